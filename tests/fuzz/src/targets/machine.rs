//! A machine's memory without a machine: 8 MiB of RAM, 8 more at 16 MiB, and an arena.

use std::sync::Arc;

use ebb_core::range::GpaRange;
use ebb_core::release::Release;
use ebb_vmm::guest_memory::{ArenaSetup, GuestMemory, Setup};
use ebb_vmm::kvm::KickTable;
use ebb_vmm::memory::Backing;
use ebb_vmm::reclaim::ReclaimTuning;

pub const MIB: u64 = 1 << 20;
/// What addresses are taken from: RAM, the hole, RAM, and nothing.
pub const REACH_MIB: u64 = 26;
/// The arena: 16 granules of 2 MiB, the first of which holds the table.
pub const ARENA: u64 = 1 << 32;
pub const TABLE: u64 = ARENA + 4096;
pub const GRANULE: u64 = 2 * MIB;
pub const GRANULES: u64 = 16;

pub fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).expect("a range of pages")
}

/// Addresses of the RAM.
pub fn ram() -> Vec<GpaRange> {
    vec![range(0, 8 * MIB), range(16 * MIB, 24 * MIB)]
}

/// The memory. A guest lies in any case, so what it says of its kernel is read, too.
pub fn memory() -> Arc<GuestMemory> {
    let setup = Setup {
        backing: Backing::default(),
        ram: ram(),
        arenas: vec![ArenaSetup {
            id: "arena".to_owned(),
            gpa: range(ARENA, ARENA + GRANULES * GRANULE),
            granule: GRANULE,
        }],
        tuning: ReclaimTuning::default(),
        reported: Release::Discard,
        strict: false,
        free_pages: true,
        restored: None,
    };
    let ram = Arc::new(setup.map().expect("memory can be mapped"));
    let memory = GuestMemory::new(&setup, ram, 1, &Arc::new(KickTable::new(1)));
    Arc::new(memory.expect("arenas can be set up"))
}
