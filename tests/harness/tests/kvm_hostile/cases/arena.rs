//! The table of granules, which the guest shares.

use ebb_hypercall_abi::{Attributes, Operation};

use super::{Case, case};

/// The arena is behind 4 GiB: 16 granules of 2 MiB, the first of which is its head.
const ARENA: u64 = 1 << 32;
const TABLE: u64 = ARENA + 4096;
const GRANULE: u64 = 2 << 20;
const MIB: u64 = 32;
pub const OPTIONS: &str = "size=32M";
const GRANULES: u64 = MIB / 2;

const REUSE: u64 = Attributes::new(Operation::Reuse).encode();

pub const CASES: &[Case] = &[
    case(
        "granules_of_no_state",
        "writes all ones, and unknown states, to the table",
        |s| {
            for word in [u64::MAX, 4, 0xff, 0x80] {
                s.store(TABLE, 8, word).times(GRANULES, 8);
            }
            s.store(TABLE, 8, 0).times(GRANULES, 8);
        },
    ),
    case(
        "granules_that_are_being_taken",
        "says that nobody but itself is taking granules",
        |s| {
            // Reclaiming and discarded, which only the monitor may write.
            for state in [2, 3] {
                s.store(TABLE, 8, 77 << 8 | state).times(GRANULES, 8);
                s.call(ARENA + GRANULE, 512, REUSE).expect_bits(!12, 0);
            }
            s.store(TABLE, 8, 0).times(GRANULES, 8);
        },
    ),
    case(
        "granules_from_the_future",
        "frees granules with generations up to 2^56 - 1",
        |s| {
            for generation in [1, 1 << 40, (1 << 56) - 1] {
                s.store(TABLE + 8, 8, generation << 8 | 1)
                    .times(GRANULES - 1, 8);
                s.call(ARENA + GRANULE, 512 * (GRANULES - 1), REUSE)
                    .expect_bits(!12, 0);
            }
        },
    ),
    case(
        "granules_of_the_head",
        "frees and reuses the granule that holds the table",
        |s| {
            s.store(TABLE, 8, 1 << 8 | 1);
            s.call(ARENA, 512, REUSE);
            s.load(ARENA, 8).expect(u64::from_le_bytes(*b"EbbArena"));
            s.store(TABLE, 8, 0);
        },
    ),
    case(
        "arena_without_a_header",
        "overwrites the arena's header",
        |s| {
            s.store(ARENA, 8, u64::MAX).times(64, 8);
            s.store(TABLE + 8, 8, 5 << 8 | 1).times(GRANULES - 1, 8);
            s.call(ARENA + GRANULE, 512, REUSE).expect_bits(!12, 0);
        },
    ),
    case(
        "reuse_of_too_many_granules",
        "reuses parts of granules, and ranges beyond the arena",
        |s| {
            for (gpa, pages) in [
                (ARENA + GRANULE + 4096, 1),
                (ARENA + (MIB << 20), 512),
                (ARENA, 1 << 40),
                (ARENA + GRANULE, 512 * GRANULES),
            ] {
                s.call(gpa, pages, REUSE);
            }
            s.call(ARENA + GRANULE, 512, REUSE).expect_bits(!12, 0);
        },
    ),
    case(
        "calls_on_an_arena",
        "frees, asks for and batches from the arena as if it were RAM",
        |s| {
            for operation in [
                Operation::LazyFree,
                Operation::LazyFreeBatch,
                Operation::Query,
                Operation::KernelNote,
            ] {
                s.call(ARENA + GRANULE, 1, Attributes::new(operation).encode())
                    .expect_bits(1 << 63, 1 << 63);
            }
        },
    ),
];
