//! The containers of the pod.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::Mount;
use ebb_pod::answers::{Exit, locked};
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{Container, Stream};
use oci_spec::runtime::Process as Wanted;

use crate::process::Process;
use crate::reaper::Reaper;
use crate::request::Place;
use crate::{cgroup, copies, interfaces, layers};

/// Where the agent keeps what belongs to containers.
const FOLDER: &str = "/run/ebb";

/// All containers.
#[derive(Debug)]
pub struct Pod {
    containers: Mutex<HashMap<String, Arc<Running>>>,
    reaper: Arc<Reaper>,
}

/// A container that has been created.
#[derive(Debug)]
pub struct Running {
    container: Container,
    folder: PathBuf,
    /// Its cgroup.
    pub cgroup: PathBuf,
    processes: Mutex<HashMap<String, Arc<Process>>>,
}

impl Pod {
    /// One without containers.
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            containers: Mutex::default(),
            reaper,
        }
    }

    /// Makes a container, whose first process is not started yet.
    pub fn create(&self, id: &str, container: Container, rootfs: &[Mount]) -> Result<()> {
        let process = container.spec.process().clone();
        let process = process.context("config.json has no process")?;
        let mut containers = locked(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::new(format!("container {id} exists")));
        }
        if let Some(network) = &container.network {
            interfaces::set_up(network)?;
        }
        copies::make_shared(&container)?;
        let folder = Path::new(FOLDER).join(id);
        layers::mount(&folder, rootfs)?;
        let linux = container.spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let cgroup = cgroup::make(id, resources).inspect_err(|_| layers::unmount(&folder))?;
        let running = Running {
            container,
            folder,
            cgroup,
            processes: Mutex::new(HashMap::from([(String::new(), Process::new(process))])),
        };
        containers.insert(id.to_owned(), Arc::new(running));
        Ok(())
    }

    /// A container.
    pub fn container(&self, id: &str) -> Result<Arc<Running>> {
        let found = locked(&self.containers).get(id).cloned();
        found.context(format_args!("container {id:?}: not found"))
    }

    /// Starts a process and returns its number.
    pub fn start(&self, id: &str, process: &str) -> Result<u32> {
        let container = self.container(id)?;
        let task = container.task(process)?;
        let first = container.task("")?.pid();
        let place = match (process, first) {
            ("", _) => self.new_place(id, &container)?,
            (_, Some(pid)) => Place::Beside(pid),
            (_, None) => return Err(Error::new("the container has not been started")),
        };
        let file = container.folder.join(format!("request{process}"));
        let helper = task.start(&self.reaper, &container.cgroup, place, &file)?;
        let (task_, reaper) = (Arc::clone(&task), Arc::clone(&self.reaper));
        std::thread::spawn(move || task_.end(reaper.wait(helper)));
        task.pid().context("no number")
    }

    /// The place of a container's first process.
    fn new_place(&self, id: &str, container: &Running) -> Result<Place> {
        let sandbox = match &container.container.sandbox {
            Some(sandbox) => self.container(sandbox)?.task("")?.pid(),
            None => None,
        };
        Ok(Place::New {
            root: layers::root(&container.folder),
            copies: copies::folder(id),
            container: Box::new(container.container.clone()),
            sandbox,
        })
    }

    /// Takes what the host copies into a container that has not been started.
    pub fn receive(&self, id: &str, archive: impl Read) -> Result<()> {
        self.container(id)?;
        copies::receive(id, archive)
    }

    /// Forgets a process that has ended, with its container if it is that one's first.
    pub fn delete(&self, id: &str, process: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let task = container.task(process)?;
        let (pid, exit) = match (task.pid(), task.exit()) {
            (Some(pid), Some(exit)) => (pid, exit),
            (Some(_), None) => return Err(Error::new("the process has not ended")),
            (None, _) => (0, Exit::now(0)),
        };
        if process.is_empty() {
            container.remove()?;
            copies::remove(id);
            locked(&self.containers).remove(id);
        } else {
            locked(&container.processes).remove(process);
        }
        Ok((pid, exit))
    }

    /// Gives away the agent's end of a stream, once.
    pub fn take_end(&self, stream: &Stream) -> Result<File> {
        let task = self.container(&stream.container)?.task(&stream.process)?;
        let end = task.take_end(stream.end);
        end.context(format_args!(
            "{stream:?}: there is none, or it has been taken"
        ))
    }
}

impl Running {
    /// A process.
    pub fn task(&self, name: &str) -> Result<Arc<Process>> {
        let found = locked(&self.processes).get(name).cloned();
        found.context(format_args!("process {name:?}: not found"))
    }

    /// Adds a process to start later.
    pub fn exec(&self, name: &str, process: Wanted) -> Result<()> {
        let mut processes = locked(&self.processes);
        if processes.contains_key(name) {
            return Err(Error::new(format!("process {name:?} exists")));
        }
        processes.insert(name.to_owned(), Process::new(process));
        Ok(())
    }

    /// Ends what is left of it and unmounts its files.
    fn remove(&self) -> Result<()> {
        cgroup::kill(&self.cgroup)?;
        cgroup::remove_when_empty(&self.cgroup)?;
        layers::unmount(&self.folder);
        Ok(())
    }
}
