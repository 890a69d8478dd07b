//! Hypercalls.

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Attributes, Error, Operation, Success};

use crate::cpu::Ram;
use crate::map;
use crate::random::Random;
use crate::ranges::TestRange;
use crate::records::WordMemory;

/// Maximum number of ranges in a batch of this guest.
pub const MAX_BATCH: usize = 64;

/// Makes the hypercalls of one vCPU.
#[derive(Clone, Debug)]
pub struct Calls {
    ram: Ram,
    block: u64,
    instruction: Transport,
}

impl Calls {
    /// For vCPU `index`. If the monitor supports no instruction, both transports are the port.
    #[must_use]
    pub fn new(ram: Ram, index: u64) -> Self {
        let found = stubs::discover().and_then(|interface| Transport::choose(interface, true));
        Self {
            ram,
            block: map::BLOCKS + index * map::BLOCK_SIZE,
            instruction: found.unwrap_or(Transport::Port(PORT)),
        }
    }

    /// One of the two transports, at random.
    pub const fn transport(&self, random: &mut Random) -> Transport {
        match random.below(2) {
            0 => self.instruction,
            _ => Transport::Port(PORT),
        }
    }

    /// A hypercall with arbitrary arguments. Returns its status.
    #[must_use]
    pub fn raw(by: Transport, gpa: u64, pages: u64, attributes: u64) -> i64 {
        // SAFETY: privilege level 0, and all memory belongs to this guest, which expects freed memory to change.
        unsafe {
            match by {
                Transport::Vmcall => stubs::vmcall(gpa, pages, attributes),
                Transport::Vmmcall => stubs::vmmcall(gpa, pages, attributes),
                Transport::Port(at) => stubs::port(gpa, pages, attributes, at.into()),
            }
        }
    }

    /// A hypercall for a range.
    ///
    /// # Errors
    /// Those of the hypercall.
    pub fn one(by: Transport, what: Operation, gpa: u64, pages: u64) -> Result<Success, Error> {
        let attributes = Attributes::new(what).encode();
        ebb_hypercall_abi::status::decode(Self::raw(by, gpa, pages, attributes))
    }

    /// A batch hypercall for at least one range.
    ///
    /// # Errors
    /// Those of the hypercall, and [`Error::Fault`] if the monitor has not processed all ranges.
    pub fn batch(
        &mut self,
        by: Transport,
        what: Operation,
        ranges: &[TestRange],
    ) -> Result<Success, Error> {
        let count = ranges.len() as u64;
        self.ram.store(self.block, count);
        self.ram.store(self.block + 8, 0);
        for (index, range) in ranges.iter().enumerate() {
            let at = self.block + 16 + 16 * index as u64;
            self.ram.store(at, range.gpa);
            self.ram.store(at + 8, range.pages.into());
        }
        let result = Self::one(by, what, self.block, 1);
        if self.ram.load(self.block) != count << 32 | count {
            return Err(Error::Fault);
        }
        result
    }

    /// Returns the number of lazily free pages that still have content, and of discarded pages.
    ///
    /// # Errors
    /// Those of the hypercall.
    pub fn query(&mut self, by: Transport) -> Result<(u64, u64), Error> {
        self.ram.store(self.block, 0);
        self.ram.store(self.block + 8, 0);
        Self::one(by, Operation::Query, self.block, 1)?;
        Ok((
            self.ram.load(self.block + 6 * 8),
            self.ram.load(self.block + 8 * 8),
        ))
    }
}
