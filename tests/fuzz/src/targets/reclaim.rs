//! Reclaim of RAM and of an arena whose table the guest writes as it likes: memory that it has not freed stays as it is.

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::granule::{State, Word};
use ebb_vmm::guest_memory::{GuestMemory, LazyOps, RangeSink};
use ebb_vmm::reclaim::{Order, Reach};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::machine::{ARENA, GRANULE, GRANULES, MIB, TABLE, memory, ram};
use crate::Bytes;

/// The pages whose content is watched: the first of each 64 KiB of RAM, and of each granule behind the first.
fn watched() -> Vec<u64> {
    let of_ram = ram()
        .into_iter()
        .flat_map(|range| (range.start()..range.end()).step_by(64 << 10));
    let of_arena = (1..GRANULES).map(|granule| ARENA + granule * GRANULE);
    of_ram.chain(of_arena).collect()
}

/// Some ranges of RAM, sorted and apart, as a driver of the balloon or a call gives them.
fn some_ram(input: &mut Bytes<'_>) -> GpaRange {
    let region = ram()[usize::from(input.u8() % 2)];
    let pages = region.len() / PAGE_SIZE;
    let start = u64::from(input.u16()) % pages;
    let count = 1 + u64::from(input.u16()) % (pages - start);
    let at = region.start() + start * PAGE_SIZE;
    GpaRange::new(at, at + count * PAGE_SIZE).expect("a range")
}

pub fn run(input: &[u8]) {
    let mut input = Bytes::new(input);
    let memory = memory();
    let view = memory.ram().memory();
    let watched = watched();
    let put = |at: u64| view.write_obj(at | 1, GuestAddress(at)).expect("is memory");
    let get = |at: u64| view.read_obj::<u64>(GuestAddress(at)).expect("is memory");
    watched.iter().for_each(|at| put(*at));
    // Where the guest may find something else than it has written.
    let mut given = vec![false; watched.len()];
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let kind = input.u8();
        let mut give = |range: GpaRange, is| {
            for (at, given) in watched.iter().zip(&mut given) {
                if range.start() <= *at && *at < range.end() {
                    *given = is;
                }
            }
        };
        match kind % 6 {
            0 | 1 => {
                let range = some_ram(&mut input);
                LazyOps::lazy_free(&*memory, &[range]);
                give(range, true);
            }
            2 => {
                let range = some_ram(&mut input);
                LazyOps::reuse(&*memory, &[range]);
                watched
                    .iter()
                    .filter(|at| range.start() <= **at && **at < range.end())
                    .for_each(|at| put(*at));
                give(range, false);
            }
            3 => give(write_word(&mut input, &view), true),
            4 => order(&mut input, &memory),
            _ => {
                let range = some_ram(&mut input);
                RangeSink::report(&*memory, &[range]);
                give(range, true);
            }
        }
    }
    for (at, given) in watched.iter().zip(given) {
        let word = get(*at);
        assert!(
            word == at | 1 || given && word == 0,
            "{at:#x}: {word:#x}, given: {given}"
        );
    }
    LazyOps::reset(&*memory);
    assert_eq!(memory.lazy().snapshot().lazy_bytes, 0);
}

/// Writes a word of the table, any word. Returns the granule's addresses.
fn write_word(input: &mut Bytes<'_>, view: &GuestMemoryMmap) -> GpaRange {
    let granule = u64::from(input.u8()) % GRANULES;
    let word = match input.u8() % 3 {
        0 => input.u64(),
        1 => Word::new(State::Lazy, input.u8().into()).raw(),
        _ => Word::new(State::InUse, input.u8().into()).raw(),
    };
    let at = GuestAddress(TABLE + 8 * granule);
    view.write_obj(word, at).expect("the table");
    let at = ARENA + granule * GRANULE;
    GpaRange::new(at, at + GRANULE).expect("a granule")
}

fn order(input: &mut Bytes<'_>, memory: &GuestMemory) {
    let kind = input.u8();
    let reach = [Reach::Blocks, Reach::Fragments, Reach::Everything][usize::from(kind % 3)];
    let order = Order {
        bytes: u64::from(input.u16()) * MIB / 64,
        reach,
        newest: if kind & 16 == 0 {
            u64::MAX
        } else {
            input.u8().into()
        },
        urgent: kind & 32 != 0,
    };
    if kind & 64 == 0 {
        memory.reclaimer().discard(order);
    } else {
        memory.reclaimer().invalidate(order);
    }
}
