//! The REUSE call, for a granule that the monitor is just taking: it returns when the monitor is done with that.
//!
//! User space makes calls by the port, which takes the right to it, `ioperm(2)`: root's. A thread asks for it here only when it
//! has to wait, and gives it back at once, as what a thread may do its children and the programs that it starts may, too.

use std::cell::Cell;
use std::sync::OnceLock;

use hypercall_abi::call::{Attributes, Operation};
use hypercall_abi::stubs::{Transport, discover};
use hypercall_abi::{Features, PAGE_SIZE};

/// Ports that a read of 32 bits covers.
const WIDTH: libc::c_ulong = 4;

thread_local! {
    /// This thread may not call, or to no effect.
    static REFUSED: Cell<bool> = const { Cell::new(false) };
}

/// The port, in a machine of Ebb's that has arenas.
fn port() -> Option<u16> {
    static PORT: OnceLock<Option<u16>> = OnceLock::new();
    *PORT.get_or_init(|| {
        let interface = discover().filter(|found| found.features.contains(Features::ARENA))?;
        match Transport::choose(interface, false) {
            Some(Transport::Port(port)) => Some(port),
            _ => None,
        }
    })
}

/// Makes the granule of `len` bytes at the guest-physical address `gpa` in use, after the monitor is done with it. `false`: this
/// thread may not call.
#[cold]
pub fn reuse(gpa: u64, len: u64) -> bool {
    if REFUSED.get() {
        return false;
    }
    let done = port().is_some_and(|port| {
        let first = libc::c_ulong::from(port);
        // SAFETY: changes what this thread may do, and nothing else.
        if unsafe { libc::ioperm(first, WIDTH, 1) } != 0 {
            return false;
        }
        let what = Attributes::new(Operation::Reuse);
        // SAFETY: the port is Ebb's, and the thread may read it; the call frees nothing.
        let answer = unsafe { Transport::Port(port).call(gpa, len / PAGE_SIZE, what) };
        // SAFETY: as above. Giving a right back is not refused.
        let _ = unsafe { libc::ioperm(first, WIDTH, 0) };
        answer.is_ok()
    });
    REFUSED.set(!done);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_not_call_is_told_each_time() {
        // Where tests run there is no Ebb, or no arena at this address.
        assert!(!reuse(0, 4096));
        assert!(REFUSED.get() && !reuse(0, 4096));
    }
}
