//! The lock that is held for as long as a machine's memory is not free: a file beside the API's socket,
//! locked by flock(2), which the kernel releases whoever dies how. It also holds how far freeing has come.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// How often a waiter looks.
const PERIOD: Duration = Duration::from_millis(20);

/// Bytes through with and bytes in all, each in 20 digits with what separates them.
const PROGRESS: usize = 42;

/// Behind that: the number of workers that somebody asks for, in as many digits, and the end of the line.
const WISH: usize = 21;
const NO_WISH: [u8; WISH] = [b' '; WISH];
/// How often somebody who asks looks whether it was heard.
const LOOKS: u32 = 25;

/// A shared lock; several machines in a row may hold it.
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
    /// Takes the lock that belongs to the API's `socket`; its file is there while somebody holds it.
    ///
    /// # Errors
    /// open(2)'s and flock(2)'s.
    pub fn hold(socket: &Path) -> io::Result<Self> {
        let mut path = path_of(socket);
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            flock(&file, FlockOperation::LockShared)?;
            let lock = Self { path, file };
            // It may have been removed between the two calls.
            if lock.is_there() {
                // What was asked for was for a machine before this one.
                lock.file.write_all_at(&NO_WISH, PROGRESS as u64)?;
                return Ok(lock);
            }
            path = lock.path;
        }
    }

    /// Takes it, too, where another has made it or does hold it.
    #[must_use]
    pub fn join(socket: &Path) -> Option<Self> {
        let path = path_of(socket);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = options.custom_flags(libc::O_NOFOLLOW).open(&path).ok()?;
        flock(&file, FlockOperation::LockShared).ok()?;
        Some(Self { path, file })
    }

    fn is_there(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::symlink_metadata(&self.path).map(identity);
        let ours = self.file.metadata().map(identity);
        matches!((there, ours), (Ok(there), Ok(ours)) if there == ours)
    }

    /// Writes down how many bytes are done with, of how many.
    pub fn note(&self, done: u64, total: u64) {
        // Who cannot be told has to wait without knowing how long.
        let _ = self
            .file
            .write_all_at(format!("{done:>20} {total:>20}\n").as_bytes(), 0);
    }

    /// How many workers somebody has asked for by [`ask_for_workers`], who is told so that it was heard.
    #[must_use]
    pub fn hear(&self) -> Option<u64> {
        let workers = read_wish(&self.file)?;
        // Who cannot be told believes that nobody has heard.
        let _ = self.file.write_all_at(&NO_WISH, PROGRESS as u64);
        Some(workers)
    }

    /// Gives it back, and removes the file unless another holds it.
    pub fn remove_if_last(&self) {
        if flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok() && self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl AsFd for MemoryLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Asks whoever is freeing the memory of the machine with its API at `socket` to do it with so many workers from now on.
/// `false`: nobody is, or has heard.
///
/// # Errors
/// open(2)'s, flock(2)'s and write(2)'s.
pub fn ask_for_workers(socket: &Path, workers: u64) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW);
    let file = match options.open(path_of(socket)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(false);
    }
    let wish = format!("{workers:>20}\n");
    file.write_all_at(wish.as_bytes(), PROGRESS as u64)?;
    for _ in 0..LOOKS {
        sleep(PERIOD);
        if read_wish(&file).is_none() {
            return Ok(true);
        }
    }
    file.write_all_at(&NO_WISH, PROGRESS as u64)?;
    Ok(false)
}

fn read_wish(file: &File) -> Option<u64> {
    let mut bytes = [0; WISH];
    file.read_exact_at(&mut bytes, PROGRESS as u64).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    text.trim().parse().ok().filter(|workers| *workers > 0)
}

/// Waits until nobody holds the lock of `socket`, telling `progress` now and then how many bytes are done
/// with, of how many; 0 of 0 before freeing has begun.
///
/// # Errors
/// open(2)'s and flock(2)'s; no file is no error: there is nothing to wait for.
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
    let mut bytes = [0; PROGRESS];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    let (done, total) = text.trim().rsplit_once(' ')?;
    Some((done.trim().parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_sees_the_progress_and_the_last_holder_go() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        wait(&socket, |_, _| panic!("nobody holds it")).unwrap();
        let first = MemoryLock::hold(&socket).unwrap();
        let second = MemoryLock::hold(&socket).unwrap();
        first.note(3, 9);
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
        assert!(MemoryLock::join(&socket).is_none(), "nobody has made it");
        assert!(
            !ask_for_workers(&socket, 3).unwrap(),
            "nobody frees anything"
        );
        let third = MemoryLock::hold(&socket).unwrap();
        assert_eq!(third.hear(), None);
        assert!(!ask_for_workers(&socket, 3).unwrap(), "nobody listens");
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask_for_workers(&socket, 3).unwrap());
            let heard = std::iter::repeat_with(|| third.hear()).find_map(|heard| heard);
            assert_eq!((heard, asked.join().unwrap()), (Some(3), true));
        });
        let joined = MemoryLock::join(&socket).unwrap();
        drop(third);
        assert!(
            flock(
                File::open(&path).unwrap(),
                FlockOperation::NonBlockingLockExclusive
            )
            .is_err()
        );
        let third = joined;
        fs::remove_file(&path).unwrap();
        let fourth = MemoryLock::hold(&socket).unwrap();
        third.remove_if_last();
        assert!(path.exists(), "it is another's file by now");
        fourth.remove_if_last();
        assert!(!path.exists());
    }
}
