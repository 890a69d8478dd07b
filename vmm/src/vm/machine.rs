//! A machine from its first mapping to the last page freed.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use ebb_core::range::GpaRange;
use ebb_hypercall_abi::{Features, Interface};
use event_manager::MutEventSubscriber;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::LaunchError;
use super::attach::{Console, Devices};
use super::balloon::MachineBalloon;
use super::control::Control;
use super::drives::Drives;
use super::events::{self, ExitSlot, Operator};
use super::instance::{Instance, Service};
use super::memory;
use super::metrics_file::MetricsFile;
use super::pages::PageWatch;
use super::pause::{Pausing, VirtioDevices};
use super::restore::{self, Restoration};
use super::snapshot::{Saver, Snapshots};
use super::vsock::ServedVsock;
use crate::arch::registers::Entry;
use crate::arch::{acpi, reset};
use crate::boot::{self, BootError, Payload};
use crate::bus::ExitReason;
use crate::config::{DiskConfig, MachineConfig, NetConfig, Transport, VsockConfig};
use crate::devices::virtio::balloon::BalloonHandle;
use crate::devices::virtio::blk::Disk;
use crate::devices::virtio::net::open_tap;
use crate::guardian::Guardian;
use crate::guest_memory::{GuestMemory, Setup, SetupError};
use crate::hypercall::{self, Hypercalls};
use crate::kvm::{self, Hypervisor, KickTable, RunPages};
use crate::memory::GuestRam;
use crate::output::{Log, Outlet};
use crate::reclaim::{AutoBalloon, BalloonBounds, ReclaimThread, Reclaimer};
use crate::strict::StrictThread;
use crate::sys::seccomp::Role;
use crate::sys::tap::Tap;
use crate::sys::{RawMode, Signals, panic_point_at};
use crate::teardown::{PageSize, Teardown};
use crate::vcpu::{self, PauseSwitch, Shared, VcpuSetup, Vcpus};

/// A running machine. [`Vm::shut_down`] stops reclaim, so that nobody waits for it, and ends the parts in the order of the
/// fields: first those that give orders, then those that touch guest memory, then KVM, and the memory last.
pub struct Vm {
    reclaimer: Arc<Reclaimer>,
    input: Option<Box<dyn MutEventSubscriber>>,
    vcpus: Vcpus,
    vsock: Option<ServedVsock>,
    snapshots: Arc<Snapshots>,
    devices: Arc<VirtioDevices>,
    reclaim: Option<ReclaimThread>,
    strict: Option<StrictThread>,
    pages: Option<PageWatch>,
    kvm: kvm::Machine,
    teardown: Arc<Teardown>,
    exit: Arc<ExitSlot>,
    output: Option<Arc<Outlet>>,
    /// Restores the terminal when dropped.
    raw_mode: Option<RawMode>,
}

impl Vm {
    /// Builds the machine that `instance` describes and starts its vCPUs. Returns also what the operator can ask of it.
    ///
    /// # Errors
    /// [`LaunchError`]; [`LaunchError::Stopped`] if the operator or one of `signals` has asked for the end.
    pub fn build(
        instance: &Arc<Instance>,
        snapshot: Option<&Restoration>,
        guardian: &'static Guardian,
        signals: &Signals,
    ) -> Result<(Self, Control), LaunchError> {
        let config = &instance.config;
        let mut host = Hypervisor::open()?;
        let setup = describe_memory(config, snapshot, &host)?;
        let backends = Backends::open(config, guardian)?;
        let vcpus = config.vcpus as usize;
        let kicks = Arc::new(KickTable::new(vcpus));
        let builder = (instance, signals, guardian);
        let (mapped, pages) = map_memory(&setup, snapshot, builder)?;
        let memory = Arc::new(GuestMemory::new(&setup, mapped, vcpus, &kicks)?);
        let ram = memory.ram().memory();
        let teardown = teardown(config, guardian, &memory, &host)?;
        if config.memory.prefault {
            populate(&memory, &teardown, instance, signals)?;
        }
        let machine = create_machine(&mut host, &setup, &memory)?;

        let mut devices = Devices::new(Arc::clone(&memory) as _, config.transport);
        instance.set_keyboard(devices.attach_platform(&machine)?);
        attach_buses(&mut devices, config, &memory)?;
        let (balloon, drives) = attach_virtio(&mut devices, &machine, config, &memory, backends)?;

        let instruction = host.take_hypercalls(&machine)?;
        let interface = hypercall::offer(instruction, more_features(&memory));
        let booted = match snapshot {
            None => {
                restore::new_generation(&ram, None)?;
                let entry = load_guest(config, &setup, &ram, &devices)?;
                create_vcpus(&host, &machine, first_vcpu(config, entry, interface))?
            }
            Some(_) => Vec::new(),
        };
        // Last, so that an error before this leaves no file behind and the terminal unchanged.
        let console = devices.attach_serial(&machine, &config.serial, &instance.exit)?;
        instance.set_console(console.output.as_ref());
        let vcpus = match snapshot {
            None => booted,
            Some(snapshot) => {
                restore::memory(&memory, setup.restored.as_ref());
                snapshot.apply(&host, &machine, &ram, &devices.saved)?
            }
        };
        let switch = PauseSwitch::new(vcpus.len(), Arc::clone(&kicks));
        let virtio = VirtioDevices(std::mem::take(&mut devices.virtio));
        let pausing = Pausing::new(switch, virtio, Arc::clone(instance));
        let pausing = Arc::new(match snapshot {
            Some(_) => pausing.paused(),
            None => pausing,
        });
        let snapshots = Snapshots::start(Saver {
            pausing: Arc::clone(&pausing),
            chips: machine.chips(),
            devices: std::mem::take(&mut devices.saved),
            disks: drives.handles(),
            memory: Arc::clone(&memory),
            msrs: host.saved_msrs()?,
            instance: Arc::clone(instance),
            base: snapshot.and_then(Restoration::base),
        })?;
        let control = Control {
            instance: Arc::clone(instance),
            pausing,
            snapshots: Arc::new(snapshots),
            balloon,
            drives,
            nets: std::mem::take(&mut devices.nets),
            auto: None,
            counters: std::mem::take(&mut devices.counters),
            hypercalls: Arc::new(Hypercalls::new(interface, ram, Arc::clone(&memory) as _)),
            memory,
            teardown: Arc::new(teardown),
        };
        let (vm, control) = Self::start(machine, kicks, devices, console, vcpus, control)?;
        Ok((Self { pages, ..vm }, control))
    }

    fn start(
        kvm: kvm::Machine,
        kicks: Arc<KickTable>,
        devices: Devices,
        console: Console,
        vcpus: Vec<VcpuFd>,
        mut control: Control,
    ) -> Result<(Self, Control), LaunchError> {
        let Devices {
            ports, mmio, vsock, ..
        } = devices;
        let exit = Arc::clone(&control.instance.exit);
        let hypercalls = Arc::clone(&control.hypercalls);
        let teardown = Arc::clone(&control.teardown);
        let memory = Arc::clone(&control.memory);
        let auto = auto_balloon(&control);
        control.auto = auto.as_ref().map(|auto| Arc::clone(auto.report()));
        let reclaim = memory.start_reclaim(auto)?;
        let strict = memory.start_strict()?;
        let on_exit = {
            let exit = Arc::clone(&exit);
            Box::new(move |reason| exit.request(reason))
        };
        let shared = Arc::new(Shared {
            ports,
            mmio,
            gate: Arc::clone(memory.gate()),
            entry_hook: Arc::clone(memory.reclaimer()) as _,
            kicks,
            pause: Arc::clone(control.pausing.switch()),
            run_pages: Arc::clone(teardown.run_pages()),
            hypercalls,
            kernel: Arc::clone(memory.kernel()),
            strict: memory.strict().cloned(),
            on_exit,
        });
        let vcpus = Vcpus::start(vcpus, &shared).map_err(LaunchError::system("vCPU thread"))?;
        let vm = Self {
            reclaimer: Arc::clone(memory.reclaimer()),
            input: console.input,
            vcpus,
            vsock,
            snapshots: Arc::clone(&control.snapshots),
            devices: Arc::clone(control.pausing.devices()),
            reclaim,
            strict,
            pages: None,
            kvm,
            teardown,
            exit,
            output: console.output,
            raw_mode: console.raw_mode,
        };
        Ok((vm, control))
    }

    /// Waits for the machine to end. Flushes `metrics` from time to time.
    ///
    /// # Errors
    /// [`LaunchError::Loop`].
    pub fn run(
        &mut self,
        signals: Signals,
        log: &Log,
        metrics: Option<Arc<MetricsFile>>,
    ) -> Result<ExitReason, LaunchError> {
        self.pages.iter().for_each(PageWatch::built);
        Role::Main.enter();
        let operator = Operator {
            signals,
            log: log.clone(),
            has_terminal: self.raw_mode.is_some(),
            console: self.input.take(),
            metrics,
        };
        let reason = events::run(&self.exit, operator)?;
        event!("ending", ?reason);
        tracing::info!("machine ends: {reason:?}");
        Ok(reason)
    }

    /// Stops everything, `service` too, and frees the guest's memory, or leaves that to the reaper: see [`Teardown::free`].
    pub fn shut_down(mut self, mut service: Service) {
        self.reclaimer.stop();
        self.vcpus.stop();
        event!("teardown", step = "vcpus_stopped");
        service.stop();
        drop(self.vsock.take());
        self.snapshots.stop();
        if let Some(output) = self.output.take() {
            output.finish();
        }
        self.devices.stop();
        event!("teardown", step = "devices_stopped");
        let pressure = self.reclaim.take().and_then(ReclaimThread::stop);
        drop(self.strict.take());
        drop(self.pages.take());
        let Self {
            reclaimer,
            vcpus,
            devices,
            snapshots,
            kvm,
            teardown,
            ..
        } = self;
        drop((reclaimer, vcpus, devices, snapshots));
        let step = match teardown.free((kvm, pressure)) {
            true => "memory_freed",
            false => "memory_left_to_reaper",
        };
        event!("teardown", step);
    }
}

/// Describes the guest's memory, if this host can have such a machine.
fn describe_memory(
    config: &MachineConfig,
    snapshot: Option<&Restoration>,
    host: &Hypervisor,
) -> Result<Setup, LaunchError> {
    let mut setup = memory::setup(config);
    let restored = snapshot.map(|it| it.memory(host, config.vcpus, &setup.regions()));
    setup.restored = restored.transpose()?;
    host.check_limits(config.vcpus, setup.end())?;
    Ok(setup)
}

/// Maps the guest's memory. If a page server gives its content, that can do so from now on, and is watched.
fn map_memory(
    setup: &Setup,
    snapshot: Option<&Restoration>,
    (instance, signals, guardian): (&Arc<Instance>, &Signals, &Guardian),
) -> Result<(Arc<GuestRam>, Option<PageWatch>), LaunchError> {
    let ram = Arc::new(setup.map().map_err(SetupError::from)?);
    let faults = ram.page_faults().map(|faults| faults.as_raw_fd());
    guardian.status().set_page_faults(faults);
    let server = snapshot.map(|it| it.hand_over(setup, &ram));
    let watch = |server| PageWatch::start(Arc::clone(server), Arc::clone(instance), signals);
    let pages = server.transpose()?.flatten().map(watch).transpose()?;
    Ok((ram, pages))
}

/// Creates the machine in KVM, with its memory.
fn create_machine(
    host: &mut Hypervisor,
    setup: &Setup,
    memory: &GuestMemory,
) -> Result<kvm::Machine, LaunchError> {
    const NO_FILTER: &str =
        "this host's KVM does not report writes of MSRs (KVM_CAP_X86_MSR_FILTER, Linux 5.10)";
    panic_point_at("building");
    let mut machine = host.create_machine()?;
    machine.map_memory(Arc::clone(memory.ram()))?;
    if setup.strict {
        host.hide_async_faults();
        machine.fault_synchronously()?;
    }
    if memory.kernel().is_enabled() && !host.report_kernels(&machine)? {
        memory.kernel().turn_off(NO_FILTER);
    }
    Ok(machine)
}

/// What the devices of a machine work on, opened before anything is built.
struct Backends {
    disks: Vec<Disk>,
    taps: Vec<Tap>,
    vsock: Option<ServedVsock>,
}

impl Backends {
    fn open(config: &MachineConfig, guardian: &Guardian) -> Result<Self, LaunchError> {
        Ok(Self {
            disks: open_disks(&config.disks)?,
            taps: open_taps(&config.nets)?,
            vsock: open_vsock(config.vsock.as_ref(), guardian)?,
        })
    }
}

/// Attaches what a machine has only by its options, beside the virtio devices.
fn attach_buses(
    devices: &mut Devices,
    config: &MachineConfig,
    memory: &GuestMemory,
) -> Result<(), LaunchError> {
    if config.transport == Transport::Pci || !config.arenas.is_empty() {
        devices.attach_pci()?;
    }
    if memory.kernel().is_enabled() {
        devices.attach_fw_cfg(&memory.ram().memory())?;
    }
    Ok(())
}

/// Attaches the virtio devices. Returns the balloon's handle, if there is one, and the disks.
fn attach_virtio(
    devices: &mut Devices,
    machine: &kvm::Machine,
    config: &MachineConfig,
    memory: &Arc<GuestMemory>,
    backends: Backends,
) -> Result<(Option<BalloonHandle>, Drives), LaunchError> {
    let ram = memory.ram().memory();
    let disks = devices.attach_disks(machine, &ram, config, backends.disks)?;
    let disks = disks.into_iter().zip(&config.disks).enumerate();
    let disks = disks.map(|(index, (disk, config))| (config.name(index), disk));
    let drives = Drives::new(disks.collect(), &config.allow_paths)
        .map_err(LaunchError::system("open of a folder of --allow-paths"))?;
    let sink = || Arc::clone(memory) as _;
    let balloon = config.balloon.as_ref();
    let balloon = balloon.map(|balloon| devices.attach_balloon(machine, &ram, balloon, sink()));
    let balloon = balloon.transpose()?;
    devices.attach_nets(machine, &ram, config, backends.taps)?;
    if config.rng {
        devices.attach_rng(machine, &ram, config.rng_limits)?;
    }
    if let (Some(vsock), Some(served)) = (&config.vsock, backends.vsock) {
        devices.attach_vsock(machine, &ram, vsock, served)?;
    }
    Ok((balloon, drives))
}

/// The balloon that runs itself, if it shall.
fn auto_balloon(control: &Control) -> Option<AutoBalloon> {
    let config = &control.instance.config;
    let reserve = config.balloon.as_ref()?.auto_reserve?;
    let device = MachineBalloon {
        handle: control.balloon.clone()?,
        memory: Arc::clone(&control.memory),
    };
    let memory = config.memory.size;
    let bounds = BalloonBounds { memory, reserve };
    let arenas = !config.arenas.is_empty();
    Some(AutoBalloon::new(Box::new(device), bounds, arenas))
}

/// What the hypercalls of this machine can do beyond what those of all machines can.
fn more_features(memory: &GuestMemory) -> Features {
    let arenas = (!memory.arenas().is_empty()).then_some(Features::ARENA);
    let note = memory
        .kernel()
        .is_enabled()
        .then_some(Features::KERNEL_NOTE);
    let more = arenas.into_iter().chain(note);
    more.fold(Features::default(), Features::union)
}

/// From here on the guest's memory is freed fast, also if the monitor is killed.
fn teardown(
    config: &MachineConfig,
    guardian: &'static Guardian,
    memory: &GuestMemory,
    host: &Hypervisor,
) -> Result<Teardown, LaunchError> {
    let run_pages = RunPages::new(config.vcpus as usize, host.vcpu_mapping()?);
    let page_size = if config.memory.hugepages {
        PageSize::Huge
    } else {
        PageSize::Small
    };
    Ok(Teardown::new(
        guardian.status(),
        guardian.reaper(),
        Arc::clone(memory.ram()),
        page_size,
        Arc::new(run_pages),
    ))
}

/// Populates the guest's RAM, unless somebody asks for the end. What is populated by then goes as at any end.
fn populate(
    memory: &Arc<GuestMemory>,
    teardown: &Teardown,
    instance: &Instance,
    signals: &Signals,
) -> Result<(), LaunchError> {
    let is_stopped = |populated| instance.is_stopped(populated, signals);
    let populated = memory.ram().populate_unless(is_stopped);
    if populated.map_err(SetupError::from)? {
        return Ok(());
    }
    teardown.free(Arc::clone(memory));
    Err(LaunchError::Stopped)
}

fn open_disks(configs: &[DiskConfig]) -> Result<Vec<Disk>, LaunchError> {
    configs
        .iter()
        .map(|config| Ok(Disk::open(config)?))
        .collect()
}

fn open_taps(configs: &[NetConfig]) -> Result<Vec<Tap>, LaunchError> {
    configs.iter().map(|config| Ok(open_tap(config)?)).collect()
}

fn open_vsock(
    config: Option<&VsockConfig>,
    guardian: &Guardian,
) -> Result<Option<ServedVsock>, LaunchError> {
    let open = |vsock| Ok(ServedVsock::open(vsock, guardian.status())?);
    config.map(open).transpose()
}

/// Writes the ACPI tables, the reset vector, and the kernel with its initial RAM disk to guest memory.
fn load_guest(
    config: &MachineConfig,
    setup: &Setup,
    memory: &GuestMemoryMmap,
    devices: &Devices,
) -> Result<Entry, LaunchError> {
    let on_pci = config.transport == Transport::Pci;
    let rsdp = acpi::write(
        memory,
        config.vcpus,
        &devices.windows,
        devices.fw_cfg,
        on_pci,
    )?;
    reset::write(memory).map_err(BootError::Write)?;
    let arenas: Vec<GpaRange> = setup.arenas.iter().map(|arena| arena.gpa).collect();
    let payload = Payload {
        kernel: &config.kernel,
        initramfs: config.initramfs.as_deref(),
        cmdline: &config.cmdline,
        arenas: &arenas,
    };
    Ok(boot::load(memory, &setup.ram, &payload, rsdp)?)
}

const fn first_vcpu(config: &MachineConfig, entry: Entry, interface: Interface) -> VcpuSetup {
    VcpuSetup {
        index: 0,
        vcpus: config.vcpus,
        nested: config.nested,
        entry,
        interface,
    }
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
