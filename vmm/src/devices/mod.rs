//! Emulated devices.

pub mod platform;
pub mod serial;
pub mod virtio;
