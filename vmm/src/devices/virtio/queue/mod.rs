//! What every device worker needs: queues that survive a hostile driver, chains of buffers, a thread that
//! can be stopped, and a log that a guest cannot flood.

mod chain;
mod service;
#[cfg(test)]
pub(super) mod tests {
    pub mod driver;
}
mod worker;

pub use crate::faults::GuestFaults;
pub use chain::{Chain, ChainFault, Cursor, ReadError};
pub use service::{QueueFailure, ServedQueue};
pub use worker::{Poller, StopSignal, Work, Worker};
