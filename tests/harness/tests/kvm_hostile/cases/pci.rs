//! Virtio devices on a PCI bus: configuration space, base addresses, MSI-X, and the registers behind them.

use ebb_payload::script::Script;

use super::{Case, case};
use crate::virtio::{ENTRIES, empty};

/// Memory of a disk that may be written to, one that may not, and a balloon: devices 1 to 3 of the root bus.
const DEVICES: [u64; 3] = [0xe000_8000, 0xe001_0000, 0xe001_8000];
const DISK: u64 = DEVICES[0];

/// Offsets in a device's memory.
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_VECTOR: u64 = 0x1a;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const END: u64 = 0x8000;

/// Offsets in a configuration space: the capability that accesses memory, and MSI-X.
const ACCESS: u64 = 0x84;
const MSIX: u64 = 0x98;

/// Points the data port to a register of a device.
fn point(s: &mut Script<'_>, device: u64, register: u64) -> u64 {
    s.output(0xcf8, 4, 0x8000_0000 | device << 11 | register & 0xfc);
    0xcfc + (register & 3)
}

fn configure(s: &mut Script<'_>, device: u64, register: u64, width: u64, value: u64) {
    let port = point(s, device, register);
    s.output(port, width, value);
}

/// The devices are there again, as at first.
fn reset(s: &mut Script<'_>) {
    for (device, memory) in (1..).zip(DEVICES) {
        configure(s, device, 4, 2, 0x406);
        configure(s, device, MSIX + 2, 2, 0);
        s.store(memory + STATUS, 1, 0);
        s.load(memory + STATUS, 1).expect(0);
        let port = point(s, device, 0x10);
        s.input(port, 4).expect(memory);
    }
}

/// Starts the disk with one queue of nothing, whose vector is 1.
fn start(s: &mut Script<'_>) {
    for status in [0, 1, 3] {
        s.store(DISK + STATUS, 1, status);
    }
    for (select, features) in [(0, 0), (1, 1)] {
        s.store(DISK + 8, 4, select);
        s.store(DISK + 12, 4, features);
    }
    s.store(DISK + STATUS, 1, 11);
    let queue = empty(s);
    s.store(DISK + QUEUE_SELECT, 2, 0);
    s.store(DISK + 0x18, 2, ENTRIES.into());
    for (at, address) in [
        (0x20, queue.descriptors),
        (0x28, queue.available),
        (0x30, queue.used),
    ] {
        s.store(DISK + at, 4, address);
        s.store(DISK + at + 4, 4, address >> 32);
    }
    s.store(DISK + QUEUE_VECTOR, 2, 1);
    s.store(DISK + 0x1c, 2, 1);
    s.store(DISK + STATUS, 1, 15);
    s.load(DISK + STATUS, 1).expect(15);
}

pub const CASES: &[Case] = &[
    case(
        "pci_configuration_at_all_widths",
        "reads and writes all of each configuration space, 1, 2 and 4 bytes wide",
        |s| {
            for device in 0..5 {
                for register in (0..0x100).step_by(4) {
                    let port = point(s, device, register);
                    for (at, width) in [(0, 4), (0, 2), (2, 2), (3, 2), (1, 1), (3, 1), (2, 4)] {
                        s.input(port + at, width).output(port + at, width, u64::MAX);
                    }
                }
            }
            reset(s);
            let port = point(s, 1, 0);
            s.input(port, 4).expect(0x1042_1af4);
        },
    ),
    case(
        "pci_base_addresses_that_move",
        "puts devices over RAM, each other and the local APIC, and switches their memory off and on",
        |s| {
            for value in [
                0,
                0xffff_ffff,
                0x10_0000,
                0xfee0_0000,
                DEVICES[1],
                0xffff_8000,
                1,
                0xe000_8004,
            ] {
                for register in [0x10, 0x14, 0x24, 0x30] {
                    configure(s, 1, register, 4, value);
                }
                s.load(value & 0x1f_f000, 4);
                s.load(DISK + STATUS, 1);
            }
            for command in [0, 6, 0xffff, 0, 2].repeat(40) {
                configure(s, 1, 4, 2, command);
                s.load(DISK, 4).store(DISK + STATUS, 1, 1);
            }
            reset(s);
        },
    ),
    case(
        "pci_msix_table_at_all_widths",
        "writes all ones to the table and beyond, at all widths, and reads which vectors wait",
        |s| {
            configure(s, 1, MSIX + 2, 2, 0xffff);
            for width in [1, 2, 4, 8] {
                for from in [TABLE, TABLE + 1, TABLE + 12, PENDING, PENDING + 3] {
                    s.store(DISK + from, width, u64::MAX).times(20, 5);
                    s.load(DISK + from, width).times(20, 5);
                }
                for at in [PENDING - 1, END - 8, END - 3, END - 1] {
                    s.store(DISK + at, width, u64::MAX).load(DISK + at, width);
                }
            }
            reset(s);
        },
    ),
    case(
        "pci_messages_to_anywhere",
        "has messages sent to RAM, to nobody and to all, of all kinds",
        |s| {
            configure(s, 1, MSIX + 2, 2, 0x8000);
            for (low, high) in [
                (0x10_0000, 0),
                (0xfee0_0000, 0xffff_ffff),
                (0xfeef_f00c, 0),
                (0xffff_fffc, 1),
                (0, 0),
            ] {
                for data in [0, 0x4021, 0xffff_ffff, 0x700, 0x200] {
                    let words = [low, high, data, 0];
                    for (n, word) in (0..).zip(words) {
                        s.store(DISK + TABLE + 16 + 4 * n, 4, word);
                    }
                }
            }
            // One that is masked in the end, with something to say.
            s.store(DISK + TABLE + 28, 4, 1);
            start(s);
            s.store(DISK + NOTIFY, 2, 0).times(20, 0);
            reset(s);
        },
    ),
    case(
        "pci_masks_in_a_loop",
        "masks, unmasks, switches off and on, and changes the message, 200 times",
        |s| {
            start(s);
            for round in 0..50u64 {
                for control in [0x8000, 0xc000, 0x8000, 0] {
                    configure(s, 1, MSIX + 2, 2, control);
                    s.store(DISK + TABLE + 16, 4, 0xfee0_0000 | round << 12);
                    s.store(DISK + TABLE + 28, 4, round & 1);
                    s.store(DISK + NOTIFY, 2, 0);
                }
            }
            reset(s);
        },
    ),
    case(
        "pci_access_through_the_configuration_space",
        "points the capability that accesses memory to everywhere and at all lengths",
        |s| {
            for (bar, offset, len) in [
                (0, 0, 4),
                (0, STATUS, 1),
                (0, END - 4, 4),
                (0, END, 4),
                (0, 0xffff_ffff, 1),
                (0, 1, 4),
                (0, 0, 0xffff_ffff),
                (0, 0, 3),
                (1, 0, 4),
                (0xff, 0, 4),
            ] {
                configure(s, 1, ACCESS + 4, 1, bar);
                configure(s, 1, ACCESS + 8, 4, offset);
                configure(s, 1, ACCESS + 12, 4, len);
                for width in [1, 2, 4] {
                    configure(s, 1, ACCESS + 16, width, 0xffff_ffff);
                    let port = point(s, 1, ACCESS + 16);
                    s.input(port, width);
                }
            }
            reset(s);
        },
    ),
    case(
        "pci_registers_with_noise",
        "writes all ones to all registers of each device, and reads them, at all widths",
        |s| {
            for memory in DEVICES {
                for width in [1, 2, 4, 8] {
                    for part in (0..END).step_by(0x1000) {
                        s.store(memory + part, width, u64::MAX).times(20, 3);
                        s.load(memory + part, width).times(20, 3);
                        s.store(memory + part + 0xffc, width, 0)
                            .load(memory + part + 0xffc, width);
                    }
                }
            }
            reset(s);
        },
    ),
    case(
        "pci_queues_and_vectors_that_do_not_exist",
        "selects, sizes, starts and notifies queues that there are not, with vectors that there are not",
        |s| {
            start(s);
            for select in [1, 2, 0x7fff, 0xffff] {
                s.store(DISK + QUEUE_SELECT, 2, select);
                s.load(DISK + 0x18, 2);
                s.store(DISK + 0x18, 2, 0xffff).store(DISK + 0x1c, 2, 1);
                s.store(DISK + QUEUE_VECTOR, 2, select);
                s.store(DISK + NOTIFY + 4 * select % 0x1000, 4, select);
            }
            s.store(DISK + QUEUE_SELECT, 2, 0);
            s.store(DISK + QUEUE_VECTOR, 2, 0x7ff);
            s.load(DISK + QUEUE_VECTOR, 2).expect(0xffff);
            s.store(DISK + 0x1c, 2, 0);
            s.load(DISK + STATUS, 1).expect(15);
            reset(s);
        },
    ),
];
