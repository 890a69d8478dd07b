use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::guest_memory::{BadNote, Lost};

/// Where tests put a request for DMA, and its buffer.
const REQUEST: u64 = 0x1000;
const BUFFER: u64 = 0x2000;
const RAM: u64 = 0x10_0000;

/// Takes every note.
#[derive(Default)]
struct Notes(Mutex<Vec<(u64, u64)>>);

impl KernelEvents for Notes {
    fn note(&self, note: GpaRange, source: NoteSource) -> Result<(), BadNote> {
        assert_eq!(source, NoteSource::FwCfg);
        self.0.lock().unwrap().push((note.start(), note.len()));
        Ok(())
    }

    fn lost(&self, _why: Lost) {}
}

struct Fixture {
    device: FwCfg,
    memory: Arc<GuestMemoryMmap>,
    notes: Arc<Notes>,
}

impl Fixture {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), RAM as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let notes = Arc::new(Notes::default());
        Self {
            device: FwCfg::new(Arc::clone(&memory), Arc::clone(&notes) as _),
            memory,
            notes,
        }
    }

    /// The first `len` bytes of an item, read as Linux's driver reads them: byte by byte.
    fn item(&mut self, key: u16, len: usize) -> Vec<u8> {
        self.device.write(KEY, &key.to_le_bytes());
        let mut bytes = vec![0xaa; len];
        for byte in bytes.chunks_mut(1) {
            self.device.read(DATA, byte);
        }
        bytes
    }

    /// Makes a request at `at` and starts it. Returns the control word afterwards, if there is memory.
    fn dma_at(&mut self, at: u64, control: u32, len: u32, address: u64) -> Option<u32> {
        let request = [
            &control.to_be_bytes()[..],
            &len.to_be_bytes(),
            &address.to_be_bytes(),
        ]
        .concat();
        let _ = self.memory.write_slice(&request, GuestAddress(at));
        self.device
            .write(DMA_HIGH, &((at >> 32) as u32).to_be_bytes());
        self.device.write(DMA_LOW, &(at as u32).to_be_bytes());
        let mut answer = [0; 4];
        let read = self.memory.read_slice(&mut answer, GuestAddress(at));
        read.ok().map(|()| u32::from_be_bytes(answer))
    }

    fn dma(&mut self, control: u32, len: u32, address: u64) -> u32 {
        self.dma_at(REQUEST, control, len, address).unwrap()
    }

    /// Writes the file `etc/vmcoreinfo` as Linux's driver does.
    fn write_file(&mut self, format: u16, len: u32, start: u64) -> u32 {
        let file = [
            &[0; 2][..],
            &format.to_le_bytes(),
            &len.to_le_bytes(),
            &start.to_le_bytes(),
        ]
        .concat();
        self.memory
            .write_slice(&file, GuestAddress(BUFFER))
            .unwrap();
        self.dma(select(NOTE_KEY) | WRITE, 16, BUFFER)
    }

    fn notes(&self) -> Vec<(u64, u64)> {
        self.notes.0.lock().unwrap().clone()
    }
}

fn select(key: u16) -> u32 {
    u32::from(key) << 16 | SELECT
}

#[test]
fn the_driver_finds_its_device_and_the_file() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.item(0, 6), b"QEMU\0\0");
    assert_eq!(fixture.item(1, 4), [3, 0, 0, 0]);
    let directory = fixture.item(0x19, 70);
    assert_eq!(directory[..4], [0, 0, 0, 1], "one file");
    assert_eq!(directory[4..12], [0, 0, 0, 16, 0, 0x20, 0, 0]);
    assert_eq!(directory[12..27], *b"etc/vmcoreinfo\0");
    assert_eq!(directory[27..], [0; 43]);
    assert_eq!(fixture.item(0x20, 16)[..4], [1, 0, 0, 0], "host: ELF");
    assert_eq!(fixture.item(0x77, 3), [0; 3], "no such item");
    let mut signature = [0; 8];
    let (high, low) = signature.split_at_mut(4);
    fixture.device.read(DMA_HIGH, high);
    fixture.device.read(DMA_LOW, low);
    assert_eq!(&signature, b"QEMU CFG");
}

#[test]
fn a_note_is_told_with_the_pages_that_it_covers() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.write_file(1, 4132, 0x5000), 0);
    assert_eq!(fixture.notes(), [(0x5000, 0x2000)]);
    assert_eq!(fixture.item(NOTE_KEY, 16)[8..10], [0x00, 0x50]);
    // Piece by piece, without a new selection in between.
    fixture.dma(select(NOTE_KEY) | WRITE, 4, BUFFER);
    fixture.dma(WRITE, 8, BUFFER + 4);
    assert_eq!(fixture.notes().len(), 1);
    assert_eq!(fixture.dma(WRITE, 4, BUFFER + 12), 0);
    assert_eq!(fixture.notes().len(), 2);
}

#[test]
fn what_is_no_note_is_not_told() {
    let mut fixture = Fixture::new();
    for (format, len, start) in [
        (0, 4132, 0x5000),
        (2, 4132, 0x5000),
        (1, 0, 0x5000),
        (1, 4132, 0x5001),
        (1, 4132, u64::MAX - 0xfff),
        (1, u32::MAX, u64::MAX - 0xfff),
    ] {
        assert_eq!(
            fixture.write_file(format, len, start),
            0,
            "the file is written"
        );
        assert_eq!(fixture.notes(), [], "{format} {len} {start:#x}");
    }
    assert_eq!(fixture.device.faults.count(), 6);
}

#[test]
fn dma_reads_skips_and_pads_with_zeros() {
    let mut fixture = Fixture::new();
    let fill = |fixture: &Fixture| {
        let ones = [0xff; 8];
        let filled = fixture.memory.write_slice(&ones, GuestAddress(BUFFER));
        filled.unwrap();
    };
    let buffer = |fixture: &Fixture| {
        let mut bytes = [0; 8];
        let read = fixture.memory.read_slice(&mut bytes, GuestAddress(BUFFER));
        read.unwrap();
        bytes
    };
    fill(&fixture);
    assert_eq!(fixture.dma(select(0) | SKIP, 2, 0), 0);
    assert_eq!(fixture.dma(READ, 4, BUFFER), 0);
    assert_eq!(&buffer(&fixture), b"MU\0\0\xff\xff\xff\xff");
    assert_eq!(fixture.dma(SKIP, u32::MAX, 0), 0);
    assert_eq!(fixture.dma(READ, 8, BUFFER), 0);
    assert_eq!(buffer(&fixture), [0; 8], "far beyond the end");
}

#[test]
fn bad_requests_get_the_error_bit() {
    let mut fixture = Fixture::new();
    for (control, len, address, what) in [
        (select(0) | READ, 4, RAM, "a buffer outside"),
        (select(0) | READ, 4, RAM - 2, "a buffer partly outside"),
        (select(0) | READ, 4, u64::MAX, "a buffer that wraps"),
        (select(0) | READ, 4097, BUFFER, "a long read"),
        (select(0) | READ, u32::MAX, BUFFER, "a very long read"),
        (select(0) | WRITE, 4, BUFFER, "an item that is read-only"),
        (select(0x77) | WRITE, 4, BUFFER, "an item that is not there"),
        (select(NOTE_KEY) | WRITE, 17, BUFFER, "more than the file"),
        (select(NOTE_KEY) | WRITE, u32::MAX, BUFFER, "much more"),
        (select(NOTE_KEY) | WRITE, 16, RAM - 8, "half a source"),
    ] {
        assert_eq!(fixture.dma(control, len, address), ERROR, "{what}");
    }
    fixture.dma(select(NOTE_KEY) | SKIP, 1, 0);
    assert_eq!(fixture.dma(WRITE, 16, BUFFER), ERROR, "beyond the end");
    assert_eq!(fixture.notes(), []);
    for at in [RAM, RAM - 8, u64::MAX, u64::MAX - 15] {
        fixture.dma_at(at, select(NOTE_KEY) | WRITE, 16, BUFFER);
    }
    assert_eq!(fixture.notes(), [], "requests that lie outside");
    // The device still works.
    assert_eq!(fixture.write_file(1, 24, 0x5000), 0);
    assert_eq!(fixture.notes(), [(0x5000, 0x1000)]);
}

proptest! {
    /// Whatever the guest writes, the device answers and survives, and a write outside the buffers does not happen.
    #[test]
    fn any_accesses_are_survived(
        accesses in proptest::collection::vec((0u64..12, any::<u32>(), 0usize..=4, any::<bool>()), 0..64),
        requests in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u64>(), any::<bool>()), 0..16),
    ) {
        let mut fixture = Fixture::new();
        for (offset, value, len, is_read) in accesses {
            let mut data = value.to_le_bytes();
            let len = len.min(12 - offset as usize);
            if is_read {
                fixture.device.read(offset, &mut data[..len]);
            } else {
                fixture.device.write(offset, &data[..len]);
            }
        }
        for (control, len, address, near) in requests {
            let (len, address) = if near { (len % 32, BUFFER + address % 64) } else { (len, address) };
            // The buffer may be the request itself.
            fixture.dma(control, len, address);
        }
    }
}
