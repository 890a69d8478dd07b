//! Watches the memory pressure of the host and of the monitor's cgroup.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::peers::{Notice, Peers};
use super::{Limit, Others, Room, Sample};
use crate::sys::cgroup::Level;
use crate::sys::pressure::HOST_PRESSURE;
use crate::sys::{Cgroup, KeptFile, MemInfo, PsiTrigger};

/// Stall time that counts as pressure within a window, both in microseconds. The first pair needs `CAP_SYS_RESOURCE`; the
/// second one has the shortest window that does not.
const STALLS: [(u32, u32); 2] = [(50_000, 500_000), (150_000, 2_000_000)];

/// After the event of a limit such events are not looked at for this time: a cgroup that uses its limit for cached files
/// reaches it all the time.
const EVENT_PAUSE: Duration = Duration::from_millis(50);

/// The sources of memory pressure: PSI triggers of the monitor's own cgroup and of the whole host; the events of the limits
/// of that cgroup and of those above it (version 2); and at times the available memory of the host and of these cgroups. The
/// latter is all there is if the kernel has neither. It also shows that a host without swap, or a cgroup, runs short before
/// anything stalls.
#[derive(Debug)]
pub struct PressureSource {
    /// The trigger of the whole host.
    host: Option<PsiTrigger>,
    /// That of the own cgroup.
    own: Option<PsiTrigger>,
    /// What [`PressureSource::is_reported`] has heard of them, and the next wait must know: the kernel tells it once.
    heard: AtomicU8,
    cgroup: Option<Cgroup>,
    meminfo: KeptFile,
    peers: Peers,
    start: Instant,
    /// From when on the events of limits are looked at.
    events_from: Instant,
    /// How often the event of a limit has ended a wait, and nobody knows yet.
    limit_events: u64,
    /// The cgroup that [`Sample::above`] is about.
    above: Option<u64>,
}

/// Bits of [`PressureSource::heard`].
const STALL: u8 = 1;
const OWN_STALL: u8 = 2;

/// What a look at the descriptors has shown.
#[derive(Clone, Copy, Debug)]
struct Look {
    stop: PollFlags,
    host: PollFlags,
    own: PollFlags,
    /// The files with events of limits, all together.
    limits: PollFlags,
}

impl Look {
    /// What the triggers say, as bits of [`PressureSource::heard`].
    fn stalls(&self) -> u8 {
        let fired = |events: PollFlags| events.contains(PollFlags::PRI) && !is_dead(events);
        let own = if fired(self.own) {
            STALL | OWN_STALL
        } else {
            0
        };
        own | if fired(self.host) { STALL } else { 0 }
    }
}

/// The trigger of a removed cgroup polls `POLLERR` for ever.
const fn is_dead(events: PollFlags) -> bool {
    events.contains(PollFlags::ERR)
}

impl PressureSource {
    /// Watches all sources that this host has.
    #[must_use]
    pub fn open() -> Self {
        let mut source = Self::watermark_only();
        source.enter(Cgroup::own());
        source.host = arm(Path::new(HOST_PRESSURE));
        source
    }

    /// Watches only the available memory of the host, as on a host without PSI.
    #[must_use]
    pub fn watermark_only() -> Self {
        Self::watching(Path::new(MemInfo::PATH))
    }

    /// Watches only the available memory that `meminfo` tells, a file like /proc/meminfo.
    #[must_use]
    pub fn watching(meminfo: &Path) -> Self {
        let start = Instant::now();
        Self {
            host: None,
            own: None,
            heard: AtomicU8::new(0),
            cgroup: None,
            meminfo: KeptFile::open(meminfo),
            peers: Peers::default(),
            start,
            events_from: start,
            limit_events: 0,
            above: None,
        }
    }

    /// Answers together with other monitors.
    #[must_use]
    pub fn with_peers(self, peers: Peers) -> Self {
        Self { peers, ..self }
    }

    /// Returns true if the kernel reports stalls.
    #[must_use]
    pub fn has_psi(&self) -> bool {
        self.host.is_some() || self.own.is_some()
    }

    /// How often the kernel has ended a wait by saying that a limit was reached, since this was last asked.
    pub(super) const fn take_limit_events(&mut self) -> u64 {
        std::mem::replace(&mut self.limit_events, 0)
    }

    /// Watches `cgroup` as the own one.
    fn enter(&mut self, cgroup: Cgroup) {
        self.own = cgroup.pressure_file().and_then(arm);
        self.cgroup = Some(cgroup);
    }

    /// Waits for about `pause`, or until the kernel reports a stall or that a limit was reached, and takes a sample. `None` if
    /// `stop` is readable.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait(&mut self, stop: BorrowedFd<'_>, pause: Duration) -> io::Result<Option<Sample>> {
        let until = Instant::now() + spread(pause, RandomState::new().hash_one(0));
        let stalls = loop {
            let now = Instant::now();
            let heard = self.heard.swap(0, Relaxed);
            let timeout = if heard == 0 {
                self.timeout(now, until)
            } else {
                Duration::ZERO
            };
            let look = self.look(Some(stop), now, timeout)?;
            if !look.stop.is_empty() {
                return Ok(None);
            }
            self.own.take_if(|_| is_dead(look.own));
            self.host.take_if(|_| is_dead(look.host));
            let (stalls, now) = (heard | look.stalls(), Instant::now());
            if self.limit_reached(now) || stalls != 0 || now >= until {
                break stalls;
            }
        };
        let moved = |cgroup: &Cgroup| !cgroup.is_current();
        if self.cgroup.as_ref().is_some_and(moved) {
            self.enter(Cgroup::own());
        }
        Ok(Some(self.sample(stalls & OWN_STALL != 0)))
    }

    /// Returns true if the kernel has reported something that the next wait will return at once for.
    pub(super) fn is_reported(&self) -> bool {
        let Ok(look) = self.look(None, Instant::now(), Duration::ZERO) else {
            return false;
        };
        let heard = self.heard.fetch_or(look.stalls(), Relaxed) | look.stalls();
        heard != 0 || look.limits.contains(PollFlags::PRI)
    }

    /// Time to the next look: at `until`, or when the events of limits count again.
    fn timeout(&self, now: Instant, until: Instant) -> Duration {
        let end = if now < self.events_from {
            until.min(self.events_from)
        } else {
            until
        };
        end.saturating_duration_since(now)
    }

    /// Looks at `stop` and at what the kernel reports, for as long as `timeout` if there is nothing.
    fn look<'a>(
        &'a self,
        stop: Option<BorrowedFd<'a>>,
        now: Instant,
        timeout: Duration,
    ) -> io::Result<Look> {
        let mut fds = Vec::new();
        let mut watch = |fd: Option<BorrowedFd<'a>>, events| {
            fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd, events)));
            fds.len()
        };
        let first = watch(stop, PollFlags::IN);
        let second = watch(self.host.as_ref().map(AsFd::as_fd), PollFlags::PRI);
        let third = watch(self.own.as_ref().map(AsFd::as_fd), PollFlags::PRI);
        let levels = self.cgroup.iter().flat_map(Cgroup::levels);
        let quiet = now < self.events_from;
        for file in levels.filter_map(Level::events).filter(|_| !quiet) {
            watch(Some(file), PollFlags::PRI);
        }
        match poll(&mut fds, Timespec::try_from(timeout).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = |from: usize, to: usize| {
            let events = fds[from..to].iter().map(PollFd::revents);
            events.fold(PollFlags::empty(), PollFlags::union)
        };
        Ok(Look {
            stop: events(0, first),
            host: events(first, second),
            own: events(second, third),
            limits: events(third, fds.len()),
        })
    }

    /// Returns true if a limit was reached until `now` since the last look, unless that was a moment ago.
    fn limit_reached(&mut self, now: Instant) -> bool {
        if now < self.events_from {
            return false;
        }
        let reached = self.cgroup.as_mut().map_or(0, Cgroup::take_events) > 0;
        if reached {
            self.limit_events += 1;
            self.events_from = now + EVENT_PAUSE;
        }
        reached
    }

    fn sample(&mut self, stalled: bool) -> Sample {
        let memory = self.meminfo.read(MemInfo::parse);
        let host = memory.map_or(Room::default(), |memory| Room {
            total: memory.total,
            available: memory.available,
        });
        let levels = self.cgroup.as_ref().map_or(&[][..], Cgroup::levels);
        let room = |level: &Level| {
            let limit = level.limit()?;
            Some(Room {
                total: limit.limit,
                available: limit.available,
            })
        };
        let own = levels.first().and_then(room).unwrap_or_default();
        let above = levels.iter().skip(1);
        let above = above.filter_map(|level| Some((level.id(), room(level)?)));
        let tightest = above.max_by_key(|(_, room)| room.shortage());
        self.above = tightest.map(|(id, _)| id);
        let limit = |room| Limit {
            room,
            ..Limit::default()
        };
        Sample {
            at: self.start.elapsed(),
            stalled,
            host: limit(host),
            own: limit(own),
            above: limit(tightest.unwrap_or_default().1),
            ..Sample::default()
        }
    }

    /// Tells the other monitors what `sample` says of this one. If memory is short, fills in what they have told.
    #[must_use]
    pub fn shared(&mut self, sample: Sample) -> Sample {
        let levels = self.cgroup.as_ref().map_or(&[][..], Cgroup::levels);
        let own = levels.first().map(Level::id);
        self.peers.tell(&Notice {
            lazy: sample.all(),
            given: sample.given,
            cgroups: Notice::cgroups(levels.iter().map(Level::id)),
        });
        if sample.is_calm() {
            return sample;
        }
        let mut told = [Others::default(); 3];
        let total = sample.host.room.total;
        self.peers.ask(|before, notice| {
            notice.add_to(&mut told[0], before, total, None);
            // Without a cgroup there is no limit, and nobody shares it.
            for (others, cgroup) in told[1..].iter_mut().zip([own, self.above]) {
                if cgroup.is_some() {
                    notice.add_to(others, before, total, cgroup);
                }
            }
        });
        let with = |limit: Limit, others| Limit { others, ..limit };
        Sample {
            host: with(sample.host, told[0]),
            own: with(sample.own, told[1]),
            above: with(sample.above, told[2]),
            ..sample
        }
    }
}

/// Arms a trigger, as sensitive as this process may.
fn arm(file: &Path) -> Option<PsiTrigger> {
    let mut result = Err(io::ErrorKind::Unsupported.into());
    for (stall, window) in STALLS {
        result = result.or_else(|_| PsiTrigger::arm(file, stall, window));
    }
    let log = |error: &io::Error| {
        tracing::debug!(file = %file.display(), %error, "no memory pressure trigger");
    };
    result.inspect_err(log).ok()
}

/// Three to five quarters of `pause`, as `random` says: so monitors that started together do not all answer at once.
fn spread(pause: Duration, random: u64) -> Duration {
    let part = u32::try_from(random % 1024).unwrap_or(0);
    pause * 3 / 4 + pause / 2048 * part
}

#[cfg(test)]
mod tests;
