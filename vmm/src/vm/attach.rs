//! Wiring of devices, one short function each.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_manager::MutEventSubscriber;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::LaunchError;
use super::counters::DeviceCounters;
use super::events::ExitSlot;
use super::nets::Nets;
use super::vsock::ServedVsock;
use crate::arch::acpi::{self, VirtioWindow};
use crate::arch::layout;
use crate::bus::{Bus, ExitReason};
use crate::config::{
    BalloonConfig, MachineConfig, RngLimits, SerialConfig, Transport, VsockConfig,
};
use crate::devices::fw_cfg::FwCfg;
use crate::devices::pci::PciRoot;
use crate::devices::platform::{I8042, Power, PvPanic};
use crate::devices::serial::{ConsoleInput, SerialFile, SerialPort};
use crate::devices::state::SaveState;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::{Balloon, BalloonHandle};
use crate::devices::virtio::blk::{Block, Disk, DiskHandle};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pci::{self, PciTransport};
use crate::devices::virtio::rng::Entropy;
use crate::devices::virtio::vsock::Vsock;
use crate::guest_memory::{KernelEvents, RangeSink};
use crate::irq::MessageInterrupt;
use crate::kvm;
use crate::output::Outlet;
use crate::sys::RawMode;
use crate::sys::tap::Tap;

/// A device that a snapshot keeps, and its name.
pub type SavedDevice = (String, Arc<Mutex<dyn SaveState>>);

/// The devices of a machine while it is being built.
pub struct Devices {
    /// Is told what the devices learn of the guest's kernel.
    kernel: Arc<dyn KernelEvents>,
    transport: Transport,
    /// The PCI root bus, if there is one.
    root: Option<Arc<Mutex<PciRoot>>>,
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// There is a [`FwCfg`], for the ACPI tables.
    pub fw_cfg: bool,
    /// Where the virtio devices are, for the ACPI tables.
    pub windows: Vec<VirtioWindow>,
    /// The virtio devices, to shut them down.
    pub virtio: Vec<Arc<Mutex<MmioTransport>>>,
    /// Their counters.
    pub counters: DeviceCounters,
    /// What may change of the network interfaces.
    pub nets: Nets,
    /// The vsock's socket, if there is one.
    pub vsock: Option<ServedVsock>,
    /// Those that have a state, in the order in which they were attached.
    pub saved: Vec<SavedDevice>,
}

/// Bytes of the guest's output that may wait for a terminal or a pipe.
const OUTPUT_CAPACITY: usize = 1 << 20;

/// For so long its output waits for more of it.
const OUTPUT_DELAY: Duration = Duration::from_millis(2);

/// The operator's side of the serial port.
#[derive(Default)]
pub struct Console {
    /// Where the guest's output goes.
    pub output: Option<Arc<Outlet>>,
    /// Restores the terminal when dropped.
    pub raw_mode: Option<RawMode>,
    /// Feeds standard input to the port.
    pub input: Option<Box<dyn MutEventSubscriber>>,
}

impl Devices {
    /// No devices yet. Those to come tell `kernel` what they learn of the guest's kernel, and are reached by `transport`.
    pub fn new(kernel: Arc<dyn KernelEvents>, transport: Transport) -> Self {
        Self {
            kernel,
            transport,
            root: None,
            ports: Bus::default(),
            mmio: Bus::default(),
            fw_cfg: false,
            windows: Vec::new(),
            virtio: Vec::new(),
            counters: DeviceCounters::default(),
            nets: Nets::default(),
            vsock: None,
            saved: Vec::new(),
        }
    }

    /// Power, reset and panic ports, and the keyboard controller, which is returned.
    pub fn attach_platform(
        &mut self,
        machine: &kvm::Machine,
    ) -> Result<Arc<Mutex<I8042>>, LaunchError> {
        let power = Power {
            off: acpi::S5,
            reset: acpi::RESET_VALUE,
        };
        self.ports.insert(
            layout::POWER_PORT,
            layout::POWER_PORT_LEN,
            Arc::new(Mutex::new(power)),
        )?;
        self.ports.insert(
            layout::PVPANIC_PORT,
            1,
            Arc::new(Mutex::new(PvPanic::default())),
        )?;
        let line = Arc::new(machine.interrupt(layout::KEYBOARD_GSI)?);
        let keyboard = Arc::new(Mutex::new(I8042::new(line)));
        self.ports
            .insert(layout::I8042_PORT, layout::I8042_PORT_LEN, keyboard.clone())?;
        self.saved.push(("keyboard".into(), keyboard.clone()));
        Ok(keyboard)
    }

    /// By this the guest's kernel tells where its note is.
    pub fn attach_fw_cfg(&mut self, memory: &Arc<GuestMemoryMmap>) -> Result<(), LaunchError> {
        let device = FwCfg::new(Arc::clone(memory), Arc::clone(&self.kernel));
        let device = Arc::new(Mutex::new(device));
        self.ports
            .insert(layout::FW_CFG_PORT, layout::FW_CFG_PORT_LEN, device.clone())?;
        self.saved.push(("fw_cfg".into(), device));
        self.fw_cfg = true;
        Ok(())
    }

    /// A PCI root bus: for devices there, and for Linux to find arenas, see [`PciRoot`].
    pub fn attach_pci(&mut self) -> Result<(), LaunchError> {
        let root = Arc::new(Mutex::new(PciRoot::default()));
        self.ports
            .insert(layout::PCI_PORT, layout::PCI_PORT_LEN, root.clone())?;
        self.saved.push(("pci".into(), root.clone()));
        self.root = Some(root);
        Ok(())
    }

    /// The serial port; with input when it goes to the terminal.
    pub fn attach_serial(
        &mut self,
        machine: &kvm::Machine,
        config: &SerialConfig,
        exit: &Arc<ExitSlot>,
    ) -> Result<Console, LaunchError> {
        let interrupt = Arc::new(machine.interrupt(layout::SERIAL_GSI)?);
        let drained = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(LaunchError::system("eventfd"))?;
        let input_drained = drained
            .try_clone()
            .map_err(LaunchError::system("eventfd"))?;
        let output = open_output(config)?;
        let port = SerialPort::new(interrupt, output.clone(), drained);
        let port = Arc::new(Mutex::new(port));
        self.ports
            .insert(layout::SERIAL_PORT, layout::SERIAL_PORT_LEN, port.clone())?;
        self.saved.push(("serial".into(), port.clone()));
        if *config != SerialConfig::Tty {
            return Ok(Console {
                output,
                ..Console::default()
            });
        }
        let raw_mode = RawMode::enter().map_err(LaunchError::system("terminal"))?;
        let exit = Arc::clone(exit);
        let quit = Box::new(move || exit.request(ExitReason::Stop));
        let input = ConsoleInput::new(port, input_drained, raw_mode.is_some(), quit);
        Ok(Console {
            output,
            raw_mode,
            input: Some(Box::new(input)),
        })
    }
}

impl Devices {
    /// A balloon that hands its pages to `sink`.
    pub fn attach_balloon(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        config: &BalloonConfig,
        sink: Arc<dyn RangeSink>,
    ) -> Result<BalloonHandle, LaunchError> {
        let balloon = Balloon::new(config, sink)?;
        let handle = balloon.handle();
        self.attach_virtio(machine, memory, Box::new(balloon))?;
        Ok(handle)
    }

    /// Block devices, in the order of the command line, and the operator's handles of them.
    pub fn attach_disks(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        config: &MachineConfig,
        disks: Vec<Disk>,
    ) -> Result<Vec<DiskHandle>, LaunchError> {
        let mut handles = Vec::new();
        for (index, (disk, it)) in disks.into_iter().zip(&config.disks).enumerate() {
            let block = Block::new(index, disk, it)?;
            self.counters.disks.push(Arc::clone(block.counters()));
            handles.push(block.handle());
            self.attach_virtio(machine, memory, Box::new(block))?;
        }
        Ok(handles)
    }

    /// Network interfaces, in the order of the command line, on the taps that were opened for them.
    pub fn attach_nets(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        config: &MachineConfig,
        taps: Vec<Tap>,
    ) -> Result<(), LaunchError> {
        for (index, (net, tap)) in config.nets.iter().zip(taps).enumerate() {
            let name = net.name(index);
            let net = Net::new(index, &config.id, net, tap)
                .map_err(LaunchError::system("network thread"))?;
            self.counters.nets.push(Arc::clone(net.counters()));
            self.nets.push(name, net.limits());
            self.attach_virtio(machine, memory, Box::new(net))?;
        }
        Ok(())
    }

    /// A source of random bytes.
    pub fn attach_rng(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        limits: RngLimits,
    ) -> Result<(), LaunchError> {
        let entropy =
            Entropy::new(limits).map_err(LaunchError::system("thread for random bytes"))?;
        self.counters.rng = Some(Arc::clone(entropy.counters()));
        self.attach_virtio(machine, memory, Box::new(entropy))
    }

    /// Streams to and from the host, through `served`.
    pub fn attach_vsock(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        config: &VsockConfig,
        served: ServedVsock,
    ) -> Result<(), LaunchError> {
        let vsock = Vsock::new(config, served.socket());
        let vsock = vsock.map_err(LaunchError::system("vsock thread"))?;
        self.vsock = Some(served);
        self.counters.vsock = Some(Arc::clone(vsock.counters()));
        self.attach_virtio(machine, memory, Box::new(vsock))
    }

    fn attach_virtio(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), LaunchError> {
        match self
            .root
            .clone()
            .filter(|_| self.transport == Transport::Pci)
        {
            Some(root) => self.attach_function(machine, memory, device, &root),
            None => self.attach_window(machine, memory, device),
        }
    }

    /// Puts a virtio device on the PCI root bus, with an interrupt and a doorbell for each queue.
    fn attach_function(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        device: Box<dyn VirtioDevice>,
        root: &Mutex<PciRoot>,
    ) -> Result<(), LaunchError> {
        // The host bridge has the first place.
        let place = self.virtio.len() + 1;
        if place > PciRoot::MOST {
            let most = PciRoot::MOST as u32;
            return Err(LaunchError::TooManyDevices { most });
        }
        let base = layout::PCI_MEMORY + place as u64 * layout::PCI_MEMORY_SIZE;
        let interrupt = |_| Ok(Box::new(machine.message_interrupt()?) as Box<dyn MessageInterrupt>);
        let interrupts = (0..=device.queue_sizes().len()).map(interrupt);
        let interrupts = interrupts.collect::<Result<Vec<_>, LaunchError>>()?;
        let (memory, kernel) = (Arc::clone(memory), Arc::clone(&self.kernel));
        let function = PciTransport::new(device, memory, base as u32, interrupts, kernel)?;
        let registers = Arc::clone(function.registers());
        let notified = registers.lock().unwrap_or_else(PoisonError::into_inner);
        for (queue, event) in notified.queue_notifiers() {
            machine.doorbell_for_any(base + pci::notify_offset(queue), event)?;
        }
        drop(notified);
        let function = Arc::new(Mutex::new(function));
        self.mmio
            .insert(base, layout::PCI_MEMORY_SIZE, function.clone())?;
        self.saved.push((format!("pci{place}"), function.clone()));
        let mut root = root.lock().unwrap_or_else(PoisonError::into_inner);
        root.add(function);
        self.virtio.push(registers);
        Ok(())
    }

    /// Gives a virtio device its window, its interrupt and a doorbell for each queue.
    fn attach_window(
        &mut self,
        machine: &kvm::Machine,
        memory: &Arc<GuestMemoryMmap>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), LaunchError> {
        let index = self.windows.len() as u32;
        let gsi = layout::VIRTIO_GSI + index;
        if gsi >= layout::GSI_END {
            let most = layout::GSI_END - layout::VIRTIO_GSI;
            return Err(LaunchError::TooManyDevices { most });
        }
        let base = layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_SIZE;
        let line = Arc::new(machine.interrupt(gsi)?);
        let transport = MmioTransport::new(device, Arc::clone(memory), line)?
            .with_kernel(Arc::clone(&self.kernel));
        for (queue, event) in transport.queue_notifiers() {
            machine.doorbell(base + QUEUE_NOTIFY, queue, event)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(base, layout::VIRTIO_MMIO_SIZE, transport.clone())?;
        self.saved
            .push((format!("virtio{index}"), transport.clone()));
        self.virtio.push(transport);
        self.windows.push(VirtioWindow { base, gsi });
        Ok(())
    }
}

fn open_output(config: &SerialConfig) -> Result<Option<Arc<Outlet>>, LaunchError> {
    let start = |target: Box<dyn Write + Send>| {
        let outlet = Outlet::start("ebb-console", OUTPUT_CAPACITY, OUTPUT_DELAY, target);
        let outlet = outlet.map_err(LaunchError::system("console thread"))?;
        Ok(Some(Arc::new(outlet)))
    };
    match config {
        SerialConfig::Tty => start(Box::new(Stdout)),
        SerialConfig::Null => Ok(None),
        SerialConfig::File(path) => {
            let file = SerialFile::create(path).map_err(|source| LaunchError::SerialFile {
                path: path.clone(),
                source,
            })?;
            start(Box::new(file))
        }
    }
}

/// Standard output, without the lock and the buffer that std has for it.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
