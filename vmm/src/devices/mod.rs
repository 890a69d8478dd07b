//! Emulated devices.

pub mod fw_cfg;
pub mod pci;
pub mod platform;
pub mod serial;
pub mod state;
pub mod virtio;
