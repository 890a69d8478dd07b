//! Calls to the monitor.

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Attributes, Error, Operation, Success};

use crate::cpu::Ram;
use crate::map;
use crate::random::Random;
use crate::slots::Slot;
use crate::stamp::Memory;

/// Most ranges of a batch here.
pub const BATCH: usize = 64;

/// A vCPU's way to the monitor.
#[derive(Clone, Debug)]
pub struct Calls {
    ram: Ram,
    block: u64,
    instruction: Transport,
}

impl Calls {
    /// For the vCPU `index`; without the interface's instruction, the port serves for both.
    #[must_use]
    pub fn new(ram: Ram, index: u64) -> Self {
        let found = stubs::discover().and_then(|interface| Transport::choose(interface, true));
        Self {
            ram,
            block: map::BLOCKS + index * map::BLOCK_SIZE,
            instruction: found.unwrap_or(Transport::Port(PORT)),
        }
    }

    /// One of the two transports, by chance.
    pub const fn transport(&self, random: &mut Random) -> Transport {
        match random.below(2) {
            0 => self.instruction,
            _ => Transport::Port(PORT),
        }
    }

    /// A call with any numbers; its status.
    #[must_use]
    pub fn raw(by: Transport, gpa: u64, pages: u64, attributes: u64) -> i64 {
        // SAFETY: all of the machine is this guest's, which answers for what it frees; privilege level 0.
        unsafe {
            match by {
                Transport::Vmcall => stubs::vmcall(gpa, pages, attributes),
                Transport::Vmmcall => stubs::vmmcall(gpa, pages, attributes),
                Transport::Port(at) => stubs::port(gpa, pages, attributes, at.into()),
            }
        }
    }

    /// A call on a range.
    ///
    /// # Errors
    /// The monitor's.
    pub fn one(by: Transport, what: Operation, gpa: u64, pages: u64) -> Result<Success, Error> {
        let attributes = Attributes::new(what).encode();
        ebb_hypercall_abi::status::decode(Self::raw(by, gpa, pages, attributes))
    }

    /// A batch of `slots`, at least one. An answer that says that not all were gone through is
    /// [`Error::Fault`].
    ///
    /// # Errors
    /// The monitor's.
    pub fn batch(
        &mut self,
        by: Transport,
        what: Operation,
        slots: &[Slot],
    ) -> Result<Success, Error> {
        let count = slots.len() as u64;
        self.ram.store(self.block, count);
        self.ram.store(self.block + 8, 0);
        for (index, slot) in slots.iter().enumerate() {
            let at = self.block + 16 + 16 * index as u64;
            self.ram.store(at, slot.gpa);
            self.ram.store(at + 8, slot.pages.into());
        }
        let result = Self::one(by, what, self.block, 1);
        if self.ram.load(self.block) != count << 32 | count {
            return Err(Error::Fault);
        }
        result
    }

    /// Pages of the machine that are lazily free and with the guest's content, and those that the host has taken.
    ///
    /// # Errors
    /// The monitor's.
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
