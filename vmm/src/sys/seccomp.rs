//! Which system calls a thread may make (seccomp(2)): a list for each role, `resources/seccomp/ROLE.json`.
//!
//! Each thread gives itself its filter before it sees anything that a guest or a client has made, and never loses it. Threads
//! that it starts have the same one. The lists are compiled when Ebb is built: it costs a start nothing but one
//! system call for each thread.
//!
//! A call that is not in the list ends the process, with one line that names thread and call.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::thread;

use seccompiler::sock_filter;
use syscalls::Sysno;

/// Exit status of a process that made a system call which its filter forbids, or one of whose threads was refused its filter.
pub const FORBIDDEN_CALL: u8 = 37;

/// What happens to calls that are in no list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// They are made: there is no filter.
    Off,
    /// They are made, and the kernel logs them (audit, type 1326).
    Log,
    /// They end the process.
    On,
}

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first thread: signals, console input, and the teardown with its workers.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves a disk.
    Block,
    /// Serves a network interface.
    Net,
    /// Serves random bytes.
    Rng,
    /// Serves the vsock.
    Vsock,
    /// Serves a queue of the balloon.
    Balloon,
    /// The API's server, and the threads that carry out its requests.
    Api,
    /// Makes snapshots, with its workers.
    Snapshot,
    /// Watches memory pressure and reclaims, with its workers.
    Reclaim,
    /// Watches page faults in strict mode.
    Strict,
    /// Watches a page server.
    Pages,
    /// Writes the console or the log.
    Output,
    /// The reaper and its workers.
    Reaper,
    /// The guardian.
    Guardian,
}

/// A compiled list, for two modes.
struct Filter {
    trap: &'static [sock_filter],
    log: &'static [sock_filter],
}

mod compiled {
    use super::{Filter, sock_filter};
    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// The mode of this process: none of its threads has another one.
static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);

/// Where the line about a forbidden call goes beside standard error; -1: nowhere.
static LOG: AtomicI32 = AtomicI32::new(-1);

impl Role {
    fn filter(self) -> &'static Filter {
        match self {
            Self::Main => &compiled::MAIN,
            Self::Vcpu => &compiled::VCPU,
            Self::Block => &compiled::BLOCK,
            Self::Net => &compiled::NET,
            Self::Rng => &compiled::RNG,
            Self::Vsock => &compiled::VSOCK,
            Self::Balloon => &compiled::BALLOON,
            Self::Api => &compiled::API,
            Self::Snapshot => &compiled::SNAPSHOT,
            Self::Reclaim => &compiled::RECLAIM,
            Self::Strict => &compiled::STRICT,
            Self::Pages => &compiled::PAGES,
            Self::Output => &compiled::OUTPUT,
            Self::Reaper => &compiled::REAPER,
            Self::Guardian => &compiled::GUARDIAN,
        }
    }

    /// From now on the calling thread makes only the calls of this role, in the mode of [`start`]. If the kernel refuses the
    /// filter, because there is no memory for it, the process ends as by a forbidden call: no thread goes on without one.
    pub fn enter(self) {
        if self.try_enter().is_err() {
            let mut line = Line::default();
            line.thread();
            line.text(b" was refused its seccomp filter by the kernel, which may lack memory; the process ends with status 37\n");
            line.end_process();
        }
    }

    /// As [`Role::enter`]. Allocates nothing and takes no lock.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn try_enter(self) -> Result<(), seccompiler::Error> {
        let mode = MODE.load(Ordering::Relaxed);
        if mode == Mode::Off as u8 {
            return Ok(());
        }
        let filter = self.filter();
        seccompiler::apply_filter(if mode == Mode::Log as u8 {
            filter.log
        } else {
            filter.trap
        })
    }
}

/// Sets the mode of this process, before it has other threads. Unless that is [`Mode::Off`], it gains no privileges by
/// programs that it starts from now on, and a forbidden call is reported on standard error and to `log`, a descriptor that
/// stays open.
///
/// # Errors
/// The kernel knows no such filters.
pub fn start(mode: Mode, log: Option<BorrowedFd<'_>>) -> io::Result<()> {
    if mode == Mode::Off {
        return Ok(());
    }
    rustix::thread::set_no_new_privs(true)?;
    is_available(mode)?;
    LOG.store(log.map_or(-1, |log| log.as_raw_fd()), Ordering::Relaxed);
    // SAFETY: all zeroes are a value. The handler makes system calls and uses memory of its own stack only.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_forbidden as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    MODE.store(mode as u8, Ordering::Relaxed);
    Ok(())
}

/// From now on a forbidden call is reported to `log`, too, a descriptor that stays open.
pub fn report_to(log: BorrowedFd<'_>) {
    LOG.store(log.as_raw_fd(), Ordering::Relaxed);
}

/// Has the allocator do now what it does once and no filter allows: glibc reads /proc/sys/vm/overcommit_memory when it first
/// shrinks the heap of a thread. Call this once there may be threads, before any thread has a filter.
///
/// # Errors
/// The thread that does it could not be started.
pub fn prepare_allocator() -> io::Result<()> {
    if MODE.load(Ordering::Relaxed) != Mode::Off as u8 {
        let _ = thread::Builder::new().spawn(grow_and_shrink)?.join();
    }
    Ok(())
}

/// Allocates more than the allocator keeps, in pieces that it takes from the thread's heap, and frees it.
fn grow_and_shrink() {
    let pieces = [(); 8].map(|()| Vec::<u8>::with_capacity(64 << 10));
    drop(std::hint::black_box(pieces));
}

/// Asks the kernel whether it has the action that `mode` needs (Linux 4.14).
///
/// # Errors
/// seccomp(2)'s: it has not.
pub fn is_available(mode: Mode) -> io::Result<()> {
    let action: u32 = match mode {
        Mode::Off => return Ok(()),
        Mode::Log => libc::SECCOMP_RET_LOG,
        Mode::On => libc::SECCOMP_RET_TRAP,
    };
    // SAFETY: the call reads one number, which lives as long as it runs.
    let rc = unsafe {
        let action = &raw const action;
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, action)
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs on the thread that made a forbidden call, instead of the call.
extern "C" fn on_forbidden(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    /// Index of `si_syscall` in a `siginfo_t` seen as numbers of 32 bits (x86-64).
    const SI_SYSCALL: usize = 6;
    // SAFETY: the kernel hands both over; they are valid until the handler returns. A `siginfo_t` has 128 bytes.
    let (number, arguments) = unsafe {
        let number = *info.cast::<i32>().add(SI_SYSCALL);
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX];
        (number, arguments.map(|index| registers[index as usize]))
    };
    let mut line = Line::default();
    line.describe(number, arguments);
    line.end_process()
}

/// A line of bounded length that is made without allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl Line {
    /// Names the calling thread.
    fn thread(&mut self) {
        let mut name = [0u8; 16];
        // SAFETY: the kernel writes at most 16 bytes, a zero among them (prctl(2)).
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        self.text(b"ebb: the thread ");
        self.text(name.split(|byte| *byte == 0).next().unwrap_or_default());
    }

    /// Says what the calling thread wanted.
    fn describe(&mut self, number: i32, arguments: [i64; 3]) {
        self.thread();
        self.text(b" wanted to make the system call ");
        let known = usize::try_from(number).ok().and_then(Sysno::new);
        match known {
            Some(call) => self.text(call.name().as_bytes()),
            None => self.hex(u64::from(number.unsigned_abs())),
        }
        for (index, argument) in arguments.into_iter().enumerate() {
            self.text(if index == 0 { b"(" } else { b", " });
            self.hex(argument.cast_unsigned());
        }
        self.text(b", ...), which its seccomp filter forbids; the process ends with status 37\n");
    }

    fn text(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn hex(&mut self, number: u64) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.text(b"0x");
        let digits = (64 - number.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let value = (number >> (4 * digit)) & 0xf;
            self.text(&[DIGITS[value as usize]]);
        }
    }

    /// Writes it, and ends the process.
    fn end_process(&self) -> ! {
        for output in [2, LOG.load(Ordering::Relaxed)] {
            self.write_to(output);
        }
        // SAFETY: it ends the process and returns to nobody.
        unsafe { libc::_exit(FORBIDDEN_CALL.into()) }
    }

    /// Writes it, unless nobody takes it for 100 ms.
    fn write_to(&self, output: c_int) {
        if output < 0 {
            return;
        }
        let mut poll = libc::pollfd {
            fd: output,
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: both calls get memory that lives as long as they run, and its length.
        unsafe {
            if libc::poll(&raw mut poll, 1, 100) == 1 {
                libc::write(output, self.bytes.as_ptr().cast(), self.len);
            }
        }
    }
}

#[cfg(test)]
mod tests;
