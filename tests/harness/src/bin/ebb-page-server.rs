//! A page server in Firecracker's protocol, for tests.
//!
//! `ebb-page-server SOCKET MEMORY MS` gives one machine what is in its memory file, and waits for so many milliseconds before each
//! answer; `never`: it gives nothing. With `hangup` behind that it closes its connection first, and serves until it is killed. Prints
//! `ready` when it listens, `serves` when a machine has asked for it, and `ends: N pages` when that has ended.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::sleep;
use std::time::Duration;

use ebb_harness::error::{Context, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

const PAGE: u64 = 4096;
/// Pages that are given together where they all are missing.
const AROUND: u64 = 16;
/// `UFFDIO_COPY`, and `UFFD_EVENT_PAGEFAULT`.
const COPY: libc::c_ulong = 0xc028_aa03;
const PAGE_FAULT: u8 = 0x12;

/// Where a part of the guest's memory is in the monitor, and in the file.
#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

struct Server {
    faults: OwnedFd,
    regions: Vec<Region>,
    memory: File,
    given: u64,
}

impl Server {
    /// What the monitor says, and the descriptor that comes with it.
    fn receive(connection: &UnixStream, memory: File) -> Result<Self> {
        // No more than servers for Firecracker read.
        let mut message = [0; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut message)];
        let received = recvmsg(connection, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC);
        let len = received.context("recvmsg")?.bytes;
        let faults = rights.drain().find_map(|it| match it {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Ok(Self {
            faults: faults.context("no descriptor came")?,
            regions: serde_json::from_slice(&message[..len]).context("the message")?,
            memory,
            given: 0,
        })
    }

    /// Serves until the connection is closed, if there is one.
    fn serve(&mut self, connection: Option<&UnixStream>, delay: Duration) -> Result<()> {
        loop {
            let fault = PollFd::from_borrowed_fd(self.faults.as_fd(), PollFlags::IN);
            let mut fds = vec![fault];
            fds.extend(connection.map(|it| PollFd::new(it, PollFlags::RDHUP)));
            poll(&mut fds, None).context("poll")?;
            if fds[1..].iter().any(|fd| !fd.revents().is_empty()) {
                return Ok(());
            }
            let mut event = [0; 32];
            match rustix::io::read(&self.faults, &mut event) {
                Ok(32) if event[0] == PAGE_FAULT => {
                    let (_, words) = event.split_at(16);
                    let (address, _) = words.as_chunks();
                    sleep(delay);
                    self.give(u64::from_ne_bytes(address[0]))?;
                }
                Err(Errno::AGAIN) => {}
                other => return Err(Error::new(format!("{other:?}, {event:?}"))),
            }
        }
    }

    /// Puts the page of `address` there, and its neighbours if all of them are missing.
    fn give(&mut self, address: u64) -> Result<()> {
        let page = address / PAGE * PAGE;
        let mut regions = self.regions.iter();
        let region = regions
            .find(|it| (it.base_host_virt_addr..it.base_host_virt_addr + it.size).contains(&page));
        let region = region.context(format!("{address:#x} is in no region"))?;
        let base = region.base_host_virt_addr;
        let first = (page - base) / (PAGE * AROUND) * (PAGE * AROUND);
        let many = (PAGE * AROUND).min(region.size - first);
        let one = (page - base, PAGE);
        for (start, len) in [(first, many), one] {
            let mut content = vec![0; len as usize];
            let read = self
                .memory
                .read_exact_at(&mut content, region.offset + start);
            read.context("the memory file")?;
            match self.copy(base + start, &content) {
                Ok(()) => {
                    self.given += len / PAGE;
                    return Ok(());
                }
                // Some of them are there, or are not to be served any more.
                Err(Errno::EXIST | Errno::NOENT | Errno::AGAIN) => {}
                // The monitor has ended.
                Err(Errno::SRCH) => return Ok(()),
                Err(error) => return Err(Error::new(format!("UFFDIO_COPY: {error}"))),
            }
        }
        Ok(())
    }

    fn copy(&self, dst: u64, content: &[u8]) -> Result<(), Errno> {
        let mut copy = Copy {
            dst,
            src: content.as_ptr().addr() as u64,
            len: content.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `content`, and writes to `copy` and to memory of the monitor's.
        let rc = unsafe { libc::ioctl(self.faults.as_raw_fd(), COPY, &raw mut copy) };
        match rc {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, memory, delay, more @ ..] = &words[..] else {
        return Err(Error::new(
            "ebb-page-server SOCKET MEMORY MS|never [hangup]",
        ));
    };
    let memory = File::open(memory).context("the memory file")?;
    let listener = UnixListener::bind(socket).context("bind")?;
    println!("ready");
    let (connection, _) = listener.accept().context("accept")?;
    let mut server = Server::receive(&connection, memory)?;
    let connection = (more != ["hangup"]).then_some(connection);
    println!("serves");
    match delay.parse().ok() {
        Some(delay) => server.serve(connection.as_ref(), Duration::from_millis(delay))?,
        None => {
            let closed = connection
                .iter()
                .map(|it| PollFd::new(it, PollFlags::RDHUP));
            poll(&mut closed.collect::<Vec<_>>(), None).context("poll")?;
        }
    }
    println!("ends: {} pages", server.given);
    Ok(())
}
