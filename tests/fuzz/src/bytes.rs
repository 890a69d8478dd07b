//! Takes numbers from an input. At its end come zeros.

/// An input that is read from its start.
#[derive(Debug)]
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// Reads `input`.
    #[must_use]
    pub const fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    /// Nothing is left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is left.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        self.0 = later;
        let mut bytes = [0; N];
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Up to `len` bytes.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    /// An address: in `mib` MiB from 0 on, near their end, or any. Mostly of a page.
    pub fn address(&mut self, mib: u64) -> u64 {
        let (kind, number) = (self.u8(), self.u32());
        let inside = u64::from(number) % (mib << 20);
        match kind {
            0..160 => inside & !0xfff,
            160..200 => inside,
            200..220 => {
                (mib << 20)
                    .wrapping_add(u64::from(number))
                    .wrapping_sub(1 << 31)
                    & !0xfff
            }
            220..240 => u64::MAX - u64::from(number),
            _ => u64::from(number) << 32 | self.u64(),
        }
    }
}
