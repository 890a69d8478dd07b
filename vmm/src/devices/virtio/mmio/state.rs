//! What a snapshot keeps of the registers.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::MmioTransport;
use super::queue::QueueSaved;
use crate::devices::state::{SaveState, from_value, to_value};

#[derive(Serialize, Deserialize)]
struct TransportSaved {
    device_type: u32,
    selects: [u32; 3],
    driver_features: u64,
    status: u32,
    active: bool,
    interrupt: (u32, u32, bool),
    queues: Vec<QueueSaved>,
    device: Value,
}

impl SaveState for MmioTransport {
    fn save(&self) -> Result<Value, String> {
        let device_type = self.device.device_type();
        let unsaved = || {
            format!(
                "the virtio device of type {device_type} cannot be part of a snapshot; start the machine without it"
            )
        };
        to_value(&TransportSaved {
            device_type,
            selects: [
                self.queue_select,
                self.device_features_select,
                self.driver_features_select,
            ],
            driver_features: self.driver_features,
            status: self.status,
            active: self.active || self.starts_late,
            interrupt: self.interrupt.save(),
            queues: self.queues.iter().map(|it| it.save(&self.memory)).collect(),
            device: self.device.save().ok_or_else(unsaved)?,
        })
    }

    /// The device is activated when the machine is resumed.
    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let saved: TransportSaved = from_value(state)?;
        let (type_, queues) = (self.device.device_type(), self.queues.len());
        if (saved.device_type, saved.queues.len()) != (type_, queues) {
            let (was, had) = (saved.device_type, saved.queues.len());
            return Err(format!(
                "it has the virtio device of type {was} with {had} queues, here is type {type_} with {queues}"
            ));
        }
        let missing = saved.driver_features & !self.device.features();
        if missing != 0 {
            return Err(format!(
                "the driver uses features {missing:#x} of the virtio device of type {type_}, which it does not have here"
            ));
        }
        self.device.restore(&saved.device)?;
        [
            self.queue_select,
            self.device_features_select,
            self.driver_features_select,
        ] = saved.selects;
        self.driver_features = saved.driver_features;
        self.status = saved.status;
        self.interrupt.restore(saved.interrupt);
        let queues = self.queues.iter_mut().zip(&saved.queues);
        queues.for_each(|(queue, saved)| queue.restore(saved));
        self.starts_late = saved.active;
        Ok(())
    }
}

impl MmioTransport {
    /// Activates a restored device. An interrupt may have been on its way when the machine was paused, so it is raised again:
    /// drivers look for what is new and find nothing, at worst.
    pub(super) fn start_late(&mut self) {
        if std::mem::take(&mut self.starts_late) {
            self.start();
            let told = self.interrupt.repeat(self.queues.len());
            told.unwrap_or_else(|error| self.faults.report(format_args!("interrupt: {error}")));
        }
    }
}
