//! What a snapshot keeps of a function.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PciTransport;
use crate::devices::pci::VectorSaved;
use crate::devices::state::{SaveState, from_value, to_value};

#[derive(Serialize, Deserialize)]
struct FunctionSaved {
    /// The whole configuration space; what the guest cannot change is the same in the restored machine.
    config: Vec<u8>,
    sizing: bool,
    /// The entries of MSI-X, and which of them stand for the configuration and the queues.
    table: Vec<VectorSaved>,
    vectors: (u16, Vec<u16>),
    /// What it has in common with a device on MMIO.
    registers: Value,
}

impl SaveState for PciTransport {
    fn save(&self) -> Result<Value, String> {
        to_value(&FunctionSaved {
            config: self.config.bytes().to_vec(),
            sizing: self.sizing,
            table: self.signal.msix().save(),
            vectors: self.signal.save(),
            registers: self.lock().save()?,
        })
    }

    /// The device is activated when the machine is resumed. Messages that the guest had chosen are known to KVM before that.
    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let saved: FunctionSaved = from_value(state)?;
        self.lock().restore(&saved.registers)?;
        let (was, is) = (saved.table.len(), self.signal.msix().len());
        if was != is {
            return Err(format!("it has {was} interrupts, here are {is}"));
        }
        self.config.write(0, &saved.config);
        self.sizing = saved.sizing;
        self.signal.restore(&saved.vectors);
        self.report(self.signal.msix().restore(&saved.table, self.control()));
        Ok(())
    }
}
