//! How containerd starts the program, finds it again, and cleans up after it.

use std::path::Path;
use std::sync::Arc;

use containerd_shim::protos::api::DeleteResponse;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{Config, ExitSignal, Flags, Shim, StartOpts, spawn};
use ebb_pod::error::{Context, Result};
use oci_spec::runtime::Spec;

use crate::pod::Pod;
use crate::service::Service;
use crate::settings::Settings;

/// The annotation by which a container says whose pod it belongs to (containerd, pkg/cri/annotations).
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// The program in the role that containerd gives it.
pub struct PodShim {
    namespace: String,
    id: String,
    exit: Arc<ExitSignal>,
}

/// The pod that the container in the bundle, which is the current folder, belongs to.
fn pod_of(id: &str) -> Result<String> {
    let path = Path::new("config.json");
    let spec = Spec::load(path).context("config.json")?;
    let annotation = spec.annotations().as_ref().and_then(|all| all.get(SANDBOX));
    Ok(annotation.cloned().unwrap_or_else(|| id.to_owned()))
}

fn other(error: &ebb_pod::error::Error) -> containerd_shim::Error {
    containerd_shim::Error::Other(error.to_string())
}

impl Shim for PodShim {
    type T = Service;

    fn new(_: &str, flags: &Flags, _: &mut Config) -> Self {
        Self {
            namespace: flags.namespace.clone(),
            id: flags.id.clone(),
            exit: Arc::default(),
        }
    }

    fn start_shim(&mut self, options: StartOpts) -> containerd_shim::Result<String> {
        let pod = pod_of(&options.id).map_err(|error| other(&error))?;
        // Where the pod's program runs already, this one finds its socket taken and ends.
        let (_, address) = spawn(options, &pod, Vec::new())?;
        std::fs::write("address", &address).map_err(|error| containerd_shim::Error::IoError {
            context: "write the address".into(),
            err: error,
        })?;
        Ok(address)
    }

    /// The program has died: so must the pod's machine.
    fn delete_shim(&mut self) -> containerd_shim::Result<DeleteResponse> {
        let settings = Settings::read().map_err(|error| other(&error))?;
        crate::machine::clean(&settings, &self.namespace, &self.id);
        Ok(DeleteResponse {
            exit_status: 128 + 9,
            exited_at: MessageField::some(std::time::SystemTime::now().into()),
            ..DeleteResponse::default()
        })
    }

    fn wait(&mut self) {
        self.exit.wait();
    }

    fn create_task_service(&self, publisher: RemotePublisher) -> Service {
        let pod = Pod::new(&self.namespace, &self.id);
        Service::new(pod, publisher, Arc::clone(&self.exit))
    }
}
