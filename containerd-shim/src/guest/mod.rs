//! What the guest's agent is asked. Whoever has the guest can have the agent say anything, and nothing: what it says about a
//! process is believed, but it decides neither whether a process ends that is to be killed, nor what the host keeps of a container.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim::protos::api::{
    DeleteRequest, KillRequest, StatsRequest, StatsResponse, WaitRequest,
};
use containerd_shim::protos::cgroups_v2::metrics::Metrics;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::ttrpc::context::{Context as Call, with_duration};
use ebb_pod::METRICS_TYPE;
use ebb_pod::answers::Exit;
use ebb_pod::error::{Context, Error, Result};

use crate::pod::{Guest, Process};

/// How long the agent may take for an answer, and a process for its end after SIGKILL.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

/// How long it may take for what a process's end waits for.
const SHORT_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// How long a machine may take to end that has closed the connection to its agent.
const ENDING: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The number of the signal that no process survives.
pub const SIGKILL: u32 = 9;

/// The exit status of a process that it has ended.
pub const KILLED: u32 = 128 + SIGKILL;

/// Bytes of a page (x86-64).
const PAGE: u64 = 4096;

/// What is kept of a sentence of the agent's, in characters.
const SENTENCE: usize = 500;

/// A call of the agent, which has to answer in time.
pub fn call() -> Call {
    with_duration(PATIENCE)
}

/// What the agent says: one line, which is not long, as it goes to containerd's log.
pub fn told(error: ttrpc::Error) -> Error {
    Error::new(match error {
        ttrpc::Error::RpcStatus(status) => one_line(&status.message),
        other => format!("the guest's agent: {}", one_line(&other.to_string())),
    })
}

/// The beginning of what a guest says, without what could look like another line of a log.
pub fn one_line(text: &str) -> String {
    let plain = |it: char| if it.is_control() { ' ' } else { it };
    text.chars().take(SENTENCE).map(plain).collect()
}

impl Guest {
    /// Sends a signal. What SIGKILL does not end, ends with the machine.
    pub fn kill(self: &Arc<Self>, process: &Arc<Process>, request: &KillRequest) -> Result<()> {
        let done = self.agent.kill(call(), request);
        if request.signal == SIGKILL {
            if !matches!(done, Ok(_) | Err(ttrpc::Error::RpcStatus(_))) {
                self.give_up("kill: no answer");
                return Ok(());
            }
            self.expect_end(process);
        }
        done.map(drop).map_err(told)
    }

    /// Ends the machine if this process has not ended in time.
    fn expect_end(self: &Arc<Self>, process: &Arc<Process>) {
        // One thread is enough, however often it is killed.
        if process.begins_to_end() {
            let (guest, process) = (Arc::clone(self), Arc::clone(process));
            std::thread::spawn(move || {
                if !process.ends_within(PATIENCE) {
                    guest.give_up("a process does not end by SIGKILL");
                }
            });
        }
    }

    /// Waits for the end of a process.
    pub fn wait(&self, request: &WaitRequest) -> Exit {
        match self.agent.wait(Call::default(), request) {
            // The guest may have any time, and say any.
            Ok(answer) => Exit::now(answer.exit_status),
            Err(ttrpc::Error::RpcStatus(_)) => Exit::now(KILLED),
            Err(_) => {
                if !self.machine.ends_within(ENDING) {
                    self.give_up("the agent's connection is closed");
                }
                // With the machine all its processes are gone.
                Exit::now(KILLED)
            }
        }
    }

    /// Has the agent forget a process that has ended, or a container.
    pub fn delete(&self, request: &DeleteRequest) {
        if self.machine.has_ended() {
            return;
        }
        match self.agent.delete(call(), request) {
            Ok(_) => {}
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
            Err(error) => self.give_up(&format!("delete: {}", told(error))),
        }
    }

    /// What a container uses, and as `pglazyfree` the pages that are free in its guest and that the host still holds: memory that it
    /// can have when it needs it. All containers of a pod have that number, for the guest is theirs together.
    pub fn stats(&self, request: &StatsRequest) -> Result<StatsResponse> {
        let mut answer = self.agent.stats(call(), request).map_err(told)?;
        if answer.stats.type_url != METRICS_TYPE {
            return Err(Error::new("the guest's agent: these are no metrics"));
        }
        let metrics = Metrics::parse_from_bytes(&answer.stats.value);
        let mut metrics = metrics.context("the guest's agent: metrics")?;
        let free = self.machine.free_bytes().unwrap_or_default();
        metrics.memory.mut_or_insert_default().pglazyfree = free / PAGE;
        let value = metrics.write_to_bytes().context("metrics")?;
        answer.stats.mut_or_insert_default().value = value;
        Ok(answer)
    }

    /// How many processes of a container the guest's kernel has killed for want of memory, if the agent says so in time.
    pub fn oom_kills(&self, id: &str) -> Option<u64> {
        let wanted = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        // The machine may have ended.
        let answer = self.agent.stats(with_duration(SHORT_PATIENCE), &wanted);
        let metrics = Metrics::parse_from_bytes(&answer.ok()?.stats.value).ok()?;
        Some(metrics.memory_events.oom_kill)
    }

    fn give_up(&self, why: &str) {
        containerd_shim::warn!("{why}: the machine is ended");
        self.machine.stop();
    }
}

#[cfg(test)]
mod tests;
