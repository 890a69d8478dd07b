//! The pods of one system.

use std::time::{Duration, Instant};

use ebb_harness::containerd::{Containerd, IMAGE};
use ebb_harness::error::Result;

use super::node::Node;

/// The case of the rows.
pub const CASE: &str = "bursts";

/// What runs the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// Guests of Ebb, as the shim starts them.
    Ebb,
    /// Debian's runc: no guests.
    Runc,
    /// The same guests without a balloon, of which nothing is taken.
    Plain,
}

/// All of them.
pub const SYSTEMS: [System; 3] = [System::Ebb, System::Runc, System::Plain];

impl System {
    /// Its name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebb => "ebb",
            Self::Runc => "runc",
            Self::Plain => "plain-guests",
        }
    }

    const fn runtime(self) -> &'static str {
        match self {
            Self::Ebb | Self::Plain => "io.containerd.ebb.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }
}

/// Pods on one node.
pub struct Fleet<'a> {
    /// The node.
    pub node: Node,
    containerd: &'a Containerd,
    system: System,
    pods: u32,
}

fn name(pod: u32) -> String {
    format!("pod{pod}")
}

impl<'a> Fleet<'a> {
    /// None yet, on a node with this limit in bytes, if it has one.
    pub fn new(containerd: &'a Containerd, system: System, limit: Option<u64>) -> Result<Self> {
        let node = Node::new(system.name(), limit)?;
        containerd.set_monitor(&node.monitor(system == System::Plain)?)?;
        Ok(Self {
            node,
            containerd,
            system,
            pods: 0,
        })
    }

    /// Starts a pod with this memory limit, and says how long it took until its program ran.
    pub fn add(&mut self, limit: u64) -> Result<Duration> {
        let name = name(self.pods);
        self.pods += 1;
        let (limit, cgroup) = (limit.to_string(), self.node.cgroup_of(&name)?);
        let start = Instant::now();
        self.containerd.done(&[
            "run",
            "--detach",
            "--runtime",
            self.system.runtime(),
            "--memory-limit",
            &limit,
            "--cgroup",
            &cgroup,
            IMAGE,
            &name,
            "sleep",
            "100000",
        ])?;
        Ok(start.elapsed())
    }

    /// Has a pod touch and free so many bytes, and says how long that took; none if it failed.
    pub fn burst(&self, pod: u32, round: u32, bytes: u64) -> Result<Option<Duration>> {
        let (name, id) = (name(pod), format!("burst{round}"));
        let block = format!("bs={bytes}");
        let start = Instant::now();
        // dd has a block in its memory.
        let ran = self.containerd.output(&[
            "tasks",
            "exec",
            "--exec-id",
            &id,
            &name,
            "dd",
            "if=/dev/zero",
            "of=/dev/null",
            &block,
            "count=1",
        ])?;
        if !ran.status.success() {
            let said = String::from_utf8_lossy(&ran.stderr);
            eprintln!("pods: {name} of {}: {}", self.system.name(), said.trim());
        }
        Ok(ran.status.success().then(|| start.elapsed()))
    }

    /// Ends all pods.
    pub fn end(self) -> Result<()> {
        for pod in 0..self.pods {
            // ctr fails where a task was killed, which is what ends it here.
            let _ = self
                .containerd
                .output(&["tasks", "delete", "--force", &name(pod)])?;
            self.containerd
                .done(&["containers", "delete", &name(pod)])?;
        }
        if self.system != System::Runc {
            self.containerd.vanished()?;
        }
        self.node.clear()
    }
}
