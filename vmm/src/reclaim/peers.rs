//! What the monitors of one host tell each other, so that they answer a need of the host together and not each for itself.
//!
//! There is no daemon: each monitor writes what it could give back into a record of a shared file, [`SlotFile`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::Others;
use crate::sys::SlotFile;
use crate::sys::slots::RECORD;

/// What is written into no record by chance; the last digit is the version.
const MAGIC: u64 = u64::from_le_bytes(*b"ebbpeer1");

/// A record that has not been written for so long is that of a monitor that hangs or has ended.
const STALE: Duration = Duration::from_secs(5);

/// Cgroups of a monitor that are told: its own and those next above it.
const MAX_CGROUPS: usize = 8;

/// What one monitor tells the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Notice {
    /// Lazily freed bytes that it could give back.
    pub lazy: u64,
    /// Bytes that it has given back under pressure since it started.
    pub given: u64,
    /// Its cgroup and those above that control memory, by their numbers; 0: no more.
    pub cgroups: [u64; MAX_CGROUPS],
}

impl Notice {
    /// The cgroups of a monitor, its own first.
    pub fn cgroups(ids: impl Iterator<Item = u64>) -> [u64; MAX_CGROUPS] {
        let mut cgroups = [0; MAX_CGROUPS];
        cgroups.iter_mut().zip(ids).for_each(|(to, id)| *to = id);
        cgroups
    }

    /// Adds this to `others` within a limit of `total` bytes, if that is a limit of the host (`None`), or of a cgroup that
    /// this monitor is in or below. What it says counts for that much at most.
    pub fn add_to(&self, others: &mut Others, before: bool, total: u64, cgroup: Option<u64>) {
        if cgroup.is_none_or(|id| self.cgroups.contains(&id)) {
            let side = if before {
                &mut others.before
            } else {
                &mut others.after
            };
            *side = side.saturating_add(self.lazy.min(total));
            others.given = others.given.saturating_add(self.given);
        }
    }

    fn encode(&self, now: Duration) -> [u8; RECORD] {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let head = [MAGIC, now, self.lazy, self.given];
        let words = head.into_iter().chain(self.cgroups);
        let mut record = [0; RECORD];
        let (slots, _) = record.as_chunks_mut::<8>();
        slots
            .iter_mut()
            .zip(words)
            .for_each(|(slot, word)| *slot = word.to_le_bytes());
        let sum = checksum(&record);
        record[RECORD - 8..].copy_from_slice(&sum.to_le_bytes());
        record
    }

    /// Reads a record, which anything may have been written to. `None` if it is no notice, or not a fresh one.
    fn decode(record: &[u8; RECORD], now: Duration) -> Option<Self> {
        let words = record.as_chunks::<8>().0;
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_le_bytes(*word));
        let at = Duration::from_nanos(word(1));
        // Another monitor may have looked at the clock a moment later.
        let fresh = now.saturating_sub(at) < STALE && at.saturating_sub(now) < STALE;
        let whole = word(0) == MAGIC && word(RECORD / 8 - 1) == checksum(record);
        (whole && fresh).then(|| Self {
            lazy: word(2),
            given: word(3),
            cgroups: std::array::from_fn(|index| word(4 + index)),
        })
    }
}

/// FNV-1a over all but the last word: tells a record that was read while it was written.
fn checksum(record: &[u8; RECORD]) -> u64 {
    let bytes = record[..RECORD - 8].iter();
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The other monitors on this host.
#[derive(Debug, Default)]
pub struct Peers(Option<SlotFile>);

impl Peers {
    /// Joins the monitors of this host, in `/run/ebb/peers`, or else those of this user, in `$XDG_RUNTIME_DIR/ebb/peers`. If
    /// neither can be used, a message in the log says so, and this monitor answers as if it were alone.
    #[must_use]
    pub fn join() -> Self {
        let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let folders = [Some("/run".into()), own].into_iter().flatten();
        for folder in folders {
            let path = folder.join("ebb/peers");
            match SlotFile::claim(&path) {
                Ok(file) => return Self(Some(file)),
                Err(error) => {
                    tracing::debug!(file = %path.display(), %error, "not shared with other monitors");
                }
            }
        }
        tracing::info!("no file to share with other monitors: this one answers for the whole host");
        Self(None)
    }

    /// Joins the monitors that share `path`.
    ///
    /// # Errors
    /// Those of [`SlotFile::claim`].
    pub fn at(path: &Path) -> io::Result<Self> {
        SlotFile::claim(path).map(|file| Self(Some(file)))
    }

    /// Tells the others.
    pub(super) fn tell(&mut self, notice: &Notice) {
        let Some(file) = &self.0 else { return };
        if let Err(error) = file.write(&notice.encode(now())) {
            tracing::info!(%error, "other monitors are told nothing any more");
            self.0 = None;
        }
    }

    /// Calls `each` for what another monitor has told lately, with whether that comes before this one.
    pub(super) fn ask(&self, mut each: impl FnMut(bool, &Notice)) {
        let Some(file) = &self.0 else { return };
        let (now, own) = (now(), file.slot());
        let read = file.read(|slot, record| {
            if slot != own
                && let Some(notice) = Notice::decode(record, now)
            {
                each(slot < own, &notice);
            }
        });
        if let Err(error) = read {
            tracing::debug!(%error, "other monitors are not heard");
        }
    }
}

/// The time that all processes of a host share.
fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTICE: Notice = Notice {
        lazy: 5,
        given: 6,
        cgroups: [7, 8, 9, 10, 11, 12, 13, 14],
    };

    #[test]
    fn a_notice_is_read_as_it_was_written_while_it_is_fresh() {
        let second = Duration::from_secs;
        let record = NOTICE.encode(second(100));
        let at = |now| Notice::decode(&record, now);
        for now in [100, 96, 104] {
            assert_eq!(at(second(now)), Some(NOTICE));
        }
        for now in [0, 95, 105, u64::MAX] {
            assert_eq!(at(second(now)), None, "{now}");
        }
        let earlier = super::now();
        assert!(earlier > Duration::ZERO && super::now() >= earlier);
    }

    #[test]
    fn what_is_no_notice_is_not_read() {
        let now = Duration::from_secs(1);
        let record = NOTICE.encode(now);
        for bit in 0..RECORD * 8 {
            let mut other = record;
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Notice::decode(&other, now), None, "{bit}");
        }
        for garbage in [[0; RECORD], [0xff; RECORD]] {
            assert_eq!(Notice::decode(&garbage, now), None);
        }
        // Whole, and of another version.
        let mut other = record;
        other[7] += 1;
        let sum = checksum(&other).to_le_bytes();
        other[RECORD - 8..].copy_from_slice(&sum);
        assert_eq!(Notice::decode(&other, now), None);
    }

    #[test]
    fn each_counts_those_before_and_after_within_the_limit() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("peers");
        let mut peers: Vec<_> = (0..4).map(|_| Peers::at(&path).unwrap()).collect();
        let cgroups = [vec![1, 9], vec![2, 9], vec![3], vec![9]];
        for (index, (peer, ids)) in peers.iter_mut().zip(cgroups).enumerate() {
            let index = index as u64;
            peer.tell(&Notice {
                lazy: 10_u64.pow(index as u32),
                given: index,
                cgroups: Notice::cgroups(ids.into_iter()),
            });
        }
        let others = |before, after, given| Others {
            before,
            after,
            given,
        };
        let within = |peer: &Peers, total, cgroup| {
            let mut others = Others::default();
            peer.ask(|before, notice| notice.add_to(&mut others, before, total, cgroup));
            others
        };
        let told = |total, cgroup| within(&peers[1], total, cgroup);
        assert_eq!(told(u64::MAX, None), others(1, 1100, 5));
        assert_eq!(told(300, None), others(1, 400, 5), "no more than there is");
        assert_eq!(told(u64::MAX, Some(9)), others(1, 1000, 3));
        assert_eq!(told(u64::MAX, Some(2)), Others::default(), "its own");
        let alone = within(&Peers::default(), u64::MAX, None);
        assert_eq!(alone, Others::default());
        drop(peers.remove(0));
        // Its record is fresh until another one takes it, or until it is stale.
        peers[0].tell(&NOTICE);
        let told = within(&Peers::at(&path).unwrap(), u64::MAX, None);
        assert_eq!((told.before, told.after), (0, 5 + 1100));
    }

    #[test]
    fn cgroups_beyond_the_record_are_left_out() {
        assert_eq!(Notice::cgroups(7..99), NOTICE.cgroups);
        assert_eq!(
            Notice::cgroups(std::iter::once(3)),
            [3, 0, 0, 0, 0, 0, 0, 0]
        );
    }
}
