//! A server for measurements of a network. A client says in a byte what it wants of its connection: `s`: to send, and one byte back
//! at the end; `g`: to get, for as long as it reads; `p`: each byte back.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use rustix::net::{AddressFamily, SocketFlags, SocketType, accept, listen, socket_with};

/// Bytes that are moved at a time.
const PIECE: usize = 128 << 10;

/// Serves at `PORT` of TCP, or at `vsock PORT`, for as long as the process lives.
///
/// # Errors
/// The port is none, or taken, or there is no room for a thread.
pub fn serve(place: &str) -> io::Result<()> {
    let none = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{place:?} is no port"));
    let listener: OwnedFd = match place.strip_prefix("vsock ") {
        Some(port) => vsock(port.parse().map_err(none)?)?,
        None => {
            let port = place.parse().map_err(none)?;
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?.into()
        }
    };
    let serve = move || {
        while let Ok(stream) = accept(&listener) {
            // Fails where it is no stream of TCP.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&stream, true);
            // Who has connected notices when it ends.
            let _ = thread::Builder::new().spawn(move || answer(File::from(stream)));
        }
    };
    thread::Builder::new().spawn(serve).map(drop)
}

/// A listening socket, see vsock(7).
fn vsock(port: u32) -> io::Result<OwnedFd> {
    let kind = SocketType::STREAM;
    let socket = socket_with(AddressFamily::VSOCK, kind, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all zeroes are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (libc::VMADDR_CID_ANY, port);
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the call reads `len` bytes of `address`, which lives as long as it runs.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    listen(&socket, 16)?;
    Ok(socket)
}

fn answer(mut stream: File) -> io::Result<()> {
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let mut piece = vec![0; PIECE];
    match wish[0] {
        b's' => {
            while stream.read(&mut piece)? > 0 {}
            stream.write_all(b".")
        }
        b'g' => loop {
            stream.write_all(&piece)?;
        },
        _ => loop {
            stream.read_exact(&mut wish)?;
            stream.write_all(&wish)?;
        },
    }
}
