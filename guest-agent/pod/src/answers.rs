//! What shim and agent answer alike: errors, and how processes end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::ttrpc::{self, Code};

use crate::error::Result;

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Its exit status: 128 and the signal's number if a signal ended it.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    /// An end at this moment.
    #[must_use]
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }

    /// Its moment in a message.
    #[must_use]
    pub fn timestamp(self) -> MessageField<Timestamp> {
        MessageField::some(Timestamp::from(self.at))
    }
}

/// The answer to a request. An error that ends with "not found" has the code by which clients know that.
///
/// # Errors
/// That of `done`.
pub fn answer<T>(done: Result<T>) -> ttrpc::Result<T> {
    done.map_err(|error| {
        let text = error.to_string();
        let code = if text.ends_with("not found") {
            Code::NOT_FOUND
        } else {
            Code::UNKNOWN
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
    })
}

/// The mutex' content; a thread that panicked has left it whole.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
