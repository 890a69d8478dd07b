//! Looks for what another guest has left in this one's memory, and leaves something there for the next.

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs::Transport;
use ebb_hypercall_abi::{Operation, PAGE_SIZE};

use crate::calls::Calls;
use crate::cpu::{Ram, send};
use crate::records::WordMemory;
use crate::{Parameters, map, marker};

/// The upper half of each word that is left.
const MARK: u64 = 0xa11e_d5ec;

/// Sends [`marker::SCANNED`], the number of words with the mark, and that of words that are not 0. Then fills all memory
/// with marks, frees every second 64 KiB of it lazily, and sends [`marker::READY`].
pub fn run(ram: &mut Ram, parameters: &Parameters) {
    let memory = map::TEST_MEMORY..parameters.ram;
    let (mut marked, mut used) = (0, 0);
    for at in memory.clone().step_by(8) {
        let word = ram.load(at);
        marked += u64::from(word >> 32 == MARK);
        used += u64::from(word != 0);
    }
    send(marker::SCANNED);
    send(marked);
    send(used);
    for at in memory.clone().step_by(8) {
        ram.store(at, MARK << 32 | at);
    }
    const PAGES: u64 = 16;
    for at in memory.step_by(2 * (PAGES * PAGE_SIZE) as usize) {
        // What is refused stays in use, with its marks.
        let _ = Calls::one(Transport::Port(PORT), Operation::LazyFree, at, PAGES);
    }
    send(marker::READY);
}
