//! The call `REUSE`, which waits in the monitor until a granule is discarded and has it in use then.
//!
//! User space makes calls by reading a port (`hypercall-abi/SPECIFICATION.md`, transport 2), which takes the permission of
//! ioperm(2), and so CAP_SYS_RAWIO. It would outlive exec: so a thread has it for the length of the call alone.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use core::arch::x86_64::__cpuid;
use ebb_hypercall_abi::call::{Attributes, Operation};
use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Features, PAGE_SIZE};

/// CPUID.1:ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;
/// Ports that a read of 32 bits takes.
const WIDTH: libc::c_ulong = 4;

/// Makes the call where this process may.
pub struct Caller {
    /// The monitor's port; 0 where there is none, or this process may not read it.
    port: AtomicU32,
}

impl Caller {
    /// Looks whether there is a port, and tries whether it may be read: early, before a program shuts itself in.
    pub fn probe() -> Self {
        let port = find().filter(|port| permit(*port, true) && permit(*port, false));
        Self {
            port: AtomicU32::new(port.map_or(0, u32::from)),
        }
    }

    /// Has the monitor make `bytes` bytes at `gpa` in use. Whether it has: if not, it will not be asked again. Allocates nothing;
    /// signals wait until it is done, so that no handler forks or runs a program with the permission.
    #[cold]
    pub fn reuse(&self, gpa: u64, bytes: u64) -> bool {
        let port = self.port.load(Ordering::Relaxed) as u16;
        if port == 0 {
            return false;
        }
        let done = !filtered() && without_signals(|| call(port, gpa, bytes / PAGE_SIZE));
        if !done {
            self.port.store(0, Ordering::Relaxed);
        }
        done
    }
}

fn find() -> Option<u16> {
    if __cpuid(1).ecx & HYPERVISOR == 0 {
        return None;
    }
    let interface = stubs::discover()?;
    let arena = interface.features.contains(Features::ARENA);
    match Transport::choose(interface, false) {
        Some(Transport::Port(port)) if arena => Some(port),
        _ => None,
    }
}

/// Gives this thread the port, or takes it away; whether the kernel did so.
fn permit(port: u16, allow: bool) -> bool {
    // SAFETY: no memory is concerned.
    unsafe { libc::ioperm(port.into(), WIDTH, allow.into()) == 0 }
}

/// Whether system calls are filtered: a filter may kill who makes one as rare as ioperm.
fn filtered() -> bool {
    // Not libc's function, which `libebb_malloc.so` stands before.
    // SAFETY: it takes no pointers.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_SECCOMP, 0, 0, 0, 0) != 0 }
}

fn call(port: u16, gpa: u64, pages: u64) -> bool {
    if !permit(port, true) {
        return false;
    }
    // SAFETY: the port is Ebb's by CPUID, and this thread may read it; a reuse frees nothing.
    let answer =
        unsafe { Transport::Port(port).call(gpa, pages, Attributes::new(Operation::Reuse)) };
    permit(port, false) && answer.is_ok()
}

/// Runs `action` with all signals blocked.
fn without_signals(action: impl FnOnce() -> bool) -> bool {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: the sets are written before they are read; blocking signals concerns this thread alone.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        if libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) != 0 {
            return false;
        }
        let done = action();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut());
        done
    }
}
