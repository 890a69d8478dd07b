//! Somebody else on the host, who holds so much memory that the rest is as little as wanted.

use ebb_harness::error::Result;
use ebb_harness::host::meminfo;
use ebb_harness::size::MIB;

/// What is taken or given back at a time.
const PIECE: u64 = 16 * MIB;

/// Memory that is held: touched, so that the host has given it.
#[derive(Default)]
pub struct Neighbour(Vec<Vec<u8>>);

impl Neighbour {
    /// Holds so much that a machine can have `room` bytes, what it uses now (`used`) included.
    pub fn leave(&mut self, room: u64, used: impl Fn() -> Result<u64>) -> Result<()> {
        loop {
            let there = meminfo("MemAvailable")? + used()?;
            if there > room + PIECE {
                self.0.push(vec![1; PIECE as usize]);
            } else if there < room && self.0.pop().is_some() {
                continue;
            } else {
                return Ok(());
            }
        }
    }
}
