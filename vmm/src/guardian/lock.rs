//! The lock that is held as long as a machine's memory is not free: the file `SOCKET.memory` next to the API's socket,
//! locked by flock(2), which the kernel releases however the holder ends.
//!
//! The file also says how much is freed. And it takes a request from the operator, for a machine whose API has ended while its
//! memory is still being freed: with how many workers to go on.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// Time between two looks of a process that waits.
const PERIOD: Duration = Duration::from_millis(20);

/// The file's first line: bytes done, and bytes in all. Each is a number in 20 characters and a separator.
const PROGRESS_LEN: usize = 42;

/// The second line: the number of workers that is asked for, in as many characters, or blanks.
const REQUEST_LEN: usize = 21;
const NO_REQUEST: [u8; REQUEST_LEN] = [b' '; REQUEST_LEN];

/// How often a request, or a lock that another process has, is looked at before it is given up.
const ATTEMPTS: u32 = 25;

/// A shared lock. Several machines that run one after the other may hold it at the same time.
#[derive(Debug)]
pub struct MemoryLock {
    path: PathBuf,
    file: File,
}

/// `SOCKET.memory`.
fn path_of(socket: &Path) -> PathBuf {
    let mut path = std::path::absolute(socket)
        .unwrap_or_else(|_| socket.to_owned())
        .into_os_string();
    path.push(".memory");
    path.into()
}

impl MemoryLock {
    /// Takes the lock that belongs to the API's `socket`, and makes its file if there is none.
    ///
    /// # Errors
    /// open(2)'s, flock(2)'s and write(2)'s; another program has an exclusive lock on the file, and keeps it.
    pub fn acquire(socket: &Path) -> io::Result<Self> {
        let mut path = path_of(socket);
        loop {
            let file = options()
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            lock_shared(&file, &path)?;
            let lock = Self { path, file };
            // Another process may have removed the file between the two calls.
            if lock.is_current() {
                // A request that is there was for the machine before this one.
                lock.clear_request()?;
                return Ok(lock);
            }
            path = lock.path;
        }
    }

    /// Takes the lock together with a process that holds it; `None` if there is no such file.
    #[must_use]
    pub fn share(socket: &Path) -> Option<Self> {
        let path = path_of(socket);
        let file = options().open(&path).ok()?;
        lock_shared(&file, &path).ok()?;
        Some(Self { path, file })
    }

    /// Returns true if the path still leads to this file.
    fn is_current(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::symlink_metadata(&self.path).map(identity);
        let ours = self.file.metadata().map(identity);
        matches!((there, ours), (Ok(there), Ok(ours)) if there == ours)
    }

    /// Writes down how many bytes are done, and how many there are in all, for those who [`wait`].
    pub fn write_progress(&self, (done, total): (u64, u64)) {
        // Should it fail, they wait without knowing for how long.
        let line = format!("{done:>20} {total:>20}\n");
        let _ = self.file.write_all_at(line.as_bytes(), 0);
    }

    /// The number of workers that [`request_workers`] asks for, if it does. This removes the request, which is the answer.
    #[must_use]
    pub fn take_request(&self) -> Option<usize> {
        let workers = read_request(&self.file)?;
        // Should it fail, the other side takes the request for unanswered.
        let _ = self.clear_request();
        Some(workers)
    }

    fn clear_request(&self) -> io::Result<()> {
        self.file.write_all_at(&NO_REQUEST, PROGRESS_LEN as u64)
    }

    /// Removes the file, unless another process holds the lock.
    pub fn remove_if_last(&self) {
        let alone = flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if alone && self.is_current() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes a shared lock. Those who look whether anybody holds it have an exclusive one for a moment.
fn lock_shared(file: &File, path: &Path) -> io::Result<()> {
    for _ in 0..ATTEMPTS {
        match flock(file, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => sleep(PERIOD),
            result => return Ok(result?),
        }
    }
    let held = format!("{}: another program has locked it", path.display());
    Err(io::Error::other(held))
}

impl AsFd for MemoryLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// How the file is opened.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW);
    options
}

/// Asks the guardian of the machine that had its API at `socket` to go on freeing its memory with so many workers. Returns
/// false if no memory is being freed, or no guardian has answered within half a second.
///
/// # Errors
/// open(2)'s, flock(2)'s and write(2)'s.
pub fn request_workers(socket: &Path, workers: u64) -> io::Result<bool> {
    let path = path_of(socket);
    let file = match options().open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(false);
    }
    let lock = MemoryLock { path, file };
    let request = format!("{workers:>20}\n");
    lock.file
        .write_all_at(request.as_bytes(), PROGRESS_LEN as u64)?;
    for _ in 0..ATTEMPTS {
        sleep(PERIOD);
        if read_request(&lock.file).is_none() {
            return Ok(true);
        }
    }
    lock.clear_request()?;
    Ok(false)
}

fn read_request(file: &File) -> Option<usize> {
    let mut bytes = [0; REQUEST_LEN];
    file.read_exact_at(&mut bytes, PROGRESS_LEN as u64).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    text.trim().parse().ok().filter(|workers| *workers > 0)
}

/// Waits until no process holds the lock of `socket`. Meanwhile calls `progress` with the bytes that are done and those that
/// there are in all, which are 0 before freeing has begun.
///
/// # Errors
/// open(2)'s and flock(2)'s. It is no error if there is no file: then there is nothing to wait for.
pub fn wait(socket: &Path, mut progress: impl FnMut(u64, u64)) -> io::Result<()> {
    let path = path_of(socket);
    loop {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                MemoryLock { path, file }.remove_if_last();
                return Ok(());
            }
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let (done, total) = read_progress(&file).unwrap_or_default();
        progress(done, total);
        sleep(PERIOD);
    }
}

fn read_progress(file: &File) -> Option<(u64, u64)> {
    let mut bytes = [0; PROGRESS_LEN];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    let (done, total) = text.trim().rsplit_once(' ')?;
    Some((done.trim().parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_held(socket: &Path) -> bool {
        let file = File::open(path_of(socket)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    }

    #[test]
    fn a_waiter_sees_the_progress_and_the_last_holder_go() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        wait(&socket, |_, _| panic!("there is no lock")).unwrap();
        let first = MemoryLock::acquire(&socket).unwrap();
        let second = MemoryLock::acquire(&socket).unwrap();
        first.write_progress((3, 9));
        first.remove_if_last();
        let path = path_of(&socket);
        assert!(path.exists(), "the second holds it");
        let mut holders = vec![second];
        let mut seen = Vec::new();
        wait(&socket, |done, total| {
            seen.push((done, total));
            holders.clear();
        })
        .unwrap();
        assert_eq!(seen, [(3, 9)]);
        assert!(!path.exists(), "what a killed holder leaves is removed");
    }

    #[test]
    fn a_file_is_removed_by_its_last_holder_only() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let path = path_of(&socket);
        assert!(MemoryLock::share(&socket).is_none(), "there is no file");
        let first = MemoryLock::acquire(&socket).unwrap();
        let shared = MemoryLock::share(&socket).unwrap();
        drop(first);
        assert!(is_held(&socket));
        fs::remove_file(&path).unwrap();
        let next = MemoryLock::acquire(&socket).unwrap();
        shared.remove_if_last();
        assert!(path.exists(), "it is another machine's by now");
        next.remove_if_last();
        assert!(!path.exists());
    }

    #[test]
    fn a_request_is_heard_while_the_lock_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let ask = || request_workers(&socket, 3).unwrap();
        assert!(!ask(), "no file");
        let lock = MemoryLock::acquire(&socket).unwrap();
        assert_eq!(lock.take_request(), None);
        assert!(!ask(), "no answer");
        assert_eq!(lock.take_request(), None, "it was withdrawn");
        std::thread::scope(|scope| {
            let asked = scope.spawn(ask);
            let heard = std::iter::repeat_with(|| lock.take_request()).find_map(|heard| heard);
            assert_eq!((heard, asked.join().unwrap()), (Some(3), true));
        });
        let no_worker = format!("{:>20}\n", 0);
        let at = PROGRESS_LEN as u64;
        lock.file.write_all_at(no_worker.as_bytes(), at).unwrap();
        assert_eq!(lock.take_request(), None);
        // A request that nobody has answered is not for the next machine.
        let request = format!("{:>20}\n", 5);
        let stale = request.as_bytes();
        lock.file.write_all_at(stale, at).unwrap();
        let next = MemoryLock::acquire(&socket).unwrap();
        assert_eq!(next.take_request(), None);
        drop((lock, next));
        assert!(!ask(), "the file is left, but nobody holds it");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_not_taken_for_none() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let path = path_of(&socket);
        std::os::unix::fs::symlink(&path, &path).unwrap();
        assert!(request_workers(&socket, 3).is_err());
        assert!(wait(&socket, |_, _| panic!("there is no lock")).is_err());
    }
}
