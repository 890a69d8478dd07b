//! A pod: one machine, and the containers in it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use containerd_shim::protos::TaskClient;
use ebb_pod::answers::{Exit, locked};
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::network::Network;
use oci_spec::runtime::{LinuxMemory, LinuxResources, Spec};

use crate::agent;
use crate::machine::{Disks, Machine, Wanted};
use crate::messages::Message;
use crate::rootfs::Root;
use crate::settings::Settings;
use crate::streams::{Carried, Paths};

/// A pod.
pub struct Pod {
    namespace: String,
    id: String,
    guest: Mutex<Option<Arc<Guest>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Those of the machine, once the first container has shown what its snapshots are.
    disks: OnceLock<Disks>,
}

/// The pod's machine and the way to the agent in it.
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// The agent's task service.
    pub agent: TaskClient,
    /// The node's settings.
    pub settings: Settings,
    /// What its interfaces are to have, until the agent knows.
    network: Mutex<Option<Network>>,
}

/// A container of the pod.
pub struct Container {
    /// Its bundle.
    pub bundle: PathBuf,
    /// The disk that has its root file system.
    pub disk: usize,
    limit: Mutex<Option<u64>>,
    /// The message that it leaves, if somebody wants one.
    pub message: OnceLock<Message>,
    paused: AtomicBool,
    /// How many of its processes the guest's kernel has killed for want of memory, as far as containerd knows.
    oom_kills: AtomicU64,
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
    /// Its end is expected.
    ends: bool,
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

/// The annotation with the sum of the limits of a pod's containers, in bytes (containerd, pkg/cri/annotations).
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The memory limit of the pod in bytes, if its first container says it.
pub fn sandbox_limit(spec: &Spec) -> Option<u64> {
    let all = spec.annotations().as_ref()?;
    let limit = all.get(SANDBOX_MEMORY)?.parse().ok()?;
    Some(limit).filter(|limit| *limit > 0)
}

impl Pod {
    /// A pod without a machine.
    pub fn new(namespace: &str, id: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            guest: Mutex::default(),
            containers: Mutex::default(),
            disks: OnceLock::new(),
        }
    }

    /// The disks that its machine has for containers such as the one with this root file system.
    pub fn disks_for(&self, root: &Root) -> Disks {
        *self.disks.get_or_init(|| Disks::of_blocks(root.is_block))
    }

    /// The namespace of containerd's that it is in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's guest, started as wanted if there is none.
    pub fn guest_for(&self, settings: &Settings, wanted: &Wanted) -> Result<Arc<Guest>> {
        let mut guest = locked(&self.guest);
        if let Some(guest) = guest.as_ref() {
            return Ok(Arc::clone(guest));
        }
        let started = Machine::start(settings, &self.namespace, &self.id, wanted);
        let (machine, network) = started?;
        let agent = agent::client(&machine).inspect_err(|_| machine.stop())?;
        let started = Arc::new(Guest::new(machine, agent, settings, network));
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
        root: &Root,
        limit: Option<u64>,
        paths: Paths,
    ) -> Result<Arc<Container>> {
        let mut containers = locked(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::new(format!("container {id} exists")));
        }
        let free = |disk: &usize| containers.values().all(|other| other.disk != *disk);
        let mut disks = self.disks_for(root).numbers(root.writable);
        if disks.is_empty() {
            return Err(Error::new(
                "a block snapshot, but the pod's first container had layers: give all of a pod's containers one snapshotter",
            ));
        }
        let most = disks.len();
        let disk = disks.find(free).context(format_args!(
            "the pod has {most} containers with such root file systems: there is no room for more"
        ))?;
        let container = Arc::new(Container {
            bundle: bundle.to_owned(),
            disk,
            limit: Mutex::new(limit),
            message: OnceLock::new(),
            paused: AtomicBool::new(false),
            oom_kills: AtomicU64::new(0),
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

    /// The pod's first container, if this one is another.
    pub fn sandbox_of(&self, id: &str) -> Option<String> {
        (id != self.id).then(|| self.id.clone())
    }

    /// True if it has no containers.
    pub fn is_empty(&self) -> bool {
        locked(&self.containers).is_empty()
    }

    /// What the pod's containers may use together, in bytes; none if one of them has no limit. The first one of several does
    /// nothing but wait.
    pub fn limit(&self) -> Option<u64> {
        let containers = locked(&self.containers);
        let counts = |id: &str| containers.len() == 1 || id != self.id;
        let counted = containers.iter().filter(|(id, _)| counts(id));
        counted.map(|(_, it)| *locked(&it.limit)).sum()
    }
}

impl Guest {
    /// A machine whose agent has answered.
    pub fn new(machine: Machine, agent: TaskClient, settings: &Settings, network: Network) -> Self {
        Self {
            machine,
            agent,
            settings: settings.clone(),
            network: Mutex::new(Some(network)),
        }
    }

    /// What its interfaces are to have, once: for the first container.
    pub fn take_network(&self) -> Option<Network> {
        locked(&self.network).take()
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

    /// Notes how many of its processes have been killed for want of memory, and returns true if these are more than before.
    pub fn note_oom_kills(&self, kills: u64) -> bool {
        self.oom_kills.fetch_max(kills, Relaxed) < kills
    }

    /// Notes another memory limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        *locked(&self.limit) = limit;
    }
}

impl Process {
    /// One that has not been started.
    pub fn new(paths: Paths) -> Arc<Self> {
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

    /// Notes that its end is expected; true the first time.
    pub fn begins_to_end(&self) -> bool {
        !std::mem::replace(&mut locked(&self.state).ends, true)
    }

    /// Waits for its end, and returns true if it came in time.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let state = locked(&self.state);
        let waited = self
            .ended
            .wait_timeout_while(state, limit, |it| it.exit.is_none());
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.exit.is_some()
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
