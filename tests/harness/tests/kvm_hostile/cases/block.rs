//! Requests to disks.

use ebb_payload::script::Script;

use super::{Case, case};
use crate::virtio::{DISK, Device, NEXT, READONLY, WRITE};

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

/// Sectors of each disk.
pub const SECTORS: u64 = 512;
/// Cases write from this sector on.
pub const FIRST_WRITTEN: u64 = 256;

/// Types of requests, and what is answered (virtio 1.3, 5.2.6).
pub const READ: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZERO: u32 = 13;
pub const OK: u64 = 0;
const FAILED: u64 = 1;
const UNSUPPORTED: u64 = 2;

/// A request's header.
pub fn header(s: &mut Script<'_>, kind: u32, sector: u64) -> u64 {
    s.words(&[kind.into(), sector], 16)
}

/// A place for a request's status, which is no status yet.
pub fn status(s: &mut Script<'_>) -> u64 {
    s.data(&[0xaa], 1)
}

/// Sends a request with `len` bytes of data, and expects this status.
fn request(s: &mut Script<'_>, disk: Device, (kind, sector): (u32, u64), len: u32, answer: u64) {
    let (at, end) = (header(s, kind, sector), status(s));
    let flags = if [OUT, DISCARD, ZERO].contains(&kind) {
        NEXT
    } else {
        NEXT | WRITE
    };
    disk.sends(s, 0, &[(at, 16, NEXT), (PLAY, len, flags), (end, 1, WRITE)]);
    s.load(end, 1).expect_bits(0xff, answer);
    disk.is_well(s);
}

/// Has segments freed or zeroed, and expects this status.
fn clear(s: &mut Script<'_>, kind: u32, segments: &[(u64, u32, u32)], answer: u64) {
    let words = segments.iter().flat_map(|&(sector, sectors, flags)| {
        [sector, u64::from(sectors) | u64::from(flags) << 32]
    });
    let words: Vec<u64> = words.chain([0]).collect();
    let (at, end) = (header(s, kind, u64::MAX), status(s));
    let (list, len) = (s.words(&words, 16), 16 * segments.len() as u32);
    DISK.sends(s, 0, &[(at, 16, NEXT), (list, len, NEXT), (end, 1, WRITE)]);
    s.load(end, 1).expect_bits(0xff, answer);
    DISK.is_well(s);
}

pub const CASES: &[Case] = &[
    case(
        "segments_beyond_the_disk",
        "frees and zeroes sectors whose position or number overflows",
        |s| {
            for kind in [DISCARD, ZERO] {
                for (sector, sectors) in [
                    (SECTORS, 1),
                    (SECTORS - 1, 2),
                    (0, u32::MAX),
                    (u64::MAX, 1),
                    (u64::MAX, u32::MAX),
                    (u64::MAX >> 9, 8),
                    (1 << 55, 1),
                ] {
                    clear(s, kind, &[(sector, sectors, 0)], FAILED);
                }
            }
        },
    ),
    case(
        "segments_with_unknown_flags",
        "frees and zeroes with flags that are reserved, or for the other one",
        |s| {
            for flags in [2, 1 << 31, u32::MAX] {
                for kind in [DISCARD, ZERO] {
                    clear(s, kind, &[(0, 8, flags)], UNSUPPORTED);
                }
            }
            clear(s, DISCARD, &[(0, 8, 1)], UNSUPPORTED);
        },
    ),
    case(
        "segments_of_any_number",
        "frees and zeroes no segment, more than one, and a part of one",
        |s| {
            for kind in [DISCARD, ZERO] {
                clear(s, kind, &[], FAILED);
                clear(s, kind, &[(0, 8, 0); 2], FAILED);
                clear(s, kind, &[(0, 8, 0); 64], FAILED);
                for len in [1, 15, 17] {
                    request(s, DISK, (kind, 0), len, FAILED);
                }
            }
        },
    ),
    case(
        "segments_that_are_good",
        "frees and zeroes 40 times, also nothing, and parts of pages",
        |s| {
            for n in 0..10 {
                clear(s, DISCARD, &[(FIRST_WRITTEN + n, 9, 0)], OK);
                clear(s, ZERO, &[(FIRST_WRITTEN + n, 3, 1)], OK);
                clear(s, ZERO, &[(FIRST_WRITTEN + n, 5, 0)], OK);
                clear(s, DISCARD, &[(SECTORS, 0, 0)], OK);
            }
        },
    ),
    case(
        "request_with_a_short_header",
        "sends headers of 1, 8 and 15 bytes",
        |s| {
            for len in [1, 8, 15] {
                let (at, end) = (header(s, READ, 0), status(s));
                DISK.sends(
                    s,
                    0,
                    &[(at, len, NEXT), (PLAY, 512, NEXT | WRITE), (end, 1, WRITE)],
                );
                s.load(end, 1).expect_bits(0xff, FAILED);
            }
        },
    ),
    case(
        "request_without_a_status",
        "leaves no byte for the status",
        |s| {
            let at = header(s, READ, 0);
            DISK.sends(s, 0, &[(at, 16, 0)]);
            DISK.is_well(s);
        },
    ),
    case(
        "request_in_pieces",
        "sends a header in 16 pieces of one byte",
        |s| {
            // In four chains of six: the queue has eight entries.
            let (at, end) = (header(s, READ, 0), status(s));
            let mut buffers: Vec<_> = (0..5).map(|n| (at + 3 * n, 3, NEXT)).collect();
            buffers.extend([
                (at + 15, 1, NEXT),
                (PLAY, 512, NEXT | WRITE),
                (end, 1, WRITE),
            ]);
            DISK.sends(s, 0, &buffers);
            s.load(end, 1).expect_bits(0xff, OK);
        },
    ),
    case(
        "sectors_beyond_the_disk",
        "reads and writes at sectors whose position overflows",
        |s| {
            for sector in [
                SECTORS,
                SECTORS - 1,
                u64::MAX,
                u64::MAX >> 9,
                1 << 55,
                1 << 63,
            ] {
                for kind in [READ, OUT] {
                    request(s, DISK, (kind, sector), 1024, FAILED);
                }
            }
        },
    ),
    case(
        "parts_of_sectors",
        "reads and writes 1, 511 and 513 bytes",
        |s| {
            for len in [1, 511, 513] {
                for kind in [READ, OUT] {
                    request(s, DISK, (kind, FIRST_WRITTEN), len, FAILED);
                }
            }
        },
    ),
    case("no_sectors", "reads and writes no bytes at all", |s| {
        for kind in [READ, OUT] {
            let (at, end) = (header(s, kind, FIRST_WRITTEN), status(s));
            DISK.sends(s, 0, &[(at, 16, NEXT), (end, 1, WRITE)]);
            s.load(end, 1).expect_bits(0xff, OK);
        }
    }),
    case(
        "writes_to_a_read_only_disk",
        "writes to, flushes and discards on a disk that may not be written to",
        |s| {
            request(s, READONLY, (OUT, 0), 512, FAILED);
            request(s, READONLY, (OUT, 0), 32 << 9, FAILED);
            for kind in [11, 13] {
                request(s, READONLY, (kind, 0), 16, UNSUPPORTED);
            }
            request(s, READONLY, (FLUSH, 0), 512, OK);
        },
    ),
    case(
        "requests_of_no_type",
        "sends types that were not offered",
        |s| {
            for kind in [2, 3, 5, 9, 12, 14, 16, 0x7fff_ffff, u32::MAX] {
                request(s, DISK, (kind, 0), 512, UNSUPPORTED);
            }
        },
    ),
    case(
        "names_of_any_length",
        "asks for the disk's name in 1, 20 and 4096 bytes",
        |s| {
            for len in [1, 19, 20, 21, 4096] {
                let (at, end) = (header(s, ID, u64::MAX), status(s));
                DISK.sends(
                    s,
                    0,
                    &[(at, 16, NEXT), (PLAY, len, NEXT | WRITE), (end, 1, WRITE)],
                );
                DISK.is_well(s);
            }
        },
    ),
    case(
        "flush_with_data",
        "flushes with a sector and data, 20 times",
        |s| {
            for _ in 0..20 {
                request(s, DISK, (FLUSH, u64::MAX), 512, OK);
            }
        },
    ),
    case(
        "status_outside_ram",
        "has the status written where no RAM is",
        |s| {
            for end in [0xd000_0000, u64::MAX, 1 << 40] {
                let at = header(s, READ, 0);
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
        "what_is_written_can_be_read",
        "writes a sector and reads it back",
        |s| {
            s.store(PLAY, 8, 0x1234_5678_9abc_def0);
            request(s, DISK, (OUT, FIRST_WRITTEN), 512, OK);
            s.store(PLAY, 8, 0);
            request(s, DISK, (READ, FIRST_WRITTEN), 512, OK);
            s.load(PLAY, 8).expect(0x1234_5678_9abc_def0);
        },
    ),
];
