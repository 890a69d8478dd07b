//! Where the registers are, and the capabilities that say so (virtio 1.3, 4.1.4).

use virtio_bindings::virtio_mmio as reg;

use crate::devices::pci::{ConfigSpace, ENTRY_SIZE, Identity};

/// Bytes of a device's memory.
pub const SIZE: u32 = 0x8000;
/// Each part of it has as many bytes.
pub const PART: usize = 0x1000;
/// The parts.
pub const COMMON: usize = 0;
pub const ISR: usize = PART;
pub const DEVICE: usize = 2 * PART;
pub const NOTIFY: usize = 3 * PART;
pub const TABLE: usize = 4 * PART;
pub const PENDING: usize = 5 * PART;

/// Bytes of the common configuration, up to what drivers read without further features.
pub const COMMON_SIZE: usize = 0x38;
/// Offsets in it.
pub const CONFIG_VECTOR: usize = 0x10;
pub const QUEUE_VECTOR: usize = 0x1a;

/// Bytes from where one queue is notified to where the next one is.
pub const NOTIFY_STEP: u32 = 4;

/// Where a driver writes to notify a queue, from the start of the device's memory.
#[must_use]
pub const fn notify_offset(queue: u32) -> u64 {
    NOTIFY as u64 + (queue * NOTIFY_STEP) as u64
}

/// "Red Hat, Inc.", and for each device type the number behind (virtio 1.3, 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// Types with a class of their own (virtio 1.3, 5).
const NET: u32 = 1;
const BLOCK: u32 = 2;

/// What the function of a device of this type is.
pub fn identity(device_type: u32) -> Identity {
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        class: match device_type {
            NET => 0x02_0000,
            BLOCK => 0x01_0000,
            // Neither of the classes that there are.
            _ => 0xff_0000,
        },
        revision: 1,
    }
}

/// Adds the capabilities of virtio. Returns the offset of the one that gives access to memory.
pub fn add_capabilities(config: &mut ConfigSpace) -> usize {
    const VENDOR_SPECIFIC: u8 = 9;
    const ACCESS: u8 = 5;
    let parts = [
        (1, COMMON, COMMON_SIZE),
        (2, NOTIFY, PART),
        (3, ISR, 1),
        (4, DEVICE, PART),
    ];
    for (kind, offset, len) in parts {
        let mut body = capability(kind, offset, len);
        if kind == 2 {
            body.extend(NOTIFY_STEP.to_le_bytes());
            body[0] += 4;
        }
        config.add_capability(VENDOR_SPECIFIC, &body);
    }
    let mut body = capability(ACCESS, 0, 0);
    body.extend([0; 4]);
    body[0] += 4;
    let at = config.add_capability(VENDOR_SPECIFIC, &body);
    // The number of the base address; offset, length and data.
    config.allow(at + 4, &[0xff]);
    config.allow(at + 8, &[0xff; 12]);
    at
}

/// What follows the link: length, kind, base address 0, no id, offset and length.
fn capability(kind: u8, offset: usize, len: usize) -> Vec<u8> {
    let mut body = vec![16, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body
}

/// Adds the capability MSI-X with a table of so many entries. Returns its offset.
pub fn add_msix(config: &mut ConfigSpace, vectors: usize) -> usize {
    const MSIX: u8 = 0x11;
    debug_assert!((1..=PART / ENTRY_SIZE).contains(&vectors));
    let mut body = (vectors as u16 - 1).to_le_bytes().to_vec();
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PENDING as u32).to_le_bytes());
    let at = config.add_capability(MSIX, &body);
    // Enable, and mask all.
    config.allow(at + 3, &[0xc0]);
    at
}

/// The register that a field of the common configuration is, if it is written at its width.
pub const fn register(offset: usize, width: usize) -> Option<u32> {
    Some(match (offset, width) {
        (0x00, 4) => reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        (0x08, 4) => reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        (0x0c, 4) => reg::VIRTIO_MMIO_DRIVER_FEATURES,
        (0x14, 1) => reg::VIRTIO_MMIO_STATUS,
        (0x16, 2) => reg::VIRTIO_MMIO_QUEUE_SEL,
        (0x18, 2) => reg::VIRTIO_MMIO_QUEUE_NUM,
        (0x1c, 2) => reg::VIRTIO_MMIO_QUEUE_READY,
        (0x20, 4) => reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
        (0x24, 4) => reg::VIRTIO_MMIO_QUEUE_DESC_HIGH,
        (0x28, 4) => reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        (0x2c, 4) => reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        (0x30, 4) => reg::VIRTIO_MMIO_QUEUE_USED_LOW,
        (0x34, 4) => reg::VIRTIO_MMIO_QUEUE_USED_HIGH,
        _ => return None,
    })
}
