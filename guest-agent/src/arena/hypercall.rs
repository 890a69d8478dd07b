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

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What `action` returns in a thread of its own, which may lose privileges.
    fn apart<T: Send + 'static>(action: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(action).join().unwrap()
    }

    fn with_port(port: u32) -> ReuseHypercall {
        ReuseHypercall {
            port: AtomicU32::new(port),
            filtered: AtomicBool::new(false),
        }
    }

    fn blocked_signals() -> libc::sigset_t {
        let mut blocked = MaybeUninit::uninit();
        // SAFETY: the set is written; without a new one the mask stays.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), blocked.as_mut_ptr());
            blocked.assume_init()
        }
    }

    /// Whether a signal is in a set.
    fn has(set: &libc::sigset_t, signal: i32) -> bool {
        // SAFETY: the set is initialized.
        unsafe { libc::sigismember(set, signal) == 1 }
    }

    #[test]
    fn a_call_that_may_not_be_made_is_not_tried_again() {
        let (answers, port) = apart(|| {
            // SAFETY: takes no pointers. The call itself changes this thread only; libc's would change all.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            let call = with_port(u32::from(ebb_hypercall_abi::discovery::PORT));
            let answers = [call.call(4 << 30, 2 << 20), call.call(4 << 30, 2 << 20)];
            (answers, call.port.into_inner())
        });
        assert_eq!((answers, port), ([Answer::NotAllowed; 2], 0));
    }

    #[test]
    fn a_thread_with_a_filter_makes_no_rare_calls() {
        let answers = apart(|| {
            let (before, call) = (ReuseHypercall::probe(), with_port(1));
            let allow = libc::sock_filter {
                code: (libc::BPF_RET | libc::BPF_K) as u16,
                jt: 0,
                jf: 0,
                k: libc::SECCOMP_RET_ALLOW,
            };
            let mut program = [allow];
            let filter = libc::sock_fprog {
                len: 1,
                filter: program.as_mut_ptr(),
            };
            // SAFETY: the program is there during the call, and is for this thread only.
            unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter);
            }
            let after = ReuseHypercall::probe();
            [before, call, after].map(|it| it.call(4 << 30, 2 << 20))
        });
        assert_eq!(answers, [Answer::Filtered; 3]);
    }

    #[test]
    fn signals_are_blocked_during_a_call_and_as_before_after_it() {
        apart(|| {
            assert!(!has(&blocked_signals(), libc::SIGUSR1));
            assert!(without_signals(|| has(&blocked_signals(), libc::SIGUSR1)));
            assert!(!without_signals(|| false));
            assert!(!has(&blocked_signals(), libc::SIGUSR1));
        });
    }
}
