//! The interface's thread: serves both queues and the tap.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::receive::Receiver;
use super::transmit::Transmitter;
use super::wire;
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{
    GuestFaults, Poller, QueueFailure, ReadError, ServedQueue, SharedLimiter, Work,
};
use crate::sys::tap::Tap;

ebb_core::metrics! {
    /// What an interface has done since the machine started. `rx` is the way to the guest, `tx` the way from it.
    pub struct NetStats from pub struct NetCounters {
        /// Frames that the guest got.
        rx_packets_total: Counter,
        /// Frames that the guest did not get: its buffers were too small, or it was resetting the device.
        rx_dropped_total: Counter,
        /// Frames that the host got.
        tx_packets_total: Counter,
        /// Frames that the host did not get: the tap did not take them, or they were none.
        tx_dropped_total: Counter,
        /// Times that frames in either direction had to wait for the interface's limits.
        throttled_total: Counter,
        /// Bytes of frames that the guest got.
        rx_bytes_total: Counter of Bytes,
        /// Bytes of frames that the host got.
        tx_bytes_total: Counter of Bytes,
    }
}

/// What both directions need.
pub(super) struct Context {
    pub memory: Arc<GuestMemoryMmap>,
    pub features: u64,
    pub tap: Arc<Tap>,
    pub counters: Arc<NetCounters>,
    pub faults: Arc<GuestFaults>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

impl Context {
    pub fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Adds the memory of one buffer to `slices`.
    pub fn add_buffer<'m>(
        &'m self,
        (addr, len): (u64, u32),
        slices: &mut impl Extend<VolatileSlice<'m>>,
    ) -> Result<(), ReadError> {
        let len = len as usize;
        let outside = |_| ReadError::NotMemory { addr, len };
        for slice in self.memory.get_slices(GuestAddress(addr), len) {
            slices.extend([slice.map_err(outside)?]);
        }
        Ok(())
    }
}

/// What wakes the thread.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const TAP: u32 = 2;

/// Both queues.
pub(super) struct NetWorker {
    context: Context,
    receive: ServedQueue,
    transmit: ServedQueue,
    limits: NetLimits,
}

/// The limits of both directions. Clones are the same ones, and a reset does not fill them up.
#[derive(Clone, Debug)]
pub struct NetLimits {
    /// Of what the guest receives.
    pub receive: SharedLimiter,
    /// Of what it sends.
    pub transmit: SharedLimiter,
}

impl NetWorker {
    pub fn new(
        context: Context,
        receive: ServedQueue,
        transmit: ServedQueue,
        limits: NetLimits,
    ) -> Self {
        Self {
            context,
            receive,
            transmit,
            limits,
        }
    }
}

/// When a direction is to be served again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// When something happens.
    Event,
    /// At once: there may be more.
    Now,
    /// After this time, because of its limit.
    After(Duration),
}

impl Next {
    const fn delay(self) -> Option<Duration> {
        match self {
            Self::Event => None,
            Self::Now => Some(Duration::ZERO),
            Self::After(delay) => Some(delay),
        }
    }
}

impl Work for NetWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.receive.notified(), RECEIVE)?;
        poller.watch(self.transmit.notified(), TRANSMIT)?;
        // It stays readable while the guest has no buffers.
        poller.watch_arrivals(&*self.context.tap, TAP)
    }

    fn run(self, poller: &Poller) {
        let offloads = wire::offloads_of(self.context.features);
        let set = self.context.tap.set_offload(offloads);
        set.unwrap_or_else(|error| tracing::error!("{}: {error}", self.context.tap.name()));
        let NetLimits { receive, transmit } = &self.limits;
        let mut receiver = Receiver::new(&self.context, self.receive, receive);
        let transmitter = Transmitter::new(&self.context, self.transmit, transmit);
        receiver.forget_old_frames(poller.stop());
        serve(&self.context, receiver, transmitter, poller);
    }
}

fn serve(
    context: &Context,
    mut receiver: Receiver<'_>,
    mut transmitter: Transmitter<'_>,
    poller: &Poller,
) {
    // What the driver made available before it was ready is not notified again.
    let (mut receive_due, mut transmit_due) = (true, true);
    let (mut receive, mut transmit) = (Next::Event, Next::Event);
    loop {
        if std::mem::take(&mut transmit_due) || transmit != Next::Event {
            transmit = context.next(transmitter.serve(poller.stop()));
        }
        if std::mem::take(&mut receive_due) || receive != Next::Event {
            receive = context.next(receiver.serve(poller.stop()));
        }
        let delays = [receive.delay(), transmit.delay()];
        let timeout = delays.into_iter().flatten().min();
        let is_running = poller.wait(timeout, |token| match token {
            TRANSMIT => transmit_due = true,
            TAP => {
                receiver.expect_frames();
                receive_due = true;
            }
            _ => receive_due = true,
        });
        if !is_running {
            return;
        }
    }
}

impl Context {
    /// A queue that is out of service waits for a reset.
    fn next(&self, served: Result<Next, QueueFailure>) -> Next {
        served.unwrap_or_else(|failure| {
            self.fail(failure);
            Next::Event
        })
    }

    fn fail(&self, failure: QueueFailure) {
        self.faults.report(failure);
        let told = self.interrupt.needs_reset();
        told.unwrap_or_else(|error| self.faults.report(format_args!("interrupt: {error}")));
    }
}
