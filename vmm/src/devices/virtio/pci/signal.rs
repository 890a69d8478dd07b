//! Which vector stands for which event of a device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::devices::pci::Msix;
use crate::devices::virtio::mmio::Signal;

/// Nobody wants to hear of it (virtio 1.3, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The vectors of a device, as its driver has chosen them.
pub(super) struct MsixSignal {
    msix: Arc<Msix>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl MsixSignal {
    pub fn new(msix: Arc<Msix>, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            msix,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        })
    }

    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Number of queues.
    pub const fn queues(&self) -> usize {
        self.queues.len()
    }

    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Relaxed);
    }

    /// The vector of a queue; none for one that does not exist.
    pub fn queue_vector(&self, queue: u32) -> u16 {
        let vector = self.queues.get(queue as usize);
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    pub fn set_queue_vector(&self, queue: u32, vector: u16) {
        if let Some(to) = self.queues.get(queue as usize) {
            to.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    /// The vectors for the configuration and for each queue.
    pub fn save(&self) -> (u16, Vec<u16>) {
        let of_queues = self.queues.iter().map(|it| it.load(Ordering::Relaxed));
        (self.config_vector(), of_queues.collect())
    }

    /// Takes up what a snapshot has kept.
    pub fn restore(&self, (config, queues): &(u16, Vec<u16>)) {
        self.set_config_vector(*config);
        for (queue, vector) in (0..).zip(queues) {
            self.set_queue_vector(queue, *vector);
        }
    }

    /// A driver that asks for a vector that does not exist reads back that it has none.
    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.len() {
            vector
        } else {
            NO_VECTOR
        }
    }
}

impl Signal for MsixSignal {
    fn used_buffers(&self, queue: usize) -> io::Result<()> {
        let vector = self.queues.get(queue);
        self.msix
            .trigger(vector.map_or(NO_VECTOR, |it| it.load(Ordering::Relaxed)))
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.msix.trigger(self.config_vector())
    }

    fn reset(&self) {
        let all = self.queues.iter().chain([&self.config]);
        all.for_each(|vector| vector.store(NO_VECTOR, Ordering::Relaxed));
    }
}
