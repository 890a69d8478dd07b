//! virtio-net (virtio 1.3, 5.1) on a tap of the host.
//!
//! The kernel reads and writes frames in guest memory itself (readv(2), writev(2)), headers included: it checks them, and
//! does what a header leaves to the receiver. This device only finds the buffers.

mod receive;
#[cfg(test)]
mod tests;
mod transmit;
mod wire;
mod worker;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{DeviceThread, GuestFaults, ServedQueue, SharedLimiter, Worker};
use super::{Activation, ActivationError, QueueHandle, VirtioDevice};
use crate::config::{ConfigError, MacAddress, NetConfig};
use crate::devices::state::from_value;
use crate::sys::seccomp::Role;
use crate::sys::tap::{Tap, TapError};
use wire::{DEVICE_TYPE, HEADER_BYTES};
use worker::{Context, NetWorker};

pub use worker::{NetCounters, NetLimits, NetStats};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// A network interface.
pub struct Net {
    tap: Arc<Tap>,
    mac: MacAddress,
    mtu: Option<u16>,
    counters: Arc<NetCounters>,
    faults: Arc<GuestFaults>,
    worker: Option<Worker>,
    thread: DeviceThread,
    limits: NetLimits,
}

/// How long a tap is waited for that another process has: that of a machine which was killed at this moment is free soon.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Opens the tap of an interface.
///
/// # Errors
/// [`TapError`].
pub fn open_tap(config: &NetConfig) -> Result<Tap, TapError> {
    if let Some(fd) = config.fd {
        return Tap::inherit(fd, HEADER_BYTES);
    }
    let name = config.tap.as_deref().unwrap_or_default();
    let patience = Instant::now() + PATIENCE;
    loop {
        match Tap::open(name, HEADER_BYTES) {
            Err(TapError::Busy { .. }) if Instant::now() < patience => thread::sleep(PERIOD),
            opened => return opened,
        }
    }
}

impl Net {
    /// An interface on `tap`, number `index` on the command line of the machine `id`: threads and logs call it `net` with that
    /// number.
    ///
    /// # Errors
    /// Its thread could not be started.
    pub fn new(index: usize, id: &str, config: &NetConfig, tap: Tap) -> io::Result<Self> {
        let name = format!("net{index}");
        let derived = || MacAddress::derived(&format!("{id}/{}", tap.name()));
        Ok(Self {
            thread: DeviceThread::spawn(&format!("ebb-{name}"), Role::Net)?,
            mac: config.mac.unwrap_or_else(derived),
            mtu: config.mtu,
            faults: Arc::new(GuestFaults::new(name)),
            tap: Arc::new(tap),
            counters: Arc::default(),
            worker: None,
            limits: NetLimits {
                receive: SharedLimiter::new(config.rx_bw, config.rx_ops),
                transmit: SharedLimiter::new(config.tx_bw, config.tx_ops),
            },
        })
    }

    /// The interface's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }

    /// The interface's limits, which may change at any time.
    #[must_use]
    pub const fn limits(&self) -> &NetLimits {
        &self.limits
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        let features = bits.iter().fold(0, |features, bit| features | 1 << bit);
        let mtu = u64::from(self.mtu.is_some()) << VIRTIO_NET_F_MTU;
        features | mtu | wire::features_of(self.tap.supported())
    }

    /// From the tap to the guest, and from the guest to the tap.
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = wire::config(self.mac.bytes(), self.mtu.unwrap_or(0));
        let tail = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut queues = activation.queues.into_iter().flatten();
        let mut next = |index| {
            let handle: QueueHandle = queues.next().ok_or(ActivationError::MissingQueue(index))?;
            Ok(ServedQueue::new(index, handle))
        };
        let (receive, transmit) = (next(0)?, next(1)?);
        let context = Context {
            memory: activation.memory,
            features: activation.features,
            tap: Arc::clone(&self.tap),
            counters: Arc::clone(&self.counters),
            faults: Arc::clone(&self.faults),
            interrupt: activation.interrupt,
        };
        let worker = NetWorker::new(context, receive, transmit, self.limits.clone());
        let worker = self.thread.start(worker);
        self.worker = Some(worker.map_err(ActivationError::Worker)?);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }

    /// Its address: the default one follows from names that may be others when it is restored.
    fn save(&self) -> Option<Value> {
        Some(self.mac.to_string().into())
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let mac = from_value::<String>(state)?.parse();
        self.mac = mac.map_err(|error: ConfigError| error.to_string())?;
        Ok(())
    }

    fn reset(&mut self) {
        // Waits for the thread.
        self.worker = None;
    }
}
