//! A client of the CRI, by which a kubelet asks for pods: what the tests of pods drive containerd with.
//!
//! Its methods fail with containerd's own words when that refuses or does not answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ebb_harness::containerd::IMAGE;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::{LONG, until};
pub use k8s_cri::v1;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatsRequest,
    ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ImageSpec, ImageStatusRequest,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    UpdateContainerResourcesRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

/// A parameter of the kernel that pods have, and its value.
pub const PARAMETER: [&str; 2] = ["net.ipv4.tcp_syn_retries", "3"];

/// The client.
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

/// A pod that runs.
pub struct Pod {
    /// What containerd calls it.
    pub id: String,
    config: PodSandboxConfig,
}

/// A container to start.
pub struct Wanted<'a> {
    /// Its name in the pod.
    pub name: &'a str,
    /// The program and its arguments.
    pub program: &'a [&'a str],
    /// The limit of its memory in bytes.
    pub limit: i64,
    /// What it gets from the host: where, what, and whether it may write there.
    pub mounts: &'a [(&'a str, PathBuf, bool)],
}

/// A container that has ended, or not yet.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// What its program exited with.
    pub code: i32,
    /// Why, in one of the CRI's words.
    pub reason: String,
}

impl Wanted<'_> {
    /// What the CRI is asked for.
    pub fn config(&self) -> ContainerConfig {
        let mounts = self.mounts.iter().map(|(to, from, writable)| Mount {
            container_path: (*to).to_owned(),
            host_path: from.display().to_string(),
            readonly: !writable,
            ..Mount::default()
        });
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: self.name.to_owned(),
                attempt: 0,
            }),
            image: Some(image()),
            command: self.program.iter().map(|it| (*it).to_owned()).collect(),
            mounts: mounts.collect(),
            log_path: format!("{}.log", self.name),
            linux: Some(LinuxContainerConfig {
                resources: Some(limited(self.limit)),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        }
    }
}

fn limited(bytes: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: bytes,
        ..LinuxContainerResources::default()
    }
}

/// Those of a pod whose containers do not see each other's processes.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..NamespaceOption::default()
    }
}

/// Waits until the CRI has heard of the image that has been imported.
fn await_image(runtime: &Runtime, channel: Channel) -> Result<()> {
    let mut images = ImageServiceClient::new(channel);
    until("the CRI knows the image", LONG, || {
        let request = ImageStatusRequest {
            image: Some(image()),
            verbose: false,
        };
        let answer = runtime.block_on(images.image_status(request));
        let answer = answer.context("the image's status")?;
        Ok(answer.into_inner().image.map(drop))
    })
}

fn image() -> ImageSpec {
    ImageSpec {
        image: IMAGE.to_owned(),
        ..ImageSpec::default()
    }
}

impl Cri {
    /// Connects to containerd.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().context("tokio")?;
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).context("the socket")?;
        let channel = runtime.block_on(endpoint.connect()).context("connect")?;
        await_image(&runtime, channel.clone())?;
        let client = RuntimeServiceClient::new(channel);
        Ok(Self { runtime, client })
    }

    /// Asks for something.
    fn ask<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Answer<T>,
    ) -> Result<T> {
        let answer = self.runtime.block_on(call(self.client.clone()));
        let answer = answer.map_err(|status| Error::new(status.message()))?;
        Ok(answer.into_inner())
    }

    /// Runs a pod whose containers may use so many bytes together, with logs in this folder.
    pub fn run_pod(&self, name: &str, limit: i64, logs: &Path) -> Result<Pod> {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(limited(limit)),
                sysctls: HashMap::from([PARAMETER.map(str::to_owned).into()]),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: "ebb".to_owned(),
        };
        let answer = self.ask(async move |mut client| client.run_pod_sandbox(request).await)?;
        Ok(Pod {
            id: answer.pod_sandbox_id,
            config,
        })
    }

    fn pod_status(&self, pod: &Pod) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let answer = self.ask(async move |mut client| client.pod_sandbox_status(request).await)?;
        answer.status.context("the pod has no status")
    }

    /// The pod's address.
    pub fn address(&self, pod: &Pod) -> Result<String> {
        let network = self.pod_status(pod)?.network;
        Ok(network.context("the pod has no network")?.ip)
    }

    /// Starts a container in a pod and returns its id.
    pub fn start(&self, pod: &Pod, wanted: &Wanted) -> Result<String> {
        self.start_config(pod, wanted.config())
    }

    /// As [`Self::start`].
    pub fn start_config(&self, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.ask(async move |mut client| client.create_container(request).await)?;
        let id = answer.container_id;
        let request = StartContainerRequest {
            container_id: id.clone(),
        };
        self.ask(async move |mut client| client.start_container(request).await)?;
        Ok(id)
    }

    /// What a program in the container says, which succeeds.
    pub fn exec(&self, id: &str, program: &[&str]) -> Result<String> {
        self.exec_within(id, program, 0)
    }

    /// As [`Self::exec`], within so many seconds; 0: there is no limit.
    pub fn exec_within(&self, id: &str, program: &[&str], seconds: i64) -> Result<String> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: program.iter().map(|word| (*word).to_owned()).collect(),
            timeout: seconds,
        };
        let answer = self.ask(async move |mut client| client.exec_sync(request).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if answer.exit_code == 0 {
            return Ok(text(&answer.stdout));
        }
        let (code, errors) = (answer.exit_code, text(&answer.stderr));
        Err(Error::new(format!("{program:?}: {code}: {errors}")))
    }

    /// The bytes of memory that a container uses.
    pub fn memory(&self, id: &str) -> Result<u64> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        let answer = self.ask(async move |mut client| client.container_stats(request).await)?;
        let memory = answer.stats.and_then(|stats| stats.memory);
        let bytes = memory.and_then(|memory| memory.working_set_bytes);
        Ok(bytes.context("no statistics of memory")?.value)
    }

    /// Sets the limit of a container's memory, in bytes.
    pub fn limit(&self, id: &str, bytes: i64) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(limited(bytes)),
            ..UpdateContainerResourcesRequest::default()
        };
        let ask = async move |mut client: RuntimeServiceClient<Channel>| {
            client.update_container_resources(request).await
        };
        self.ask(ask).map(drop)
    }

    /// Waits until a container has ended, and returns how.
    pub fn await_end(&self, id: &str) -> Result<Ended> {
        let request = || ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        until("the container has ended", LONG, || {
            let request = request();
            let answer =
                self.ask(async move |mut client| client.container_status(request).await)?;
            let status = answer.status.context("no status")?;
            let ended = Ended {
                code: status.exit_code,
                reason: status.reason,
            };
            Ok((status.state == i32::from(ContainerState::ContainerExited)).then_some(ended))
        })
    }

    /// True if a pod runs.
    pub fn is_ready(&self, pod: &Pod) -> Result<bool> {
        let status = self.pod_status(pod)?;
        Ok(status.state == i32::from(PodSandboxState::SandboxReady))
    }

    /// Stops a container, which has so many seconds to do so by itself.
    pub fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: seconds,
        };
        let ask = async move |mut client: RuntimeServiceClient<Channel>| {
            client.stop_container(request).await
        };
        self.ask(ask).map(drop)
    }

    /// Stops a container at once, and removes it.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.stop(id, 0)?;
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.ask(async move |mut client| client.remove_container(request).await)?;
        Ok(())
    }

    /// Stops a pod with everything in it, and removes it.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.ask(async move |mut client| client.stop_pod_sandbox(request).await)?;
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.ask(async move |mut client| client.remove_pod_sandbox(request).await)?;
        Ok(())
    }
}

type Answer<T> = std::result::Result<tonic::Response<T>, tonic::Status>;
