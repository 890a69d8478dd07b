//! Pausing and resuming: first the vCPUs rest, then the devices; the other way round they go on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::instance::Instance;
use crate::devices::virtio::mmio::MmioTransport;
use crate::vcpu::{Ending, PauseSwitch};

/// The virtio devices of a running machine.
pub struct VirtioDevices(pub Vec<Arc<Mutex<MmioTransport>>>);

impl VirtioDevices {
    /// Stops them for good: their workers are joined.
    pub fn stop(&self) {
        self.each(MmioTransport::shut_down);
    }

    fn each(&self, mut act: impl FnMut(&mut MmioTransport)) {
        for transport in &self.0 {
            act(&mut transport.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// Pauses and resumes a machine. One request at a time: the others wait for `turn`, under which `switch` and the transports
/// have locks of their own.
pub struct Pausing {
    /// True while the machine is paused.
    turn: Mutex<bool>,
    switch: Arc<PauseSwitch>,
    devices: Arc<VirtioDevices>,
    instance: Arc<Instance>,
}

impl Pausing {
    /// For a machine that runs.
    pub fn new(switch: PauseSwitch, devices: VirtioDevices, instance: Arc<Instance>) -> Self {
        Self {
            turn: Mutex::new(false),
            switch: Arc::new(switch),
            devices: Arc::new(devices),
            instance,
        }
    }

    /// The same for a machine that was restored: it is paused until it is resumed.
    pub fn paused(self) -> Self {
        self.switch.start_paused();
        self.instance.set_paused(true);
        Self {
            turn: Mutex::new(true),
            ..self
        }
    }

    /// Does something with a paused machine, which stays paused meanwhile. `None`: it is not paused.
    pub fn while_paused<T>(&self, action: impl FnOnce() -> T) -> Option<T> {
        let paused = self.turn();
        paused.then(action)
    }

    /// By this its vCPUs hear of it.
    pub const fn switch(&self) -> &Arc<PauseSwitch> {
        &self.switch
    }

    /// The virtio devices.
    pub const fn devices(&self) -> &Arc<VirtioDevices> {
        &self.devices
    }

    /// Returns when no vCPU is in the guest and no device uses its memory.
    ///
    /// # Errors
    /// [`Ending`].
    pub fn pause(&self) -> Result<(), Ending> {
        let mut paused = self.turn();
        if !*paused {
            self.switch.pause()?;
            self.devices.each(MmioTransport::pause);
            *paused = true;
            self.instance.set_paused(true);
        }
        Ok(())
    }

    /// Lets devices and vCPUs go on.
    ///
    /// # Errors
    /// [`Ending`].
    pub fn resume(&self) -> Result<(), Ending> {
        let mut paused = self.turn();
        if *paused {
            self.instance.set_paused(false);
            *paused = false;
            self.devices.each(MmioTransport::resume);
            self.switch.resume()?;
        }
        Ok(())
    }

    fn turn(&self) -> MutexGuard<'_, bool> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
