//! The vsock's socket, from the moment when it is made until it is removed.

use crate::config::VsockConfig;
use crate::devices::virtio::vsock::{VsockError, VsockSocket};
use crate::teardown::{Socket, StatusPage};

/// The socket. Dropping this removes its path, unless sockets are left behind; the guardian does if the monitor cannot.
pub struct ServedVsock {
    socket: VsockSocket,
    status: &'static StatusPage,
}

impl ServedVsock {
    /// Makes the socket of `config`.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn open(config: &VsockConfig, status: &'static StatusPage) -> Result<Self, VsockError> {
        let path = std::path::absolute(&config.path);
        status.set_vsock_path(path.as_deref().unwrap_or(&config.path));
        let mut socket = VsockSocket::open(&config.path)?;
        if status.leaves_sockets() {
            socket.leave();
        }
        status.set_socket(Socket::Vsock, socket.identity());
        Ok(Self { socket, status })
    }

    /// The socket.
    pub const fn socket(&self) -> &VsockSocket {
        &self.socket
    }
}

impl Drop for ServedVsock {
    fn drop(&mut self) {
        self.socket.remove();
        self.status.forget_socket(Socket::Vsock);
    }
}
