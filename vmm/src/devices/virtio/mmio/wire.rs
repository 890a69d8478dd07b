//! The register layout of virtio 1.3, 4.2.2.

use virtio_bindings::{virtio_config as config, virtio_mmio as mmio};

/// Size in bytes of a device's window.
pub const WINDOW: u64 = 0x1000;

/// Offset of the register that the driver writes a queue's number to (virtio 1.3, 4.2.3.3).
pub const QUEUE_NOTIFY: u64 = mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Offset of the device's configuration.
pub const CONFIG: u64 = mmio::VIRTIO_MMIO_CONFIG as u64;

/// "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// The only version that is not legacy.
pub const VERSION: u32 = 2;
/// "EBB" and a zero.
pub const VENDOR: u32 = 0x0042_4245;

/// The driver has noticed the device.
pub const ACKNOWLEDGE: u32 = config::VIRTIO_CONFIG_S_ACKNOWLEDGE;
/// The driver supports it.
pub const DRIVER: u32 = config::VIRTIO_CONFIG_S_DRIVER;
/// The features are negotiated.
pub const FEATURES_OK: u32 = config::VIRTIO_CONFIG_S_FEATURES_OK;
/// The driver is ready.
pub const DRIVER_OK: u32 = config::VIRTIO_CONFIG_S_DRIVER_OK;
/// The device cannot continue.
pub const NEEDS_RESET: u32 = config::VIRTIO_CONFIG_S_NEEDS_RESET;
/// The driver has given up.
pub const FAILED: u32 = config::VIRTIO_CONFIG_S_FAILED;

/// Interrupt status: buffers were used.
pub const INTERRUPT_USED: u32 = mmio::VIRTIO_MMIO_INT_VRING;
/// Interrupt status: the configuration changed.
pub const INTERRUPT_CONFIG: u32 = mmio::VIRTIO_MMIO_INT_CONFIG;

/// Half of a 64-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    /// `old` with this half replaced by `value`.
    #[must_use]
    pub const fn replace(self, old: u64, value: u32) -> u64 {
        match self {
            Self::Low => old & !0xffff_ffff | value as u64,
            Self::High => old & 0xffff_ffff | (value as u64) << 32,
        }
    }

    /// This half of `value`.
    #[must_use]
    pub const fn of(self, value: u64) -> u32 {
        match self {
            Self::Low => value as u32,
            Self::High => (value >> 32) as u32,
        }
    }

    /// The half that a feature selector names; `None` for features that do not exist.
    #[must_use]
    pub const fn selected(selector: u32) -> Option<Self> {
        match selector {
            0 => Some(Self::Low),
            1 => Some(Self::High),
            _ => None,
        }
    }
}

/// A part of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Descriptor table.
    Descriptors,
    /// Available ring.
    Available,
    /// Used ring.
    Used,
}

/// A register that configures the selected queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRegister {
    /// Number of entries.
    Size,
    /// In use.
    Ready,
    /// Where a part of it is.
    Address(Ring, Half),
}

impl QueueRegister {
    /// The register at `offset`.
    #[must_use]
    pub const fn at(offset: u32) -> Option<Self> {
        use {Half::*, Ring::*};
        Some(match offset {
            mmio::VIRTIO_MMIO_QUEUE_NUM => Self::Size,
            mmio::VIRTIO_MMIO_QUEUE_READY => Self::Ready,
            mmio::VIRTIO_MMIO_QUEUE_DESC_LOW => Self::Address(Descriptors, Low),
            mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH => Self::Address(Descriptors, High),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW => Self::Address(Available, Low),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => Self::Address(Available, High),
            mmio::VIRTIO_MMIO_QUEUE_USED_LOW => Self::Address(Used, Low),
            mmio::VIRTIO_MMIO_QUEUE_USED_HIGH => Self::Address(Used, High),
            _ => return None,
        })
    }
}
