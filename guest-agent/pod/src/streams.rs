//! Standard streams of containers' processes, and copies of files, over connections of the guest's vsock.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use ebb_pod::error::{Context, Result};
use ebb_pod::{Connection, End, LONGEST_LINE, STREAM_PORT, carry_bytes};
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket,
};
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

use crate::container::Pod;
use crate::copies;

/// The agent's ends of a process' streams.
#[derive(Debug, Default)]
pub struct Ends {
    /// Where its input is written.
    pub input: Option<File>,
    /// Where its output is read.
    pub output: Option<File>,
    /// Where its errors are read.
    pub errors: Option<File>,
}

/// Starts the thread that takes the host's connections.
pub fn serve(pod: Arc<Pod>) -> Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None).context("vsock")?;
    let address = VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT);
    bind(listener.as_raw_fd(), &address).context("the streams' port")?;
    listen(&listener, Backlog::MAXCONN).context("the streams' port")?;
    std::thread::spawn(move || accept_all(&listener, &pod));
    Ok(())
}

fn accept_all(listener: &OwnedFd, pod: &Arc<Pod>) {
    loop {
        // The host is trusted: there are no more than it wants.
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(connection) => {
                let pod = Arc::clone(pod);
                std::thread::spawn(move || {
                    if let Err(error) = carry(File::from(connection), &pod) {
                        eprintln!("ebb-pod-agent: a stream: {error}");
                    }
                });
            }
            Err(error) => eprintln!("ebb-pod-agent: accept: {error}"),
        }
    }
}

/// Moves a stream's bytes until its end.
fn carry(connection: File, pod: &Pod) -> Result<()> {
    let mut reader = BufReader::new(connection.try_clone().context("dup")?);
    let mut line = String::new();
    (&mut reader)
        .take(LONGEST_LINE)
        .read_line(&mut line)
        .context("the first line")?;
    let stream = match serde_json::from_str(&line).context("the first line")? {
        Connection::Stream(stream) => stream,
        Connection::Copies { container } => {
            let text = match pod.receive(&container, &mut reader) {
                Ok(()) => String::new(),
                Err(error) => error.to_string(),
            };
            return writeln!(&connection, "{text}").context("answer");
        }
        Connection::Copied { container, name } => {
            let mut file = copies::open(&container, &name)?;
            carry_bytes(&mut file, &mut &connection);
            return Ok(());
        }
    };
    let mut end = pod.take_end(&stream)?;
    let mut connection = connection;
    match stream.end {
        End::Input => carry_bytes(&mut reader, &mut end),
        End::Output | End::Errors => {
            carry_bytes(&mut end, &mut connection);
            // The host sees the end though its own direction is open.
            let _ = shutdown(&connection, Shutdown::Write);
        }
    }
    Ok(())
}
