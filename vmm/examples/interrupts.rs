//! How many interrupts it takes to invalidate and to discard scattered ranges under running vCPUs: each with
//! its own call, and in slices at the entry gate. Prints one line of JSON a case; needs /dev/kvm, and
//! debugfs for KVM's own counters.
//!
//! `interrupts [RANGES [PAUSE_US]]`

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use vm_memory::{Bytes, GuestAddress};
use vmm::arch::registers::Entry;
use vmm::bus::Bus;
use vmm::generation::{Gate, VmGeneration};
use vmm::hypercall::{Hypercalls, LazyOps, Survey, offer};
use vmm::kvm::{Hypervisor, KickTable, Machine, prepare_kicks};
use vmm::lazy::{LazyMemory, Pieces, RangeState, Sweep};
use vmm::memory::{Backing, GpaRange, GuestRam};
use vmm::reclaim::slice::{Limits, Slice, Slicer, Stage};
use vmm::sys::Pins;
use vmm::vcpu::{Shared, Vcpus, WayIn};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CODE: u64 = 0x10_0000;
const COUNTERS: u64 = 0x11_0000;
const FIRST: u64 = 0x20_0000;
const STRIDE: u64 = 256 << 10;
const RANGE: u64 = 64 << 10;

/// In 32-bit mode: writes to 16 pages each `edx` bytes, `ecx` times, from `esi` on; then counts at `[edi]`.
const PROGRAM: [u8; 26] = [
    0x89, 0xf0, 0xbd, 0x10, 0, 0, 0, 0x89, 0x00, 0x05, 0x00, 0x10, 0, 0, 0x4d, 0x75, 0xf6, 0x01,
    0xd6, 0x49, 0x75, 0xea, 0xff, 0x07, 0xeb, 0xfc,
];

/// This guest makes no calls.
struct NoCalls;

/// The guest never exits by itself.
struct NothingToDo;

impl WayIn for NothingToDo {
    fn pass(&self) {}
}

impl LazyOps for NoCalls {
    fn is_ram(&self, _: GpaRange) -> bool {
        false
    }

    fn lazy_free(&self, _: &[GpaRange]) -> u64 {
        0
    }

    fn reuse(&self, _: &[GpaRange]) -> bool {
        true
    }

    fn reset(&self) {}

    fn prefault(&self, _: GpaRange) -> bool {
        false
    }

    fn survey(&self, _: Option<GpaRange>) -> Survey {
        Survey::default()
    }
}

/// The kernel's own counters.
#[derive(Clone, Copy, Debug)]
struct Counters {
    flushes: u64,
    requests: u64,
    calls: u64,
    exits: u64,
}

impl Counters {
    fn read() -> Self {
        let kvm = |name| {
            let text = fs::read_to_string(format!("/sys/kernel/debug/kvm/{name}"));
            text.ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let interrupts = fs::read_to_string("/proc/interrupts").unwrap_or_default();
        let line = interrupts
            .lines()
            .find(|line| line.trim().starts_with("CAL:"));
        let words = line.into_iter().flat_map(str::split_whitespace);
        Self {
            flushes: kvm("remote_tlb_flush"),
            requests: kvm("remote_tlb_flush_requests"),
            calls: words.filter_map(|word| word.parse::<u64>().ok()).sum(),
            exits: kvm("exits"),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            flushes: self.flushes - before.flushes,
            requests: self.requests - before.requests,
            calls: self.calls - before.calls,
            exits: self.exits - before.exits,
        }
    }
}

struct Guest {
    vcpus: Vcpus,
    gate: Arc<Gate>,
    lazy: LazyMemory,
    ram: Arc<GuestRam>,
    count: usize,
    ranges: u64,
    _machine: Machine,
}

fn start(count: usize, ranges: u64) -> Result<Guest> {
    let host = Hypervisor::open()?;
    let end = (FIRST + ranges * STRIDE).next_multiple_of(2 << 20);
    let all = GpaRange::new(0, end).ok_or("size")?;
    let ram = Arc::new(GuestRam::allocate(Backing::default(), &[all])?);
    let entry = Entry::Pvh { rip: CODE };
    entry.write_tables(&ram.memory())?;
    ram.memory().write_slice(&PROGRAM, GuestAddress(CODE))?;
    let mut machine = host.create_machine()?;
    machine.map_memory(Arc::clone(&ram))?;
    let mut fds = Vec::new();
    for index in 0..count {
        let fd = machine.create_vcpu(index as u32)?;
        fd.set_cpuid2(host.cpuid())?;
        fd.set_sregs(&entry.sregs(&fd.get_sregs()?))?;
        let mut regs = entry.regs();
        (regs.rsi, regs.rcx, regs.rdx) = (FIRST, ranges, STRIDE);
        regs.rdi = COUNTERS + index as u64 * 64;
        fd.set_regs(&regs)?;
        fd.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        })?;
        fds.push(fd);
    }
    let generation = Arc::new(VmGeneration::default());
    let kicks = Arc::new(KickTable::new(count));
    let gate = Gate::new(count, Arc::clone(&generation), Box::new(Arc::clone(&kicks)));
    let gate = Arc::new(gate);
    let shared = Shared {
        way_in: Arc::new(NothingToDo),
        ports: Bus::default(),
        mmio: Bus::default(),
        gate: Arc::clone(&gate),
        kicks,
        pins: Arc::new(Pins::new(0, 4096)),
        hypercalls: Arc::new(Hypercalls::new(
            offer(None, false),
            ram.memory(),
            Box::new(NoCalls),
        )),
        strict: None,
        on_exit: Box::new(|reason| eprintln!("guest ends: {reason:?}")),
    };
    let guest = Guest {
        vcpus: Vcpus::start(fds, &Arc::new(shared))?,
        gate,
        lazy: LazyMemory::new(1 << 16, generation),
        ram,
        count,
        ranges,
        _machine: machine,
    };
    while guest.work()?.contains(&0) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(guest)
}

impl Guest {
    /// What each vCPU has counted.
    fn work(&self) -> Result<Vec<u32>> {
        let read = |index| {
            let at = GuestAddress(COUNTERS + index as u64 * 64);
            Ok(self.ram.memory().read_obj(at)?)
        };
        (0..self.count).map(read).collect()
    }

    fn pass(&self, mut sweep: Sweep, stage: Stage, limits: Limits, held: bool) -> (Slice, u64) {
        let cost = AtomicU64::new(0);
        let slicer = Slicer {
            lazy: &self.lazy,
            gate: &self.gate,
            pages: &*self.ram,
            cost: &cost,
        };
        let (mut all, mut slices) = (Slice::default(), 0);
        loop {
            let slice = if held {
                slicer.held(&mut sweep, stage, limits)
            } else {
                slicer.open(&mut sweep, stage, limits)
            };
            all.bytes += slice.bytes;
            all.ranges += slice.ranges;
            all.calls += slice.calls;
            all.held = all.held.max(slice.held);
            slices += u64::from(slice.calls > 0);
            if slice.done {
                return (all, slices);
            }
        }
    }

    fn measure(&self, name: &str, limits: Limits, held: bool, stages: &[(Stage, RangeState)]) {
        let ranges = (0..self.ranges).filter_map(|index| {
            let at = FIRST + index * STRIDE;
            GpaRange::new(at, at + RANGE)
        });
        self.lazy.free(&ranges.collect::<Vec<_>>());
        for &(stage, from) in stages {
            let (step, sweep) = match (stage, from) {
                (Stage::Invalidate, _) => ("invalidate", Sweep::new(Pieces::Any, u64::MAX)),
                (_, RangeState::Lazy) => ("discard_lazy", Sweep::new(Pieces::Any, u64::MAX)),
                _ => ("discard", Sweep::unmapped(Pieces::Any, u64::MAX)),
            };
            let (kicks, before, start) =
                (self.gate.stats().kicks, Counters::read(), Instant::now());
            let (slice, slices) = self.pass(sweep, stage, limits, held);
            let (took, after) = (start.elapsed(), Counters::read());
            std::thread::sleep(took);
            let (found, idle) = (after.since(before), Counters::read().since(after));
            let kicks = self.gate.stats().kicks - kicks;
            // A request that interrupts somebody is a flush.
            let total = found.flushes + found.calls + kicks;
            let noise = idle.flushes + idle.calls;
            println!(
                "{{\"vcpus\":{},\"case\":\"{name}\",\"step\":\"{step}\",\"slice\":{},\"ranges\":{},\
                 \"slices\":{slices},\"calls\":{},\"flushes\":{},\"requests\":{},\"ipis\":{},\
                 \"exits\":{},\"kicks\":{kicks},\"idle_ipis\":{},\"ms\":{:.1},\
                 \"longest_pause_ms\":{:.2},\"per_range\":{:.3},\"idle_per_range\":{:.3}}}",
                self.count,
                limits.ranges,
                slice.ranges,
                slice.calls,
                found.flushes,
                found.requests,
                found.calls,
                found.exits,
                idle.calls,
                took.as_secs_f64() * 1e3,
                slice.held.as_secs_f64() * 1e3,
                total as f64 / self.ranges as f64,
                noise as f64 / self.ranges as f64,
            );
        }
    }
}

/// By way of unmapped.
const TWO_STEPS: [(Stage, RangeState); 2] = [
    (Stage::Invalidate, RangeState::Lazy),
    (Stage::Discard, RangeState::Unmapped),
];

/// As reclaim under pressure does it.
const ONE_STEP: [(Stage, RangeState); 1] = [(Stage::Discard, RangeState::Lazy)];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let ranges = arguments.next().map_or(Ok(512), |text| text.parse())?;
    let pause = arguments
        .next()
        .map_or(Ok(2_000_000), |text| text.parse())?;
    let pause = Duration::from_micros(pause);
    prepare_kicks()?;
    for vcpus in [1, 3] {
        for (held, slice) in [(false, 1), (true, 1), (true, 16), (true, 128), (true, 512)] {
            let limits = Limits {
                ranges: slice,
                bytes: u64::MAX,
                pause,
            };
            let name = if held { "held" } else { "running" };
            for stages in [&TWO_STEPS[..], &ONE_STEP] {
                let mut guest = start(vcpus, ranges)?;
                guest.measure(name, limits, held, stages);
                guest.vcpus.stop();
            }
        }
    }
    Ok(())
}
