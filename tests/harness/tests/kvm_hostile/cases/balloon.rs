//! The balloon: pages, reports, statistics.

use ebb_payload::script::Script;

use super::{Case, case};
use crate::machine::RAM;
use crate::virtio::{BALLOON, Buffer, CONFIG, Queue, STATUS, WRITE, empty, queue, table};

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;
const FIRST: u32 = (PLAY / 4096) as u32;

/// Features (virtio 1.3, 5.5.3).
const MUST_TELL: u64 = 1;
const STATISTICS: u64 = 2;
const POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// Numbers of the queues, when all are negotiated.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTS: usize = 3;

/// Starts the balloon with one chain in one of its queues.
fn send(s: &mut Script<'_>, features: u64, index: usize, buffers: &[Buffer]) -> Queue {
    let mut queues = [0; 4].map(|_| empty(s));
    queues[index] = queue(s, &table(buffers), &[0]);
    let used = if features & REPORTING != 0 { 4 } else { 3 };
    BALLOON.start(s, features, &queues[..used]);
    BALLOON.notify(s, index as u64);
    queues[index]
}

const ALL: u64 = MUST_TELL | STATISTICS | REPORTING;

/// Inflates by these page numbers.
fn pages(s: &mut Script<'_>, index: usize, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
    let at = s.data(&bytes, 4);
    for features in [ALL, ALL & !MUST_TELL] {
        send(s, features, index, &[(at, bytes.len() as u32, 0)]).returns(s, 1);
        BALLOON.is_well(s);
    }
}

/// Statistics: tags and values, packed.
fn statistics(s: &mut Script<'_>, tags: &[(u16, u64)]) -> (u64, u32) {
    let pairs = tags.iter().flat_map(|(tag, value)| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    });
    let bytes: Vec<u8> = pairs.collect();
    (s.data(&bytes, 1), bytes.len() as u32)
}

/// Sends a chain for each of these buffers at once. The device keeps the last one, and returns the others.
fn send_statistics(s: &mut Script<'_>, buffers: &[Buffer]) {
    let mut queues = [0; 4].map(|_| empty(s));
    let heads: Vec<u16> = (0..buffers.len() as u16).collect();
    queues[STATS] = queue(s, &table(buffers), &heads);
    BALLOON.start(s, ALL, &queues);
    BALLOON.notify(s, STATS as u64);
    queues[STATS].returns(s, buffers.len() as u64 - 1);
    BALLOON.is_well(s);
}

pub const CASES: &[Case] = &[
    case(
        "kata_13661_only_the_start_is_ram",
        "inflates the last page of RAM and the ones behind it",
        |s| {
            let last = (RAM / 4096 - 1) as u32;
            pages(s, INFLATE, &[last, last + 1, last + 2, last + 600]);
            pages(s, DEFLATE, &[last, last + 1]);
        },
    ),
    case(
        "pages_that_are_no_ram",
        "inflates and deflates page numbers up to 2^32 - 1, and the devices' windows",
        |s| {
            let numbers = [
                0xd_0000,
                0xf_ee00,
                0x10_0000,
                0x7fff_ffff,
                0xffff_fffe,
                0xffff_ffff,
            ];
            pages(s, INFLATE, &numbers);
            pages(s, DEFLATE, &numbers);
        },
    ),
    case(
        "the_same_page_again_and_again",
        "inflates one page 256 times, and deflates it as often",
        |s| {
            pages(s, INFLATE, &[FIRST; 256]);
            pages(s, DEFLATE, &[FIRST; 256]);
        },
    ),
    case(
        "cloud_hypervisor_8177_endless_array",
        "sends an array of all of the memory that it frees",
        |s| {
            // What is there are addresses of pages: far beyond RAM.
            let buffers = [(PLAY, (RAM - PLAY) as u32 / 8, 0)];
            for index in [INFLATE, DEFLATE] {
                send(s, ALL, index, &buffers).returns(s, 1);
                BALLOON.is_well(s);
            }
            send(s, ALL, INFLATE, &[(PLAY, u32::MAX, 0)]).returns(s, 1);
            BALLOON.is_well(s);
        },
    ),
    case(
        "arrays_of_odd_length",
        "sends 0 bytes, half a page number, and what is to be written",
        |s| {
            let one = s.data(&FIRST.to_le_bytes(), 4);
            for (len, flags) in [(1, 0), (2, 0), (3, 0), (4, WRITE), (0, 0)] {
                for index in [INFLATE, DEFLATE] {
                    send(s, ALL, index, &[(one, len, flags)]).returns(s, 1);
                    BALLOON.is_well(s);
                }
            }
        },
    ),
    case(
        "cloud_hypervisor_c1b5b18d9_bad_then_good",
        "sends an array that is no memory, and then a good one",
        |s| {
            let good = s.data(&FIRST.to_le_bytes(), 4);
            let mut queues = [0; 4].map(|_| empty(s));
            queues[INFLATE] = queue(s, &table(&[(1 << 45, 64, 0), (good, 4, 0)]), &[0, 1, 0, 1]);
            BALLOON.start(s, ALL, &queues);
            BALLOON.notify(s, INFLATE as u64);
            queues[INFLATE].returns(s, 4);
            BALLOON.is_well(s);
        },
    ),
    case(
        "inflating_the_queue_itself",
        "frees the pages in which the rings are, and sends more",
        |s| {
            let page = PLAY + (1 << 20);
            let array = s.data(&((page / 4096) as u32).to_le_bytes(), 4);
            s.store(page, 8, array).store(page + 8, 8, 4);
            s.store(page + 0x200, 4, 1 << 16).store(page + 0x204, 4, 0);
            let itself = Queue {
                descriptors: page,
                available: page + 0x200,
                used: page + 0x400,
            };
            let others = [0; 3].map(|_| empty(s));
            BALLOON.start(s, ALL, &[itself, others[0], others[1], others[2]]);
            BALLOON.notify(s, 0);
            s.times(50, 0);
            BALLOON.set(s, STATUS, 0);
        },
    ),
    case(
        "cloud_hypervisor_8098_report_beyond_ram",
        "reports ranges of which only the start is RAM",
        |s| {
            s.store(RAM - 4096, 8, 77);
            for (at, len) in [
                (RAM - 4096, 8192),
                (PLAY, RAM as u32),
                (RAM - (2 << 20), 4 << 20),
                (RAM, 4096),
            ] {
                send(s, ALL, REPORTS, &[(at, len, WRITE)]).returns(s, 1);
                BALLOON.is_well(s);
            }
            // Nothing of it was taken.
            s.load(RAM - 4096, 8).expect(77);
        },
    ),
    case(
        "reports_of_odd_ranges",
        "reports parts of pages, nothing, 4 GiB, and what wraps",
        |s| {
            for (at, len) in [
                (PLAY + 1, 4096),
                (PLAY, 4095),
                (PLAY, 0),
                (PLAY, u32::MAX),
                (u64::MAX - 4095, 4096),
                (0xd000_0000, 4096),
            ] {
                send(s, ALL, REPORTS, &[(at, len, WRITE)]).returns(s, 1);
                BALLOON.is_well(s);
            }
        },
    ),
    case(
        "reports_to_be_read",
        "reports ranges that the device may not write",
        |s| {
            s.store(PLAY, 8, PLAY);
            send(s, ALL, REPORTS, &[(PLAY, 4096, 0)]).returns(s, 1);
            s.load(PLAY, 8).expect(PLAY);
        },
    ),
    case(
        "reports_of_poisoned_pages",
        "says that its free pages hold a value, and reports them",
        |s| {
            for poison in [0u64, 0xaaaa_aaaa] {
                let mut queues = [0; 4].map(|_| empty(s));
                queues[REPORTS] = queue(s, &table(&[(PLAY + (4 << 20), 8192, WRITE)]), &[0]);
                BALLOON.negotiate(s, ALL | POISON);
                BALLOON.set(s, CONFIG + 12, poison);
                for (index, queue) in (0..).zip(queues) {
                    BALLOON.queue(s, index, queue, 8);
                }
                BALLOON.set(s, STATUS, 15);
                BALLOON.notify(s, REPORTS as u64);
                queues[REPORTS].returns(s, 1);
            }
        },
    ),
    case(
        "firecracker_5794_oversized_statistics",
        "sends 60 KiB of statistics, and 4 GiB",
        |s| {
            let buffers = [641, 60 << 10, u32::MAX].map(|len| (PLAY, len, 0));
            send_statistics(s, &buffers);
        },
    ),
    case(
        "statistics_of_nonsense",
        "sends unknown tags, the largest values, and half a statistic",
        |s| {
            let all: Vec<_> = (0..20).map(|tag| (tag, u64::MAX)).collect();
            for tags in [&all[..], &[(0xffff, 1)], &[(4, 0), (4, u64::MAX), (5, 1)]] {
                let (at, len) = statistics(s, tags);
                let lengths = [len, len - 1, 1, 0];
                send_statistics(s, &lengths.map(|len| (at, len, 0)));
            }
        },
    ),
    case(
        "size_that_cannot_be",
        "says that the balloon holds 2^32 - 1 pages",
        |s| {
            let queues = [0; 4].map(|_| empty(s));
            BALLOON.start(s, ALL, &queues);
            for actual in [u64::MAX, 0x10_0000, 0] {
                BALLOON.set(s, CONFIG + 4, actual);
            }
            // What the host asks for cannot be written.
            BALLOON.set(s, CONFIG, 77);
            s.load(BALLOON.0 + CONFIG, 4).expect(0);
        },
    ),
];
