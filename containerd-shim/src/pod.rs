//! A pod: one machine, and the containers in it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use containerd_shim::protos::TaskClient;
use ebb_pod::answers::{Exit, locked};
use ebb_pod::error::{Context, Error, Result};
use oci_spec::runtime::{LinuxMemory, LinuxResources};

use crate::agent;
use crate::machine::{DISKS, Machine};
use crate::settings::Settings;
use crate::streams::{Carried, Paths};

/// A pod.
pub struct Pod {
    namespace: String,
    id: String,
    guest: Mutex<Option<Arc<Guest>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

/// The pod's machine and the way to the agent in it.
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// The agent's task service.
    pub agent: TaskClient,
    /// The node's settings.
    pub settings: Settings,
}

/// A container of the pod.
pub struct Container {
    /// Its bundle.
    pub bundle: PathBuf,
    /// The disk that has its root file system.
    pub disk: usize,
    limit: Mutex<Option<u64>>,
    paused: AtomicBool,
    processes: Mutex<HashMap<String, Arc<Process>>>,
}

/// A process of a container; the first has an empty name.
pub struct Process {
    /// Its FIFOs.
    pub paths: Paths,
    /// Its streams, once it has been started.
    pub streams: Arc<Carried>,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    started: bool,
    exit: Option<Exit>,
}

/// How far a process is.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// It has not been started.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Ended(Exit),
}

/// The memory limit in bytes, if there is one.
pub fn memory_limit(resources: Option<&LinuxResources>) -> Option<u64> {
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let limit = memory.and_then(LinuxMemory::limit)?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

impl Pod {
    /// A pod without a machine.
    pub fn new(namespace: &str, id: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            guest: Mutex::default(),
            containers: Mutex::default(),
        }
    }

    /// The namespace of containerd's that it is in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's guest, started with memory for `limit` if there is none.
    pub fn guest_for(&self, settings: &Settings, limit: Option<u64>) -> Result<Arc<Guest>> {
        let mut guest = locked(&self.guest);
        if let Some(guest) = guest.as_ref() {
            return Ok(Arc::clone(guest));
        }
        let machine = Machine::start(settings, &self.namespace, &self.id, limit)?;
        let agent = agent::client(&machine).inspect_err(|_| machine.stop())?;
        let started = Arc::new(Guest {
            machine,
            agent,
            settings: settings.clone(),
        });
        *guest = Some(Arc::clone(&started));
        Ok(started)
    }

    /// The pod's guest.
    pub fn guest(&self) -> Result<Arc<Guest>> {
        locked(&self.guest)
            .clone()
            .context("the pod has no machine")
    }

    /// Adds a container, and chooses the disk for its root file system.
    pub fn add(
        &self,
        id: &str,
        bundle: &Path,
        limit: Option<u64>,
        paths: Paths,
    ) -> Result<Arc<Container>> {
        let mut containers = locked(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::new(format!("container {id} exists")));
        }
        let free = |disk: &usize| containers.values().all(|other| other.disk != *disk);
        let disk = (0..DISKS).find(free);
        let disk = disk.context(format_args!(
            "the pod has {DISKS} containers: there is no room for more"
        ))?;
        let container = Arc::new(Container {
            bundle: bundle.to_owned(),
            disk,
            limit: Mutex::new(limit),
            paused: AtomicBool::new(false),
            processes: Mutex::new(HashMap::from([(String::new(), Process::new(paths))])),
        });
        containers.insert(id.to_owned(), Arc::clone(&container));
        Ok(container)
    }

    /// A container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = locked(&self.containers).get(id).cloned();
        found.context(format_args!("container {id}: not found"))
    }

    /// A process.
    pub fn process(&self, id: &str, name: &str) -> Result<Arc<Process>> {
        self.container(id)?.process(name)
    }

    /// Forgets a container. The machine ends with the last one.
    pub fn remove(&self, id: &str) {
        let mut containers = locked(&self.containers);
        containers.remove(id);
        let last = containers.is_empty();
        drop(containers);
        if last && let Some(guest) = locked(&self.guest).take() {
            guest.machine.stop();
        }
    }

    /// True if it has no containers.
    pub fn is_empty(&self) -> bool {
        locked(&self.containers).is_empty()
    }

    /// What the pod's containers may use together, in bytes; none if one of them has no limit.
    pub fn limit(&self) -> Option<u64> {
        let containers = locked(&self.containers);
        containers.values().map(|it| *locked(&it.limit)).sum()
    }
}

impl Container {
    /// A process of it.
    pub fn process(&self, name: &str) -> Result<Arc<Process>> {
        let found = locked(&self.processes).get(name).cloned();
        found.context(format_args!("process {name:?}: not found"))
    }

    /// Adds a process that is to be started later.
    pub fn add(&self, name: &str, paths: Paths) {
        locked(&self.processes).insert(name.to_owned(), Process::new(paths));
    }

    /// Forgets a process.
    pub fn forget(&self, name: &str) {
        locked(&self.processes).remove(name);
    }

    /// Notes that none of its processes runs, or that they do.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Relaxed);
    }

    /// True if none of its processes runs.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Relaxed)
    }

    /// Notes another memory limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        *locked(&self.limit) = limit;
    }
}

impl Process {
    fn new(paths: Paths) -> Arc<Self> {
        Arc::new(Self {
            paths,
            streams: Arc::default(),
            state: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let state = locked(&self.state);
        match (state.started, state.exit) {
            (false, None) => Progress::Created,
            (true, None) => Progress::Running,
            (_, Some(exit)) => Progress::Ended(exit),
        }
    }

    /// Notes that it runs.
    pub fn started(&self) {
        locked(&self.state).started = true;
    }

    /// Notes how it ended.
    pub fn ended(&self, exit: Exit) {
        locked(&self.state).exit = Some(exit);
        self.ended.notify_all();
    }

    /// Waits for its end.
    pub fn wait(&self) -> Exit {
        let mut state = locked(&self.state);
        loop {
            if let Some(exit) = state.exit {
                return exit;
            }
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
