//! vCPU threads: enter the guest, handle its exits, stop.

mod pause;
mod setup;

use std::fmt::Display;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ebb_core::generation::Gate;
use kvm_ioctls::{HypercallExit, VcpuExit, VcpuFd};

use ebb_hypercall_abi::call::KVM_HC_MAP_GPA_RANGE;
use ebb_hypercall_abi::discovery::PORT;

use crate::bus::{Action, Bus, ExitReason};
use crate::guest_kernel::{KnownKernel, Lost};
use crate::hypercall::{Arguments, Hypercalls};
use crate::kvm::{KickTable, KickTarget, MSR_KVM_SYSTEM_TIME_NEW, RunPages, kick};
use crate::reclaim::EntryHook;
use crate::strict::Strict;
use crate::sys::panic_point;
use crate::sys::seccomp::Role;
use pause::Wish;

pub use pause::{Ending, PauseSwitch};
pub use setup::{VcpuSetup, configure};

/// Time until a kick is tried again that could not be sent.
const RETRY: Duration = Duration::from_millis(1);

/// What the vCPUs of a machine share.
pub struct Shared {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// The gate through which every vCPU enters the guest.
    pub gate: Arc<Gate>,
    /// Called before the gate.
    pub entry_hook: Arc<dyn EntryHook>,
    /// The table by which the gate kicks vCPUs. Their threads register in it.
    pub kicks: Arc<KickTable>,
    /// Pauses and stops the threads.
    pub pause: Arc<PauseSwitch>,
    /// Where the threads register the pages that they share with KVM.
    pub run_pages: Arc<RunPages>,
    /// Carries out the guest's calls.
    pub hypercalls: Arc<Hypercalls>,
    /// Is told when a vCPU enters or leaves a kernel.
    pub kernel: Arc<KnownKernel>,
    /// Strict mode, where it is on.
    pub strict: Option<Arc<Strict>>,
    /// Called when an exit of a vCPU ends the machine. Several vCPUs may call it; the first reason counts.
    pub on_exit: Box<dyn Fn(ExitReason) + Send + Sync>,
}

/// The vCPU threads of a running machine.
pub struct Vcpus {
    pause: Arc<PauseSwitch>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. The threads enter the guest at once, unless they are paused.
    ///
    /// # Errors
    /// A thread could not be started. Those that were started are stopped again.
    pub fn start(vcpus: Vec<VcpuFd>, shared: &Arc<Shared>) -> io::Result<Self> {
        let mut started = Self {
            pause: Arc::clone(&shared.pause),
            gate: Arc::clone(&shared.gate),
            threads: Vec::new(),
        };
        for (index, fd) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(shared);
            let thread = thread::Builder::new()
                .name(format!("ebb-vcpu{index}"))
                .spawn(move || run_thread(index, fd, &shared));
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

    /// Brings every vCPU out of the guest for good, and waits until all threads have ended.
    pub fn stop(&mut self) {
        self.pause.stop();
        // Wakes the threads that wait at the gate, which a kick does not do.
        self.gate.stop();
        let mut left: Vec<_> = self.threads.iter().filter(|it| !kick(it)).collect();
        while !left.is_empty() {
            thread::sleep(RETRY);
            left.retain(|thread| !kick(thread));
        }
        for thread in self.threads.drain(..) {
            // The thread itself has reported a panic, as a crash.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a vCPU thread runs. A panic in a device ends the machine, not just the thread.
fn run_thread(index: usize, fd: VcpuFd, shared: &Shared) {
    Role::Vcpu.enter();
    let run = AssertUnwindSafe(|| run(index, fd, shared));
    match catch_unwind(run) {
        Ok(None) => {}
        Ok(Some(reason)) => (shared.on_exit)(reason),
        Err(_) => {
            (shared.on_exit)(ExitReason::Crash);
            tracing::error!("vCPU {index}: a device model panicked");
        }
    }
    shared.pause.has_ended();
}

/// Runs the guest until it ends the machine, and returns why; `None` if the machine is stopped.
fn run(index: usize, fd: VcpuFd, shared: &Shared) -> Option<ExitReason> {
    let mut vcpu = KickTarget::new(fd, &shared.run_pages, index);
    let _registration = shared.kicks.register(index);
    loop {
        shared.entry_hook.before_entry();
        // First forget earlier kicks, then look for their reasons: a kick that comes later makes KVM_RUN return at once.
        vcpu.clear_kick();
        let wish = shared.pause.wish();
        match wish {
            Wish::Run => {}
            Wish::Pause => vcpu.return_at_once(),
            Wish::Stop => return None,
        }
        report_caught_access(index, &mut vcpu, shared);
        let exit = {
            // The only place where a vCPU enters the guest. While an exit is handled, the vCPU counts as out.
            let _inside = shared.gate.enter(index)?;
            let _in_guest = shared.strict.as_ref().map(|strict| strict.in_guest(index));
            vcpu.run()
        };
        panic_point();
        let action = match exit {
            Ok((VcpuExit::IoIn(PORT, data), 4)) if data.len() == 4 => {
                hypercall_by_port(index, &mut vcpu, shared)
            }
            Ok((VcpuExit::Hypercall(call), _)) if call.nr == KVM_HC_MAP_GPA_RANGE => {
                hypercall(call, shared)
            }
            Ok((VcpuExit::IoIn(port, data), size)) => read_port(&shared.ports, port, data, size),
            Ok((VcpuExit::IoOut(port, data), size)) => write_port(&shared.ports, port, data, size),
            Ok((VcpuExit::MmioRead(addr, data), _)) => read_mmio(&shared.mmio, addr, data),
            Ok((VcpuExit::MmioWrite(addr, data), _)) => shared.mmio.write(addr, data),
            Ok((VcpuExit::X86Wrmsr(write), _)) => {
                let (register, data) = (write.index, write.data);
                write_msr(index, &mut vcpu, (register, data), &shared.kernel)
            }
            Ok((VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen, _)) => Action::Continue,
            Ok((VcpuExit::SystemEvent(event, _), _)) => Action::Exit(reason_of(event)),
            Ok((VcpuExit::Shutdown, _)) => crash(index, "triple fault"),
            Ok((other, _)) => crash(index, format_args!("KVM cannot go on: {other:?}")),
            Err(error) if error.errno() == libc::EINTR && wish == Wish::Pause => {
                shared.pause.rest(index, &mut vcpu);
                Action::Continue
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Action::Continue,
            Err(error) => crash(index, format_args!("KVM_RUN failed: {error}")),
        };
        if let Action::Exit(reason) = action {
            return Some(reason);
        }
    }
}

/// Has strict mode report an access that the vCPU was caught at, together with its instruction pointer, or 0 if that
/// cannot be read.
fn report_caught_access(index: usize, vcpu: &mut KickTarget, shared: &Shared) {
    if let Some(strict) = &shared.strict
        && strict.is_caught(index)
    {
        let rip = vcpu.registers().map_or(0, |registers| registers.rip);
        strict.tell(index, rip);
    }
}

/// A hypercall by port: the arguments are in registers, and the status is what the guest reads from the port.
fn hypercall_by_port(index: usize, vcpu: &mut KickTarget, shared: &Shared) -> Action {
    let registers = match vcpu.registers() {
        Ok(registers) => registers,
        Err(error) => return crash(index, error),
    };
    let status = shared.hypercalls.call(Arguments {
        gpa: registers.rbx,
        pages: registers.rcx,
        attributes: registers.rsi,
    });
    // Every status fits into 32 bits; the guest extends the sign.
    vcpu.answer_input(status as u32);
    Action::Continue
}

/// A hypercall by instruction, which KVM has passed on.
fn hypercall(call: HypercallExit<'_>, shared: &Shared) -> Action {
    let [gpa, pages, attributes, ..] = call.args;
    let status = shared.hypercalls.call(Arguments {
        gpa,
        pages,
        attributes,
    });
    *call.ret = status.cast_unsigned();
    Action::Continue
}

/// A write that says that a kernel starts or ends: it is reported, and then carried out.
fn write_msr(
    index: usize,
    vcpu: &mut KickTarget,
    (register, data): (u32, u64),
    kernel: &KnownKernel,
) -> Action {
    if register == MSR_KVM_SYSTEM_TIME_NEW {
        kernel.clock_set(index, data & 1 != 0);
    }
    kernel.forget(Lost::KernelLeft);
    vcpu.write_msr(register, data);
    Action::Continue
}

/// Logs why the vCPU cannot go on.
fn crash(index: usize, why: impl Display) -> Action {
    tracing::error!("vCPU {index}: {why}");
    Action::Exit(ExitReason::Crash)
}

/// Why the machine ends at KVM's system event of this kind.
const fn reason_of(event: u32) -> ExitReason {
    match event {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => ExitReason::Stop,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => ExitReason::Reset,
        _ => ExitReason::Crash,
    }
}

fn read_mmio(mmio: &Bus, addr: u64, data: &mut [u8]) -> Action {
    mmio.read(addr, data);
    Action::Continue
}

/// Reads from a port, `size` bytes at a time.
fn read_port(ports: &Bus, port: u16, data: &mut [u8], size: usize) -> Action {
    for element in data.chunks_mut(size) {
        ports.read(u64::from(port), element);
    }
    Action::Continue
}

/// Writes to a port, `size` bytes at a time, until one of the writes ends the machine.
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

    /// Keeps what is written, answers reads with 1, 2, 3 and so on, and stops the machine when a zero is written.
    #[derive(Default)]
    struct Tape {
        written: Vec<Vec<u8>>,
        reads: u8,
    }

    impl BusDevice for Tape {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            self.reads += 1;
            data.fill(self.reads);
        }

        fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
            self.written.push(data.to_vec());
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
        assert_eq!(tape.lock().unwrap().written, want);
        let mut data = [0; 6];
        assert_eq!(read_port(&ports, 0x3f8, &mut data, 2), Action::Continue);
        assert_eq!(data, [1, 1, 2, 2, 3, 3]);
    }
}
