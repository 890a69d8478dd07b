//! vCPU threads: enter the guest, handle its exits, stop.

mod setup;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};

use ebb_hypercall_abi::call::KVM_HC_MAP_GPA_RANGE;
use ebb_hypercall_abi::discovery::PORT;

use crate::bus::{Action, Bus, ExitReason};
use crate::hypercall::{Arguments, Hypercalls};
use crate::kvm::{KickTable, KickTarget, KvmError, RunPages, kick};
use crate::reclaim::EntryHook;
use crate::strict::Strict;

use ebb_core::generation::Gate;
pub use setup::{VcpuSetup, configure};

/// What the vCPUs of a machine share.
pub struct Shared {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// Every vCPU enters the guest through it.
    pub gate: Arc<Gate>,
    /// Called before the gate.
    pub entry_hook: Arc<dyn EntryHook>,
    /// The same as the gate kicks.
    pub kicks: Arc<KickTable>,
    /// Where the threads register the pages that they share with KVM.
    pub run_pages: Arc<RunPages>,
    /// Carries out the guest's calls.
    pub hypercalls: Arc<Hypercalls>,
    /// Strict mode, where it is on.
    pub strict: Option<Arc<Strict>>,
    /// Called once a vCPU learns that the machine must end; the first reason counts.
    pub on_exit: Box<dyn Fn(ExitReason) + Send + Sync>,
}

/// The vCPU threads of a running machine.
pub struct Vcpus {
    stopping: Arc<AtomicBool>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they enter the guest at once.
    ///
    /// # Errors
    /// A thread could not be started; those that were are stopped again.
    pub fn start(vcpus: Vec<VcpuFd>, shared: &Arc<Shared>) -> io::Result<Self> {
        let mut started = Self {
            stopping: Arc::default(),
            gate: Arc::clone(&shared.gate),
            threads: Vec::new(),
        };
        for (index, fd) in vcpus.into_iter().enumerate() {
            let (shared, stopping) = (Arc::clone(shared), Arc::clone(&started.stopping));
            let thread = thread::Builder::new()
                .name(format!("ebb-vcpu{index}"))
                .spawn(move || run_thread(index, fd, &shared, &stopping));
            match thread {
                Ok(thread) => started.threads.push(thread),
                Err(error) => {
                    started.stop();
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    /// Brings every vCPU out of the guest for good and waits for its thread to end.
    pub fn stop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Those who wait at the gate get no kick.
        self.gate.stop();
        self.threads.iter().for_each(kick);
        for thread in self.threads.drain(..) {
            // A panic was already reported as a crash by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The whole life of a vCPU thread. A panic in a device ends the machine, not just the thread.
fn run_thread(index: usize, fd: VcpuFd, shared: &Shared, stopping: &AtomicBool) {
    let run = AssertUnwindSafe(|| run(index, fd, shared, stopping));
    match catch_unwind(run) {
        Ok(None) => {}
        Ok(Some(reason)) => (shared.on_exit)(reason),
        Err(_) => {
            tracing::error!("vCPU {index}: a device model panicked");
            (shared.on_exit)(ExitReason::Crash);
        }
    }
}

/// Runs the guest until it ends the machine (then says why) or the machine stops.
fn run(index: usize, fd: VcpuFd, shared: &Shared, stopping: &AtomicBool) -> Option<ExitReason> {
    let mut target = KickTarget::new(fd, &shared.run_pages, index);
    let _registration = shared.kicks.register(index);
    loop {
        shared.entry_hook.before_entry();
        // First forget old kicks, then look at what they are for: a kick that comes in between makes
        // KVM_RUN return at once.
        target.clear_kick();
        if stopping.load(Ordering::SeqCst) {
            return None;
        }
        if let Some(strict) = shared
            .strict
            .as_deref()
            .filter(|strict| strict.is_caught(index))
        {
            // Where it cannot be told, it is 0.
            strict.tell(
                index,
                target.registers().map_or(0, |registers| registers.rip),
            );
        }
        // The only place where a vCPU enters the guest. While it handles the exit it is out.
        let exit = {
            let _inside = shared.gate.enter(index)?;
            let _in_guest = shared.strict.as_ref().map(|strict| strict.in_guest(index));
            target.run()
        };
        match exit {
            Ok((VcpuExit::IoIn(PORT, data), 4)) if data.len() == 4 => {
                if let Err(error) = call_by_port(&mut target, shared) {
                    tracing::error!("vCPU {index}: {error}");
                    return Some(ExitReason::Crash);
                }
            }
            Ok((exit, io_size)) => {
                if let Action::Exit(reason) = handle(index, exit, io_size, shared) {
                    return Some(reason);
                }
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                tracing::error!("vCPU {index}: KVM_RUN failed: {error}");
                return Some(ExitReason::Crash);
            }
        }
    }
}

/// A call whose arguments are in registers, and whose answer is what the guest reads from the port.
fn call_by_port(target: &mut KickTarget, shared: &Shared) -> Result<(), KvmError> {
    let registers = target.registers()?;
    let status = shared.hypercalls.call(Arguments {
        gpa: registers.rbx,
        pages: registers.rcx,
        attributes: registers.rsi,
    });
    // All statuses fit into 32 bits; the guest extends the sign.
    target.answer_input(status as u32);
    Ok(())
}

/// Handles one exit. Port I/O comes as one or more accesses of `io_size` bytes.
fn handle(index: usize, exit: VcpuExit<'_>, io_size: usize, shared: &Shared) -> Action {
    match exit {
        VcpuExit::IoOut(port, data) => write_port(&shared.ports, port, data, io_size),
        VcpuExit::IoIn(port, data) => {
            for element in data.chunks_mut(io_size) {
                shared.ports.read(u64::from(port), element);
            }
            Action::Continue
        }
        VcpuExit::Hypercall(call) if call.nr == KVM_HC_MAP_GPA_RANGE => {
            let [gpa, pages, attributes, ..] = call.args;
            let status = shared.hypercalls.call(Arguments {
                gpa,
                pages,
                attributes,
            });
            *call.ret = status.cast_unsigned();
            Action::Continue
        }
        VcpuExit::MmioRead(addr, data) => {
            shared.mmio.read(addr, data);
            Action::Continue
        }
        VcpuExit::MmioWrite(addr, data) => shared.mmio.write(addr, data),
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => Action::Continue,
        VcpuExit::SystemEvent(kind, _) => Action::Exit(match kind {
            kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => ExitReason::Stop,
            kvm_bindings::KVM_SYSTEM_EVENT_RESET => ExitReason::Reset,
            _ => ExitReason::Crash,
        }),
        VcpuExit::Shutdown => {
            tracing::error!("vCPU {index}: triple fault");
            Action::Exit(ExitReason::Crash)
        }
        other => {
            tracing::error!("vCPU {index}: KVM cannot go on: {other:?}");
            Action::Exit(ExitReason::Crash)
        }
    }
}

/// Writes to a port element by element, until one ends the machine.
fn write_port(ports: &Bus, port: u16, data: &[u8], size: usize) -> Action {
    data.chunks(size)
        .map(|element| ports.write(u64::from(port), element))
        .find(|action| *action != Action::Continue)
        .unwrap_or(Action::Continue)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;

    /// Keeps what is written, and stops the machine at a zero.
    #[derive(Default)]
    struct Tape(Vec<Vec<u8>>);

    impl BusDevice for Tape {
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

        fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
            self.0.push(data.to_vec());
            match data {
                [0, ..] => Action::Exit(ExitReason::Stop),
                _ => Action::Continue,
            }
        }
    }

    #[test]
    fn a_string_instruction_is_as_many_accesses_as_it_has_elements() {
        let tape = Arc::new(Mutex::new(Tape::default()));
        let mut ports = Bus::default();
        ports.insert(0x3f8, 8, tape.clone()).unwrap();
        assert_eq!(write_port(&ports, 0x3f8, b"abc", 1), Action::Continue);
        assert_eq!(write_port(&ports, 0x3f8, b"dede", 2), Action::Continue);
        assert_eq!(
            write_port(&ports, 0x3f8, b"f\0g", 1),
            Action::Exit(ExitReason::Stop)
        );
        let want: [&[u8]; 7] = [b"a", b"b", b"c", b"de", b"de", b"f", b"\0"];
        assert_eq!(tape.lock().unwrap().0, want);
    }
}
