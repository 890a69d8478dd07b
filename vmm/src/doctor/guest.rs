//! A tiny guest that runs kernel-mode code. It shows how fast instructions are executed, and which of the instructions that a
//! stock kernel uses fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::layout;
use crate::arch::registers::Entry;

/// Size of the guest's memory in bytes.
const MEMORY: usize = 64 << 10;
/// Code and data, where a booting guest's tables are not.
const CODE: u64 = 0x4000;
const DATA: u64 = 0xd000;
const _: () = assert!(DATA >= layout::PAGE_TABLES + 3 * 0x1000);
/// The guest writes its marks to this port.
const PORT: u16 = 0x10;
/// The last mark.
const END: u8 = 0xff;
/// How often the loop is timed.
const ROUNDS: u8 = 3;
/// Iterations of the loop, of two instructions each.
const TURNS: u32 = 50_000;
/// Time limit for everything.
const LIMIT: Duration = Duration::from_secs(5);
/// Additional time for a vCPU that was told to stop.
const GRACE: Duration = Duration::from_secs(1);

/// The guest gave no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// KVM refused.
    #[error("KVM cannot {operation}: {cause}")]
    Kvm {
        /// The call that failed.
        operation: &'static str,
        /// The error of the system call.
        cause: String,
    },
    /// The guest ended before its last instruction.
    #[error("it ended early, with {0}")]
    Died(String),
    /// The guest did not finish in time.
    #[error("it did not end within {} s", LIMIT.as_secs())]
    TimedOut,
}

fn refused<E: ToString>(operation: &'static str) -> impl Fn(E) -> GuestError {
    move |error| GuestError::Kvm {
        operation,
        cause: error.to_string(),
    }
}

/// How KVM runs code at privilege level 0.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelMode {
    /// Nanoseconds per simple instruction, the best of several rounds.
    pub ns_per_instruction: f64,
    /// Instructions that KVM's CPUID reports as available but that fail.
    pub unsupported: Vec<&'static str>,
}

/// Runs tiny guests in 64-bit kernel mode; gives up after 6 s. Uses the signal `SIGRTMIN + 1`.
///
/// # Errors
/// [`GuestError`] if not even the loop runs.
pub fn probe_kernel_mode() -> Result<KernelMode, GuestError> {
    in_time(LIMIT, probe)
}

/// Runs `work` in a thread. After `limit` the thread is told to stop, then interrupted, and at last abandoned.
fn in_time<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce(&AtomicBool) -> Result<T, GuestError> + Send + 'static,
) -> Result<T, GuestError> {
    let stop = Arc::new(AtomicBool::new(false));
    let (done, answer) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("ebb-probe".to_owned())
        .spawn({
            let stop = Arc::clone(&stop);
            move || {
                // The receiver may be gone after a time-out.
                let _ = done.send(work(&stop));
            }
        })
        .map_err(refused("be asked from a thread"))?;
    let outcome = match answer.recv_timeout(limit) {
        Err(RecvTimeoutError::Timeout) => {
            stop.store(true, Ordering::Release);
            if !interrupt(&thread) {
                // Stuck in the kernel: the thread ends with the process.
                return Err(GuestError::TimedOut);
            }
            Err(GuestError::TimedOut)
        }
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Disconnected) => Err(GuestError::Died("a panic".to_owned())),
    };
    // A panic was already reported as `Died`.
    let _ = thread.join();
    outcome
}

/// Signals the thread until it ends: a single signal could arrive just before the vCPU is entered. Returns false if the
/// thread does not end.
fn interrupt(thread: &JoinHandle<()>) -> bool {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let signal = SIGRTMIN() + 1;
    let start = Instant::now();
    let ready = register_signal_handler(signal, nothing).is_ok();
    while !thread.is_finished() && start.elapsed() < GRACE {
        if ready {
            // A thread that has just ended cannot be signalled, and need not be.
            let _ = thread.kill(signal);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.is_finished()
}

fn probe(stop: &AtomicBool) -> Result<KernelMode, GuestError> {
    let kvm = Kvm::new().map_err(refused("be opened"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell its CPUID"))?;
    let times = run(&kvm, &cpuid, &counting(), stop)?;
    let fastest = times.windows(2).map(|pair| pair[1] - pair[0]).min();
    let instructions = f64::from(2 * TURNS);
    let nanoseconds = fastest.unwrap_or_default().as_secs_f64() * 1e9;
    let mut unsupported = Vec::new();
    for instruction in INSTRUCTIONS {
        if !instruction.promised(&cpuid) {
            continue;
        }
        match run(&kvm, &cpuid, &single(instruction.code), stop) {
            Ok(_) => {}
            Err(GuestError::Died(_)) => unsupported.push(instruction.name),
            Err(error) => return Err(error),
        }
    }
    Ok(KernelMode {
        ns_per_instruction: nanoseconds / instructions,
        unsupported,
    })
}

/// An instruction that a stock kernel uses where its CPUID bit is set.
struct Instruction {
    name: &'static str,
    /// May use the 512 zeroed bytes at RDI, and RAX..RDX, which are 0.
    code: &'static [u8],
    leaf: u32,
    register: fn(&kvm_cpuid_entry2) -> u32,
    bit: u32,
}

#[rustfmt::skip]
const INSTRUCTIONS: &[Instruction] = &[
    Instruction { name: "cmpxchg16b", code: &[0xf0, 0x48, 0x0f, 0xc7, 0x0f], leaf: 1, register: |entry| entry.ecx, bit: 13 },
    Instruction { name: "popcnt", code: &[0xf3, 0x48, 0x0f, 0xb8, 0xc7], leaf: 1, register: |entry| entry.ecx, bit: 23 },
    Instruction { name: "xrstor", code: &[0x0f, 0xae, 0x2f], leaf: 1, register: |entry| entry.ecx, bit: 26 },
    Instruction { name: "andn (BMI1)", code: &[0xc4, 0xe2, 0x60, 0xf2, 0xc1], leaf: 7, register: |entry| entry.ebx, bit: 3 },
    Instruction { name: "shlx (BMI2)", code: &[0xc4, 0xe2, 0x71, 0xf7, 0xc3], leaf: 7, register: |entry| entry.ebx, bit: 8 },
];

impl Instruction {
    fn promised(&self, cpuid: &CpuId) -> bool {
        cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == self.leaf && entry.index == 0)
            .is_some_and(|entry| (self.register)(entry) >> self.bit & 1 == 1)
    }
}

/// Writes a mark: `mov al, value; out PORT, al`.
fn mark(value: u8) -> [u8; 4] {
    [0xb0, value, 0xe6, PORT.to_le_bytes()[0]]
}

/// Counts down several times, with a mark before and after each.
fn counting() -> Vec<u8> {
    let mut code = mark(0).to_vec();
    for round in 1..=ROUNDS {
        code.push(0xb9); // mov ecx, TURNS
        code.extend(TURNS.to_le_bytes());
        code.extend([0xff, 0xc9]); // dec ecx
        code.extend([0x75, 0xfc]); // jnz to the dec
        code.extend(mark(round));
    }
    code.extend(mark(END));
    code
}

/// One instruction, then the last mark.
fn single(code: &[u8]) -> Vec<u8> {
    [code, &mark(END)].concat()
}

/// Runs `code` in a machine of its own. Returns the times of its marks, except the last.
fn run(
    kvm: &Kvm,
    cpuid: &CpuId,
    code: &[u8],
    stop: &AtomicBool,
) -> Result<Vec<Instant>, GuestError> {
    let entry = Entry::Linux64 { rip: CODE };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(refused("be given memory"))?;
    entry
        .write_tables(&memory)
        .and_then(|()| memory.write_slice(code, GuestAddress(CODE)))
        .map_err(refused("be given code"))?;
    let vm = kvm.create_vm().map_err(refused("create a machine"))?;
    // Intel's processors need it for guests that are not in 64-bit mode yet.
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(refused("set the TSS address"))?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(refused("find its memory"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: `memory` maps these bytes, and is dropped after `vm` and `vcpu`, which are declared later.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("map memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    set_registers(&vcpu, cpuid, entry)?;
    collect_marks(&mut vcpu, stop)
}

/// 64-bit mode as at a kernel's entry, and what a kernel turns on before it uses [`INSTRUCTIONS`].
fn set_registers(vcpu: &VcpuFd, cpuid: &CpuId, entry: Entry) -> Result<(), GuestError> {
    const MONITOR_COPROCESSOR: u64 = 1 << 1;
    const OSFXSR: u64 = 1 << 9;
    const OSXSAVE: u64 = 1 << 18;
    vcpu.set_cpuid2(cpuid).map_err(refused("set the CPUID"))?;
    let reset = vcpu.get_sregs().map_err(refused("read registers"))?;
    let mut sregs = entry.sregs(&reset);
    sregs.cr0 |= MONITOR_COPROCESSOR;
    sregs.cr4 |= OSFXSR;
    let mut instructions = INSTRUCTIONS.iter();
    if instructions.any(|it| it.name == "xrstor" && it.promised(cpuid)) {
        sregs.cr4 |= OSXSAVE;
    }
    vcpu.set_sregs(&sregs).map_err(refused("set registers"))?;
    let regs = kvm_regs {
        rdi: DATA,
        rsi: 0,
        rbp: 0,
        ..entry.regs()
    };
    vcpu.set_regs(&regs).map_err(refused("set registers"))
}

fn collect_marks(vcpu: &mut VcpuFd, stop: &AtomicBool) -> Result<Vec<Instant>, GuestError> {
    let mut times = Vec::new();
    // The program writes few marks. More would mean that it runs wild.
    while times.len() <= usize::from(ROUNDS) + 1 {
        if stop.load(Ordering::Acquire) {
            return Err(GuestError::TimedOut);
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [END])) => return Ok(times),
            Ok(VcpuExit::IoOut(PORT, _)) => times.push(Instant::now()),
            Ok(exit) => return Err(GuestError::Died(format!("{exit:?}"))),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return Err(refused("run the guest")(error)),
        }
    }
    Err(GuestError::Died("more marks than it has".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn work_that_ends_in_time() {
        assert_eq!(in_time(LIMIT, |_| Ok(7)), Ok(7));
        let panicked = in_time(LIMIT, |_| -> Result<(), GuestError> {
            panic!("on purpose")
        });
        assert!(matches!(panicked, Err(GuestError::Died(_))));
    }

    #[test]
    fn work_that_hangs_is_given_up() {
        static HAS_ENDED: AtomicBool = AtomicBool::new(false);
        let hung = in_time(SHORT, |stop| {
            while !stop.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            HAS_ENDED.store(true, Ordering::Release);
            Ok(())
        });
        assert_eq!(hung, Err(GuestError::TimedOut));
        while !HAS_ENDED.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let stuck = in_time(SHORT, |_| -> Result<(), GuestError> {
            loop {
                std::thread::park();
            }
        });
        assert_eq!(stuck, Err(GuestError::TimedOut));
    }
}
