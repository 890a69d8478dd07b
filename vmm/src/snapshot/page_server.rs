//! A process that gives a restored machine the content of its memory, page by page, by userfaultfd(2). The protocol is
//! Firecracker's (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md` there): it listens on a unix socket, and gets one
//! message, a JSON array of what lies where, with the descriptor.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::Serialize;

use super::FileError;
use crate::memory::Served;
use crate::sys::sockets::{connect_at_once, server_of};

/// Bytes of a page that the guest waits for.
const PAGE: u64 = 4096;

/// A page server, to which this process is connected.
///
/// One that only closes its connection is not gone: servers for Firecracker do that. One that has handed its connection to
/// another process is not gone either, as long as that has it.
#[derive(Debug)]
pub struct PageServer {
    path: PathBuf,
    connection: UnixStream,
    /// The process that listens; `None` if it cannot be seen from here.
    process: Option<OwnedFd>,
}

/// An entry of the message.
#[derive(Serialize)]
struct Entry {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes as well: Firecracker has misnamed it, and older servers read it.
    page_size_kib: u64,
}

impl PageServer {
    /// Connects to the server that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, FileError> {
        let refuse = |error: io::Error| {
            let why = match error.kind() {
                io::ErrorKind::WouldBlock => "is too busy".to_owned(),
                _ => format!("cannot be asked: {error}"),
            };
            FileError::new(
                path,
                format!(
                    "the page server {why}; start it before, and name the socket that it listens on"
                ),
            )
        };
        let connection = connect_at_once(path).map_err(refuse)?;
        let process = server_of(&connection);
        let process = process.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Self {
            path: path.to_owned(),
            connection,
            process,
        })
    }

    /// The path of its socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends it what it has to serve, and `faults`, by which it does.
    ///
    /// # Errors
    /// sendmsg(2)'s.
    pub fn hand_over(&self, faults: BorrowedFd<'_>, served: &[Served]) -> io::Result<()> {
        let message = serde_json::to_vec(&entries(served))?;
        let faults = [faults];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&faults));
        let parts = [IoSlice::new(&message)];
        let sent = sendmsg(&self.connection, &parts, &mut rights, SendFlags::NOSIGNAL)?;
        if sent < message.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// What has to be polled to hear of its end: its process and its connection, as far as it still has them.
    #[must_use]
    pub fn signs_of_life(&self) -> Vec<PollFd<'_>> {
        let process = self.process.as_ref().map(|it| (it.as_fd(), PollFlags::IN));
        let connection = (self.connection.as_fd(), PollFlags::RDHUP);
        let signs = process.into_iter().chain([connection]);
        let signs = signs.map(|(fd, event)| PollFd::from_borrowed_fd(fd, event));
        signs.filter(|sign| !is_ready(sign.clone())).collect()
    }

    /// Returns true if nobody can give the guest its memory any more: the process has ended, and the connection is closed.
    #[must_use]
    pub fn has_gone(&self) -> bool {
        self.signs_of_life().is_empty()
    }
}

fn is_ready(fd: PollFd<'_>) -> bool {
    matches!(poll(&mut [fd], Some(&Timespec::default())), Ok(1))
}

fn entries(served: &[Served]) -> Vec<Entry> {
    let entry = |it: &Served| Entry {
        base_host_virt_addr: it.address as u64,
        size: it.len as u64,
        offset: it.file_offset,
        page_size: PAGE,
        page_size_kib: PAGE,
    };
    served.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn as_many_runs_as_there_may_be_fit_into_what_servers_read() {
        let served = Served {
            address: 0x7fff_ffff_f000,
            len: 1 << 42,
            file_offset: 1 << 42,
        };
        let message = serde_json::to_string(&entries(&[served; 8])).unwrap();
        assert!(message.len() <= 1024, "{}", message.len());
        let first = r#"[{"base_host_virt_addr":140737488351232,"size":4398046511104,"offset":4398046511104,"page_size":4096,"page_size_kib":4096},"#;
        assert!(message.starts_with(first), "{message}");
    }

    #[test]
    fn one_that_does_not_listen_is_refused_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        let refused = || PageServer::connect(&path).unwrap_err().to_string();
        let text = refused();
        assert!(
            text.contains("pages: the page server cannot be asked: No such file"),
            "{text}"
        );
        drop(UnixListener::bind(&path).unwrap());
        assert!(refused().contains("refused"));
    }

    #[test]
    fn one_is_gone_when_both_its_process_and_its_connection_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        let listener = UnixListener::bind(&path).unwrap();
        let mut server = PageServer::connect(&path).unwrap();
        let (connection, _) = listener.accept().unwrap();
        assert_eq!(server.signs_of_life().len(), 2);
        drop(connection);
        assert_eq!(server.signs_of_life().len(), 1);
        assert!(!server.has_gone(), "its process, this one, lives");
        server.process = None;
        assert!(server.has_gone());
    }
}
