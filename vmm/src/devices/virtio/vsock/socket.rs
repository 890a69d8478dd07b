//! The unix sockets of the host: the only place where their paths are opened.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{ConfigError, SocketPath, check_vsock_path};
use crate::sys::sockets::{BoundPath, FileIdentity, bind, connect_at_once, remove_stale};

/// The socket for clients of the host could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The path cannot be used.
    #[error(transparent)]
    Path(#[from] ConfigError),
    /// A system call failed.
    #[error("--vsock path={}: {source}; choose a folder that you may write", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// The socket at which clients of the host ask for ports of the guest. Dropping it removes its path.
#[derive(Debug)]
pub struct VsockSocket {
    listener: Arc<UnixListener>,
    path: BoundPath,
}

impl VsockSocket {
    /// Makes the socket, which only this user may open. One that a dead monitor left there is replaced.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn open(path: &Path) -> Result<Self, VsockError> {
        let refused = |source| VsockError::Bind {
            path: path.to_owned(),
            source,
        };
        if check_vsock_path(path)? == SocketPath::Stale {
            remove_stale(path).map_err(refused)?;
        }
        let (listener, path) = bind(path).map_err(refused)?;
        Ok(Self {
            listener: Arc::new(listener),
            path,
        })
    }

    /// Device and inode.
    #[must_use]
    pub const fn identity(&self) -> FileIdentity {
        self.path.identity()
    }

    /// The socket itself.
    pub(super) fn listener(&self) -> Arc<UnixListener> {
        Arc::clone(&self.listener)
    }

    /// Leaves its path behind.
    pub fn leave(&mut self) {
        self.path.leave();
    }

    /// Removes its path, while it is still open. Those who are connected stay so.
    pub fn remove(&mut self) {
        self.path.remove();
    }
}

/// Connects to the server of the host at `PATH_PORT`. Waits for nobody.
///
/// # Errors
/// The error of the system call: nobody listens there, or too many wait for it.
pub(super) fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    connect_at_once(Path::new(&name))
}
