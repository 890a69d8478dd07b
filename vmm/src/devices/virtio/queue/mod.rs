//! What every device worker needs: queues and chains of buffers that a hostile driver cannot break, a thread that
//! can be stopped, and a log that a guest cannot flood.

mod chain;
mod limit;
mod service;
#[cfg(test)]
pub(super) mod tests {
    pub mod driver;
}
mod worker;

pub use crate::faults::GuestFaults;
pub use chain::{Chain, ChainFault, Cursor, ReadError};
pub use limit::{Limiter, SharedLimiter};
pub use service::{QueueFailure, ServedQueue};
pub use worker::{DeviceThread, Poller, StopSignal, Work, Worker};
