//! The first serial port, a 16550A, and the terminal that it is connected to.

mod file;
mod input;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Action, BusDevice};
use crate::faults::GuestFaults;
use crate::irq::Interrupt;
use crate::output::Outlet;

pub use file::SerialFile;
pub use input::ConsoleInput;

/// Where the guest's output goes; nowhere without an outlet.
struct Output(Option<Arc<Outlet>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(outlet) = &self.0 {
            outlet.put(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line as the trait of vm-superio.
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Signals the input side that the guest has read all input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // The eventfd is non-blocking and its counter cannot overflow in steps of one, so this cannot fail.
        let _ = self.0.write(1);
    }
}

/// The serial port.
pub struct SerialPort {
    uart: Serial<Line, Drained, Output>,
    faults: GuestFaults,
}

impl SerialPort {
    /// A port that raises `interrupt` and writes to `output`. `drained` is signalled whenever the guest has read all input.
    #[must_use]
    pub fn new(
        interrupt: Arc<dyn Interrupt>,
        output: Option<Arc<Outlet>>,
        drained: EventFd,
    ) -> Self {
        Self {
            uart: Serial::with_events(Line(interrupt), Drained(drained), Output(output)),
            faults: GuestFaults::new("serial port"),
        }
    }

    /// Gives input to the guest, as much as fits.
    ///
    /// Returns the number of bytes taken.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        if self.uart.fifo_capacity() == 0 {
            return 0;
        }
        self.uart.enqueue_raw_bytes(bytes).unwrap_or_else(|error| {
            self.faults.report(format_args!("{error:?}"));
            0
        })
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.uart.write(offset, *byte)
        {
            self.faults.report(format_args!("{error:?}"));
        }
        Action::Continue
    }
}

/// Locks the port. After a panic of another holder the port is still usable.
fn lock(port: &Mutex<SerialPort>) -> std::sync::MutexGuard<'_, SerialPort> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}
