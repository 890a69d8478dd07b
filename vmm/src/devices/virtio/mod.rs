//! Virtio devices (virtio 1.3) and their transports.

pub mod balloon;
pub mod blk;
mod device;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod vsock;

pub use device::{Activation, ActivationError, QueueHandle, VirtioDevice, VirtioInterrupt};
