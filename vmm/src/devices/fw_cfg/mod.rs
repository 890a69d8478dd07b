//! fw_cfg, QEMU's configuration device (QEMU, `docs/specs/fw_cfg.rst`), with one file: `etc/vmcoreinfo`.
//!
//! Linux's driver `qemu_fw_cfg`, which udev loads for the device in the ACPI tables, writes to this file where the kernel's
//! vmcoreinfo note is (QEMU, `docs/specs/vmcoreinfo.rst`). So the monitor learns it without any software of its own in the
//! guest.

mod items;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bus::{Action, BusDevice};
use crate::devices::state::{SaveState, from_value, to_value};
use crate::faults::GuestFaults;
use crate::guest_memory::{KernelEvents, NoteSource};
use items::{NOTE_KEY, NOTE_LEN, NoteFile};

/// Offsets of the registers: the key, two bytes wide; data, one byte; and the address for DMA, in two halves of four bytes,
/// the upper one first.
const KEY: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;
/// What the address for DMA reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of the control word for DMA. Bits 31..16 are the key to select.
const ERROR: u32 = 1 << 0;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;
/// Longest read by DMA in bytes: no item is longer, and what is read beyond its end is zero.
const LONGEST_READ: usize = 4096;

/// The device: twelve ports.
pub struct FwCfg {
    memory: Arc<GuestMemoryMmap>,
    kernel: Arc<dyn KernelEvents>,
    faults: GuestFaults,
    note: NoteFile,
    key: u16,
    /// Bytes of the item that were read, written or skipped.
    offset: u64,
    dma_high: u32,
}

/// A request by DMA that is not carried out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum DmaError {
    #[error("a read of {0} bytes")]
    TooLong(u32),
    #[error("a write of {len} bytes at {offset} of item {key:#x}")]
    NotWritable { key: u16, offset: u64, len: u32 },
    #[error("a buffer at {0:#x}, which is not memory")]
    NotMemory(u64),
}

impl FwCfg {
    /// A device that reads and writes `memory`, and tells `kernel` where the note is.
    #[must_use]
    pub fn new(memory: Arc<GuestMemoryMmap>, kernel: Arc<dyn KernelEvents>) -> Self {
        Self {
            memory,
            kernel,
            faults: GuestFaults::new("fw_cfg"),
            note: NoteFile::new(),
            key: 0,
            offset: 0,
            dma_high: 0,
        }
    }

    const fn select(&mut self, key: u16) {
        self.key = key;
        self.offset = 0;
    }

    /// Fills `data` with what comes next in the item, and with zeros beyond its end.
    fn take(&mut self, data: &mut [u8]) {
        let item = self.note.item(self.key);
        let at = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let rest = item.get(at..).unwrap_or_default();
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        data[len..].fill(0);
        self.advance(data.len() as u64);
    }

    const fn advance(&mut self, bytes: u64) {
        self.offset = self.offset.saturating_add(bytes);
    }

    /// Carries out the request at `at`: control word, length and address, big-endian. The control word becomes 0, or [`ERROR`].
    fn dma(&mut self, at: u64) {
        let mut request = [0; 16];
        let read = self.memory.read_slice(&mut request, GuestAddress(at));
        if read.is_err() {
            let outside = DmaError::NotMemory(at);
            return self.faults.report(format_args!("DMA: {outside}"));
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        let done = self.carry_out(control, len, u64::from_be_bytes(address));
        let status = match done {
            Ok(()) => 0,
            Err(error) => {
                self.faults.report(format_args!("DMA: {error}"));
                ERROR
            }
        };
        // The request was just read there.
        let _ = self
            .memory
            .write_slice(&status.to_be_bytes(), GuestAddress(at));
    }

    fn carry_out(&mut self, control: u32, len: u32, address: u64) -> Result<(), DmaError> {
        if control & SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & READ != 0 {
            self.dma_read(len, address)
        } else if control & WRITE != 0 {
            self.dma_write(len, address)
        } else {
            if control & SKIP != 0 {
                self.advance(len.into());
            }
            Ok(())
        }
    }

    fn dma_read(&mut self, len: u32, address: u64) -> Result<(), DmaError> {
        let mut bytes = [0; LONGEST_READ];
        let bytes = bytes.get_mut(..len as usize);
        let bytes = bytes.ok_or(DmaError::TooLong(len))?;
        self.take(bytes);
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|_| DmaError::NotMemory(address))
    }

    fn dma_write(&mut self, len: u32, address: u64) -> Result<(), DmaError> {
        let (key, offset) = (self.key, self.offset);
        let end = offset.saturating_add(len.into());
        if key != NOTE_KEY || end > NOTE_LEN as u64 {
            return Err(DmaError::NotWritable { key, offset, len });
        }
        let mut bytes = [0; NOTE_LEN];
        let bytes = &mut bytes[..len as usize];
        let read = self.memory.read_slice(bytes, GuestAddress(address));
        read.map_err(|_| DmaError::NotMemory(address))?;
        self.note.0[offset as usize..end as usize].copy_from_slice(bytes);
        self.advance(len.into());
        if end == NOTE_LEN as u64 {
            self.tell();
        }
        Ok(())
    }

    /// The file is complete: tells where the note is.
    fn tell(&self) {
        let place = self.note.place().and_then(|place| {
            let end = place.start.checked_add(place.len.into())?;
            GpaRange::new(place.start, end.checked_next_multiple_of(PAGE_SIZE)?)
        });
        let Some(note) = place else {
            let written = self.note.place();
            return self.faults.report(format_args!(
                "the guest wrote to etc/vmcoreinfo what names no ELF note: {written:x?}"
            ));
        };
        if let Err(error) = self.kernel.note(note, NoteSource::FwCfg) {
            let start = note.start();
            self.faults.report(format_args!(
                "the guest's vmcoreinfo note at {start:#x} is not used: {error}"
            ));
        }
    }
}

/// What a snapshot keeps of it.
#[derive(Serialize, Deserialize)]
struct FwCfgState {
    note: [u8; items::NOTE_LEN],
    key: u16,
    offset: u64,
    dma_high: u32,
}

impl SaveState for FwCfg {
    fn save(&self) -> Result<Value, String> {
        to_value(&FwCfgState {
            note: self.note.0,
            key: self.key,
            offset: self.offset,
            dma_high: self.dma_high,
        })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state: FwCfgState = from_value(state)?;
        self.note.0 = state.note;
        (self.key, self.offset, self.dma_high) = (state.key, state.offset, state.dma_high);
        Ok(())
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(DMA_HIGH) {
            Some(at) => {
                let bytes = DMA_SIGNATURE.into_iter().skip(at as usize);
                data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            }
            None if offset == DATA && data.len() == 1 => self.take(data),
            None => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            (KEY, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let high = std::mem::take(&mut self.dma_high);
                let low = u32::from_be_bytes([a, b, c, d]);
                self.dma(u64::from(high) << 32 | u64::from(low));
            }
            _ => self.faults.report(format_args!(
                "write of {} bytes at {offset:#x}, ignored",
                data.len()
            )),
        }
        Action::Continue
    }
}
