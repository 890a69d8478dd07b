//! A chain of descriptors: each is read once, into a buffer list that is reused for the next chain.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// One buffer of a chain: guest-physical address and length in bytes, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    addr: u64,
    len: u32,
}

/// A chain violates the rules of virtio 1.3, 2.7. The buffers before the fault are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The head is not an index of the descriptor table.
    #[error("descriptor head {head} is outside the queue of {size}")]
    Head {
        /// What the driver made available.
        head: u16,
        /// Entries in the descriptor table.
        size: u16,
    },
    /// A next index or an address outside its bounds, an indirect table in another one, or more than 4 GiB.
    #[error("the chain from descriptor {head} leads nowhere after {walked} descriptors")]
    Broken {
        /// First descriptor.
        head: u16,
        /// Number of valid descriptors before it.
        walked: u16,
    },
    /// More descriptors than the queue has: probably a loop.
    #[error("the chain from descriptor {head} has more than {limit} descriptors")]
    TooLong {
        /// First descriptor.
        head: u16,
        /// Maximum length of a chain.
        limit: u16,
    },
    /// A readable buffer after a writable one.
    #[error("the chain from descriptor {head} has a readable buffer after a writable one")]
    Order {
        /// First descriptor.
        head: u16,
    },
}

/// A chain of buffers. Reused from chain to chain, so that serving a queue allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// Room for chains of up to `limit` descriptors.
    #[must_use]
    pub fn with_capacity(limit: u16) -> Self {
        Self {
            head: 0,
            readable: Vec::with_capacity(limit.into()),
            writable: Vec::with_capacity(limit.into()),
        }
    }

    /// Index of the first descriptor: what goes into the used ring.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// Reads `descriptors`, at most `limit` of them, each once.
    ///
    /// # Errors
    /// [`ChainFault`]; the buffers before the fault are kept.
    pub(super) fn load(
        &mut self,
        mut descriptors: DescriptorChain<&GuestMemoryMmap>,
        limit: u16,
    ) -> Result<(), ChainFault> {
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut walked = 0;
        let mut more = true;
        while more {
            if walked == limit {
                return Err(ChainFault::TooLong { head, limit });
            }
            let descriptor = descriptors
                .next()
                .ok_or(ChainFault::Broken { head, walked })?;
            walked += 1;
            more = descriptor.has_next();
            let segment = Segment {
                addr: descriptor.addr().0,
                len: descriptor.len(),
            };
            if segment.len == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return Err(ChainFault::Order { head });
            }
        }
        Ok(())
    }

    /// The buffers that the device may write, as address and length, not checked against guest memory: for devices to which
    /// a buffer is itself the message.
    pub fn writable_buffers(&self) -> impl Iterator<Item = (u64, u32)> {
        self.writable
            .iter()
            .map(|segment| (segment.addr, segment.len))
    }

    /// The buffers that the device may read, in the same way.
    pub fn readable_buffers(&self) -> impl Iterator<Item = (u64, u32)> {
        self.readable
            .iter()
            .map(|segment| (segment.addr, segment.len))
    }

    /// What the device may read.
    #[must_use]
    pub fn readable<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Cursor<'a> {
        Cursor::new(memory, &self.readable)
    }

    /// What the device may write.
    #[must_use]
    pub fn writable<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Cursor<'a> {
        Cursor::new(memory, &self.writable)
    }
}

/// Bytes could not be moved between a chain and the device.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A buffer lies outside of guest memory.
    #[error("the buffer {addr:#x}+{len:#x} is not guest memory")]
    NotMemory {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: usize,
    },
    /// The buffers are too small.
    #[error("the buffers hold {available} bytes of the {wanted} that are due")]
    Short {
        /// Bytes left.
        available: u64,
        /// Bytes needed.
        wanted: u64,
    },
}

/// A position in the readable or in the writable buffers of a chain.
#[derive(Clone)]
pub struct Cursor<'a> {
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    /// Bytes of the first segment that are done.
    done: u32,
    remaining: u64,
}

impl<'a> Cursor<'a> {
    fn new(memory: &'a GuestMemoryMmap, segments: &'a [Segment]) -> Self {
        // At most u16::MAX segments of less than 4 GiB each: no overflow.
        let remaining = segments.iter().map(|segment| u64::from(segment.len)).sum();
        Self {
            memory,
            segments,
            done: 0,
            remaining,
        }
    }

    /// Number of bytes from here to the end.
    #[must_use]
    pub const fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Splits off the last `count` bytes as a cursor of their own; `None` if there are fewer.
    #[must_use]
    pub fn split_tail(&mut self, count: u64) -> Option<Self> {
        let front = self.remaining.checked_sub(count)?;
        let mut tail = self.clone();
        tail.skip(front);
        self.remaining = front;
        Some(tail)
    }

    /// Leaves out what comes after the next `count` bytes.
    pub fn truncate(&mut self, count: u64) {
        self.remaining = self.remaining.min(count);
    }

    /// The memory of the next bytes, which are not moved yet; `None` at the end.
    ///
    /// # Errors
    /// [`ReadError::NotMemory`].
    pub fn next_piece(&self) -> Result<Option<VolatileSlice<'a>>, ReadError> {
        self.slice(usize::MAX)
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the chain.
    ///
    /// # Errors
    /// [`ReadError::NotMemory`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..)
            && let Some((addr, len)) = self.piece(rest.len())
            && let Some(target) = rest.get_mut(..len)
        {
            self.memory
                .read_slice(target, GuestAddress(addr))
                .map_err(|_| ReadError::NotMemory { addr, len })?;
            self.skip(len as u64);
            filled += len;
        }
        Ok(filled)
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`ReadError::NotMemory`] or [`ReadError::Short`].
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.enough(buffer.len())?;
        self.read(buffer).map(drop)
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// [`ReadError::NotMemory`] or [`ReadError::Short`].
    pub fn write_all(&mut self, mut data: &[u8]) -> Result<(), ReadError> {
        self.enough(data.len())?;
        while let Some((addr, len)) = self.piece(data.len())
            && let Some((now, later)) = data.split_at_checked(len)
        {
            self.memory
                .write_slice(now, GuestAddress(addr))
                .map_err(|_| ReadError::NotMemory { addr, len })?;
            self.skip(len as u64);
            data = later;
        }
        Ok(())
    }

    fn enough(&self, wanted: usize) -> Result<(), ReadError> {
        let (available, wanted) = (self.remaining, wanted as u64);
        if available < wanted {
            return Err(ReadError::Short { available, wanted });
        }
        Ok(())
    }

    /// Address and length of the next piece of one buffer, at most `limit` bytes.
    fn piece(&self, limit: usize) -> Option<(u64, usize)> {
        let first = self.segments.first()?;
        let left = u64::from(first.len.saturating_sub(self.done)).min(self.remaining);
        let len = usize::try_from(left).map_or(limit, |left| left.min(limit));
        // An address that wraps around is not guest memory, and the access fails.
        let addr = first.addr.saturating_add(u64::from(self.done));
        (len > 0).then_some((addr, len))
    }

    /// The next piece as memory. If it crosses into another region, only the part in the first.
    fn slice(&self, limit: usize) -> Result<Option<VolatileSlice<'a>>, ReadError> {
        let Some((addr, len)) = self.piece(limit) else {
            return Ok(None);
        };
        let first = self.memory.get_slices(GuestAddress(addr), len).next();
        first
            .transpose()
            .map_err(|_| ReadError::NotMemory { addr, len })
    }

    /// Address and length of the next piece of one buffer, at most `limit` bytes, which is then done; `None` at the end. It is
    /// not checked against guest memory.
    pub fn take_piece(&mut self, limit: usize) -> Option<(u64, usize)> {
        let piece = self.piece(limit)?;
        self.skip(piece.1 as u64);
        Some(piece)
    }

    /// Goes on by `count` bytes, or to the end.
    pub fn skip(&mut self, mut count: u64) {
        self.remaining = self.remaining.saturating_sub(count);
        while let Some((first, rest)) = self.segments.split_first() {
            let left = u64::from(first.len.saturating_sub(self.done));
            if count < left {
                // Less than what is left of a u32.
                self.done = self.done.saturating_add(u32::try_from(count).unwrap_or(0));
                return;
            }
            count = count.saturating_sub(left);
            self.segments = rest;
            self.done = 0;
        }
    }
}
