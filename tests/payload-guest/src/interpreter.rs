//! Runs scripts, see [`script`]: the first vCPU those whose number comes from the serial port, the second one those that the
//! first one names.

use core::arch::asm;
use core::sync::atomic::Ordering;

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs::{self, Transport};

use crate::calls::Calls;
use crate::cpu::{Ram, power_off, send};
use crate::guarded::{self, Outcome};
use crate::records::WordMemory;
use crate::script::{self, Kind, PASSED, STEP_WORDS, Step};
use crate::{Parameters, map, marker, mischief};

/// Ports of the serial port: data, interrupts, line status.
const DATA: u16 = 0x3f8;
const INTERRUPTS: u16 = 0x3f9;
const FIFO: u16 = 0x3fa;
const LINE: u16 = 0x3fb;
const MODEM: u16 = 0x3fc;
const STATUS: u16 = 0x3fd;

/// The shared words in which the first vCPU names a script to the second one, and the second one says which it runs.
const WANTED: u64 = 100;
const RUNNING: u64 = 101;

/// Runs scripts, forever.
pub fn run(ram: Ram, parameters: &Parameters, index: u64) -> ! {
    let interpreter = Interpreter {
        ram,
        parameters: *parameters,
        index,
    };
    if index > 0 {
        interpreter.serve()
    }
    // Addresses that the guest frees must have been used.
    for address in (map::TEST_MEMORY..parameters.ram).step_by(4096) {
        let _ = guarded::store(address, 8, address);
    }
    send(marker::READY);
    loop {
        let number = receive();
        let at = ram.load(map::SCRIPTS + 8 * u64::from(number));
        let (step, value) = interpreter.script(at);
        prepare_serial();
        send(marker::SCRIPT);
        send(step);
        send(value);
    }
}

/// What runs scripts on one vCPU.
#[derive(Debug)]
struct Interpreter {
    ram: Ram,
    parameters: Parameters,
    index: u64,
}

impl Interpreter {
    /// Runs what the first vCPU names.
    fn serve(&self) -> ! {
        loop {
            let wanted = self.ram.shared(WANTED).load(Ordering::Acquire);
            self.ram.shared(RUNNING).store(wanted, Ordering::Release);
            if wanted == 0 {
                core::hint::spin_loop();
            } else {
                let _ = self.script(wanted);
            }
        }
    }

    /// Runs the script at `at`. Returns the number of the step that went wrong, and its result.
    fn script(&self, at: u64) -> (u64, u64) {
        let mut last: Outcome = (0, false);
        for number in 0.. {
            let mut words = [0; STEP_WORDS];
            for (word, address) in words.iter_mut().zip(0u64..) {
                let step = at + (number * STEP_WORDS as u64 + address) * 8;
                *word = self.ram.load(step);
            }
            let step = Step::from_words(words);
            let kind = Kind::ALL.get(step.kind as usize).copied();
            let good = match kind.unwrap_or(Kind::End) {
                Kind::End => break,
                Kind::Expect => !last.1 && last.0 & step.a == step.b,
                Kind::ExpectFault => last.1,
                kind => {
                    last = self.repeat(kind, step);
                    true
                }
            };
            if !good {
                return (number, last.0);
            }
        }
        (PASSED, last.0)
    }

    fn repeat(&self, kind: Kind, mut step: Step) -> Outcome {
        let mut last = self.step(kind, step);
        for _ in 1..step.times {
            step.at = step.at.wrapping_add(step.stride);
            last = self.step(kind, step);
        }
        last
    }

    fn step(&self, kind: Kind, step: Step) -> Outcome {
        let Step {
            at, width, a, b, ..
        } = step;
        match kind {
            Kind::Output => guarded::output(at as u16, width, a),
            Kind::Input => guarded::input(at as u16, width),
            Kind::OutputString => guarded::output_string(at as u16, width, a, b),
            Kind::InputString => guarded::input_string(at as u16, width, a, b),
            Kind::Store => guarded::store(at, width, a),
            Kind::Load => guarded::load(at, width),
            Kind::PortCall => (
                Calls::raw(Transport::Port(PORT), at, a, b).cast_unsigned(),
                false,
            ),
            Kind::InstructionCall => (Calls::raw(instruction(), at, a, b).cast_unsigned(), false),
            Kind::KvmCall => guarded::kvm_call(instruction(), at),
            Kind::WriteMsr => guarded::write_msr(at as u32, a),
            Kind::ReadMsr => guarded::read_msr(at as u32),
            Kind::Cpuid => (cpuid(at as u32, a as u32, b), false),
            Kind::Call => guarded::call(at),
            Kind::Wait => self.wait(step),
            Kind::Fill => self.fill(step),
            Kind::CountFilled => self.count_filled(step),
            Kind::Side => self.side(at),
            Kind::Mischief => {
                let seed = b.wrapping_add(self.index);
                (mischief::run(self.ram, self.parameters.ram, seed, a), false)
            }
            Kind::Crash => crash(),
            Kind::PowerOff => power_off(),
            Kind::End | Kind::Expect | Kind::ExpectFault => (0, false),
        }
    }

    fn wait(&self, step: Step) -> Outcome {
        loop {
            let outcome = guarded::load(step.at, step.width);
            if outcome.1 || outcome.0 & step.a == step.b {
                return outcome;
            }
            core::hint::spin_loop();
        }
    }

    fn fill(&self, step: Step) -> Outcome {
        for page in 0..step.a {
            let address = step.at + page * 4096;
            let _ = guarded::store(address, 8, step.b.wrapping_add(address));
        }
        (0, false)
    }

    fn count_filled(&self, step: Step) -> Outcome {
        let is_filled = |page: &u64| {
            let address = step.at + page * 4096;
            guarded::load(address, 8).0 == step.b.wrapping_add(address)
        };
        ((0..step.a).filter(is_filled).count() as u64, false)
    }

    /// Names a script to the second vCPU, and waits until it begins with it.
    fn side(&self, at: u64) -> Outcome {
        self.ram.shared(WANTED).store(at, Ordering::Release);
        while self.ram.shared(RUNNING).load(Ordering::Acquire) != at {
            core::hint::spin_loop();
        }
        (0, false)
    }
}

/// The hypercall instruction of this processor.
pub fn instruction() -> Transport {
    let found = stubs::discover().and_then(|interface| Transport::choose(interface, true));
    found.unwrap_or(Transport::Port(PORT))
}

fn cpuid(leaf: u32, subleaf: u32, register: u64) -> u64 {
    let found = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    let registers = [found.eax, found.ebx, found.ecx, found.edx];
    registers
        .get(register as usize)
        .copied()
        .unwrap_or(0)
        .into()
}

fn crash() -> ! {
    let nothing = [0u16; 5];
    // SAFETY: ends the guest: without a table, an exception cannot be delivered.
    unsafe {
        asm!("lidt [{}]", "ud2", in(reg) &raw const nothing, options(noreturn));
    }
}

/// Puts the serial port into a state in which it sends, whatever a script has written to it.
fn prepare_serial() {
    for (port, value) in [(LINE, 3), (MODEM, 8), (FIFO, 0), (INTERRUPTS, 1)] {
        let _ = guarded::output(port, 1, value);
    }
}

/// Waits for a byte from the serial port, with its interrupt by way of the I/O APIC's pin 4.
fn receive() -> u8 {
    const SELECT: u64 = 0xfec0_0000;
    const WINDOW: u64 = 0xfec0_0010;
    const SPURIOUS: u64 = 0xfee0_00f0;
    const LINT0: u64 = 0xfee0_0350;
    const MASKED: u64 = 1 << 16;
    // The local APIC's software enable, and vector 0xff for what is spurious, at which nothing comes here.
    let _ = guarded::store(SPURIOUS, 4, 0x1ff);
    // The same interrupt comes by way of the PIC, which is not set up.
    let _ = guarded::store(LINT0, 4, MASKED);
    for port in [0x21, 0xa1] {
        let _ = guarded::output(port, 1, 0xff);
    }
    for (register, value) in [(0x19, 0), (0x18, SERIAL_VECTOR)] {
        let _ = guarded::store(SELECT, 4, register);
        let _ = guarded::store(WINDOW, 4, value);
    }
    prepare_serial();
    while guarded::input(STATUS, 1).0 & 1 == 0 {
        // SAFETY: the interrupt's handler changes nothing but the stack. It comes after the processor has halted, or wakes it.
        unsafe { asm!("sti", "hlt", "cli") };
    }
    guarded::input(DATA, 1).0 as u8
}

/// As in `faults`, which exists in the guest only.
const SERIAL_VECTOR: u64 = 0x20;

const _: () = assert!(script::STEP_WORDS == 7);
