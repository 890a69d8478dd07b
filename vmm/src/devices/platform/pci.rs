//! The PCI configuration ports of a machine that has only a host bridge.

use crate::bus::{Action, BusDevice};

/// Offset of the data port from the address port.
const DATA: u64 = 4;
/// The bit of the address that enables the data port.
const ENABLE: u32 = 1 << 31;
/// Vendor and device of the host bridge: Intel's 440FX, which every kernel supports.
const VENDOR_DEVICE: u32 = 0x1237_8086;
/// Its class: bridge, host.
const CLASS: u32 = 0x0600_0000;

/// Configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2). Linux puts soft-reserved memory into its tree of resources,
/// from which `/dev/daxN.M` is made, only on a machine whose PCI configuration it can access (Linux, `arch/x86/pci/legacy.c`,
/// `pcibios_init`). No root bridge is in the ACPI tables, so it does not look for devices.
#[derive(Debug, Default)]
pub struct PciConfig {
    address: u32,
}

impl PciConfig {
    /// The register that the address names.
    const fn register(&self) -> u32 {
        match self.address {
            0x8000_0000 => VENDOR_DEVICE,
            0x8000_0008 => CLASS,
            // The host bridge has no other register.
            0x8000_0004..=0x8000_00ff => 0,
            _ => u32::MAX,
        }
    }
}

impl BusDevice for PciConfig {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset.checked_sub(DATA) {
            None if offset == 0 && data.len() == 4 => self.address,
            Some(byte @ 0..4) => self.register() >> (byte * 8),
            _ => u32::MAX,
        };
        let bytes = value
            .to_le_bytes()
            .into_iter()
            .chain(std::iter::repeat(0xff));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        // All other registers are read-only.
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & (ENABLE | 0x00ff_fffc);
        }
        Action::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut PciConfig, address: u32, offset: u64, len: usize) -> u32 {
        device.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        device.read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    #[test]
    fn there_is_a_host_bridge_and_nothing_else() {
        let mut device = PciConfig::default();
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
}
