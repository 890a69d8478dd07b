//! The configuration space of a function (PCI 3.0, 6.1).

/// Bytes of it.
const SIZE: usize = 256;
/// Offsets (PCI 3.0, 6.1).
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
/// Offset of the command register.
const COMMAND: usize = 0x04;
/// Its bits: answer to memory accesses, access memory, no interrupt by a line.
const COMMAND_BITS: [u8; 2] = [0x06, 0x04];

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// Registers, and which of their bits the guest may change.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes, and where its offset is to be written.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// The registers of a device that has no capabilities, base addresses and interrupt lines yet.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        let Identity {
            vendor,
            device,
            class,
            revision,
        } = identity;
        space.set(0x00, &vendor.to_le_bytes());
        space.set(0x02, &device.to_le_bytes());
        space.set(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        // The subsystem.
        space.set(0x2c, &vendor.to_le_bytes());
        space.set(0x2e, &device.to_le_bytes());
        space.allow(COMMAND, &COMMAND_BITS);
        // The interrupt line is a note for the driver, and means nothing.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Sets registers from offset `at` on.
    ///
    /// # Panics
    /// They go beyond the end: a mistake of ours.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest change these bits from offset `at` on.
    ///
    /// # Panics
    /// They go beyond the end: a mistake of ours.
    pub fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Adds a capability: `body` is what follows its number and the link. Returns its offset.
    ///
    /// # Panics
    /// There is no room: a mistake of ours.
    pub fn add_capability(&mut self, number: u8, body: &[u8]) -> usize {
        const HAS_CAPABILITIES: u8 = 1 << 4;
        let at = self.next;
        self.bytes[STATUS] |= HAS_CAPABILITIES;
        self.bytes[self.link] = at as u8;
        self.bytes[at] = number;
        self.set(at + 2, body);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// The function answers to accesses of its memory.
    #[must_use]
    pub const fn memory_enabled(&self) -> bool {
        self.bytes[COMMAND] & 2 != 0
    }

    /// `N` bytes from offset `at` on.
    ///
    /// # Panics
    /// They go beyond the end: a mistake of ours.
    #[must_use]
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|n| self.bytes[at + n])
    }

    /// Reads registers. Beyond the end there are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = *self.bytes.get(at).unwrap_or(&0xff);
        }
    }

    /// All registers.
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes registers, as far as the guest may.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..SIZE).zip(data) {
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | byte & writable;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_0000,
        revision: 1,
    };

    #[test]
    fn only_what_is_allowed_changes() {
        let mut space = ConfigSpace::new(IDENTITY);
        let mut before = [0; SIZE];
        space.read(0, &mut before);
        for at in 0..SIZE + 8 {
            space.write(at, &[0xff; 4]);
        }
        let mut after = [0; SIZE];
        space.read(0, &mut after);
        let changed: Vec<usize> = (0..SIZE).filter(|at| before[*at] != after[*at]).collect();
        assert_eq!(changed, [0x04, 0x05, 0x3c]);
        assert_eq!(after[4..6], [6, 4]);
        let mut beyond = [0; 4];
        space.read(SIZE - 1, &mut beyond);
        assert_eq!(beyond, [0, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut space = ConfigSpace::new(IDENTITY);
        let first = space.add_capability(9, &[1; 14]);
        let second = space.add_capability(0x11, &[2; 9]);
        let third = space.add_capability(9, &[3; 2]);
        let at = |offset: usize| space.get::<1>(offset)[0];
        assert_eq!((first, second, third), (0x40, 0x50, 0x5c));
        assert_eq!(
            [0x34, first + 1, second + 1, third + 1].map(at),
            [0x40, 0x50, 0x5c, 0]
        );
        assert_eq!(at(6) & 0x10, 0x10);
        assert_eq!(space.get::<4>(second), [0x11, 0x5c, 2, 2]);
    }
}
