//! The cases, each with what the guest does. All leave the machine alive but those in [`ends`].

mod arena;
mod balloon;
mod block;
mod calls;
pub mod ends;
mod memory;
pub mod net;
pub mod pci;
mod ports;
mod processor;
mod queues;
pub mod races;
mod transport;
pub mod vsock;

use ebb_payload::script::Script;

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name; that of another monitor's bug where it is one.
    pub name: &'static str,
    /// What the guest does.
    pub does: &'static str,
    /// The steps, with what the guest must see.
    pub write: fn(&mut Script<'_>),
    /// The exit code, if it ends the machine.
    pub ends: Option<i32>,
}

/// A case that the machine survives.
pub const fn case(name: &'static str, does: &'static str, write: fn(&mut Script<'_>)) -> Case {
    Case {
        name,
        does,
        write,
        ends: None,
    }
}

/// What the disks hold.
pub mod disk {
    use super::block::{FIRST_WRITTEN, SECTORS};

    /// Bytes at the start that no case writes.
    pub const KEPT: u64 = FIRST_WRITTEN << 9;

    /// What they hold at first: numbers of which none is that of a page.
    pub fn content() -> Vec<u8> {
        let words = (0..(SECTORS << 9) / 4).map(|word| 0x8000_0000 | word as u32);
        words.flat_map(u32::to_le_bytes).collect()
    }
}

/// The arena that the cases expect.
pub const fn arena_options() -> &'static str {
    arena::OPTIONS
}

/// All that leave the machine alive and take one vCPU.
pub fn survived() -> impl Iterator<Item = &'static Case> {
    let all: [&[Case]; 10] = [
        calls::CASES,
        arena::CASES,
        transport::CASES,
        queues::CASES,
        block::CASES,
        balloon::CASES,
        ports::CASES,
        processor::CASES,
        memory::CASES,
        vsock::CASES,
    ];
    all.into_iter().flatten()
}
