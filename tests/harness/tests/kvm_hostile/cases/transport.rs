//! The registers of virtio devices.

use super::{Case, case};
use crate::virtio::{
    BALLOON, CONFIG, DISK, ENTRIES, EVENT_INDEX, FEATURES, FEATURES_SELECT, NEEDS_RESET, NOTIFY,
    QUEUE_READY, QUEUE_SELECT, QUEUE_SIZE, READONLY, STATUS, empty,
};

pub const CASES: &[Case] = &[
    case(
        "registers_at_all_widths",
        "reads and writes registers 1, 2 and 8 bytes wide and unaligned",
        |s| {
            for width in [1, 2, 4, 8] {
                for at in [0, 1, 2, 3, 0x70, 0x71, 0xfc, 0xfe, 0xff] {
                    s.load(DISK.0 + at, width);
                    s.store(DISK.0 + at, width, 0xa5a5_a5a5_a5a5_a5a5);
                }
            }
            s.load(DISK.0, 4).expect(0x7472_6976);
        },
    ),
    case(
        "registers_across_windows",
        "accesses the last bytes of one window and the first of the next at once",
        |s| {
            for device in [DISK, READONLY, BALLOON] {
                for at in [0xff9, 0xffc, 0xffd, 0xfff] {
                    s.load(device.0 + at, 8);
                    s.store(device.0 + at, 8, u64::MAX);
                }
            }
        },
    ),
    case(
        "every_register_with_noise",
        "writes all ones to every register of every device",
        |s| {
            for device in [DISK, READONLY, BALLOON] {
                s.store(device.0, 4, u64::MAX).times(64, 4);
                s.load(device.0, 4).times(64, 4);
                device.set(s, STATUS, 0);
            }
        },
    ),
    case(
        "configuration_beyond_its_end",
        "reads and writes configuration up to the end of the window",
        |s| {
            for device in [DISK, BALLOON] {
                device.negotiate(s, 0);
                for width in [1, 2, 4, 8] {
                    s.load(device.0 + CONFIG, width).times(12, 7);
                    s.store(device.0 + CONFIG, width, u64::MAX).times(12, 7);
                    s.load(device.0 + 0xff8, width)
                        .store(device.0 + 0xff8, width, u64::MAX);
                }
            }
        },
    ),
    case(
        "cloud_hypervisor_7917_queue_select",
        "selects queues that do not exist, and sets them up",
        |s| {
            DISK.negotiate(s, 0);
            let queue = empty(s);
            for select in [1, 256, 0x1_0000, 0x7fff_ffff, 0xffff_ffff] {
                DISK.queue(s, select, queue, ENTRIES.into());
                s.load(DISK.0 + QUEUE_READY, 4).expect(0);
                s.load(DISK.0 + 0x34, 4).expect(0);
            }
            DISK.set(s, STATUS, 15);
        },
    ),
    case(
        "cve_2026_5747_size_after_activation",
        "makes a queue larger, moves it and disables it while it is in use",
        |s| {
            let queue = empty(s);
            DISK.start(s, 0, &[queue]);
            DISK.set(s, QUEUE_SIZE, 0x8000);
            DISK.set(s, QUEUE_READY, 0);
            DISK.set(s, 0x90, 0xffff_fff0);
            DISK.set(s, 0x94, 0xffff_ffff);
            DISK.set(s, QUEUE_READY, 1);
            DISK.notify(s, 0);
            DISK.is_well(s);
        },
    ),
    case(
        "queue_sizes_that_cannot_be",
        "starts with queues of 0, 3, 2^15 and 2^32 - 1 entries",
        |s| {
            for size in [0, 3, 257, 512, 0x8000, 0x1_0000, 0x1_0008, 0xffff_ffff] {
                let queue = empty(s);
                DISK.negotiate(s, 0);
                DISK.queue(s, 0, queue, size);
                DISK.set(s, STATUS, 15);
                s.load(DISK.0 + STATUS, 4)
                    .expect_bits(NEEDS_RESET, NEEDS_RESET);
                DISK.notify(s, 0);
            }
        },
    ),
    case(
        "rings_that_are_no_memory",
        "puts rings outside RAM, at the end of it, at 0, and unaligned",
        |s| {
            for at in [0, 1, 0xd000_0000, (32 << 20) - 2, 1 << 45, u64::MAX - 15] {
                for part in 0..3 {
                    let mut queue = empty(s);
                    [
                        &mut queue.descriptors,
                        &mut queue.available,
                        &mut queue.used,
                    ][part]
                        .clone_from(&at);
                    DISK.start(s, 0, &[queue]);
                    DISK.notify(s, 0);
                }
            }
        },
    ),
    case(
        "features_that_were_not_offered",
        "accepts every feature, and none",
        |s| {
            for (low, high) in [(u64::MAX, 1), (0, 0), (0, u64::MAX), (1 << 11, 1)] {
                for status in [0, 1, 3] {
                    DISK.set(s, STATUS, status);
                }
                for (half, value) in [(0, low), (1, high), (2, u64::MAX), (0xffff_ffff, 1)] {
                    DISK.set(s, FEATURES_SELECT, half);
                    DISK.set(s, FEATURES, value);
                }
                DISK.set(s, STATUS, 11);
                s.load(DISK.0 + STATUS, 4).expect(3);
            }
        },
    ),
    case(
        "features_after_the_agreement",
        "changes features after FEATURES_OK and DRIVER_OK",
        |s| {
            let queue = empty(s);
            DISK.start(s, 0, &[queue]);
            DISK.set(s, FEATURES_SELECT, 0);
            DISK.set(s, FEATURES, EVENT_INDEX);
            DISK.is_well(s);
        },
    ),
    case(
        "status_out_of_order",
        "sets DRIVER_OK first, all bits at once, and clears bits",
        |s| {
            DISK.set(s, STATUS, 0);
            for status in [4, 8, 15, 0xff, 0xffff_ffff, 4, 1, 0x40] {
                DISK.set(s, STATUS, status);
            }
            DISK.set(s, STATUS, 0);
            s.load(DISK.0 + STATUS, 4).expect(0);
        },
    ),
    case(
        "devices_without_queues",
        "starts each device without setting up a queue",
        |s| {
            for device in [DISK, READONLY, BALLOON] {
                device.start(s, 0x3f & !0x10, &[]);
                device.notify(s, 0);
                device.set(s, STATUS, 0);
                device.start(s, 0, &[]);
                s.load(device.0 + STATUS, 4)
                    .expect_bits(NEEDS_RESET, NEEDS_RESET);
            }
        },
    ),
    case(
        "notifications_of_anything",
        "notifies queues that are not in use or do not exist, at all widths",
        |s| {
            for queue in [0, 1, 4, 5, 0x1_0000, 0xffff_ffff] {
                for width in [1, 2, 4, 8] {
                    s.store(DISK.0 + NOTIFY, width, queue)
                        .store(BALLOON.0 + NOTIFY, width, queue);
                }
            }
            DISK.set(s, NOTIFY, 0);
            s.times(200, 0);
        },
    ),
    case(
        "resets_in_flight",
        "resets a disk with 8 reads under way, 20 times",
        |s| {
            // The bug behind CVE-2026-45782: requests that are under way when the device is reset.
            for _ in 0..20 {
                busy_disk(s);
                DISK.set(s, STATUS, 0);
                s.load(DISK.0 + STATUS, 4).expect(0);
            }
        },
    ),
    case(
        "interrupts_of_nothing",
        "acknowledges interrupts that were not raised",
        |s| {
            for value in [0, 1, 2, 3, 0xffff_ffff] {
                DISK.set(s, 0x64, value);
            }
            s.load(DISK.0 + 0x60, 4).expect(0);
        },
    ),
    case(
        "queue_selected_while_in_use",
        "selects other queues and reads all registers of a device in use",
        |s| {
            let queue = empty(s);
            DISK.start(s, 0, &[queue]);
            DISK.set(s, QUEUE_SELECT, 0xffff_ffff);
            s.load(DISK.0, 4).times(80, 4);
            DISK.notify(s, 0);
            DISK.is_well(s);
        },
    ),
];

/// Starts the disk with a read of 32 KiB in each entry of its queue.
pub fn busy_disk(s: &mut ebb_payload::script::Script<'_>) {
    use super::block::{READ, header};
    use crate::virtio::{NEXT, WRITE, queue, table};
    let at = header(s, READ, 0);
    let buffers = [
        (at, 16, NEXT),
        (PLAY, 64 << 9, NEXT | WRITE),
        (PLAY + (64 << 9), 1, WRITE),
    ];
    let queue = queue(s, &table(&buffers), &[0; ENTRIES as usize]);
    DISK.start(s, 0, &[queue]);
    DISK.notify(s, 0);
}

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;
