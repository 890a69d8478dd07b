//! Scripts for [`crate::freestanding`]: written on the host, run by the guest one by one, on command.

use ebb_payload_guest::map;
pub use ebb_payload_guest::script::{Kind, PASSED, Step};

/// Steps and data of all scripts of one guest.
#[derive(Clone, Debug)]
pub struct Scripts {
    /// What is loaded at [`map::SCRIPTS`]: the addresses of the scripts first.
    bytes: Vec<u8>,
    count: usize,
}

/// One script, while it is written.
#[derive(Debug)]
pub struct Script<'a> {
    scripts: &'a mut Scripts,
    steps: Vec<Step>,
}

/// Maximum number of scripts: the guest is told the number in one byte.
pub const MAX_SCRIPTS: usize = 256;

impl Default for Scripts {
    fn default() -> Self {
        Self {
            bytes: vec![0; MAX_SCRIPTS * 8],
            count: 0,
        }
    }
}

impl Scripts {
    /// Adds a script. Returns its number.
    ///
    /// # Panics
    /// If there are too many scripts, or too much of them.
    pub fn add(&mut self, write: impl FnOnce(&mut Script<'_>)) -> u8 {
        let number = u8::try_from(self.count).expect("too many scripts");
        let at = self.write(write);
        self.bytes[self.count * 8..][..8].copy_from_slice(&at.to_le_bytes());
        self.count += 1;
        number
    }

    /// Writes a script that is not run by itself. Returns its address.
    fn write(&mut self, write: impl FnOnce(&mut Script<'_>)) -> u64 {
        let mut script = Script {
            scripts: self,
            steps: Vec::new(),
        };
        write(&mut script);
        let mut steps = std::mem::take(&mut script.steps);
        steps.push(Step::default());
        let words = steps.iter().flat_map(|step| step.to_words());
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        self.place(&bytes, 8)
    }

    fn place(&mut self, bytes: &[u8], align: usize) -> u64 {
        let offset = self.bytes.len().next_multiple_of(align);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(bytes);
        let at = map::SCRIPTS + offset as u64;
        // The last pages are those of random batches.
        assert!(
            at + (bytes.len() as u64) < map::TEST_MEMORY - 0x8000,
            "too much data"
        );
        at
    }

    /// What belongs at [`map::SCRIPTS`].
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Script<'_> {
    /// Puts bytes into the guest's memory, at a multiple of `align`. Returns their address.
    pub fn data(&mut self, bytes: &[u8], align: usize) -> u64 {
        self.scripts.place(bytes, align)
    }

    /// The same with words of 64 bits.
    pub fn words(&mut self, words: &[u64], align: usize) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.data(&bytes, align)
    }

    /// A step.
    pub fn step(&mut self, kind: Kind, at: u64, width: u64, (a, b): (u64, u64)) -> &mut Self {
        self.steps.push(Step {
            kind: kind as u64,
            at,
            width,
            a,
            b,
            times: 1,
            stride: 0,
        });
        self
    }

    /// Does the last step so often, with `stride` more each time as its address, port or register.
    pub fn times(&mut self, times: u64, stride: u64) -> &mut Self {
        if let Some(last) = self.steps.last_mut() {
            (last.times, last.stride) = (times, stride);
        }
        self
    }

    /// Writes to a port.
    pub fn output(&mut self, port: u64, width: u64, value: u64) -> &mut Self {
        self.step(Kind::Output, port, width, (value, 0))
    }

    /// Reads a port.
    pub fn input(&mut self, port: u64, width: u64) -> &mut Self {
        self.step(Kind::Input, port, width, (0, 0))
    }

    /// Writes to an address.
    pub fn store(&mut self, at: u64, width: u64, value: u64) -> &mut Self {
        self.step(Kind::Store, at, width, (value, 0))
    }

    /// Reads an address.
    pub fn load(&mut self, at: u64, width: u64) -> &mut Self {
        self.step(Kind::Load, at, width, (0, 0))
    }

    /// A hypercall by port.
    pub fn call(&mut self, gpa: u64, pages: u64, attributes: u64) -> &mut Self {
        self.step(Kind::PortCall, gpa, 0, (pages, attributes))
    }

    /// Writes a model-specific register.
    pub fn write_msr(&mut self, register: u64, value: u64) -> &mut Self {
        self.step(Kind::WriteMsr, register, 0, (value, 0))
    }

    /// Reads a model-specific register.
    pub fn read_msr(&mut self, register: u64) -> &mut Self {
        self.step(Kind::ReadMsr, register, 0, (0, 0))
    }

    /// Calls machine code.
    pub fn run(&mut self, code: &[u8]) -> &mut Self {
        let at = self.data(code, 16);
        self.step(Kind::Call, at, 0, (0, 0))
    }

    /// The last result must be `value`.
    pub fn expect(&mut self, value: u64) -> &mut Self {
        self.expect_bits(u64::MAX, value)
    }

    /// The last result must be `value` in the bits of `mask`.
    pub fn expect_bits(&mut self, mask: u64, value: u64) -> &mut Self {
        self.step(Kind::Expect, 0, 0, (mask, value))
    }

    /// The last step must have faulted.
    pub fn expect_fault(&mut self) -> &mut Self {
        self.step(Kind::ExpectFault, 0, 0, (0, 0))
    }

    /// Waits until what is read at `at` is `value` in the bits of `mask`.
    pub fn wait(&mut self, at: u64, width: u64, mask: u64, value: u64) -> &mut Self {
        self.step(Kind::Wait, at, width, (mask, value))
    }

    /// From now on the second vCPU does this, again and again.
    pub fn beside(&mut self, write: impl FnOnce(&mut Script<'_>)) -> &mut Self {
        let at = self.scripts.write(write);
        self.step(Kind::Side, at, 0, (0, 0))
    }

    /// The second vCPU stops what it does.
    pub fn alone(&mut self) -> &mut Self {
        self.step(Kind::Side, 0, 0, (0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_where_the_guest_looks_for_them() {
        let mut scripts = Scripts::default();
        let mut data = 0;
        for number in 0..3u64 {
            let added = scripts.add(|script| {
                data = script.words(&[number], 4096);
                script.load(data, 8).expect(number);
            });
            assert_eq!(u64::from(added), number);
        }
        let bytes = scripts.bytes();
        let word = |at: u64| {
            let at = (at - map::SCRIPTS) as usize;
            bytes[at..]
                .first_chunk()
                .map(|raw| u64::from_le_bytes(*raw))
        };
        let last = word(map::SCRIPTS + 16).unwrap();
        assert_eq!((data % 4096, word(data)), (0, Some(2)));
        assert_eq!(word(last), Some(Kind::Load as u64));
        assert_eq!(word(last + 8), Some(data));
        assert_eq!(word(last + 56), Some(Kind::Expect as u64));
        assert_eq!(word(last + 112), Some(Kind::End as u64));
    }
}
