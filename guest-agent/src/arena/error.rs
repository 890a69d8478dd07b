//! Why an arena cannot be opened.

use std::io;
use std::path::{Path, PathBuf};

use ebb_hypercall_abi::arena::HeaderError;

use super::slots::SLOTS;

/// An arena cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device does not exist.
    #[error(
        "{path}: there is no such device; run `ebb-guest setup` as root, in a machine with --arena"
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// The user may not use the device.
    #[error(
        "{path}: permission denied; join the group of the device, or run `ebb-guest setup --mode 0666` as root"
    )]
    Permission {
        /// The device.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{path}: {what} failed: {source}")]
    Call {
        /// The device.
        path: PathBuf,
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The device has no valid arena header.
    #[error("{path}: {source}")]
    Header {
        /// The device.
        path: PathBuf,
        /// What is wrong with the header.
        source: HeaderError,
    },
    /// All slots are held.
    #[error("{path}: {SLOTS} processes use it already; end one of them, or add another --arena")]
    Full {
        /// The device.
        path: PathBuf,
    },
}

impl OpenError {
    /// Turns the error of the operation `what` into an `OpenError`.
    pub(super) fn from_io(path: &Path, what: &'static str) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| {
            let path = path.clone();
            match source.kind() {
                io::ErrorKind::NotFound => Self::Missing { path },
                io::ErrorKind::PermissionDenied => Self::Permission { path },
                _ => Self::Call { path, what, source },
            }
        }
    }
}
