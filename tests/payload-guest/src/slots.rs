//! Ranges, dealt out to the vCPUs in turn, so that neighbours have different owners and ranges merge and split
//! across them.

use ebb_hypercall_abi::PAGE_SIZE;

use crate::map;
use crate::random::Random;

/// One range of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Slot {
    /// Its address.
    pub gpa: u64,
    /// Its pages.
    pub pages: u32,
    /// Whether it is lazily free.
    pub lazy: bool,
    /// The generation of what it holds.
    pub generation: u64,
}

/// Slots of at least so many pages are *big*: they are freed and reused less often.
pub const BIG: u32 = 512;

/// Calls `take` for each range of the vCPU `index` of `vcpus`: most have 1 to 16 pages, one in a hundred 2 to
/// 6 MiB.
pub fn deal(seed: u64, (index, vcpus): (u64, u64), ram: u64, mut take: impl FnMut(Slot)) {
    let mut random = Random::new(seed);
    let (mut at, mut turn) = (map::FREE, 0);
    while at < ram {
        let pages = match random.below(100) {
            0 => u64::from(BIG) + random.below(1024),
            _ => {
                let most = 1 + random.below(16);
                1 + random.below(most)
            }
        };
        let pages = pages.min((ram - at) / PAGE_SIZE);
        if turn % vcpus == index {
            take(Slot {
                gpa: at,
                pages: pages as u32,
                lazy: false,
                generation: 0,
            });
        }
        at += pages * PAGE_SIZE;
        turn += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_of_all_cover_the_memory_once() {
        const RAM: u64 = 128 << 20;
        let mut slots = Vec::new();
        for index in 0..4 {
            let before = slots.len();
            deal(7, (index, 4), RAM, |slot| slots.push(slot));
            let room = map::SLOTS_SIZE as usize / size_of::<Slot>();
            assert!((1..room).contains(&(slots.len() - before)));
        }
        slots.sort_by_key(|slot| slot.gpa);
        let mut at = map::FREE;
        for slot in &slots {
            assert_eq!(slot.gpa, at);
            at += u64::from(slot.pages) * PAGE_SIZE;
        }
        assert_eq!(at, RAM);
        assert!(slots.iter().any(|slot| slot.pages >= BIG));
    }
}
