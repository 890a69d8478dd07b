//! A virtio device on PCI, whose driver accesses its configuration space and its memory as the input says.

use std::io;
use std::sync::Arc;

use ebb_vmm::bus::BusDevice;
use ebb_vmm::config::DiskEngine;
use ebb_vmm::devices::pci::PciFunction;
use ebb_vmm::devices::virtio::pci::{PciTransport, SIZE};
use ebb_vmm::irq::{Interrupt, Message, MessageInterrupt};

use super::devices::{a_balloon, disk, read_only};
use super::machine::memory;
use crate::Bytes;

/// An interrupt that nobody hears, and that takes every other message.
struct Unheard;

impl Interrupt for Unheard {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

impl MessageInterrupt for Unheard {
    fn route(&self, message: Option<Message>) -> io::Result<()> {
        match message {
            Some(message) if message.data & 1 != 0 => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(()),
        }
    }
}

/// Any accesses to the configuration space and the memory of a disk or a balloon.
pub fn run(input: &[u8]) {
    const BASE: u32 = 0xe000_8000;
    let mut input = Bytes::new(input);
    let memory = memory();
    let device = match input.u8() % 2 {
        0 => a_balloon(&memory),
        _ => disk(read_only(), true, DiskEngine::Auto),
    };
    let interrupts = (0..4).map(|_| Box::new(Unheard) as Box<dyn MessageInterrupt>);
    let (ram, kernel) = (memory.ram().memory(), Arc::clone(&memory) as _);
    let function = PciTransport::new(device, ram, BASE, interrupts.collect(), kernel);
    let mut function = function.expect("a function");
    function.write_config(4, &[6, 4]);
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        let kind = input.u8();
        // Most of what can be accessed lies at the start of each part of the memory.
        let at = u32::from(input.u8()) | u32::from(kind & 7) << 12;
        let width = 1 << (kind >> 3 & 3);
        let mut data = input.u64().to_le_bytes();
        let data = &mut data[..width];
        match kind >> 5 {
            0 => function.read_config(at as usize & 0xff, data),
            1 | 2 => function.write_config(at as usize & 0xff, data),
            3 => function.read(u64::from(at), data),
            4 => function.read(u64::from(at | 0xf00) % u64::from(SIZE - 8), data),
            _ => drop(function.write(u64::from(at), data)),
        }
    }
    let mut base = [0; 4];
    function.write_config(0x10, &[0; 4]);
    function.read_config(0x10, &mut base);
    assert_eq!(u32::from_le_bytes(base), BASE, "it stays where it is");
    let registers = function.registers().lock();
    registers.expect("nobody has panicked").shut_down();
}
