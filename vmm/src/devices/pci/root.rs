//! The configuration ports of the root bus: a host bridge, and the functions beside it.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::bus::{Action, BusDevice};
use crate::devices::state::{SaveState, from_value, to_value};

/// Offset of the data port from the address port.
const DATA: u64 = 4;
/// The bit of the address that enables the data port.
const ENABLE: u32 = 1 << 31;
/// Vendor and device of the host bridge: Intel's 440FX, which every kernel supports.
const VENDOR_DEVICE: u32 = 0x1237_8086;
/// Its class: bridge, host.
const CLASS: u32 = 0x0600_0000;

/// The configuration space of a function on the root bus.
pub trait PciFunction: Send {
    /// Reads registers.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Writes registers.
    fn write_config(&mut self, offset: usize, data: &[u8]);
}

/// Configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2). Linux puts soft-reserved memory into its tree of resources,
/// from which `/dev/daxN.M` is made, only on a machine whose PCI configuration it can access (Linux, `arch/x86/pci/legacy.c`,
/// `pcibios_init`). Without functions there is no root bridge in the ACPI tables either, so it does not look for devices.
#[derive(Default)]
pub struct PciRoot {
    address: u32,
    functions: Vec<Arc<Mutex<dyn PciFunction>>>,
}

impl PciRoot {
    /// Most functions beside the host bridge.
    pub const MOST: usize = 31;

    /// Puts a function on the bus; the first one is device 1.
    pub fn add(&mut self, function: Arc<Mutex<dyn PciFunction>>) {
        self.functions.push(function);
    }

    /// The register that the address names, of the host bridge.
    const fn bridge(&self) -> u32 {
        match self.address & 0xfc {
            0 => VENDOR_DEVICE,
            8 => CLASS,
            // It has no other register.
            _ => 0,
        }
    }

    /// Device of function 0 on bus 0 that the address names; `None` if it names no such place.
    const fn device(&self) -> Option<usize> {
        if self.address & ENABLE == 0 || self.address & 0x00ff_0700 != 0 {
            return None;
        }
        Some((self.address >> 11 & 0x1f) as usize)
    }

    /// The function that the address names, and the offset of the register for an access at `byte` of the data port.
    fn function(&self, byte: u64) -> Option<(&Mutex<dyn PciFunction>, usize)> {
        let index = self.device()?.checked_sub(1)?;
        let register = (self.address & 0xfc) as usize + byte as usize;
        Some((self.functions.get(index)?, register))
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let byte = offset.checked_sub(DATA);
        if let Some(byte @ 0..4) = byte
            && let Some((function, register)) = self.function(byte)
        {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            return function.read_config(register, data);
        }
        let value = match byte {
            None if offset == 0 && data.len() == 4 => self.address,
            Some(byte @ 0..4) if self.device() == Some(0) => self.bridge() >> (byte * 8),
            _ => u32::MAX,
        };
        let bytes = value
            .to_le_bytes()
            .into_iter()
            .chain(std::iter::repeat(0xff));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & (ENABLE | 0x00ff_fffc);
        } else if let Some(byte @ 0..4) = offset.checked_sub(DATA)
            && let Some((function, register)) = self.function(byte)
        {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.write_config(register, data);
        }
        Action::Continue
    }
}

impl SaveState for PciRoot {
    /// The guest may be between its two accesses to the ports.
    fn save(&self) -> Result<Value, String> {
        to_value(&self.address)
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        self.address = from_value(state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its offset, and keeps what is written.
    #[derive(Default)]
    struct Probe(Vec<(usize, Vec<u8>)>);

    impl PciFunction for Probe {
        fn read_config(&mut self, offset: usize, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn read(device: &mut PciRoot, address: u32, offset: u64, len: usize) -> u32 {
        device.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        device.read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    #[test]
    fn there_is_a_host_bridge_and_nothing_else() {
        let mut device = PciRoot::default();
        assert_eq!(read(&mut device, 0x8000_0000, 0, 4), 0x8000_0000);
        assert_eq!(read(&mut device, 0x8000_0000, 4, 4), VENDOR_DEVICE);
        assert_eq!(read(&mut device, 0x8000_0000, 4, 2), 0x8086);
        assert_eq!(read(&mut device, 0x8000_0008, 6, 2), 0x0600, "the class");
        assert_eq!(read(&mut device, 0x8000_000c, 4, 4), 0);
        assert_eq!(read(&mut device, 0x8000_0800, 4, 4), u32::MAX, "device 1");
        assert_eq!(read(&mut device, 0x8001_0000, 4, 4), u32::MAX, "bus 1");
        assert_eq!(read(&mut device, 0, 4, 4), u32::MAX, "switched off");
        device.write(3, &[1]);
        device.write(4, &[1, 2, 3, 4]);
        assert_eq!(read(&mut device, 0x8000_0000, 4, 4), VENDOR_DEVICE);
    }

    #[test]
    fn functions_are_devices_of_bus_0() {
        let mut device = PciRoot::default();
        let probes: [Arc<Mutex<Probe>>; 2] = Default::default();
        probes.iter().for_each(|probe| device.add(probe.clone()));
        assert_eq!(read(&mut device, 0x8000_1010, 4, 4), 0x1010_1010);
        assert_eq!(read(&mut device, 0x8000_1010, 7, 1), 0x13);
        for (address, why) in [
            (0x8000_1110, "function 1"),
            (0x8001_1010, "bus 1"),
            (0x8000_1810, "device 3"),
            (0x1010, "off"),
        ] {
            assert_eq!(read(&mut device, address, 4, 4), u32::MAX, "{why}");
            device.write(4, &[1]);
        }
        read(&mut device, 0x8000_0804, 4, 4);
        device.write(6, &[1, 2]);
        assert_eq!(
            probes.map(|it| it.lock().unwrap().0.clone()),
            [vec![(6, vec![1, 2])], vec![]]
        );
    }
}
