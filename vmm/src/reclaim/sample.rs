//! Watches the memory pressure of the host and of the monitor's cgroup.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Room, Sample};
use crate::sys::pressure::HOST_PRESSURE;
use crate::sys::{Cgroup, KeptFile, MemInfo, PsiTrigger};

/// Stall time that counts as pressure, in microseconds within [`WINDOW_US`].
const STALL_US: u32 = 150_000;

/// Window of the triggers in microseconds: the shortest one that needs no `CAP_SYS_RESOURCE`.
const WINDOW_US: u32 = 2_000_000;

/// Time between two samples if no trigger fires.
const INTERVAL: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The sources of memory pressure: PSI triggers of the monitor's own cgroup (v2 with a memory controller) and of the whole
/// host; and, each second, the available memory of the host and of the cgroup with its ancestors. The latter are all there
/// is if the kernel has no PSI. They also show that a host without swap, or a cgroup, runs short before anything stalls.
#[derive(Debug)]
pub struct PressureSource {
    triggers: Vec<PsiTrigger>,
    cgroup: Option<Cgroup>,
    meminfo: KeptFile,
    interval: Timespec,
}

impl PressureSource {
    /// Watches all sources that this host has.
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

    /// Watches only the available memory of the host, as on a host without PSI.
    #[must_use]
    pub fn watermark_only() -> Self {
        Self {
            triggers: Vec::new(),
            cgroup: None,
            meminfo: KeptFile::open(Path::new(MemInfo::PATH)),
            interval: INTERVAL,
        }
    }

    /// Watches only the available memory of the host, each `interval`: for modes that reclaim anyway.
    #[must_use]
    pub fn every(interval: Duration) -> Self {
        Self {
            interval: Timespec::try_from(interval).unwrap_or(INTERVAL),
            ..Self::watermark_only()
        }
    }

    /// Returns true if the kernel reports stalls.
    #[must_use]
    pub fn has_psi(&self) -> bool {
        !self.triggers.is_empty()
    }

    /// The tightest limit of the cgroup and its ancestors.
    fn cgroup_room(&self) -> Room {
        let limits = self.cgroup.iter().flat_map(Cgroup::limits);
        Room::tightest(limits.map(|limit| Room {
            total: limit.limit,
            available: limit.available,
        }))
    }

    /// Waits until a trigger fires, at most for the interval, and takes a sample. `None` if `stop` is readable.
    ///
    /// # Errors
    /// Those of poll(2).
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
        // The trigger of a removed cgroup polls `POLLERR` for ever.
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
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::net::{SendFlags, send};

    use super::*;

    fn with_triggers(triggers: Vec<PsiTrigger>) -> PressureSource {
        PressureSource {
            triggers,
            ..PressureSource::every(Duration::from_secs(20))
        }
    }

    /// Two ends of a connection. The second one polls `POLLPRI` after the first one has sent urgent data.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sender, listener.accept().unwrap().0)
    }

    #[test]
    fn a_trigger_that_fires_is_a_stall() {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (quiet, (sender, receiver)) = (connection(), connection());
        let triggers = [quiet.1, receiver].map(|end| PsiTrigger::from_file(end.into()));
        let mut source = with_triggers(triggers.into());
        send(&sender, &[1], SendFlags::OOB).unwrap();
        let start = Instant::now();
        let sample = source.wait(stop.as_fd()).unwrap().unwrap();
        assert!(sample.stalled && source.triggers.len() == 2);
        assert!(start.elapsed() < Duration::from_secs(10), "not at once");
    }

    #[test]
    fn a_trigger_that_fails_is_no_stall_and_is_given_up() {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let quiet = connection();
        let triggers = [writer, quiet.1.into()].map(PsiTrigger::from_file);
        let mut source = with_triggers(triggers.into());
        let sample = source.wait(stop.as_fd()).unwrap().unwrap();
        assert!(!sample.stalled && source.has_psi());
        assert_eq!(source.triggers.len(), 1);
    }

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
