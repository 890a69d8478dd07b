//! Random accesses and calls: hypercalls, ports, memory-mapped registers, model-specific registers, and queues.
//!
//! The guest must not hit its own code, or the figure would say little. So all addresses are no RAM, or in the memory that
//! scripts free and reuse. Half of that is read by devices, and the vCPUs write nothing there that names a page of the code,
//! whatever a device takes it for; the other half is written by devices and KVM. What would end the machine is left out:
//! those ports, and interrupts that start or stop vCPUs.

use ebb_hypercall_abi::call::MAGIC;
use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs::Transport;

use crate::calls::Calls;
use crate::cpu::Ram;
use crate::interpreter::instruction;
use crate::random::Random;
use crate::records::WordMemory;
use crate::{guarded, map};

/// The windows of virtio devices, of which there are at most so many.
const WINDOWS: u64 = 0xd000_0000;
const DEVICES: u64 = 4;

/// The block of batches: the last pages below the memory that is freed. No device writes here, so a batch is what was
/// written last, and frees no code.
const BATCH: u64 = map::TEST_MEMORY - 4 * 4096;

/// First ports of the devices, and how many each has.
const PORTS: [(u64, u64); 8] = [
    (0x3f8, 8),
    (0x60, 5),
    (0xcf8, 8),
    (0x510, 12),
    (0x505, 1),
    (0x600, 3),
    (PORT as u64, 4),
    (0, 0x1_0000),
];

/// Most bytes of a buffer.
const LONGEST: u64 = 0x1_0000;

/// A half of the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    /// Devices read it.
    Read,
    /// Devices and KVM write to it.
    Written,
}

struct Mischief {
    ram: Ram,
    size: u64,
    random: Random,
    instruction: Transport,
}

/// Makes `calls` of them. Returns how many did not fault.
#[must_use]
pub fn run(ram: Ram, size: u64, seed: u64, calls: u64) -> u64 {
    let mut mischief = Mischief {
        ram,
        size,
        random: Random::new(seed),
        instruction: instruction(),
    };
    (0..calls).filter(|_| !mischief.once()).count() as u64
}

impl Mischief {
    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// A number: small, a power of two, one less, or any.
    fn number(&mut self) -> u64 {
        let bit = self.below(64);
        match self.below(6) {
            0 => self.below(16),
            1 => 1 << bit,
            2 => (1 << bit) - 1,
            3 => u64::MAX - self.below(4096),
            4 => self.below(1 << 32),
            // The generator gives 56 bits.
            _ => self.below(u64::MAX) << 8 | self.below(256),
        }
    }

    /// An address that is no RAM, or in that half of the memory.
    fn address(&mut self, half: Half) -> u64 {
        let middle = self.middle();
        let inside = match half {
            // Nothing that is read from here on ends in the other half.
            Half::Read => map::TEST_MEMORY + self.below(middle - LONGEST - map::TEST_MEMORY),
            Half::Written => middle + self.below(self.size - middle),
        };
        match self.below(12) {
            0 => self.size + self.below(1 << 30) / 4096 * 4096,
            1 => self.size + self.below(8192),
            2 => WINDOWS + self.below(0x5000),
            3 => 0xc000_0000 + self.below(0x4000_0000),
            4 => (1 << 32) + self.below(1 << 40),
            5 => u64::MAX - self.below(1 << 20),
            6 => inside,
            7 => inside / 16 * 16,
            _ => inside / 4096 * 4096,
        }
    }

    const fn middle(&self) -> u64 {
        (map::TEST_MEMORY + self.size) / 2 / 4096 * 4096
    }

    fn any_half(&mut self) -> Half {
        match self.below(2) {
            0 => Half::Read,
            _ => Half::Written,
        }
    }

    /// Stores a word in the half that is read. No half of it is the number of a page of the code.
    fn store(&mut self, at: u64, word: u64) {
        let harmless = |part: u64| match part {
            16..2048 => part | 1 << 31,
            _ => part,
        };
        self.ram.store(
            at,
            harmless(word >> 32) << 32 | harmless(word & 0xffff_ffff),
        );
    }

    /// One access or call. Returns true if it faulted.
    fn once(&mut self) -> bool {
        match self.below(16) {
            0..3 => self.hypercall(),
            3..5 => self.port(),
            5..9 => self.window(),
            9 => self.queue_setup(),
            10..13 => self.queue_entry(),
            13 => self.msr(),
            14 => {
                let half = self.any_half();
                let (address, width) = (self.address(half), 1 << self.below(4));
                guarded::load(address.min(0x1_ffff_0000), width).1
            }
            _ => self.dma(),
        }
    }

    fn hypercall(&mut self) -> bool {
        let by = match self.below(2) {
            0 => self.instruction,
            _ => Transport::Port(PORT),
        };
        let operation = self.below(11);
        let flags = if self.below(8) == 0 {
            self.below(16)
        } else {
            0
        };
        let attributes = match self.below(32) {
            0 => self.number(),
            _ => MAGIC << 20 | flags << 16 | operation << 8,
        };
        let half = match operation {
            // QUERY and ARENA_INFO write an answer.
            6 | 8 => Half::Written,
            _ => self.any_half(),
        };
        let (mut gpa, mut pages) = (self.address(half), 1 + self.below(600));
        if self.below(16) == 0 {
            pages = self.number();
        }
        // Batches are read at their place, and the other calls that write are kept away from it.
        if operation == 4 || operation == 5 {
            gpa = BATCH;
            pages = 1 + self.below(4);
            self.batch();
        } else if self.below(8) == 0 && (operation == 1 || operation == 7) {
            (gpa, pages) = (0, 1);
        }
        let _ = Calls::raw(by, gpa, pages, attributes);
        false
    }

    fn batch(&mut self) {
        let count = match self.below(8) {
            0 => self.number(),
            _ => self.below(40),
        };
        self.ram.store(BATCH, count & 0xffff_ffff);
        for entry in 0..count.min(40) {
            let half = self.any_half();
            let (gpa, pages) = (self.address(half), self.below(64));
            self.ram.store(BATCH + 16 + 16 * entry, gpa);
            self.ram.store(BATCH + 24 + 16 * entry, pages);
        }
    }

    fn port(&mut self) -> bool {
        let (first, count) = PORTS[self.below(PORTS.len() as u64) as usize];
        let port = (first + self.below(count)) as u16;
        let width = 1 << self.below(3);
        let value = self.number();
        // Reset, power, and panic; and addresses for DMA, which only `dma` writes.
        let ends = [0x60..0x65, 0x505..0x506, 0x514..0x51c, 0x600..0x603];
        let touches = |range: &core::ops::Range<u16>| {
            port < range.end && port.saturating_add(width) > range.start
        };
        if self.below(2) == 0 || ends.iter().any(touches) {
            return guarded::input(port, width.into()).1;
        }
        guarded::output(port, width.into(), value).1
    }

    /// Any register of any virtio device.
    fn window(&mut self) -> bool {
        let base = WINDOWS + 0x1000 * self.below(DEVICES);
        let register = match self.below(8) {
            0 => self.below(0x1000),
            1 => 0x100 + self.below(0x20),
            _ => 4 * self.below(0x40),
        };
        let width = match self.below(6) {
            0 => 1 << self.below(4),
            _ => 4,
        };
        if self.below(3) == 0 {
            return guarded::load(base + register, width).1;
        }
        let value = match self.below(3) {
            0 => self.below(4),
            1 => self.address(Half::Written),
            _ => self.number(),
        };
        // An address would be put together of any two halves.
        let is_ring = (0x80..0xb0).contains(&register) || (0x7d..0x80).contains(&register);
        if is_ring {
            return guarded::load(base + register, width).1;
        }
        guarded::store(base + register, width, value).1
    }

    /// Resets a device, and sets its queues up as a driver does, nearly.
    fn queue_setup(&mut self) -> bool {
        let base = WINDOWS + 0x1000 * self.below(DEVICES);
        let mut faulted = false;
        let mut write = |register, value| faulted |= guarded::store(base + register, 4, value).1;
        for status in [0, 1, 3] {
            write(0x70, status);
        }
        let features = self.below(1 << 16) & self.below(1 << 16);
        for (half, value) in [(0, features << 24 & 0x3000_0000 | features & 0x37), (1, 1)] {
            write(0x24, half);
            write(0x20, value);
        }
        write(0x70, 11);
        for queue in 0..self.below(6) {
            write(0x30, queue);
            let size = 1 << self.below(8);
            write(
                0x38,
                if self.below(8) == 0 {
                    self.number()
                } else {
                    size
                },
            );
            for (ring, half) in [
                (0x80, Half::Read),
                (0x90, Half::Read),
                (0xa0, Half::Written),
            ] {
                let address = self.address(half) / 16 * 16;
                write(ring, address);
                write(ring + 4, address >> 32);
            }
            write(0x44, 1);
        }
        write(0x70, 15);
        write(0x50, self.below(6));
        faulted
    }

    /// Something like a descriptor, a request, or a part of a ring, at the start of any page. Each place is always a descriptor
    /// of the same direction, so half of one with half of another is harmless, too.
    fn queue_entry(&mut self) -> bool {
        let room = self.middle() - LONGEST - map::TEST_MEMORY;
        let page = map::TEST_MEMORY + self.below(room) / 4096 * 4096;
        let place = self.below(16);
        let at = page + 16 * place;
        let length = match self.below(4) {
            0 => self.below(LONGEST),
            1 => 16,
            _ => 512 * self.below(16),
        };
        let next = self.below(20);
        match self.below(4) {
            // Flags and index of a ring, and two of its entries.
            0 => {
                let entries = self.below(1 << 48);
                self.store(page, entries << 16 & 0x0007_0007_0007_0000 | 1 << 48);
            }
            // A request's header. Taken for a descriptor, it is no RAM.
            1 => {
                let (kind, sector) = (self.below(16), self.number());
                self.store(at / 32 * 32, 1 << 32 | kind);
                self.store(at / 32 * 32 + 8, sector);
            }
            // Readable ones, with more to come, or tables of others.
            _ if place.is_multiple_of(2) => {
                let (address, flags) = (self.address(Half::Read), self.below(8) & 5);
                self.store(at, address);
                self.store(at + 8, next << 48 | flags << 32 | length);
            }
            // Writable ones.
            _ => {
                let (address, flags) = (self.address(Half::Written), 2 | self.below(2));
                self.store(at, address);
                self.store(at + 8, next << 48 | flags << 32 | length);
            }
        }
        let notified = WINDOWS + 0x1000 * self.below(DEVICES) + 0x50;
        guarded::store(notified, 4, self.below(6)).1
    }

    /// A request for DMA to fw_cfg.
    fn dma(&mut self) -> bool {
        let at = self.address(Half::Written);
        let (control, len, to) = (self.number(), self.number(), self.address(Half::Written));
        if at < self.size - 16 && at >= map::TEST_MEMORY {
            let key = self.below(0x22) << 16;
            let control = key | control & 0x1f;
            let len = if self.below(2) == 0 {
                self.below(64)
            } else {
                len & 0xffff_ffff
            };
            let word = u64::from((control as u32).swap_bytes())
                | u64::from((len as u32).swap_bytes()) << 32;
            self.ram.store(at, word);
            self.ram.store(at + 8, to.swap_bytes());
        }
        let (high, low) = ((at >> 32) as u32, at as u32);
        let faulted = guarded::output(0x514, 4, high.swap_bytes().into()).1;
        faulted | guarded::output(0x518, 4, low.swap_bytes().into()).1
    }

    fn msr(&mut self) -> bool {
        let place = self.address(Half::Written) / 64 * 64;
        let (register, value) = match self.below(8) {
            0 => (0xc000_0082, self.number()),
            // Shared pages of KVM: bit 0 switches them on.
            1 => (0x4b56_4d00 + self.below(2), place | self.below(2)),
            2 => (0x4b56_4d03, place | self.below(2)),
            3 => (0x4b56_4d04, place | self.below(2)),
            4 => (0xc000_0081 + self.below(4), self.number()),
            5 => (0x4000_0000 + self.below(0x110), self.number()),
            6 => return guarded::read_msr(self.number() as u32).1,
            _ => return guarded::read_msr(0xc000_0080 + self.below(16) as u32).1,
        };
        guarded::write_msr(register as u32, value).1
    }
}
