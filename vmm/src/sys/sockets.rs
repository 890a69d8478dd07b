//! Unix sockets in the file system: whose they are, and removing one's own and no other.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, RenameFlags, renameat_with};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

/// Device and inode of a file. While a socket is open, no other file has those of its own.
pub type FileIdentity = (u64, u64);

/// The identity of the file at `path` itself, not of what a link there leads to.
///
/// # Errors
/// lstat(2)'s.
pub fn file_identity(path: &Path) -> io::Result<FileIdentity> {
    path.symlink_metadata().map(|it| (it.dev(), it.ino()))
}

/// Connects to the server at `path`, if it is ready for that: one whose backlog is full would have the caller wait.
///
/// # Errors
/// socket(2)'s and connect(2)'s; `WouldBlock` if the backlog is full.
pub fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// The process that has made the other end of `stream` listen; `None` if it is outside of this one's namespace
/// (`SO_PEERCRED`, unix(7)).
#[must_use]
pub fn server_of(stream: &UnixStream) -> Option<Pid> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the call writes at most `len` bytes to `peer`, which is plain data of that size.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    (rc == 0).then(|| Pid::from_raw(peer.pid)).flatten()
}

/// Returns true if the process is dead, waited for or not.
#[must_use]
pub fn is_dead(pid: Pid) -> bool {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => {
            let mut fds = [PollFd::new(&process, PollFlags::IN)];
            matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
        }
        Err(error) => error == rustix::io::Errno::SRCH,
    }
}

/// Removes the file at `path` if `identity` is its own, whatever others do to the path meanwhile. Returns true if it did.
///
/// # Errors
/// rename(2)'s and unlink(2)'s.
pub fn remove_file_if(path: &Path, identity: FileIdentity) -> io::Result<bool> {
    if !file_identity(path).is_ok_and(|it| it == identity) {
        return Ok(false);
    }
    remove_aside(path, identity)
}

/// Another process may put its own file at `path` at any time. So it is moved away first, and looked at there.
fn remove_aside(path: &Path, identity: FileIdentity) -> io::Result<bool> {
    let aside = beside(path, getpid());
    fs::rename(path, &aside)?;
    if file_identity(&aside)? == identity {
        fs::remove_file(&aside)?;
        return Ok(true);
    }
    renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE)?;
    Ok(false)
}

/// A name beside that of `path` that no process but `pid` uses: a file of its own is there for a moment, before it is served
/// at `path` and before it is removed.
#[must_use]
pub fn beside(path: &Path, pid: Pid) -> PathBuf {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{pid}"));
    aside.into()
}

/// A socket in the file system that this process created. Dropping it removes it, unless [`BoundPath::remove`] has done so.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    identity: FileIdentity,
    is_removed: bool,
}

impl BoundPath {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode.
    #[must_use]
    pub const fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Leaves the socket where it is, for ever.
    pub fn leave(&mut self) {
        self.is_removed = true;
    }

    /// Removes the socket, once, unless another file has taken its place. The socket must be open: later, another file may
    /// have its identity.
    pub fn remove(&mut self) {
        if std::mem::replace(&mut self.is_removed, true) {
            return;
        }
        if let Err(error) = remove_file_if(&self.path, self.identity) {
            tracing::warn!("{}: not removed: {error}", self.path.display());
        }
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// Creates a listening socket with mode 0600. Linux takes a socket file's mode from the descriptor's, so the file never exists
/// with wider permissions, and the process's umask, which other threads share, stays as it is.
///
/// Clients connect as soon as they see the file: it gets its name when it listens, unless the path is too long for that.
///
/// # Errors
/// The error of the system call.
pub fn bind(path: &Path) -> io::Result<(UnixListener, BoundPath)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    let aside = beside(path, getpid());
    if let Ok(address) = SocketAddrUnix::new(&aside) {
        // A process of this number may have left one.
        let _ = fs::remove_file(&aside);
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        let named = renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE);
        named.inspect_err(|_| drop(fs::remove_file(&aside)))?;
    } else {
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, BACKLOG)?;
    }
    let bound = BoundPath {
        path: path.to_owned(),
        identity: identity_of_bound(path)?,
        is_removed: false,
    };
    Ok((UnixListener::from(socket), bound))
}

/// Removes the socket that a dead server has left, unless its guardian has just done so.
///
/// # Errors
/// unlink(2)'s.
pub fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// The identity of a socket that was just bound. The guardian of a machine before this one may move it aside for a moment, to
/// look whose it is.
fn identity_of_bound(path: &Path) -> io::Result<FileIdentity> {
    for _ in 0..100 {
        match file_identity(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                thread::sleep(Duration::from_millis(1));
            }
            identity => return identity,
        }
    }
    file_identity(path)
}

#[cfg(test)]
mod tests {
    use rustix::process::{WaitOptions, waitpid};

    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::sys::process::fork_for_test;

    #[test]
    fn only_the_file_that_is_meant_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let [path, other] = ["socket", "other"].map(|name| folder.path().join(name));
        fs::write(&path, "").unwrap();
        fs::write(&other, "").unwrap();
        let identity = file_identity(&path).unwrap();
        assert!(!remove_file_if(&other, identity).unwrap());
        // It was put there after the first look.
        assert!(!remove_aside(&other, identity).unwrap());
        assert!(other.exists());
        assert!(remove_file_if(&path, identity).unwrap());
        assert!(!remove_file_if(&path, identity).unwrap(), "it is gone");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn whoever_sees_a_socket_can_connect_to_it() {
        let folder = tempfile::tempdir().unwrap();
        // The second one leaves no room for a name beside it.
        let long = "x".repeat(105 - folder.path().as_os_str().len());
        let path = folder.path().join("socket");
        let (over, refused) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    match UnixStream::connect(&path) {
                        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
            });
            for _ in 0..200 {
                let (listener, mut bound) = bind(&path).unwrap();
                let taken = bind(&path).unwrap_err();
                assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
                bound.remove();
                drop(listener);
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(refused.into_inner(), 0);
        drop(bind(&folder.path().join(long)).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// A socket that a dead process has made can still be connected to while another has the descriptor.
    #[test]
    fn the_server_of_a_socket_is_known_when_it_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let own = UnixListener::bind(&path).unwrap();
        let server = server_of(&UnixStream::connect(&path).unwrap()).unwrap();
        assert_eq!(server, rustix::process::getpid());
        assert!(!is_dead(server));
        drop(own);
        let child = fork_for_test(|| 0);
        let pidfd = pidfd_open(child, PidfdFlags::empty()).unwrap();
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        assert!(is_dead(child), "nobody has waited for it");
        waitpid(Some(child), WaitOptions::empty()).unwrap();
        assert!(is_dead(child));
    }
}
