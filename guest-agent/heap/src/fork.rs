//! fork(3): a process with its heap in the arena has none.
//!
//! A device-dax mapping is always shared, so a child that inherited the heap would write into its parent's. To copy the heap
//! for the child, all that writes to it must stop meanwhile: threads that hold locks of the C library, that wait for a child
//! of vfork(2), that belong to the kernel (io_uring); and there must be memory for the copy. None of this can be ensured. So
//! the arena is only for a process that says that it never forks, and one that forks all the same is refused.
//!
//! vfork(2), posix_spawn(3), system(3) and popen(3) share the parent's memory until they call exec, so they work.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::heap::Heap;
use crate::stderr;

/// If this process cannot fork, says so once, sets errno to ENOSYS and returns true.
#[must_use]
pub fn is_refused() -> bool {
    static SAID: AtomicBool = AtomicBool::new(false);
    if Heap::get().is_none() {
        return false;
    }
    if !SAID.swap(true, Ordering::Relaxed) {
        stderr::print(format_args!(
            "this program was started with --no-fork, but forks: start it without"
        ));
    }
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() = libc::ENOSYS };
    true
}

/// Ends children of forks that do not ask [`is_refused`], such as those of Rust programs. The kernel does not pass the heap
/// on to them (MADV_DONTFORK). Must come before jemalloc registers its handlers, which use its heap.
pub fn register() {
    // SAFETY: the function lives as long as the process.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

extern "C" fn in_child() {
    if is_refused() {
        // SAFETY: ends the process without running its code.
        unsafe { libc::_exit(127) };
    }
}
