//! Guests for tests, without an operating system.
//!
//! A [`Program`] is a list of steps: hypercalls, loads, stores. It is written as an ELF file that `ebb run --kernel` starts
//! in 64-bit mode. The guest runs the steps in order, writes the result of each to the serial port, and powers off. Its
//! hypercalls use copies of the stubs of `ebb-hypercall-abi`.
//!
//! [`freestanding`] is a guest in Rust, and [`busy`] and [`use_after_free`] are guests for single purposes.

pub mod busy;
mod code;
mod elf;
pub mod freestanding;
pub mod script;
pub mod use_after_free;

use std::io;
use std::path::Path;

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::{Attributes, Operation, PAGE_SIZE};

/// Programs may use all memory from this address on. Below it lie the payload's code and tables.
pub const FREE_START: u64 = 8 << 20;

/// Where the guest is entered, in 64-bit mode.
pub const ENTRY: u64 = code::BASE;

/// Number of ranges that [`Program::pairs`] uses in turn.
pub const PAIR_RANGES: u64 = 1024;

/// Bytes of a step's result on the serial port.
pub const RESULT_SIZE: usize = 8;

/// How a hypercall is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// By VMCALL.
    Vmcall,
    /// By VMMCALL.
    Vmmcall,
    /// By reading the port.
    Port,
}

/// A result register of CPUID.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Index of a step and of its result.
pub type Step = usize;

/// The steps and the initial memory of a guest.
#[derive(Clone, Debug, Default)]
pub struct Program {
    steps: Vec<[u64; 5]>,
    data: Vec<(u64, Vec<u8>)>,
    user: bool,
}

impl Program {
    /// A guest that runs its steps at privilege level 0.
    #[must_use]
    pub fn kernel() -> Self {
        Self::default()
    }

    /// A guest that runs its steps at privilege level 3, with all I/O ports open.
    #[must_use]
    pub fn user() -> Self {
        Self {
            user: true,
            ..Self::default()
        }
    }

    /// Puts bytes into memory before the guest starts.
    pub fn data(&mut self, gpa: u64, bytes: Vec<u8>) {
        self.data.push((gpa, bytes));
    }

    /// Puts 64-bit numbers into memory before the guest starts.
    pub fn words(&mut self, gpa: u64, words: &[u64]) {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.data(gpa, bytes);
    }

    /// A hypercall with arbitrary arguments. The result is its status.
    pub fn raw_call(&mut self, by: Transport, gpa: u64, pages: u64, attributes: u64) -> Step {
        self.repeated_call(by, [gpa, pages, attributes], 1)
    }

    /// A hypercall. The result is its status.
    pub fn call(&mut self, by: Transport, what: Operation, gpa: u64, pages: u64) -> Step {
        self.raw_call(by, gpa, pages, Attributes::new(what).encode())
    }

    /// Makes the same hypercall `times` times, at least once. The result is the last status.
    pub fn repeated_call(&mut self, by: Transport, arguments: [u64; 3], times: u64) -> Step {
        let kind = match by {
            Transport::Vmcall => code::VMCALL,
            Transport::Vmmcall => code::VMMCALL,
            Transport::Port => code::PORT_CALL,
        };
        let [gpa, pages, attributes] = arguments;
        self.push([kind, gpa, pages, attributes, times.max(1)])
    }

    /// `times` times, at least once: LAZY_FREE of a range of `pages`, REUSE of the same range, and a store to it.
    ///
    /// [`PAIR_RANGES`] ranges from `gpa` on are used in turn, with gaps as long as the ranges. The result is the last status.
    pub fn pairs(&mut self, by: Transport, (gpa, pages): (u64, u64), times: u64) -> Step {
        let stub = match by {
            Transport::Vmcall => code::VMCALL_STUB,
            Transport::Vmmcall => code::VMMCALL_STUB,
            Transport::Port => code::PORT_STUB,
        };
        self.push([code::PAIR, gpa, pages, stub, times.max(1)])
    }

    /// Stores `value` at `gpa`.
    pub fn store(&mut self, gpa: u64, value: u64) -> Step {
        self.push([code::STORE, gpa, value, 0, 1])
    }

    /// The result is the word at `gpa`.
    pub fn load(&mut self, gpa: u64) -> Step {
        self.push([code::LOAD, gpa, 0, 0, 1])
    }

    /// Stores `value` plus the page's address at the start of each page.
    pub fn fill(&mut self, gpa: u64, pages: u64, value: u64) -> Step {
        self.push([code::FILL, gpa, pages, value, 1])
    }

    /// The result is the number of pages that still begin as [`Program::fill`] has left them.
    pub fn count_filled(&mut self, gpa: u64, pages: u64, value: u64) -> Step {
        self.push([code::COUNT_FILLED, gpa, pages, value, 1])
    }

    /// The result is the number of pages that begin with `value`.
    pub fn count_equal(&mut self, gpa: u64, pages: u64, value: u64) -> Step {
        self.push([code::COUNT_EQUAL, gpa, pages, value, 1])
    }

    /// The result is a register after CPUID.
    pub fn cpuid(&mut self, leaf: u32, register: Register) -> Step {
        let shift = register as u64;
        self.push([code::CPUID, leaf.into(), shift, 0, 1])
    }

    /// Repeats QUERY with the block at `gpa`, by port, until word number `word` of the block is at least `value`.
    pub fn query_until(&mut self, gpa: u64, word: u64, value: u64) -> Step {
        self.push([code::QUERY_UNTIL, gpa, value, word * 8, 1])
    }

    /// Reads one byte from the hypercall port. Only 32-bit reads are hypercalls.
    pub fn input_byte(&mut self) -> Step {
        self.push([code::INPUT_BYTE, PORT.into(), 0, 0, 1])
    }

    /// Writes 32 bits to the hypercall port. Only reads are hypercalls.
    pub fn output(&mut self, value: u32) -> Step {
        self.push([code::OUTPUT, PORT.into(), value.into(), 0, 1])
    }

    /// Writes one byte to any port, `times` times, at least once.
    pub fn output_byte(&mut self, port: u16, value: u8, times: u64) -> Step {
        self.push([
            code::OUTPUT_BYTE,
            port.into(),
            value.into(),
            0,
            times.max(1),
        ])
    }

    /// Ends in a triple fault: the step is none.
    pub fn crash(&mut self) {
        self.push([u64::MAX, 0, 0, 0, 1]);
    }

    /// The result is the time stamp counter.
    pub fn time(&mut self) -> Step {
        self.push([code::TIME, 0, 0, 0, 1])
    }

    /// Atomically stores `new` at `gpa` if the word there is `old`. The result is the word before.
    pub fn compare_exchange(&mut self, gpa: u64, old: u64, new: u64) -> Step {
        self.push([code::COMPARE_EXCHANGE, gpa, old, new, 1])
    }

    /// Waits until the word at `gpa` is `value`.
    pub fn wait_for(&mut self, gpa: u64, value: u64) -> Step {
        self.push([code::WAIT_FOR, gpa, value, 0, 1])
    }

    /// Writes pseudo-random words at pseudo-random places among the `words` words at `gpa`: `times` times 131,072. Every other
    /// word is below 4, a valid granule state. `words` is a power of two.
    pub fn write_random(&mut self, gpa: u64, words: u64, times: u64) -> Step {
        self.push([code::WRITE_RANDOM, gpa, words - 1, 1, times.max(1)])
    }

    /// Halts forever. Needs privilege level 0.
    pub fn halt(&mut self) {
        self.push([code::HALT, 0, 0, 0, 1]);
    }

    /// Number of results that the guest writes.
    #[must_use]
    pub const fn results(&self) -> usize {
        self.steps.len()
    }

    fn push(&mut self, step: [u64; 5]) -> Step {
        self.steps.push(step);
        self.steps.len() - 1
    }

    /// The initial memory of the guest, as addresses and bytes. It is entered at [`ENTRY`].
    ///
    /// # Errors
    /// `InvalidInput` if there are too many steps.
    pub fn segments(&self) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let steps = self.steps.as_flattened();
        if steps.len() as u64 * 8 >= FREE_START - code::PROGRAM {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut segments = code::segments(self.user);
        let mut program: Vec<u8> = steps.iter().flat_map(|word| word.to_le_bytes()).collect();
        // A step of kind 0 ends the program.
        program.extend([0; 8]);
        segments.push((code::PROGRAM, program));
        segments.extend(self.data.iter().cloned());
        Ok(segments)
    }

    /// Writes the guest as an ELF file.
    ///
    /// # Errors
    /// Those of [`Program::segments`] and of writing the file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, elf::file(ENTRY, &self.segments()?))
    }
}

/// The results in the serial port's output.
#[must_use]
pub fn results(serial: &[u8]) -> Vec<u64> {
    let (results, _) = serial.as_chunks::<RESULT_SIZE>();
    results
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .collect()
}

/// The words of a batch block for these ranges, each an address and a number of pages.
#[must_use]
pub fn batch(ranges: &[(u64, u64)]) -> Vec<u64> {
    let header = [ranges.len() as u64, 0];
    let ranges = ranges.iter().flat_map(|&(gpa, pages)| [gpa, pages]);
    header.into_iter().chain(ranges).collect()
}

/// Address of page `number` after [`FREE_START`].
#[must_use]
pub const fn page(number: u64) -> u64 {
    FREE_START + number * PAGE_SIZE
}
