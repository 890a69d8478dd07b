//! Watches the host's memory pressure.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Room, Sample};
use crate::sys::pressure::HOST_PRESSURE;
use crate::sys::{Cgroup, KeptFile, MemInfo, PsiTrigger};

/// Stall that counts as pressure, in microseconds within [`WINDOW_US`].
const STALL_US: u32 = 150_000;

/// Window of the trigger in microseconds: the shortest that needs no `CAP_SYS_RESOURCE`.
const WINDOW_US: u32 = 2_000_000;

/// Time between two samples when nothing happens.
const INTERVAL: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Where pressure comes from: PSI triggers of the monitor's own cgroup (v2 with a memory controller: its
/// limits are felt there) and of the whole host, and once a second the available memory of the host and what the limits
/// of the own cgroup and of those above it leave. These alone where the kernel has no PSI; they also see a host without
/// swap, or a cgroup, run short before anything stalls.
#[derive(Debug)]
pub struct PressureSource {
    triggers: Vec<PsiTrigger>,
    cgroup: Option<Cgroup>,
    meminfo: KeptFile,
    interval: Timespec,
}

impl PressureSource {
    /// Arms what there is.
    #[must_use]
    pub fn open() -> Self {
        let cgroup = Cgroup::own();
        let own = cgroup.as_ref().map(Cgroup::pressure_file);
        let files = own.into_iter().chain([HOST_PRESSURE.into()]);
        let arm = |file: &Path| PsiTrigger::arm(file, STALL_US, WINDOW_US);
        let triggers = files.filter_map(|file| match arm(&file) {
            Ok(trigger) => Some(trigger),
            Err(error) => {
                tracing::debug!(file = %file.display(), %error, "no memory pressure trigger");
                None
            }
        });
        Self {
            triggers: triggers.collect(),
            cgroup,
            ..Self::watermark_only()
        }
    }

    /// Only the available memory, as on a host without PSI.
    #[must_use]
    pub fn watermark_only() -> Self {
        Self {
            triggers: Vec::new(),
            cgroup: None,
            meminfo: KeptFile::open(Path::new(MemInfo::PATH)),
            interval: INTERVAL,
        }
    }

    /// Only the available memory, and that each `interval`: for those who reclaim anyway.
    #[must_use]
    pub fn every(interval: Duration) -> Self {
        Self {
            interval: Timespec::try_from(interval).unwrap_or(INTERVAL),
            ..Self::watermark_only()
        }
    }

    /// Whether the kernel reports stalls.
    #[must_use]
    pub fn has_psi(&self) -> bool {
        !self.triggers.is_empty()
    }

    /// What is left of the tightest limit.
    fn cgroup_room(&self) -> Room {
        let limits = self.cgroup.iter().flat_map(Cgroup::limits);
        Room::tightest(limits.map(|limit| Room {
            total: limit.limit,
            available: limit.available,
        }))
    }

    /// Waits for a report, or for the interval, and takes a sample of the host. `None` when `stop` is
    /// readable.
    ///
    /// # Errors
    /// poll(2)'s.
    pub fn wait(&mut self, stop: BorrowedFd<'_>) -> io::Result<Option<Sample>> {
        let triggers = self.triggers.iter();
        let mut fds: Vec<_> = [PollFd::from_borrowed_fd(stop, PollFlags::IN)]
            .into_iter()
            .chain(triggers.map(|trigger| PollFd::new(trigger, PollFlags::PRI)))
            .collect();
        match poll(&mut fds, Some(&self.interval)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events: Vec<_> = fds.iter().map(PollFd::revents).collect();
        if !events[0].is_empty() {
            return Ok(None);
        }
        let dead = |events: &PollFlags| events.contains(PollFlags::ERR);
        let stall = |events: &PollFlags| events.contains(PollFlags::PRI) && !dead(events);
        let stalled = events[1..].iter().any(stall);
        // The trigger of a cgroup that was removed reports an error for ever.
        let mut events = events[1..].iter();
        self.triggers.retain(|_| !events.next().is_some_and(dead));
        let memory = self.meminfo.read(MemInfo::parse);
        Ok(Some(Sample {
            stalled,
            available: memory.map_or(0, |memory| memory.available),
            total: memory.map_or(0, |memory| memory.total),
            cgroup: self.cgroup_room(),
            ..Sample::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_sample_has_the_memory_of_the_host_and_stop_ends_the_wait() {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut source = PressureSource::watermark_only();
        let sample = source.wait(stop.as_fd()).unwrap().unwrap();
        assert!(!sample.stalled && sample.available > 0 && sample.available <= sample.total);
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(PressureSource::open().wait(stop.as_fd()).unwrap(), None);
    }

    #[test]
    fn psi_is_used_where_the_kernel_has_it() {
        let armed = PsiTrigger::arm(Path::new(HOST_PRESSURE), STALL_US, WINDOW_US);
        let source = PressureSource::open();
        assert!(armed.is_err() || source.has_psi());
        println!("PSI: {}", source.has_psi());
    }
}
