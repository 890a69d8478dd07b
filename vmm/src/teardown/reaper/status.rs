//! The page that monitor, reaper and guardian share.

use std::ffi::OsString;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use rustix::time::{ClockId, clock_gettime};

use crate::sys;
use crate::teardown::{MAX_WORKERS, Report};

/// What monitor, reaper and guardian tell each other. The page stays shared across fork(2). It is also the one place
/// where the number of teardown workers is kept: the API's controller and the guardian write it, and all workers read it.
#[derive(Debug, Default)]
pub struct StatusPage {
    /// The monitor has stopped everything by itself.
    finished: AtomicBool,
    /// They stay in the file system.
    leaves_sockets: AtomicBool,
    /// Device and inode of each [`Socket`]; the inode is 0 if there is none.
    sockets: [[AtomicU64; 2]; 2],
    /// Path of the vsock's socket, in bytes, the rest zero.
    vsock_path: [AtomicU64; PATH_WORDS],
    /// The descriptor by which a page server gives the guest its memory, and 1 more; 0: there is none.
    page_faults: AtomicI32,
    /// How many threads shall free memory at the same time.
    workers: AtomicUsize,
    /// Bytes that the reaper has to free; 0 if it has no job.
    total_bytes: AtomicU64,
    /// Bytes that it has handled.
    done_bytes: AtomicU64,
    /// Batches that the kernel refused to free.
    failures: AtomicU64,
    /// Maximum number of threads that took part at the same time.
    max_workers: AtomicUsize,
    begin: Moment,
    end: Moment,
}

/// The longest path of a unix socket, 107 bytes, fits into so many words.
const PATH_WORDS: usize = 14;

/// A socket of the monitor's in the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// That of the API.
    Api,
    /// That of the vsock, for clients of the host.
    Vsock,
}

/// When freeing began or ended, and what was resident then.
#[derive(Debug, Default)]
struct Moment {
    /// Nanoseconds of `CLOCK_MONOTONIC`; 0 until it comes.
    time: AtomicU64,
    /// Resident bytes.
    resident: AtomicU64,
}

impl StatusPage {
    /// A page that this process shares with all processes that it makes from now on. It is never unmapped.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new() -> io::Result<&'static Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel picks an unused place. It is never unmapped, aligned to a page and large
        // enough. All fields are atomics, for which all zeroes are a value.
        let status = unsafe {
            let (anywhere, len) = (ptr::null_mut(), size_of::<Self>());
            let page = rustix::mm::mmap_anonymous(anywhere, len, prot, MapFlags::SHARED)?;
            &*page.cast::<Self>()
        };
        // The first use of the clock may initialize something in libc, which must not happen in the reaper.
        let _ = now();
        Ok(status)
    }

    /// Sets how many threads shall free memory at the same time. Workers obey between two batches.
    pub fn set_workers(&self, workers: usize) {
        self.workers.store(workers, Ordering::Relaxed);
    }

    /// How many threads shall free memory at the same time: 1 to [`MAX_WORKERS`].
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.load(Ordering::Relaxed).clamp(1, MAX_WORKERS)
    }

    /// From now on the monitor's sockets stay in the file system when it has ended: clients of Firecracker remove them.
    pub fn leave_sockets(&self) {
        self.leaves_sockets.store(true, Ordering::Release);
    }

    /// Returns true if nobody shall remove the monitor's sockets.
    #[must_use]
    pub fn leaves_sockets(&self) -> bool {
        self.leaves_sockets.load(Ordering::Acquire)
    }

    /// The monitor has made this socket, a file with this device and inode.
    pub fn set_socket(&self, socket: Socket, identity: (u64, u64)) {
        let [device, inode] = &self.sockets[socket as usize];
        device.store(identity.0, Ordering::Relaxed);
        inode.store(identity.1, Ordering::Release);
    }

    /// The monitor will make the vsock's socket at this absolute path.
    pub fn set_vsock_path(&self, path: &Path) {
        let mut bytes = path.as_os_str().as_bytes().iter().copied();
        for word in &self.vsock_path {
            let chunk = std::array::from_fn(|_| bytes.next().unwrap_or(0));
            word.store(u64::from_ne_bytes(chunk), Ordering::Release);
        }
    }

    /// That path, if there is one.
    #[must_use]
    pub fn vsock_path(&self) -> Option<PathBuf> {
        let words = self.vsock_path.iter();
        let bytes = words.flat_map(|word| word.load(Ordering::Acquire).to_ne_bytes());
        let path: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
        (!path.is_empty()).then(|| OsString::from_vec(path).into())
    }

    /// The monitor has removed this socket: from now on another file may have its identity.
    pub fn forget_socket(&self, socket: Socket) {
        self.set_socket(socket, (u64::MAX, u64::MAX));
    }

    /// Device and inode of this socket, if the monitor has made it.
    #[must_use]
    pub fn socket(&self, socket: Socket) -> Option<(u64, u64)> {
        let [device, inode] = &self.sockets[socket as usize];
        let inode = inode.load(Ordering::Acquire);
        (inode > 0).then(|| (device.load(Ordering::Relaxed), inode))
    }

    /// The guest's memory comes from a page server by this descriptor, or does not. The reaper needs it after the monitor's end.
    pub fn set_page_faults(&self, descriptor: Option<RawFd>) {
        let number = descriptor.map_or(0, |it| it + 1);
        self.page_faults.store(number, Ordering::Release);
    }

    /// That descriptor, if there is one.
    #[must_use]
    pub fn page_faults(&self) -> Option<RawFd> {
        self.page_faults
            .load(Ordering::Acquire)
            .checked_sub(1)
            .filter(|it| *it >= 0)
    }

    /// The monitor has stopped everything by itself and exits now.
    pub fn set_finished(&self) {
        self.finished.store(true, Ordering::Release);
    }

    /// Returns true if the monitor has stopped everything by itself, false if it was killed.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Bytes that the reaper has handled, and bytes that it has to free.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let [done, total] = [&self.done_bytes, &self.total_bytes].map(load);
        (done, total)
    }

    pub(super) fn set_total(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Freeing begins. Like all that follows, it is called in the reaper: no allocation, no lock.
    pub(super) fn set_begin(&self) {
        self.begin.set();
    }

    pub(super) fn set_end(&self) {
        self.end.set();
    }

    pub(super) fn add_batch(&self, bytes: u64, is_freed: bool) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !is_freed {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn note_workers(&self, workers: usize) {
        self.max_workers.fetch_max(workers, Ordering::Relaxed);
    }

    /// Returns true if the reaper has begun to free memory.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        load(&self.begin.time) > 0
    }

    /// What the reaper did; `None` if it has not ended its work.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        let [began, ended] = [&self.begin, &self.end].map(|moment| load(&moment.time));
        let [before, after] = [&self.begin, &self.end].map(|moment| load(&moment.resident));
        (ended > 0).then(|| Report {
            bytes: before.saturating_sub(after),
            duration: Duration::from_nanos(ended.saturating_sub(began)),
            workers: self.max_workers.load(Ordering::Relaxed),
            failures: load(&self.failures),
        })
    }
}

impl Moment {
    /// It is now.
    fn set(&self) {
        let resident = sys::resident_bytes().unwrap_or(0);
        self.resident.store(resident, Ordering::Relaxed);
        self.time.store(now(), Ordering::Release);
    }
}

fn load(value: &AtomicU64) -> u64 {
    value.load(Ordering::Acquire)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_there_once_the_work_has_ended() {
        let status = StatusPage::new().unwrap();
        assert_eq!((status.report(), status.has_begun()), (None, false));
        assert_eq!(
            (status.socket(Socket::Api), status.is_finished()),
            (None, false)
        );
        assert_eq!(status.vsock_path(), None);
        status.set_begin();
        status.note_workers(3);
        status.note_workers(2);
        status.set_total(12);
        status.add_batch(4, true);
        status.add_batch(5, false);
        assert_eq!((status.report(), status.has_begun()), (None, true));
        assert_eq!(status.progress(), (9, 12));
        std::thread::sleep(Duration::from_millis(2));
        status.set_end();
        let report = status.report().unwrap();
        assert_eq!((report.workers, report.failures), (3, 1));
        let expected = Duration::from_millis(2)..Duration::from_secs(60);
        assert!(expected.contains(&report.duration), "{report:?}");
        for path in ["/run/a-path-that-is-longer", "/run/short"] {
            status.set_vsock_path(Path::new(path));
            assert_eq!(status.vsock_path(), Some(path.into()));
        }
        status.set_socket(Socket::Api, (0, 7));
        status.set_finished();
        assert_eq!(
            (status.socket(Socket::Api), status.is_finished()),
            (Some((0, 7)), true)
        );
    }

    #[test]
    fn a_moment_is_in_nanoseconds() {
        let seconds = || clock_gettime(ClockId::Monotonic).tv_sec.unsigned_abs();
        let (before, moment, after) = (seconds(), now(), seconds());
        assert!((before..=after).contains(&(moment / 1_000_000_000)));
    }

    #[test]
    fn the_number_of_workers_is_bounded_whoever_sets_it() {
        let status = StatusPage::default();
        for (set, workers) in [(0, 1), (3, 3), (usize::MAX, MAX_WORKERS)] {
            status.set_workers(set);
            assert_eq!(status.workers(), workers);
        }
    }
}
