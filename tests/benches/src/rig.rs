//! A machine for measurements in this very process, made of the monitor's own parts: its guest works without
//! ever leaving, and touches memory when it is told to.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::Features;
use ebb_payload::busy::{self, word};
use ebb_vmm::arch::registers::Entry;
use ebb_vmm::bus::Bus;
use ebb_vmm::guest_memory::{LazyOps, Survey};
use ebb_vmm::hypercall::{Hypercalls, offer};
use ebb_vmm::kvm::{Hypervisor, KickTable, Machine, RunPages, prepare_kicks};
use ebb_vmm::memory::{Backing, GuestRam};
use ebb_vmm::reclaim::{EntryHook, ReclaimTuning, Reclaimer};
use ebb_vmm::vcpu::{PauseSwitch, Shared, Vcpus};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::LONG;

/// First address for ranges.
pub const FIRST: u64 = busy::FREE_START;

/// Ranges at equal distances from [`FIRST`] on.
#[derive(Clone, Copy, Debug)]
pub struct Ranges {
    /// Bytes of each, whole pages.
    pub size: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// How many.
    pub count: u64,
}

impl Ranges {
    /// First address after the last one.
    #[must_use]
    pub const fn end(self) -> u64 {
        FIRST + self.stride * self.count
    }

    /// Bytes of all.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.size * self.count
    }

    /// Each of them.
    #[must_use]
    pub fn all(self) -> Vec<GpaRange> {
        let range = |index| {
            let at = FIRST + index * self.stride;
            GpaRange::new(at, at + self.size)
        };
        (0..self.count).filter_map(range).collect()
    }
}

/// This guest makes no calls.
struct NoCalls;

/// The guest never exits by itself: nobody would come by an offer.
struct NothingToDo;

impl EntryHook for NothingToDo {
    fn before_entry(&self) {}
}

impl LazyOps for NoCalls {
    fn is_ram(&self, _: GpaRange) -> bool {
        false
    }

    fn lazy_free(&self, _: &[GpaRange]) {}

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

/// The machine. The vCPUs are let go first.
pub struct Rig {
    vcpus: Vcpus,
    /// Where they enter.
    pub gate: Arc<Gate>,
    /// What is lazily free.
    pub lazy: Arc<LazyMemory>,
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// What the kernel names the machine's counters by: the thread that has made it.
    pub owner: u32,
    ranges: Ranges,
    count: usize,
    /// Nothing only while it ends.
    machine: Option<Machine>,
}

impl Rig {
    /// Starts `vcpus` vCPUs with memory for `ranges`, and waits until all of them work.
    ///
    /// # Errors
    /// A part of the machine cannot be had.
    pub fn start(vcpus: usize, ranges: Ranges, thp: bool) -> Result<Self> {
        prepare_kicks().context("sigaction")?;
        let host = Hypervisor::open().context("KVM")?;
        let all = GpaRange::new(0, ranges.end().next_multiple_of(2 << 20)).context("no ranges")?;
        let backing = Backing {
            thp,
            ..Backing::default()
        };
        let ram = Arc::new(GuestRam::allocate(backing, &[all]).context("guest memory")?);
        // Else the guest's first reads would map the zero page, and each first write would flush.
        let own = GpaRange::new(0, FIRST).context("no memory")?;
        ram.populate(own).context("guest memory")?;
        let mut machine = host.create_machine().context("KVM")?;
        machine.map_memory(Arc::clone(&ram)).context("KVM")?;
        let entry = Entry::Pvh { rip: busy::ENTRY };
        let memory = ram.memory();
        entry.write_tables(&memory).context("guest memory")?;
        let code = busy::code();
        let written = memory.write_slice(&code, GuestAddress(busy::ENTRY));
        written.context("guest memory")?;
        let mut fds = Vec::new();
        for index in 0..vcpus {
            let fd = machine.create_vcpu(index as u32).context("KVM")?;
            set_up(&fd, &host, entry, index).context("KVM")?;
            fds.push(fd);
            let set = busy::working_set(index) as u32;
            let at = GuestAddress(busy::mailbox(index) + word::SET);
            memory.write_obj(set, at).context("guest memory")?;
        }
        let generation = Arc::new(VmGeneration::default());
        let kicks = Arc::new(KickTable::new(vcpus));
        let kick = Box::new(Arc::clone(&kicks));
        let gate = Arc::new(Gate::new(vcpus, Arc::clone(&generation), kick));
        let shared = Shared {
            ports: Bus::default(),
            mmio: Bus::default(),
            gate: Arc::clone(&gate),
            entry_hook: Arc::new(NothingToDo),
            pause: Arc::new(PauseSwitch::new(vcpus, Arc::clone(&kicks))),
            kicks,
            run_pages: Arc::new(RunPages::new(0, 4096)),
            hypercalls: Arc::new(Hypercalls::new(
                offer(None, Features::default()),
                memory,
                Arc::new(NoCalls),
            )),
            on_exit: Box::new(|reason| eprintln!("the guest has ended: {reason:?}")),
            kernel: Arc::default(),
            strict: None,
        };
        let rig = Self {
            vcpus: Vcpus::start(fds, &Arc::new(shared)).context("vCPU threads")?,
            gate,
            lazy: Arc::new(LazyMemory::new(generation)),
            ram,
            owner: rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            ranges,
            count: vcpus,
            machine: Some(machine),
        };
        wait("the vCPUs work", || {
            let work: Result<Vec<u32>> = (0..vcpus).map(|vcpu| rig.work(vcpu)).collect();
            Ok(!work?.contains(&0))
        })?;
        Ok(rig)
    }

    /// The ranges that there is memory for.
    #[must_use]
    pub const fn ranges(&self) -> Ranges {
        self.ranges
    }

    /// A reclaimer of this machine's memory.
    #[must_use]
    pub fn reclaimer(&self, tuning: ReclaimTuning) -> Reclaimer {
        let (lazy, pages) = (Arc::clone(&self.lazy), Arc::clone(&self.ram));
        Reclaimer::new(lazy, pages, Arc::clone(&self.gate), tuning)
    }

    /// Turns that a vCPU has made, modulo 2^32.
    ///
    /// # Errors
    /// The mailbox is not in memory.
    pub fn work(&self, vcpu: usize) -> Result<u32> {
        self.read(vcpu, word::WORK)
    }

    /// Has the guest write to every page of the ranges, each vCPU to its share.
    ///
    /// # Errors
    /// It does not come to an end.
    pub fn touch(&self) -> Result<()> {
        let count = self.count as u64;
        for vcpu in 0..self.count {
            let from = self.ranges.count * vcpu as u64 / count;
            let to = self.ranges.count * (vcpu as u64 + 1) / count;
            if from == to {
                continue;
            }
            let words = [
                (word::FIRST, FIRST + from * self.ranges.stride),
                (word::STRIDE, self.ranges.stride),
                (word::RANGES, to - from),
                (word::PAGES, self.ranges.size / PAGE_SIZE),
                (word::COMMAND, u64::from(self.read(vcpu, word::DONE)?) + 1),
            ];
            for (offset, value) in words {
                self.write(vcpu, offset, value as u32)?;
            }
        }
        wait("the guest touches its memory", || {
            let done = |vcpu| Ok(self.read(vcpu, word::DONE)? == self.read(vcpu, word::COMMAND)?);
            let done: Result<Vec<bool>> = (0..self.count).map(done).collect();
            Ok(!done?.contains(&false))
        })
    }

    /// Has the guest touch the ranges, and makes them lazily free.
    ///
    /// # Errors
    /// As for [`Rig::touch`].
    pub fn free(&self) -> Result<()> {
        self.lazy.reset();
        self.touch()?;
        self.lazy.free(&self.ranges.all());
        Ok(())
    }

    /// Ends the vCPUs: what the machine is in KVM, and its memory, with all that the guest has touched mapped.
    #[must_use]
    pub fn end(mut self) -> (Option<Machine>, Arc<GuestRam>) {
        self.vcpus.stop();
        (self.machine.take(), Arc::clone(&self.ram))
    }

    fn read(&self, vcpu: usize, offset: u64) -> Result<u32> {
        let at = GuestAddress(busy::mailbox(vcpu) + offset);
        self.ram
            .memory()
            .load(at, Ordering::Acquire)
            .context("guest memory")
    }

    fn write(&self, vcpu: usize, offset: u64, value: u32) -> Result<()> {
        let at = GuestAddress(busy::mailbox(vcpu) + offset);
        let memory = self.ram.memory();
        memory
            .store(value, at, Ordering::Release)
            .context("guest memory")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Before the fields go, whatever their order.
        self.vcpus.stop();
    }
}

fn set_up(
    fd: &VcpuFd,
    host: &Hypervisor,
    entry: Entry,
    index: usize,
) -> Result<(), kvm_ioctls::Error> {
    fd.set_cpuid2(host.cpuid())?;
    fd.set_sregs(&entry.sregs(&fd.get_sregs()?))?;
    let mut regs = entry.regs();
    regs.rdi = busy::mailbox(index);
    fd.set_regs(&regs)?;
    fd.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LONG;
    while !done()? {
        if Instant::now() > deadline {
            return Err(Error::new(format!("{what}: not within {LONG:?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
