//! Two vCPUs against each other.

use ebb_hypercall_abi::{Attributes, Operation};
use ebb_payload::script::Script;

use super::transport::busy_disk;
use super::{Case, case};
use crate::virtio::{BALLOON, DISK, STATUS, empty};

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;
const TABLE: u64 = (1 << 32) + 4096;

const fn of(operation: Operation) -> u64 {
    Attributes::new(operation).encode()
}

pub const CASES: &[Case] = &[
    case(
        "cve_2026_45782_resets_beside_requests",
        "one vCPU starts reads, the other one resets the disk",
        |s| {
            s.beside(|s| DISK.set(s, STATUS, 0));
            for _ in 0..30 {
                busy_disk(s);
            }
            s.alone();
        },
    ),
    case(
        "notifications_beside_resets",
        "one vCPU notifies all queues, the other one starts and resets devices",
        |s| {
            s.beside(|s| {
                for queue in 0..5 {
                    BALLOON.notify(s, queue);
                    DISK.notify(s, queue);
                }
            });
            for _ in 0..10 {
                let queues = [0; 3].map(|_| empty(s));
                BALLOON.start(s, 3, &queues);
                BALLOON.set(s, STATUS, 0);
            }
            s.alone();
        },
    ),
    case(
        "rustsec_2020_0157_rings_that_change",
        "one vCPU changes descriptors and indices while the other's requests are read",
        |s| {
            let at = super::block::header(s, super::block::READ, 0);
            let words = crate::virtio::table(&[(at, 16, 1), (PLAY, 512, 3), (PLAY + 512, 1, 2)]);
            let queue = crate::virtio::queue(s, &words, &[0; 8]);
            s.beside(|s: &mut Script<'_>| {
                for word in [u64::MAX, 0, PLAY, 1 << 63] {
                    s.store(queue.descriptors + 16, 8, word)
                        .store(queue.descriptors + 8, 8, word);
                    s.store(queue.available + 2, 2, word & 0xf)
                        .store(at, 8, word);
                }
            });
            for _ in 0..20 {
                DISK.start(s, 0, &[queue]);
                DISK.notify(s, 0);
                s.load(DISK.0 + STATUS, 4).times(5, 0);
            }
            s.alone();
        },
    ),
    case(
        "batches_that_change",
        "one vCPU changes a batch while the other one makes the call",
        |s| {
            let block = s.words(
                &[
                    8,
                    0,
                    PLAY,
                    1,
                    PLAY + 4096,
                    1,
                    PLAY,
                    4,
                    PLAY,
                    1,
                    PLAY,
                    1,
                    PLAY,
                    1,
                    PLAY,
                    1,
                    PLAY,
                    1,
                ],
                4096,
            );
            s.beside(|s| {
                // All of it stays RAM that may be freed, or is none.
                for (gpa, pages) in [(PLAY, 512), (1 << 45, 1), (PLAY + 1, u64::MAX), (PLAY, 1)] {
                    s.store(block + 16, 8, gpa).store(block + 24, 8, pages);
                }
                s.store(block, 4, 0xffff).store(block, 4, 8);
            });
            for operation in [
                Operation::LazyFreeBatch,
                Operation::ReuseBatch,
                Operation::Query,
            ] {
                s.call(block, 1, of(operation)).times(150, 0);
            }
            s.alone();
        },
    ),
    case(
        "granules_that_change",
        "one vCPU writes all states to the table while the other one reuses",
        |s| {
            s.beside(|s| {
                for word in [1u64 << 8 | 1, 2, 3, u64::MAX, 0, 9 << 8 | 1] {
                    s.store(TABLE + 8, 8, word).times(15, 8);
                }
            });
            for granule in 1..16u64 {
                s.call((1 << 32) + (granule << 21), 512, of(Operation::Reuse))
                    .times(20, 0);
            }
            s.alone();
            s.store(TABLE, 8, 0).times(16, 8);
        },
    ),
];
