//! What the shim on the host and the agent in the guest agree on.
//!
//! The agent serves containerd's task service (version 2) by ttrpc at [`TASK_PORT`] of the guest's vsock. Requests mean what
//! they mean to a shim, with these differences:
//!
//! - `Create` has a [`Container`] as its option, in JSON, instead of a bundle, and its root file system is disks of the
//!   guest: see [`rootfs`].
//! - Standard streams are connections to [`STREAM_PORT`], and so is what the host copies into a container: see [`Connection`].
//!   A stream can be connected once its process has been started.
//! - Process numbers are those of the guest.

pub mod answers;
pub mod error;
pub mod network;
pub mod volumes;

use std::io::{ErrorKind, Read, Write};

use serde::{Deserialize, Serialize};

/// The guest's vsock port for the task service.
pub const TASK_PORT: u32 = 1024;

/// The guest's vsock port for standard streams.
pub const STREAM_PORT: u32 = 1025;

/// The `type_url` of `Create`'s option.
pub const CONTAINER_TYPE: &str = "dev.ebb/Container";

/// The `type_url` of what `Stats` answers: containerd's metrics for cgroups of version 2.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// The longest line at the beginning of a connection, in bytes.
pub const LONGEST_LINE: u64 = 4096;

/// A container, as its runtime bundle describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// The bundle's config.json.
    pub spec: oci_spec::runtime::Spec,
    /// The network of the pod, which its first container brings.
    pub network: Option<network::Network>,
    /// The pod's first container, whose namespaces this one joins where its specification names a path for them.
    pub sandbox: Option<String>,
}

/// The first line of a connection to [`STREAM_PORT`], in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Connection {
    /// A standard stream: all that follows are its bytes.
    Stream(Stream),
    /// What the host copies into a container that has not been started: a tar archive. The answer is a line: empty, or what has
    /// failed.
    Copies {
        /// The container's id.
        container: String,
    },
    /// One of these copies, a file, as it is now: what follows are its bytes.
    Copied {
        /// The container's id.
        container: String,
        /// Its name in the archive.
        name: String,
    },
}

/// A standard stream of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The container's id.
    pub container: String,
    /// The process: empty for the container's first, else the exec id.
    pub process: String,
    /// Which of its streams.
    pub end: End,
}

/// Which standard stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Standard input: from host to guest. Its end closes the process' input.
    Input,
    /// Standard output, or all output of a terminal: from guest to host.
    Output,
    /// Standard error: from guest to host.
    Errors,
}

/// Carries bytes from one side to the other until one of them ends. An error is an end, too: a terminal that nobody has open
/// any more ends with EIO.
///
/// Not [`std::io::copy`]: that splices, and a splice into a pipe holds the pipe's lock while it waits for a socket (Linux,
/// `splice_file_to_pipe`), so that a process which has the pipe open cannot exit.
pub fn carry_bytes(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
        }
    }
}

/// The root file system of a container in `Create`: mounts whose sources are disks of the guest. Those of type [`LAYER`] are
/// read-only and lie below a file system in the guest's memory, the first one on top. A single one of another type is the root
/// file system itself, with the options of the mount.
///
/// [`LAYER`]: rootfs::LAYER
pub mod rootfs {
    /// The type of a read-only layer, which is an EROFS.
    pub const LAYER: &str = "ebb-layer";
}
