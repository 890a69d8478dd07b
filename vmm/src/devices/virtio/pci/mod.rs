//! virtio over PCI (virtio 1.3, 4.1): the registers of [`super::mmio`] at other places, and MSI-X instead of a line.
//!
//! There is no line, no legacy interface, and one base address. It is fixed: Linux leaves alone what lies in the window of its
//! root bus, and a driver that writes another address reads back the old one.

mod signal;
mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio as reg;
use vm_memory::GuestMemoryMmap;

use super::VirtioDevice;
use super::mmio::{MmioTransport, TransportError};
use super::queue::GuestFaults;
use crate::bus::{Action, BusDevice};
use crate::devices::pci::{ConfigSpace, Msix, PciFunction};
use crate::guest_memory::KernelEvents;
use crate::irq::MessageInterrupt;
use signal::MsixSignal;
use wire::{COMMON, COMMON_SIZE, CONFIG_VECTOR, DEVICE, ISR, NOTIFY, PENDING, QUEUE_VECTOR, TABLE};

pub use wire::{NOTIFY_STEP, SIZE, notify_offset};

/// Offset of the only base address in the configuration space.
const BASE_ADDRESS: usize = 0x10;

/// A virtio device as a function on the root bus: its configuration space, and its memory of [`SIZE`] bytes.
pub struct PciTransport {
    registers: Arc<Mutex<MmioTransport>>,
    signal: Arc<MsixSignal>,
    config: ConfigSpace,
    /// The guest has written ones to the base address, to learn how large the memory is.
    sizing: bool,
    /// Offset of the capabilities MSI-X, and access to the memory.
    msix: usize,
    access: usize,
    faults: GuestFaults,
}

impl PciTransport {
    /// Makes a function of `device` whose memory is at `base`, a multiple of [`SIZE`]. It has an interrupt for its configuration
    /// and one for each queue, as many as are given: a driver that finds too few lets queues share one. `kernel` is told when
    /// the driver resets the device while it is in use.
    ///
    /// # Errors
    /// [`TransportError`] if the queues' events cannot be created.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        base: u32,
        interrupts: Vec<Box<dyn MessageInterrupt>>,
        kernel: Arc<dyn KernelEvents>,
    ) -> Result<Self, TransportError> {
        let mut config = ConfigSpace::new(wire::identity(device.device_type()));
        config.set(BASE_ADDRESS, &base.to_le_bytes());
        let access = wire::add_capabilities(&mut config);
        let msix = wire::add_msix(&mut config, interrupts.len());
        let signal = MsixSignal::new(Msix::new(interrupts), device.queue_sizes().len());
        let faults = GuestFaults::new(format!("virtio device {} on PCI", device.device_type()));
        let registers = MmioTransport::with_signal(device, memory, Arc::clone(&signal) as _)?;
        Ok(Self {
            registers: Arc::new(Mutex::new(registers.with_kernel(kernel))),
            signal,
            config,
            sizing: false,
            msix,
            access,
            faults,
        })
    }

    /// The device's registers, to pause and stop it.
    #[must_use]
    pub const fn registers(&self) -> &Arc<Mutex<MmioTransport>> {
        &self.registers
    }

    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The common configuration as the driver sees it now.
    fn common(&self) -> [u8; COMMON_SIZE] {
        let registers = self.lock();
        let seen = registers.seen();
        let queue = seen.queue_select;
        let fields: [(usize, usize, u64); 17] = [
            (0x00, 4, seen.device_features_select.into()),
            (
                0x04,
                4,
                registers
                    .read_register(reg::VIRTIO_MMIO_DEVICE_FEATURES)
                    .into(),
            ),
            (0x08, 4, seen.driver_features_select.into()),
            (0x0c, 4, seen.driver_features.into()),
            (CONFIG_VECTOR, 2, self.signal.config_vector().into()),
            (0x12, 2, self.signal.queues() as u64),
            (
                0x14,
                1,
                registers.read_register(reg::VIRTIO_MMIO_STATUS).into(),
            ),
            (
                0x15,
                1,
                registers
                    .read_register(reg::VIRTIO_MMIO_CONFIG_GENERATION)
                    .into(),
            ),
            (0x16, 2, queue.into()),
            (0x18, 2, seen.queue_size.into()),
            (QUEUE_VECTOR, 2, self.signal.queue_vector(queue).into()),
            (
                0x1c,
                2,
                registers.read_register(reg::VIRTIO_MMIO_QUEUE_READY).into(),
            ),
            (0x1e, 2, queue.into()),
            (0x20, 8, seen.rings[0]),
            (0x28, 8, seen.rings[1]),
            (0x30, 8, seen.rings[2]),
            (0x38, 2, 0),
        ];
        let mut image = [0; COMMON_SIZE];
        for (at, width, value) in fields {
            let bytes = value.to_le_bytes().into_iter().take(width);
            image
                .iter_mut()
                .skip(at)
                .zip(bytes)
                .for_each(|(to, from)| *to = from);
        }
        image
    }

    fn write_common(&self, offset: usize, data: &[u8]) {
        if let (0x20..0x38, Some((low, high))) = (offset, data.split_at_checked(4))
            && high.len() == 4
        {
            // An address at once (virtio 1.3, 4.1.3.1 allows it, and drivers need not).
            self.write_common(offset, low);
            return self.write_common(offset + 4, high);
        }
        self.write_field(offset, data);
    }

    fn write_field(&self, offset: usize, data: &[u8]) {
        let mut registers = self.lock();
        match (wire::register(offset, data.len()), data) {
            (Some(register), _) => {
                let value = data
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u32::from(*byte));
                if register == reg::VIRTIO_MMIO_QUEUE_READY && value != 1 {
                    // Only a reset disables a queue (virtio 1.3, 4.1.4.3.2).
                    return self
                        .faults
                        .report(format_args!("{value} written to queue_enable"));
                }
                registers.write_register(register, value);
            }
            (None, &[low, high]) if offset == CONFIG_VECTOR => {
                self.signal
                    .set_config_vector(u16::from_le_bytes([low, high]));
            }
            (None, &[low, high]) if offset == QUEUE_VECTOR => {
                let queue = registers.seen().queue_select;
                self.signal
                    .set_queue_vector(queue, u16::from_le_bytes([low, high]));
            }
            _ => self.faults.report(format_args!(
                "write of {} bytes at {offset:#x} of the common configuration",
                data.len()
            )),
        }
    }

    fn report(&self, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.faults.report(format_args!("interrupt: {error}"));
        }
    }

    /// Reads the device's memory.
    fn read_memory(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let (part, at) = (offset & !(wire::PART - 1), offset & (wire::PART - 1));
        match part {
            COMMON => {
                let image = self.common();
                data.iter_mut()
                    .zip(image.iter().skip(at))
                    .for_each(|(to, from)| *to = *from);
            }
            ISR if at == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.lock().take_interrupts() as u8;
                }
            }
            DEVICE => self.lock().read_config(at as u64, data),
            TABLE => self.signal.msix().read_table(at, data),
            PENDING => self.signal.msix().read_pending(at, data),
            _ => {}
        }
    }

    /// Writes the device's memory.
    fn write_memory(&self, offset: usize, data: &[u8]) {
        let (part, at) = (offset & !(wire::PART - 1), offset & (wire::PART - 1));
        match part {
            COMMON => self.write_common(at, data),
            DEVICE => self.lock().write_config(at as u64, data),
            NOTIFY => {
                let queue = at as u32 / NOTIFY_STEP;
                self.lock()
                    .write_register(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue);
            }
            TABLE => self.report(self.signal.msix().write_table(at, data)),
            _ => {}
        }
    }

    /// What the capability that accesses memory points to (virtio 1.3, 4.1.4.9); `None` if that is nowhere.
    fn accessed(&self) -> Option<(usize, usize)> {
        let [bar] = self.config.get(self.access + 4);
        let at = u32::from_le_bytes(self.config.get(self.access + 8)) as usize;
        let len = u32::from_le_bytes(self.config.get(self.access + 12)) as usize;
        let fits = bar == 0 && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len);
        (fits && at < SIZE as usize).then_some((at, len))
    }

    /// The control register of MSI-X.
    fn control(&self) -> u16 {
        u16::from_le_bytes(self.config.get(self.msix + 2))
    }

    /// Returns true if an access of `len` bytes at `offset` touches `size` bytes at `at`.
    const fn touches(offset: usize, len: usize, at: usize, size: usize) -> bool {
        offset < at + size && at < offset + len
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.access + 16;
        if Self::touches(offset, data.len(), window, 4)
            && let Some((at, len)) = self.accessed()
        {
            let mut bytes = [0; 4];
            self.read_memory(at, &mut bytes[..len]);
            self.config.set(window, &bytes);
        }
        if self.sizing && Self::touches(offset, data.len(), BASE_ADDRESS, 4) {
            let base = self.config.get::<4>(BASE_ADDRESS);
            self.config.set(BASE_ADDRESS, &(!(SIZE - 1)).to_le_bytes());
            self.config.read(offset, data);
            return self.config.set(BASE_ADDRESS, &base);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let len = data.len();
        if Self::touches(offset, len, BASE_ADDRESS, 4) {
            self.sizing = data == [0xff; 4];
        }
        if Self::touches(offset, len, self.msix + 2, 2) {
            self.report(self.signal.msix().set_control(self.control()));
        }
        let window = self.access + 16;
        if Self::touches(offset, len, window, 4)
            && let Some((at, len)) = self.accessed()
        {
            let bytes = self.config.get::<4>(window);
            self.write_memory(at, &bytes[..len]);
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Nobody answers otherwise: what the bus has filled in stays.
        if self.config.memory_enabled() {
            self.read_memory(offset as usize, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if self.config.memory_enabled() {
            self.write_memory(offset as usize, data);
        }
        Action::Continue
    }
}
