//! Bringing a vCPU out of guest mode from another thread.
//!
//! A signal alone can arrive just before the vCPU's thread calls `KVM_RUN`, and then it has no effect. So the signal
//! handler, which runs on that thread, also sets `immediate_exit` in the vCPU's shared page, and `KVM_RUN` returns at
//! once (Linux, `Documentation/virt/kvm/api.rst`, 5. The kvm_run structure).

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;

use ebb_core::generation::Kick;
use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::run_pages::{RegisteredPage, RunPages};

thread_local! {
    /// Address of `immediate_exit` of the vCPU that this thread runs; null if it runs none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set only while the `KickTarget` of this thread borrows the vCPU whose
        // mapped page it points into.
        unsafe { flag.write_volatile(1) };
    }
}

/// A vCPU that this thread runs and that [`kick`] can bring out.
pub struct KickTarget {
    /// Dropped before `fd`, which unmaps the page.
    _registered: RegisteredPage,
    pub(super) fd: VcpuFd,
    /// The page that KVM shares with this thread, mapped as long as `fd` lives.
    page: *const kvm_run,
}

impl KickTarget {
    /// Makes `fd`, the vCPU `index`, the one that the calling thread runs; no other thread may run it. Registers its page
    /// in `pages`, whose mappings must have the length that [`Hypervisor::vcpu_mapping`](super::Hypervisor::vcpu_mapping)
    /// tells.
    #[must_use]
    pub fn new(mut fd: VcpuFd, pages: &Arc<RunPages>, index: usize) -> Self {
        let page = &raw mut *fd.get_kvm_run();
        // SAFETY: the page is mapped as long as `fd` lives, and nothing is read or written here.
        IMMEDIATE_EXIT.set(unsafe { &raw mut (*page).immediate_exit });
        // SAFETY: `fd` has mapped the page and unmaps it when it is dropped, which is after the entry is removed. A dead
        // process runs no vCPU.
        let registered = unsafe { pages.register(index, page.expose_provenance()) };
        Self {
            _registered: registered,
            fd,
            page,
        }
    }

    /// Runs the guest until its next exit.
    ///
    /// Returns the exit, and for port I/O the size of one access in bytes: 1, 2 or 4. A string instruction makes many
    /// accesses to one port, and KVM reports them together.
    ///
    /// # Errors
    /// `EINTR` after a kick; else `KVM_RUN` failed.
    pub fn run(&mut self) -> Result<(VcpuExit<'_>, usize), kvm_ioctls::Error> {
        let page = self.page;
        let exit = self.fd.run()?;
        let size = match exit {
            // SAFETY: the page is mapped, KVM writes to it only during the call above, and after such an exit this
            // member of the union is set. The exit's data lies elsewhere, after it.
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => unsafe { (*page).__bindgen_anon_1.io.size },
            _ => 1,
        };
        Ok((exit, usize::from(size.max(1))))
    }

    /// Forgets earlier kicks. Call this before you look for the reason of a kick, so that no kick is lost.
    pub fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }
}

impl KickTarget {
    /// Makes the next [`run`](Self::run) return `EINTR` without entering the guest, once KVM has completed what the last exit
    /// has begun (Linux, `Documentation/virt/kvm/api.rst`, 5. The kvm_run structure, `immediate_exit` and `KVM_EXIT_MMIO`).
    pub fn return_at_once(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
    }

    /// Tells the guest, if it uses kvmclock, that it was paused, so that its watchdogs do not take that for a lockup
    /// (`KVM_KVMCLOCK_CTRL`).
    pub fn was_paused(&mut self) {
        // Refused if the guest does not use kvmclock.
        let _ = self.fd.kvmclock_ctrl();
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Installs the signal handler. Must be called before any thread is kicked, because without a handler the signal ends the
/// process.
///
/// # Errors
/// The error of the system call.
pub fn prepare_kicks() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Brings the vCPU that `thread` runs out of guest mode. Does nothing if the thread has ended. Returns false if the kernel
/// has no room for the signal now: there are as many of this user as `RLIMIT_SIGPENDING` allows.
#[must_use = "without the signal the vCPU stays in the guest"]
pub fn kick<T>(thread: &JoinHandle<T>) -> bool {
    // SAFETY: the thread is not joined yet, so its pthread id is valid even if it has just ended. `prepare_kicks` has
    // installed a handler.
    thread.is_finished()
        || unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) } != libc::EAGAIN
}

/// Which thread runs which vCPU of a machine, so that other threads can kick the vCPUs. It may outlive the threads;
/// kicks do nothing then.
#[derive(Debug)]
pub struct KickTable(
    /// Number of each vCPU's thread; 0 if there is none.
    Box<[AtomicI32]>,
);

impl KickTable {
    /// A table for `vcpus` vCPUs that have no threads yet.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| AtomicI32::new(0)).collect())
    }

    /// Index of the vCPU that the thread with the number `thread` runs; `None` if it runs none.
    #[must_use]
    pub fn vcpu_of(&self, thread: i32) -> Option<usize> {
        let mut threads = self.0.iter();
        threads.position(|runs| thread != 0 && runs.load(Ordering::Acquire) == thread)
    }

    /// Notes that the calling thread runs the vCPU `index`, until the returned value is dropped.
    pub fn register(&self, index: usize) -> Registration<'_> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.0[index].store(thread, Ordering::Release);
        Registration(&self.0[index])
    }
}

/// A thread's entry in a [`KickTable`].
#[must_use = "the entry is removed when this is dropped"]
pub struct Registration<'a>(&'a AtomicI32);

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Kick for KickTable {
    fn kick(&self, index: usize) {
        let thread = self.0[index].load(Ordering::Acquire);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: tgkill takes numbers only. If the thread has just ended and another thread of ours has got its
            // number, the handler finds no vCPU there and does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGRTMIN()) };
        }
    }
}
