//! Queues and chains of descriptors.

use ebb_payload::script::Script;

use super::block::{OK, READ, header, status};
use super::{Case, case};
use crate::machine::RAM;
use crate::virtio::{
    Buffer, DISK, ENTRIES, EVENT_INDEX, INDIRECT, INDIRECT_TABLES, NEXT, Queue, STATUS, WRITE,
    queue, table,
};

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

/// Starts the disk with these descriptors, and heads.
fn disk(s: &mut Script<'_>, descriptors: &[u64], heads: &[u16]) -> Queue {
    let queue = queue(s, descriptors, heads);
    DISK.start(s, INDIRECT_TABLES, &[queue]);
    DISK.notify(s, 0);
    queue
}

/// A good read of one sector.
fn good(s: &mut Script<'_>) -> ([Buffer; 3], u64) {
    let (at, end) = (header(s, READ, 0), status(s));
    (
        [(at, 16, NEXT), (PLAY, 512, NEXT | WRITE), (end, 1, WRITE)],
        end,
    )
}

pub const CASES: &[Case] = &[
    case(
        "a_good_request",
        "reads a sector as it should: what the other cases break works",
        |s| {
            let (buffers, end) = good(s);
            DISK.sends(s, 0, &buffers);
            s.load(end, 1).expect_bits(0xff, OK);
            DISK.is_well(s);
        },
    ),
    case(
        "chain_that_is_a_loop",
        "makes a descriptor the next of itself, and of another",
        |s| {
            for last in [0u64, 1] {
                let mut words = table(&[(PLAY, 16, NEXT), (PLAY, 16, NEXT)]);
                words[3] = words[3] & 0xffff_ffff_ffff | last << 48;
                disk(s, &words, &[0]).returns(s, 1);
                DISK.is_well(s);
            }
        },
    ),
    case(
        "chain_that_leads_outside",
        "names next descriptors outside the table",
        |s| {
            for next in [u64::from(ENTRIES), 255, 0xffff] {
                let words = [PLAY, 16 | u64::from(NEXT) << 32 | next << 48];
                disk(s, &words, &[0]).returns(s, 1);
                DISK.is_well(s);
            }
        },
    ),
    case(
        "heads_outside_the_table",
        "makes descriptors available that do not exist, and then one that does",
        |s| {
            let (buffers, end) = good(s);
            disk(s, &table(&buffers), &[ENTRIES, 0x7fff, 0xffff, 0]).returns(s, 1);
            s.load(end, 1).expect_bits(0xff, OK);
        },
    ),
    case(
        "firecracker_3149_available_index_jumps",
        "moves the available index by more than the queue has",
        |s| {
            for index in [u64::from(ENTRIES) + 1, 0x7fff, 0xffff] {
                let (buffers, _) = good(s);
                let queue = queue(s, &table(&buffers), &[0]);
                s.store(queue.available + 2, 2, index);
                DISK.start(s, 0, &[queue]);
                DISK.notify(s, 0);
                DISK.asks_for_reset(s);
            }
        },
    ),
    case(
        "available_index_goes_back",
        "moves the available index back after a request",
        |s| {
            let (buffers, _) = good(s);
            let queue = disk(s, &table(&buffers), &[0]);
            queue.returns(s, 1);
            s.store(queue.available + 2, 2, 0);
            DISK.notify(s, 0);
            DISK.asks_for_reset(s);
        },
    ),
    case(
        "the_same_chain_eight_times",
        "makes one chain available in every entry",
        |s| {
            let (buffers, end) = good(s);
            disk(s, &table(&buffers), &[0; ENTRIES as usize]).returns(s, ENTRIES.into());
            s.load(end, 1).expect_bits(0xff, OK);
        },
    ),
    case(
        "indirect_tables_that_are_none",
        "has tables outside RAM, of no length, of 2^32 - 1 bytes, and of half a descriptor",
        |s| {
            let (buffers, _) = good(s);
            let inner = s.words(&table(&buffers), 16);
            for (at, len) in [
                (RAM, 48),
                (u64::MAX - 15, 48),
                (inner, 0),
                (inner, 8),
                (inner, u32::MAX),
                (inner, 17),
            ] {
                disk(s, &table(&[(at, len, INDIRECT)]), &[0]).returns(s, 1);
                DISK.is_well(s);
            }
        },
    ),
    case(
        "indirect_in_indirect",
        "puts an indirect table into an indirect table, which is itself",
        |s| {
            let inner = s.words(&[0, 0], 16);
            let word = 16 | u64::from(INDIRECT) << 32;
            s.store(inner, 8, inner).store(inner + 8, 8, word);
            disk(s, &[inner, word], &[0]).returns(s, 1);
            DISK.is_well(s);
        },
    ),
    case(
        "indirect_with_more_to_come",
        "gives an indirect descriptor a next one, and makes it writable",
        |s| {
            let (buffers, _) = good(s);
            let inner = s.words(&table(&buffers), 16);
            for flags in [INDIRECT | NEXT, INDIRECT | WRITE] {
                disk(s, &table(&[(inner, 48, flags), (PLAY, 16, 0)]), &[0]).returns(s, 1);
                DISK.is_well(s);
            }
        },
    ),
    case(
        "indirect_that_was_not_agreed",
        "uses an indirect table without the feature",
        |s| {
            let (buffers, _) = good(s);
            let inner = s.words(&table(&buffers), 16);
            DISK.sends(s, 0, &[(inner, 48, INDIRECT)]);
            DISK.is_well(s);
        },
    ),
    case(
        "readable_after_writable",
        "puts what is read behind what is written",
        |s| {
            let (buffers, end) = good(s);
            let [at, to, _] = buffers;
            DISK.sends(
                s,
                0,
                &[(to.0, 512, NEXT | WRITE), (at.0, 16, NEXT), (end, 1, WRITE)],
            );
            DISK.is_well(s);
        },
    ),
    case(
        "buffers_of_four_gib",
        "gives buffers 2^32 - 1 bytes, and chains more than 4 GiB",
        |s| {
            for len in [u32::MAX, 0x8000_0000, RAM as u32 + 1] {
                let at = header(s, READ, 0);
                let (big, end) = ((PLAY, len, NEXT | WRITE), status(s));
                DISK.sends(s, 0, &[(at, 16, NEXT), big, big, (end, 1, WRITE)]);
                DISK.is_well(s);
            }
        },
    ),
    case(
        "buffers_that_wrap",
        "gives buffers at 2^64 - 1, and across the end of RAM",
        |s| {
            for at in [u64::MAX, u64::MAX - 511, RAM - 256, 0xd000_0000, 1 << 52] {
                let first = header(s, READ, 0);
                let end = status(s);
                DISK.sends(
                    s,
                    0,
                    &[(first, 16, NEXT), (at, 512, NEXT | WRITE), (end, 1, WRITE)],
                );
                s.load(end, 1).expect_bits(0xff, 1);
                DISK.sends(
                    s,
                    0,
                    &[(at, 16, NEXT), (PLAY, 512, NEXT | WRITE), (end, 1, WRITE)],
                );
                DISK.is_well(s);
            }
        },
    ),
    case(
        "buffers_of_nothing",
        "makes chains of empty buffers only",
        |s| {
            DISK.sends(
                s,
                0,
                &[(PLAY, 0, NEXT), (PLAY, 0, NEXT | WRITE), (PLAY, 0, WRITE)],
            );
            DISK.is_well(s);
        },
    ),
    case(
        "rings_that_overlap",
        "puts all three rings at one address, and has data written there",
        |s| {
            let (buffers, _) = good(s);
            let good = queue(s, &table(&buffers), &[0]);
            let one = Queue {
                used: good.descriptors,
                ..good
            };
            DISK.start(s, 0, &[one]);
            DISK.notify(s, 0);
            // Whatever comes of it: the device can be reset.
            DISK.set(s, STATUS, 0);
            s.load(DISK.0 + STATUS, 4).expect(0);
        },
    ),
    case(
        "data_over_the_rings",
        "has a sector written over the rings of its own request",
        |s| {
            let at = header(s, READ, 0);
            let end = status(s);
            let queue = queue(
                s,
                &table(&[(at, 16, NEXT), (0, 512, NEXT | WRITE), (end, 1, WRITE)]),
                &[0],
            );
            s.store(queue.descriptors + 16, 8, queue.descriptors);
            DISK.start(s, 0, &[queue]);
            DISK.notify(s, 0);
            s.wait(end, 1, 0xff, OK);
            DISK.set(s, STATUS, 0);
        },
    ),
    case(
        "events_that_are_never_due",
        "asks for interrupts at indices that do not come",
        |s| {
            let (buffers, end) = good(s);
            let queue = queue(s, &table(&buffers), &[0]);
            s.store(queue.available + 4 + 2 * u64::from(ENTRIES), 2, 0xffff);
            DISK.start(s, EVENT_INDEX, &[queue]);
            DISK.notify(s, 0);
            queue.returns(s, 1);
            s.load(end, 1).expect_bits(0xff, OK);
            DISK.is_well(s);
        },
    ),
];
