//! Hypercalls.

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::{Attributes, Error, Operation};
use ebb_payload::script::{Kind, Script};

use super::{Case, case};
use crate::machine::RAM;

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

const fn of(operation: Operation) -> u64 {
    Attributes::new(operation).encode()
}

const FREE: u64 = of(Operation::LazyFree);
const REUSE: u64 = of(Operation::Reuse);

/// What a call by port leaves in the register: its status.
const fn status(error: Error) -> u64 {
    error.code().cast_unsigned()
}

const INVALID: u64 = status(Error::Invalid);
const FAULT: u64 = status(Error::Fault);
const UNKNOWN: u64 = status(Error::NoSuchCall);

/// A batch or query block.
fn block(s: &mut Script<'_>, words: &[u64]) -> u64 {
    let mut words = words.to_vec();
    words.resize(512, 0);
    s.words(&words, 4096)
}

pub const CASES: &[Case] = &[
    case(
        "call_of_no_operation",
        "makes calls with numbers that name no operation",
        |s| {
            for operation in [0, 10, 0xff] {
                s.call(PLAY, 1, FREE & !0xff00 | operation << 8)
                    .expect(UNKNOWN);
            }
            for attributes in [0, u64::MAX, FREE << 1, FREE ^ 1 << 40] {
                s.call(PLAY, 1, attributes).expect(UNKNOWN);
            }
        },
    ),
    case(
        "call_with_unknown_bits",
        "sets reserved bits and flags of calls",
        |s| {
            for bit in [1, 1 << 7, 1 << 16, 1 << 19] {
                s.call(PLAY, 1, FREE | bit).expect(INVALID);
            }
            s.call(PLAY, 1, REUSE | 2 << 16).expect(INVALID);
        },
    ),
    case(
        "free_of_part_of_a_page",
        "frees addresses that are not aligned",
        |s| {
            for offset in [1, 8, 4095] {
                s.call(PLAY + offset, 1, FREE).expect(INVALID);
            }
        },
    ),
    case("free_of_nothing", "frees no pages", |s| {
        s.call(PLAY, 0, FREE).expect(INVALID);
    }),
    case(
        "free_that_wraps",
        "frees ranges whose end is beyond 2^64",
        |s| {
            for pages in [u64::MAX, 1 << 52, (1 << 52) - 1, 1 << 63] {
                s.call(PLAY, pages, FREE).expect(INVALID);
            }
            s.call(u64::MAX - 4095, 1, FREE).expect(INVALID);
        },
    ),
    case(
        "free_outside_ram",
        "frees what is no RAM, and what is only in part",
        |s| {
            for gpa in [RAM, 0xd000_0000, 0xfee0_0000, 1 << 40, !0xfff] {
                s.call(gpa, 1, FREE).expect(INVALID);
            }
            s.call(RAM - 4096, 2, FREE).expect(INVALID);
            s.call(0, RAM / 4096 + 1, FREE).expect(INVALID);
        },
    ),
    case(
        "reuse_outside_ram",
        "reuses what is no RAM, and populates it",
        |s| {
            for flags in [0, 1 << 16] {
                for gpa in [RAM, 0xc000_0000, 1 << 44] {
                    s.call(gpa, 1 << 20, REUSE | flags).expect(INVALID);
                }
            }
        },
    ),
    case(
        "batch_of_too_many",
        "gives batches counts that do not fit",
        |s| {
            for count in [0, 256, 0xffff, 0xffff_ffff] {
                let at = block(s, &[count]);
                s.call(at, 1, of(Operation::LazyFreeBatch)).expect(INVALID);
            }
            let at = block(s, &[1 << 32 | 1, 0, PLAY, 1]);
            s.call(at, 1, of(Operation::LazyFreeBatch))
                .expect_bits(1, 0);
            for pages in [(1 << 20) + 1, 1 << 51] {
                s.call(PLAY, pages, of(Operation::LazyFreeBatch))
                    .expect(INVALID);
            }
        },
    ),
    case(
        "batch_outside_ram",
        "has batches read where no RAM is",
        |s| {
            for gpa in [RAM, 0xd000_0000, 1 << 40] {
                s.call(gpa, 1, of(Operation::LazyFreeBatch)).expect(FAULT);
                s.call(gpa, 1, of(Operation::ReuseBatch)).expect(FAULT);
            }
            s.call(RAM - 4096, 2, of(Operation::ReuseBatch))
                .expect(FAULT);
        },
    ),
    case(
        "batch_with_a_bad_range",
        "puts bad ranges behind good ones into batches",
        |s| {
            for bad in [
                [RAM, 1],
                [PLAY + 1, 1],
                [PLAY, 0],
                [PLAY, u64::MAX],
                [!0xfff, 1],
            ] {
                let at = block(s, &[3, 0, PLAY, 1, bad[0], bad[1], PLAY + 8192, 1]);
                s.call(at, 1, of(Operation::LazyFreeBatch)).expect(INVALID);
                // One was done.
                s.load(at + 4, 4).expect(1);
            }
        },
    ),
    case(
        "batch_that_frees_itself",
        "frees the block of the batch, and reuses it by itself",
        |s| {
            s.store(PLAY, 8, 2).store(PLAY + 8, 8, 0);
            for (entry, gpa) in [(16, PLAY), (32, PLAY + 4096)] {
                s.store(PLAY + entry, 8, gpa).store(PLAY + entry + 8, 8, 1);
            }
            s.call(PLAY, 1, of(Operation::LazyFreeBatch)).expect(0);
            s.call(PLAY, 1, of(Operation::ReuseBatch));
            s.call(PLAY, 2, REUSE).expect_bits(!12, 0);
        },
    ),
    case(
        "query_of_what_is_not_there",
        "asks for ranges that wrap or are no RAM, and for answers there",
        |s| {
            for query in [[RAM, 1], [PLAY, u64::MAX], [PLAY + 1, 1], [0, 1 << 40]] {
                let at = block(s, &query);
                s.call(at, 1, of(Operation::Query)).expect(INVALID);
            }
            for gpa in [RAM, 0xd000_0000] {
                s.call(gpa, 1, of(Operation::Query)).expect(FAULT);
            }
            s.call(PLAY, 2, of(Operation::Query)).expect(INVALID);
        },
    ),
    case(
        "arena_that_is_not_there",
        "asks for arenas with numbers up to 2^64 - 1",
        |s| {
            for index in [1, 2, 1 << 32, u64::MAX] {
                let at = block(s, &[index]);
                s.call(at, 1, of(Operation::ArenaInfo)).expect(INVALID);
            }
        },
    ),
    case(
        "note_that_is_none",
        "tells of kernel notes that are noise, or no RAM",
        |s| {
            let noise: Vec<u64> = (1..1024u64)
                .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .collect();
            let at = s.words(&noise, 4096);
            s.call(at, 2, of(Operation::KernelNote)).expect(INVALID);
            for (gpa, pages) in [(RAM, 1), (0, 1 << 40), (0, RAM / 4096)] {
                s.call(gpa, pages, of(Operation::KernelNote))
                    .expect(INVALID);
            }
        },
    ),
    case(
        "note_with_endless_text",
        "tells of a note whose lengths are 2^32 - 1",
        |s| {
            for sizes in [
                [0xffff_ffffu32, 0xffff_ffff],
                [11, 0xffff_ffff],
                [0, 0],
                [0xffff_fff0, 8],
            ] {
                let mut bytes: Vec<u8> = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
                bytes.extend(
                    *b"\0\0\0\0VMCOREINFO\0\0SIZE(page)=99999999999999999999999\nSYMBOL(x)=",
                );
                bytes.resize(4096, b'f');
                let at = s.data(&bytes, 4096);
                s.call(at, 1, of(Operation::KernelNote)).expect(INVALID);
            }
        },
    ),
    case(
        "scattered_frees",
        "frees every other page, twice, and all of it",
        |s| {
            let pages = (RAM - PLAY) / 4096;
            s.call(PLAY, 1, FREE).times(512, 8192);
            s.call(PLAY, 1, FREE).times(512, 8192);
            s.call(PLAY, pages, FREE).expect(0);
            s.call(PLAY, pages, REUSE).expect_bits(!12, 0);
        },
    ),
    case(
        "reset_again_and_again",
        "resets what is lazily free 500 times",
        |s| {
            s.call(PLAY, 512, FREE).expect(0);
            s.call(0, 1, of(Operation::Reset)).times(500, 0).expect(12);
        },
    ),
    case(
        "populate_everything",
        "has 24 MiB populated 20 times",
        |s| {
            let pages = (RAM - PLAY) / 4096;
            s.call(PLAY, pages, REUSE | 1 << 16).times(20, 0).expect(12);
        },
    ),
    case(
        "call_of_odd_width",
        "reads the port of calls one, two and eight times four bytes wide, and writes to it",
        |s| {
            let port = u64::from(PORT);
            s.input(port, 1).expect_bits(0xff, 0xff);
            s.input(port, 2).expect_bits(0xffff, 0xffff);
            s.output(port, 4, FREE)
                .output(port, 1, 1)
                .output(port + 1, 4, 1);
            s.step(Kind::InputString, port, 4, (PLAY, 8));
            s.step(Kind::OutputString, port, 4, (PLAY, 8));
        },
    ),
    case(
        "instruction_with_other_numbers",
        "makes KVM's other hypercalls",
        |s| {
            for number in [0, 1, 5, 9, 10, 11, 13, 99, u64::MAX] {
                s.step(Kind::KvmCall, number, 0, (0, 0));
            }
            s.step(Kind::InstructionCall, PLAY, 0, (0, FREE));
        },
    ),
];
