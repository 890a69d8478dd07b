//! A machine from its first mapping to the last page freed.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::{DEFAULT_MAX_RANGES, LazyMemory};
use ebb_core::range::GpaRange;
use ebb_core::release::{Release, ReleasePages};
use ebb_hypercall_abi::Interface;
use event_manager::MutEventSubscriber;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::LaunchError;
use super::attach::{Console, Devices};
use super::control::Control;
use super::ending::Ending;
use super::events::{self, ExitSlot};
use super::lazy_ops::TrackedMemory;
use super::sink::LazySink;
use crate::api;
use crate::arch::registers::Entry;
use crate::arch::{acpi, layout, reset};
use crate::arena::{Arena, Arenas};
use crate::boot::{self, BootError, Payload};
use crate::bus::ExitReason;
use crate::config::{
    ArenaConfig, BalloonConfig, DiskConfig, LazyConfig, LazyMode, MachineConfig, MemoryConfig,
    Reporting,
};
use crate::devices::serial::RawMode;
use crate::devices::virtio::blk::Disk;
use crate::guardian::Guardian;
use crate::hypercall::{self, Hypercalls};
use crate::kvm::{self, Hypervisor, KickTable};
use crate::memory::{Backing, GuestRam};
use crate::reclaim::{Mode, PressureSource, ReclaimThread, Reclaimer, ReportedMemory, Tuning};
use crate::strict::{Strict, StrictThread};
use crate::sys::{Pins, TerminationSignals};
use crate::vcpu::{self, Shared, VcpuSetup, Vcpus};

/// Time between two looks for something to take in the eager mode.
const EAGER_INTERVAL: Duration = Duration::from_millis(100);

/// A running machine. The fields stand in the order in which [`Vm::shut_down`] lets them go: first those
/// who give orders, then those who touch guest memory, then KVM, and the memory last.
pub struct Vm {
    input: Option<Box<dyn MutEventSubscriber>>,
    api: Option<api::Server>,
    vcpus: Vcpus,
    devices: DeviceStop,
    reclaim: Option<ReclaimThread>,
    strict: Option<StrictThread>,
    kvm: kvm::Machine,
    ending: Arc<Ending>,
    exit: Arc<ExitSlot>,
    /// Restores the terminal, however we leave.
    _raw_mode: Option<RawMode>,
}

/// Where guest memory lies.
struct Layout {
    ram: Vec<GpaRange>,
    arenas: Vec<GpaRange>,
}

impl Layout {
    fn new(config: &MachineConfig) -> Self {
        let ram = layout::ram(config.memory.size);
        let sizes: Vec<u64> = config.arenas.iter().map(|arena| arena.size).collect();
        let arenas = layout::arenas(&ram, &sizes);
        Self { ram, arenas }
    }

    fn end(&self) -> u64 {
        let last = self.arenas.last().or(self.ram.last());
        last.map_or(0, |range| range.end())
    }
}

/// The arenas at `places`.
fn arenas(
    configs: &[ArenaConfig],
    places: &[GpaRange],
    memory: &Arc<GuestMemoryMmap>,
) -> Result<Arenas, LaunchError> {
    let arena = |(index, (config, &gpa)): (u32, (&ArenaConfig, &GpaRange))| {
        let id = config.id.clone();
        let arena = Arena::new(index, id, gpa, config.granule, Arc::clone(memory))?;
        Ok(Arc::new(arena))
    };
    (0..).zip(configs.iter().zip(places)).map(arena).collect()
}

/// Guest memory and what keeps account of it.
struct Memory {
    ram: Arc<GuestRam>,
    guest: Arc<GuestMemoryMmap>,
    layout: Layout,
    arenas: Arenas,
    lazy: Arc<LazyMemory>,
    reclaimer: Arc<Reclaimer>,
    gate: Arc<Gate>,
    kicks: Arc<KickTable>,
    reported: Arc<ReportedMemory>,
    strict: Option<Arc<Strict>>,
}

impl Memory {
    fn allocate(config: &MachineConfig, layout: Layout) -> Result<Self, LaunchError> {
        let MemoryConfig {
            size: _,
            thp,
            hugepages,
            prefault,
            shared,
        } = config.memory;
        let vcpus = config.vcpus as usize;
        let backing = Backing {
            thp,
            hugepages,
            prefault,
            shared,
        };
        let ram = GuestRam::with_arenas(backing, &layout.ram, &layout.arenas)?;
        let ram = Arc::new(ram);
        let arenas = arenas(&config.arenas, &layout.arenas, &ram.memory())?;
        let generation = Arc::new(VmGeneration::default());
        let kicks = Arc::new(KickTable::new(vcpus));
        let kick = Box::new(Arc::clone(&kicks));
        let gate = Arc::new(Gate::new(vcpus, Arc::clone(&generation), kick));
        let lazy = Arc::new(LazyMemory::new(DEFAULT_MAX_RANGES, generation));
        let pages: Arc<dyn ReleasePages> = ram.clone();
        let (frees, entries) = (Arc::clone(&lazy), Arc::clone(&gate));
        let reclaimer = Reclaimer::new(frees, pages, entries, tuning(config.lazy));
        let reclaimer = Arc::new(reclaimer.with_arenas(Arc::clone(&arenas)));
        let release = release(config.balloon.as_ref());
        let reported = ReportedMemory::new(Arc::clone(&lazy), Arc::clone(&ram), release);
        let strict = config.lazy.strict.then(|| {
            let (lazy, ram, kicks) = (Arc::clone(&lazy), Arc::clone(&ram), Arc::clone(&kicks));
            Arc::new(Strict::new(lazy, ram, kicks, vcpus))
        });
        Ok(Self {
            guest: ram.memory(),
            ram,
            layout,
            arenas,
            lazy,
            reclaimer,
            gate,
            kicks,
            reported: Arc::new(reported),
            strict,
        })
    }

    /// The way of the guest's calls to this memory.
    fn hypercalls(&self, interface: Interface) -> Arc<Hypercalls> {
        let ops = TrackedMemory {
            lazy: Arc::clone(&self.lazy),
            ram: Arc::clone(&self.ram),
            arenas: Arc::clone(&self.arenas),
            strict: self.strict.clone(),
        };
        let guest = Arc::clone(&self.guest);
        Arc::new(Hypercalls::new(interface, guest, Box::new(ops)))
    }

    fn sink(&self) -> LazySink {
        LazySink {
            lazy: Arc::clone(&self.lazy),
            reclaimer: Arc::clone(&self.reclaimer),
            reported: Arc::clone(&self.reported),
            ram: Arc::clone(&self.ram),
            strict: self.strict.clone(),
        }
    }
}

/// What is left of the devices once the machine runs: the way to stop them.
struct DeviceStop(Vec<Arc<std::sync::Mutex<crate::devices::virtio::mmio::MmioTransport>>>);

impl DeviceStop {
    fn stop(&self) {
        for transport in &self.0 {
            transport
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .shut_down();
        }
    }
}

impl Vm {
    /// Builds the machine and starts its vCPUs.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn build(config: MachineConfig, guardian: &'static Guardian) -> Result<Self, LaunchError> {
        let started = Instant::now();
        let mut host = Hypervisor::open()?;
        let layout = Layout::new(&config);
        host.check_limits(config.vcpus, layout.end())?;
        let disks = open_disks(&config.disks)?;
        let memory = Memory::allocate(&config, layout)?;
        let ram = Arc::clone(&memory.ram);
        let pins = Arc::new(Pins::new(config.vcpus as usize, host.vcpu_mapping()?));
        let ending = Arc::new(Ending::new(guardian, ram, pins, &config.memory));
        let exit = ExitSlot::new().map_err(LaunchError::system("eventfd"))?;
        let mut machine = host.create_machine()?;
        machine.map_memory(Arc::clone(&memory.ram))?;
        if memory.strict.is_some() {
            host.hide_async_faults();
            machine.fault_synchronously()?;
        }

        let mut devices = Devices::default();
        devices.attach_platform()?;
        if !memory.arenas.is_empty() {
            devices.attach_pci()?;
        }
        devices.attach_disks(&machine, &memory.guest, disks)?;
        let balloon = match &config.balloon {
            Some(balloon) => {
                Some(devices.attach_balloon(&machine, &memory.guest, balloon, memory.sink())?)
            }
            None => None,
        };

        let entry = load_guest(&config, &memory, &devices)?;
        let instruction = host.take_hypercalls(&machine)?;
        let interface = hypercall::offer(instruction, !memory.arenas.is_empty());
        let setup = VcpuSetup {
            index: 0,
            vcpus: config.vcpus,
            entry,
            interface,
        };
        let vcpus = create_vcpus(&host, &machine, setup)?;
        // Late: what fails before this leaves no file behind and the terminal as it was.
        let console = devices.attach_serial(&machine, &config.serial, &exit)?;
        let control = Control {
            started,
            exit: Arc::clone(&exit),
            balloon,
            lazy: Arc::clone(&memory.lazy),
            arenas: Arc::clone(&memory.arenas),
            gate: Arc::clone(&memory.gate),
            reclaimer: Arc::clone(&memory.reclaimer),
            hypercalls: memory.hypercalls(interface),
            reported: Arc::clone(&memory.reported),
            strict: memory.strict.clone(),
            ending,
            config,
        };
        Self::start(machine, memory, devices, console, vcpus, control)
    }

    fn start(
        kvm: kvm::Machine,
        memory: Memory,
        devices: Devices,
        console: Option<Console>,
        vcpus: Vec<VcpuFd>,
        control: Control,
    ) -> Result<Self, LaunchError> {
        let Devices {
            ports,
            mmio,
            virtio,
            ..
        } = devices;
        let exit = Arc::clone(&control.exit);
        let hypercalls = Arc::clone(&control.hypercalls);
        let ending = Arc::clone(&control.ending);
        let way_in = Arc::clone(&memory.reclaimer);
        let reclaim = start_reclaim(memory.reclaimer)?;
        let strict = memory.strict.clone();
        let watch = |strict| StrictThread::start(strict, Arc::clone(&memory.ram));
        let strict_thread = strict.clone().map(watch).transpose()?;
        let socket = control.config.api_socket.clone();
        let api = socket
            .map(|path| api::serve(&path, Arc::new(control)))
            .transpose()?;
        if let Some(api) = &api {
            ending.watch_socket(api.identity());
        }
        let on_exit = {
            let exit = Arc::clone(&exit);
            Box::new(move |reason| exit.request(reason))
        };
        let shared = Arc::new(Shared {
            ports,
            mmio,
            gate: memory.gate,
            way_in,
            kicks: memory.kicks,
            pins: ending.pins(),
            hypercalls,
            strict,
            on_exit,
        });
        let vcpus = Vcpus::start(vcpus, &shared).map_err(LaunchError::system("vCPU thread"))?;
        let (raw_mode, input) = console.map_or((None, None), |c| (c.raw_mode, Some(c.input)));
        Ok(Self {
            input,
            api,
            vcpus,
            devices: DeviceStop(virtio),
            reclaim,
            strict: strict_thread,
            kvm,
            ending,
            exit,
            _raw_mode: raw_mode,
        })
    }

    /// Waits for the machine to end.
    ///
    /// # Errors
    /// [`LaunchError::Loop`].
    pub fn run(&mut self, signals: TerminationSignals) -> Result<ExitReason, LaunchError> {
        let reason = events::run(&self.exit, signals, self.input.take())?;
        tracing::info!("machine ends: {reason:?}");
        Ok(reason)
    }

    /// Stops everything and frees the guest's memory, or leaves that to the heir: see [`Ending::free`].
    pub fn shut_down(mut self) {
        drop(self.api.take());
        self.vcpus.stop();
        self.devices.stop();
        let pressure = self.reclaim.take().and_then(ReclaimThread::stop);
        drop(self.strict.take());
        let Self {
            vcpus,
            devices,
            kvm,
            ending,
            ..
        } = self;
        drop((vcpus, devices));
        ending.free((kvm, pressure));
    }
}

fn tuning(config: LazyConfig) -> Tuning {
    Tuning {
        mode: match config.mode {
            LazyMode::Pressure => Mode::Pressure,
            LazyMode::Eager => Mode::Eager,
            LazyMode::Age => Mode::Age(Duration::from_secs(config.age_s.into())),
            LazyMode::Off => Mode::Off,
        },
        pause: Duration::from_micros(config.pause_us.into()),
        slice: config.slice as usize,
        share: config.share,
    }
}

fn start_reclaim(reclaimer: Arc<Reclaimer>) -> Result<Option<ReclaimThread>, LaunchError> {
    let source = match reclaimer.tuning().mode {
        Mode::Off => return Ok(None),
        Mode::Eager => PressureSource::every(EAGER_INTERVAL),
        Mode::Pressure | Mode::Age(_) => PressureSource::open(),
    };
    Ok(Some(ReclaimThread::start(reclaimer, source)?))
}

/// When the host gets the pages that the guest reports free.
fn release(balloon: Option<&BalloonConfig>) -> Release {
    let reporting = balloon.and_then(|balloon| balloon.free_page_reporting);
    match reporting.unwrap_or_default() {
        Reporting::Eager => Release::Discard,
        Reporting::Lazy => Release::MarkFree,
    }
}

fn open_disks(configs: &[DiskConfig]) -> Result<Vec<Disk>, LaunchError> {
    configs
        .iter()
        .map(|config| Ok(Disk::open(config)?))
        .collect()
}

/// Writes the tables, the kernel and what comes with it to guest memory.
fn load_guest(
    config: &MachineConfig,
    memory: &Memory,
    devices: &Devices,
) -> Result<Entry, LaunchError> {
    let rsdp = acpi::write(&memory.guest, config.vcpus, &devices.windows)?;
    reset::write(&memory.guest).map_err(BootError::Write)?;
    let payload = Payload {
        kernel: &config.kernel,
        initramfs: config.initramfs.as_deref(),
        cmdline: &config.cmdline,
        arenas: &memory.layout.arenas,
    };
    Ok(boot::load(
        &memory.guest,
        &memory.layout.ram,
        &payload,
        rsdp,
    )?)
}

fn create_vcpus(
    host: &Hypervisor,
    machine: &kvm::Machine,
    setup: VcpuSetup,
) -> Result<Vec<VcpuFd>, LaunchError> {
    let create = |index| {
        let mut fd = machine.create_vcpu(index)?;
        vcpu::configure(&mut fd, host, VcpuSetup { index, ..setup })?;
        Ok(fd)
    };
    (0..setup.vcpus).map(create).collect()
}
