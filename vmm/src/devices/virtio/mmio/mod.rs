//! virtio over MMIO, version 2 (virtio 1.3, 4.2).

mod interrupt;
mod queue;
mod state;
#[cfg(test)]
pub(super) mod tests;
mod wire;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{GuestFaults, Worker};
use super::{Activation, ActivationError, QueueHandle, VirtioDevice, VirtioInterrupt};
use crate::bus::{Action, BusDevice};
use crate::guest_memory::{KernelEvents, Lost};
use crate::irq::Interrupt;
use interrupt::{Line, MmioInterrupt};
use queue::{QueueError, QueueSetup};
use wire::{
    ACKNOWLEDGE, CONFIG, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, Half, MAGIC, NEEDS_RESET,
    QueueRegister, VENDOR, VERSION,
};

pub use interrupt::Signal;
pub use wire::{QUEUE_NOTIFY, WINDOW};

/// The transport of one device could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("the event of queue {index} could not be created")]
pub struct TransportError {
    index: usize,
    source: io::Error,
}

/// Registers that a driver on MMIO only writes.
pub(super) struct Seen {
    pub device_features_select: u32,
    pub driver_features_select: u32,
    /// The selected half.
    pub driver_features: u32,
    pub queue_select: u32,
    /// Of the selected queue, as the addresses of its descriptors, its available and its used ring.
    pub queue_size: u32,
    pub rings: [u64; 3],
}

/// The driver set DRIVER_OK, and the device could not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Device(#[from] ActivationError),
}

/// The registers of one virtio device: a window of [`WINDOW`] bytes.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<MmioInterrupt>,
    faults: GuestFaults,
    queues: Vec<QueueSetup>,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    status: u32,
    active: bool,
    /// It was restored, and is to be activated when the machine is resumed.
    starts_late: bool,
    /// Is told when the driver resets the device while it is in use.
    kernel: Option<Arc<dyn KernelEvents>>,
}

impl MmioTransport {
    /// Makes the registers for `device`. `line` is its interrupt.
    ///
    /// # Errors
    /// [`TransportError`] if the queues' events cannot be created.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, TransportError> {
        Self::with_signal(device, memory, Arc::new(Line(line)))
    }

    /// The same for another transport, which shows the registers at other places and has other interrupts.
    pub(super) fn with_signal(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        signal: Arc<dyn Signal>,
    ) -> Result<Self, TransportError> {
        let queue = |(index, &size)| {
            QueueSetup::new(size).map_err(|source| TransportError { index, source })
        };
        let queues = device.queue_sizes().iter().enumerate().map(queue);
        Ok(Self {
            queues: queues.collect::<Result<_, _>>()?,
            faults: GuestFaults::new(format!("virtio device {}", device.device_type())),
            device,
            memory,
            interrupt: Arc::new(MmioInterrupt::new(signal)),
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            status: 0,
            active: false,
            starts_late: false,
            kernel: None,
        })
    }

    /// The same, and `kernel` is told when the driver resets the device while it is in use.
    #[must_use]
    pub fn with_kernel(self, kernel: Arc<dyn KernelEvents>) -> Self {
        Self {
            kernel: Some(kernel),
            ..self
        }
    }

    /// Number and event of each queue. A write of the number to [`QUEUE_NOTIFY`], four bytes wide, signals the event:
    /// registered with KVM as an ioeventfd, it does so without an exit to user space. The events live as long as the
    /// transport, through all resets.
    pub fn queue_notifiers(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (0..).zip(self.queues.iter().map(|queue| &queue.notifier))
    }

    /// Stops the device, as a reset by the driver does: when this returns, its worker is joined and its memory no longer used.
    pub fn shut_down(&mut self) {
        self.reset();
    }

    /// Has the device rest: when this returns, it uses the guest's memory no more, until it is resumed. The guest must not run.
    pub fn pause(&mut self) {
        self.device.workers().iter().for_each(Worker::pause);
    }

    /// Lets the device work again.
    pub fn resume(&mut self) {
        self.device.workers().iter().for_each(Worker::resume);
        self.start_late();
    }

    fn status(&self) -> u32 {
        if self.interrupt.is_reset_needed() {
            self.status | NEEDS_RESET
        } else {
            self.status
        }
    }

    fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// What can be read at other transports only.
    pub(super) fn seen(&self) -> Seen {
        let queue = self.selected();
        Seen {
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: Half::selected(self.driver_features_select)
                .map_or(0, |half| half.of(self.driver_features)),
            queue_select: self.queue_select,
            queue_size: queue.map_or(0, QueueSetup::size),
            rings: queue.map_or([0; 3], QueueSetup::rings),
        }
    }

    /// Reads the interrupt status and clears it.
    pub(super) fn take_interrupts(&self) -> u32 {
        self.interrupt.take()
    }

    /// Reads the device's configuration.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes the device's configuration, if it has a driver.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.has(DRIVER) {
            self.device.write_config(offset, data);
        }
    }

    pub(super) fn read_register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => Half::selected(self.device_features_select)
                .map_or(0, |half| half.of(self.device.features())),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.selected().map_or(0, |queue| queue.max_size().into())
            }
            reg::VIRTIO_MMIO_QUEUE_READY => {
                self.selected().map_or(0, |queue| queue.is_ready().into())
            }
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.status(),
            // There is no shared memory region: length and address are -1.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    pub(super) fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        if !self.has(DRIVER) || self.has(FEATURES_OK) {
            let status = self.status;
            return self.faults.report(format_args!(
                "features written with status {status:#x}, ignored"
            ));
        }
        match Half::selected(self.driver_features_select) {
            Some(half) => self.driver_features = half.replace(self.driver_features, value),
            // The driver accepts features that do not exist.
            None if value == 0 => {}
            None => self
                .faults
                .report("features beyond bit 63 written, ignored"),
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK. Later writes must not change a queue in use.
    fn write_queue(&mut self, offset: u32, value: u32) {
        let Some(register) = QueueRegister::at(offset) else {
            return self
                .faults
                .report(format_args!("write of {value:#x} to register {offset:#x}"));
        };
        let select = self.queue_select;
        if register == QueueRegister::Ready && value == 0 && !self.has(FEATURES_OK) {
            // Linux removes its queues after it has reset the device.
            return;
        }
        if !self.has(FEATURES_OK) || self.has(DRIVER_OK) {
            let status = self.status;
            return self.faults.report(format_args!(
                "queue {select}: {register:?} written with status {status:#x}, ignored"
            ));
        }
        let queue = usize::try_from(select)
            .ok()
            .and_then(|index| self.queues.get_mut(index));
        match queue {
            Some(queue) => queue.write(register, value),
            None => self
                .faults
                .report(format_args!("there is no queue {select}")),
        }
    }

    /// A notification of the driver, if no ioeventfd takes it.
    fn notify(&self, index: u32) {
        let queue = usize::try_from(index)
            .ok()
            .and_then(|index| self.queues.get(index));
        match queue {
            Some(queue) if self.active => {
                // The counter can only be full when it is readable anyway.
                let _ = queue.notifier.write(1);
            }
            _ => self.faults.report(format_args!(
                "notification of queue {index}, which is not in use"
            )),
        }
    }

    /// Virtio 1.3, 2.1 and 3.1.1: 0 resets, bits are set in order and never cleared.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            if let Some(kernel) = self.kernel.as_ref().filter(|_| self.has(DRIVER_OK)) {
                kernel.lost(Lost::DeviceReset);
            }
            return self.reset();
        }
        let value = value & !NEEDS_RESET;
        if value & self.status != self.status {
            let status = self.status;
            return self.faults.report(format_args!(
                "status {value:#x} clears bits of {status:#x}, ignored"
            ));
        }
        self.status |= value & FAILED;
        let order = [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ];
        for (bit, before) in order {
            if value & bit == 0 || self.has(bit) || !self.has(before) || self.has(FAILED) {
                continue;
            }
            match bit {
                FEATURES_OK if !self.features_are_good() => {
                    let features = self.driver_features;
                    self.faults
                        .report(format_args!("features {features:#x} are refused"));
                }
                DRIVER_OK => {
                    self.status |= bit;
                    self.start();
                }
                _ => self.status |= bit,
            }
        }
    }

    fn features_are_good(&self) -> bool {
        self.driver_features & !self.device.features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn start(&mut self) {
        match self.try_start() {
            Ok(()) => self.active = true,
            Err(error) => {
                self.faults.report(error);
                let told = self.interrupt.needs_reset();
                told.unwrap_or_else(|error| {
                    self.faults.report(format_args!("interrupt: {error}"));
                });
            }
        }
    }

    fn try_start(&mut self) -> Result<(), StartError> {
        let features = self.driver_features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let build =
            |(index, queue): (usize, &QueueSetup)| queue.build(index, &self.memory, event_idx);
        let queues = self.queues.iter().enumerate().map(build);
        let queues = queues.collect::<Result<Vec<Option<QueueHandle>>, _>>()?;
        let interrupt: Arc<MmioInterrupt> = Arc::clone(&self.interrupt);
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            interrupt,
        })?;
        Ok(())
    }

    /// Resets the device. When this returns, the device uses nothing of the driver's any more; only then does the status read 0.
    fn reset(&mut self) {
        self.device.reset();
        self.interrupt.reset();
        self.queues.iter_mut().for_each(QueueSetup::reset);
        self.queue_select = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.active = false;
        self.starts_late = false;
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.read_config(offset, data);
        } else if let (Ok(data), Some(offset)) = (<&mut [u8; 4]>::try_from(data), aligned(offset)) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.write_config(offset, data);
        } else if let (Ok(&data), Some(offset)) = (<&[u8; 4]>::try_from(data), aligned(offset)) {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            let len = data.len();
            self.faults.report(format_args!(
                "write of {len} bytes at {offset:#x}: registers are 4 bytes wide"
            ));
        }
        Action::Continue
    }
}

/// The offset, if a register can be there.
fn aligned(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|at| at.is_multiple_of(4))
}
