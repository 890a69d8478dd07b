//! The first serial port, a 16550A, and the terminal that it is connected to.

mod file;
mod input;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_superio::serial::{Serial, SerialEvents};
use vm_superio::{SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Action, BusDevice};
use crate::devices::state::{SaveState, from_value, to_value};
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
    interrupt: Arc<dyn Interrupt>,
    output: Option<Arc<Outlet>>,
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
            uart: Serial::with_events(
                Line(Arc::clone(&interrupt)),
                Drained(drained),
                Output(output.clone()),
            ),
            interrupt,
            output,
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

/// What a snapshot keeps of it.
#[derive(Serialize, Deserialize)]
struct PortState {
    divisor: [u8; 2],
    interrupts: [u8; 2],
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
    input: Vec<u8>,
}

impl SaveState for SerialPort {
    fn save(&self) -> Result<Value, String> {
        let is = self.uart.state();
        to_value(&PortState {
            divisor: [is.baud_divisor_low, is.baud_divisor_high],
            interrupts: [is.interrupt_enable, is.interrupt_identification],
            line: [is.line_control, is.line_status],
            modem: [is.modem_control, is.modem_status],
            scratch: is.scratch,
            input: is.in_buffer,
        })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let was: PortState = from_value(state)?;
        let drained = self.uart.events().0.try_clone();
        let drained = drained.map_err(|error| error.to_string())?;
        let state = SerialState {
            baud_divisor_low: was.divisor[0],
            baud_divisor_high: was.divisor[1],
            interrupt_enable: was.interrupts[0],
            interrupt_identification: was.interrupts[1],
            line_control: was.line[0],
            line_status: was.line[1],
            modem_control: was.modem[0],
            modem_status: was.modem[1],
            scratch: was.scratch,
            in_buffer: was.input,
        };
        let (line, output) = (Line(Arc::clone(&self.interrupt)), self.output.clone());
        let uart = Serial::from_state(&state, line, Drained(drained), Output(output));
        self.uart = uart.map_err(|error| format!("{error:?}"))?;
        Ok(())
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
