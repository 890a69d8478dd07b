//! Address ranges that trap, and the devices behind them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Why the machine ends. The monitor's exit status follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered off, or the operator stopped the machine.
    Stop,
    /// The guest asked for a reset.
    Reset,
    /// The guest cannot continue: a triple fault, or KVM could not run it.
    Crash,
    /// The guest's kernel reported a panic.
    Panic,
    /// The process is gone that the guest's memory comes from.
    PageServer,
}

/// What a device wants the machine to do after an access. Devices hold no reference to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the vCPU continues.
    Continue,
    /// End the machine.
    Exit(ExitReason),
}

/// A device that handles accesses to an address range.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` from the start of the range. What the device does not fill in
    /// stays as the bus set it: all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;
}

/// Two devices were given overlapping ranges, or a range is empty or wraps.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bus range {base:#x}+{len:#x} is empty, wraps, or overlaps the range at {other:#x}")]
pub struct Overlap {
    base: u64,
    len: u64,
    other: u64,
}

/// One device and the length of its range in bytes.
type Entry = (u64, Arc<Mutex<dyn BusDevice>>);

/// A port or MMIO address space. Built once, then shared read-only by the vCPU threads; each device has
/// a lock of its own.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Registers `device` for the addresses `base..base + len`.
    ///
    /// # Errors
    /// [`Overlap`] if the range is empty, wraps around, or overlaps another one.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let clash = |other| Overlap { base, len, other };
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(clash(base))?;
        if let Some((&other, (other_len, _))) = self.devices.range(..end).next_back()
            && other + other_len > base
        {
            return Err(clash(other));
        }
        self.devices.insert(base, (len, device));
        Ok(())
    }

    /// Reads from the device at `addr`; an address without a device, or an access that leaves the
    /// device's range, reads all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(addr, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
        }
    }

    /// Writes to the device at `addr`. If there is none, the write is ignored.
    #[must_use]
    pub fn write(&self, addr: u64, data: &[u8]) -> Action {
        self.find(addr, data.len())
            .map_or(Action::Continue, |(offset, device)| {
                device
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(offset, data)
            })
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, &Arc<Mutex<dyn BusDevice>>)> {
        let (base, (range, device)) = self.devices.range(..=addr).next_back()?;
        let offset = addr - base;
        (offset.checked_add(len as u64)? <= *range).then_some((offset, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last access.
    #[derive(Default)]
    struct Probe {
        last: Option<(u64, usize)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.last = Some((offset, data.len()));
            data.fill(0);
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Action {
            self.last = Some((offset, data.len()));
            Action::Exit(ExitReason::Reset)
        }
    }

    #[test]
    fn accesses_reach_the_device_with_their_offset() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x60, 5, probe.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x63, &mut data);
        assert_eq!((data, probe.lock().unwrap().last), ([0, 0], Some((3, 2))));
        assert_eq!(bus.write(0x60, &[1]), Action::Exit(ExitReason::Reset));
    }

    #[test]
    fn an_access_outside_reads_ones_and_writes_nothing() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x60, 5, probe.clone()).unwrap();
        for addr in [0, 0x5f, 0x64, 0x65, u64::MAX] {
            let mut data = [0; 2];
            bus.read(addr, &mut data);
            assert_eq!(data, [0xff, 0xff], "{addr:#x}");
            assert_eq!(bus.write(addr, &data), Action::Continue, "{addr:#x}");
        }
        assert_eq!(probe.lock().unwrap().last, None);
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x60, 5, probe.clone()).unwrap();
        for (base, len) in [
            (0x60, 1),
            (0x5f, 2),
            (0x64, 9),
            (0, 0x100),
            (7, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(base, len, probe.clone()).is_err(),
                "{base:#x}+{len:#x}"
            );
        }
        bus.insert(0x65, 1, probe).unwrap();
    }
}
