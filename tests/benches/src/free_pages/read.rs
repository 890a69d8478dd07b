//! How long it takes to find what is free, by the image of a guest whose memory was in use and is free again.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::free_pages::read_free_lists;
use ebb_harness::host::guest_memory;
use ebb_harness::{Guest, Launch};
use ebb_vmm::guest_kernel::GuestKernel;
use ebb_vmm::memory::{Backing, GuestRam};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::results::{Metric, Results};

/// The guest's RAM.
const RAM: u64 = 1 << 30;
const IMAGE: &str = "free-pages.ram";
const NOTE: &str = "free-pages-note.json";
/// Searches of the whole image.
const ROUNDS: u32 = 101;
/// Orders that are looked for: blocks of 2 MiB, and the smallest pieces.
const ORDERS: [u32; 2] = [9, 4];
const MIB: usize = 1 << 20;

const TIME: Metric = ("read", "ms/GiB");

/// Where the note of the guest's kernel is, and how much of its memory is free.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    start: u64,
    bytes: u64,
    free: u64,
}

/// Boots a guest, has it use its memory and free most of it, and writes its RAM and the note's address into `out`.
pub fn keep_image(out: &Path) -> Result<()> {
    let mut monitor = Launch::new()?.memory("size=1G").start()?;
    let mut guest = monitor.guest()?;
    read_free_lists(&monitor, &mut guest)?;
    guest.ask("keep 64M")?;
    guest.ask("churn 700M 0")?;
    let mut note = note(&mut guest)?;
    note.free = guest.number("meminfo", "MemFree")?;
    let memory = File::open(format!("/proc/{}/mem", monitor.pid())).context("/proc/PID/mem")?;
    let path = out.join(IMAGE);
    let mut image = File::create(&path).context(path.display())?;
    let mut piece = vec![0; MIB];
    for range in guest_memory(monitor.pid(), RAM)? {
        for at in range.step_by(MIB) {
            memory
                .read_exact_at(&mut piece, at)
                .context("read guest memory")?;
            if piece.iter().all(|byte| *byte == 0) {
                let over = image.seek(SeekFrom::Current(MIB as i64));
                over.context(path.display())?;
            } else {
                image.write_all(&piece).context(path.display())?;
            }
        }
    }
    image.set_len(RAM).context(path.display())?;
    let text = serde_json::to_string(&note).context(NOTE)?;
    fs::write(out.join(NOTE), text).context(NOTE)?;
    guest.send("exit")?;
    monitor.wait().map(drop)
}

/// The address and size of the kernel's note in whole pages, by /sys/kernel/vmcoreinfo.
fn note(guest: &mut Guest) -> Result<Note> {
    let said = guest.must("cat /sys/kernel/vmcoreinfo")?;
    let mut numbers = said.trim_end_matches("\\n").split_whitespace().map(|word| {
        let digits = word.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).context(format_args!("{said:?} is no note's place"))
    });
    let mut number = || {
        let number = numbers.next();
        number.unwrap_or_else(|| Err(Error::new(format!("{said:?} is no note's place"))))
    };
    Ok(Note {
        start: number()?,
        bytes: number()?.next_multiple_of(PAGE_SIZE),
        free: 0,
    })
}

/// Times the search in the image.
pub fn measure(out: &Path, results: &mut Results) -> Result<()> {
    let text = fs::read_to_string(out.join(NOTE)).context(NOTE)?;
    let note: Note = serde_json::from_str(&text).context(NOTE)?;
    let all = GpaRange::new(0, RAM).context("no range")?;
    let ram = GuestRam::allocate(Backing::default(), &[all]).context("memory")?;
    let mut image = File::open(out.join(IMAGE)).context(IMAGE)?;
    let (memory, mut piece) = (ram.memory(), vec![0; MIB]);
    for at in (0..RAM).step_by(MIB) {
        image.read_exact(&mut piece).context(IMAGE)?;
        let written = memory.write_slice(&piece, GuestAddress(at));
        written.context("memory")?;
    }
    let place = GpaRange::new(note.start, note.start + note.bytes).context("no note")?;
    let kernel = GuestKernel::accept(&ram, place).context("the guest's note")?;
    for order in ORDERS {
        let case = format!("order {order}");
        let mut found = Vec::new();
        for _ in 0..ROUNDS {
            found.clear();
            let (start, mut at) = (Instant::now(), 0);
            while let Some(within) = GpaRange::new(at, RAM).filter(|_| at < RAM) {
                at = kernel.find_free(&ram, within, order, &mut found);
            }
            let gib = RAM as f64 / f64::from(1 << 30);
            let ms = start.elapsed().as_secs_f64() * 1e3 / gib;
            results.add(("ebb", &case), TIME, ms);
        }
        let bytes: u64 = found.iter().map(|range| range.len()).sum();
        results.add(("ebb", &case), ("found", "bytes"), bytes as f64);
        if bytes < note.free / 2 {
            return Err(Error::new(format!("found only {bytes} of {}", note.free)));
        }
    }
    results.add(("guest", "MemFree"), ("free", "bytes"), note.free as f64);
    let median = results.median("ebb", "order 9", TIME.0);
    results.lower("read_ms_per_gib", median.context("no searches")?);
    let median = results.median("ebb", "order 4", TIME.0);
    results.lower("read_ms_per_gib_order_4", median.context("no searches")?);
    Ok(())
}
