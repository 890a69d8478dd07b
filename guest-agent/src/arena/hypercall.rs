//! The REUSE hypercall for a granule that the monitor is discarding: the monitor ends the discard and marks the granule
//! as in use.
//!
//! User space makes hypercalls by reading an I/O port (`hypercall-abi/SPECIFICATION.md`, transport 2). That takes
//! ioperm(2), and so CAP_SYS_RAWIO. The permission would survive exec(2), so a thread has it only during a call.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use core::arch::x86_64::__cpuid;
use ebb_hypercall_abi::call::{Attributes, Operation};
use ebb_hypercall_abi::stubs::{self, Transport};
use ebb_hypercall_abi::{Features, PAGE_SIZE};

/// CPUID leaf 1, ECX: set in virtual machines only.
const HYPERVISOR: u32 = 1 << 31;
/// I/O ports that a 32-bit read covers.
const PORTS: libc::c_ulong = 4;

/// How a call went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The granule is in use.
    Done,
    /// This process may not make the call.
    NotAllowed,
    /// A filter of system calls (seccomp) may end this process for any that is rare, even for a sleep.
    Filtered,
}

/// Makes the hypercall if this process may.
pub struct ReuseHypercall {
    /// The monitor's port, or 0 if there is none or this process may not read it.
    port: AtomicU32,
    /// Set once this process was seen to have a filter, which it keeps.
    filtered: AtomicBool,
}

impl ReuseHypercall {
    /// Looks for the port and checks the permission. To be called early, before a program gives up its privileges.
    pub fn probe() -> Self {
        let filtered = has_seccomp_filter();
        let port = find_port()
            .filter(|_| !filtered)
            .filter(|port| set_permission(*port, true) && set_permission(*port, false));
        Self {
            port: AtomicU32::new(port.map_or(0, u32::from)),
            filtered: AtomicBool::new(filtered),
        }
    }

    /// Has the monitor mark `bytes` bytes at `gpa` as in use. Allocates nothing.
    ///
    /// Does not try again after a call that cannot be made. Signals are blocked meanwhile, so that no handler runs a program
    /// that would inherit the permission.
    #[cold]
    pub fn call(&self, gpa: u64, bytes: u64) -> Answer {
        if self.filtered.load(Ordering::Relaxed) || has_seccomp_filter() {
            self.filtered.store(true, Ordering::Relaxed);
            return Answer::Filtered;
        }
        let port = self.port.load(Ordering::Relaxed) as u16;
        if port != 0 && without_signals(|| reuse(port, gpa, bytes / PAGE_SIZE)) {
            return Answer::Done;
        }
        self.port.store(0, Ordering::Relaxed);
        Answer::NotAllowed
    }
}

fn find_port() -> Option<u16> {
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

/// Allows or forbids this thread to read the port. Returns true if the kernel did so.
fn set_permission(port: u16, allow: bool) -> bool {
    // SAFETY: touches no memory.
    unsafe { libc::ioperm(port.into(), PORTS, allow.into()) == 0 }
}

/// A seccomp filter may kill a process for a system call as rare as ioperm.
fn has_seccomp_filter() -> bool {
    // Not by libc's prctl, which `libebb_malloc.so` overrides.
    // SAFETY: takes no pointers.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_SECCOMP, 0, 0, 0, 0) != 0 }
}

fn reuse(port: u16, gpa: u64, pages: u64) -> bool {
    if !set_permission(port, true) {
        return false;
    }
    // SAFETY: CPUID says that the port is Ebb's, and this thread may read it. REUSE frees nothing.
    let answer =
        unsafe { Transport::Port(port).call(gpa, pages, Attributes::new(Operation::Reuse)) };
    set_permission(port, false) && answer.is_ok()
}

/// Runs `action` with all signals blocked.
fn without_signals(action: impl FnOnce() -> bool) -> bool {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: both sets are written before they are read. The mask is this thread's own.
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
