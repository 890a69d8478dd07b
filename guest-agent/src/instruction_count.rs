//! Counts the instructions of a pair of `lazy_free` and `reuse` by single steps, which works without performance counters.
//!
//! A child process makes the pairs and stops itself before and after. Its parent single-steps it: ptrace(2).

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode};

use ebb_guest_agent::arena::Arena;
use rustix::process::{Signal, getpid, kill_process};

/// Pairs in the two measurements. Their difference leaves out the instructions of the stops.
const FEW: u32 = 8;
const MANY: u32 = 40;
/// At most so many steps in one measurement.
const MAX_STEPS: u64 = 1_000_000;

/// Instructions of a pair.
pub fn of_a_pair(device: &Path) -> Result<f64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.arg("bench-worker").arg(device);
    // SAFETY: one system call, which is allowed between fork and exec.
    unsafe { command.pre_exec(|| ptrace(libc::PTRACE_TRACEME, 0)) };
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let counted = count(&child);
    // Both fail if the child has ended.
    let _ = child.kill();
    let _ = child.wait();
    let (few, many) = counted.map_err(|error| format!("single steps: {error}"))?;
    Ok(many.saturating_sub(few) as f64 / f64::from(MANY - FEW))
}

/// The child.
pub fn worker(words: &[&str]) -> ExitCode {
    let Some(arena) = words
        .first()
        .and_then(|path| Arena::open(Path::new(path)).ok())
    else {
        return ExitCode::FAILURE;
    };
    let Some(mut granule) = arena.claim() else {
        return ExitCode::FAILURE;
    };
    granule.bytes()[0] = 1;
    stop_self();
    for pairs in [FEW, MANY] {
        for _ in 0..pairs {
            granule = granule.lazy_free().reuse().0;
        }
        stop_self();
    }
    ExitCode::SUCCESS
}

/// Not inlined, so that both measurements contain the same instructions for it.
#[inline(never)]
fn stop_self() {
    // A process may always stop itself.
    let _ = kill_process(getpid(), Signal::STOP);
}

fn ptrace(request: libc::c_uint, pid: libc::pid_t) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: no request that is made here reads or writes memory of this process.
    match unsafe { libc::ptrace(request, pid, none, none) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Waits until the child stops. Returns the signal that stopped it.
fn wait_for_stop(pid: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    // SAFETY: writes the status.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if libc::WIFSTOPPED(status) {
        Ok(libc::WSTOPSIG(status))
    } else {
        Err(io::Error::other("the process has ended"))
    }
}

/// Steps of the two measurements.
fn count(child: &Child) -> io::Result<(u64, u64)> {
    let pid = child.id() as libc::pid_t;
    wait_for_stop(pid)?; // At its first instruction.
    ptrace(libc::PTRACE_CONT, pid)?;
    if wait_for_stop(pid)? != libc::SIGSTOP {
        return Err(io::Error::other("the device cannot be used"));
    }
    let steps = || {
        for steps in 1..MAX_STEPS {
            // Without the signal that stopped it: the last argument is 0.
            ptrace(libc::PTRACE_SINGLESTEP, pid)?;
            if wait_for_stop(pid)? == libc::SIGSTOP {
                return Ok(steps);
            }
        }
        Err(io::Error::other(format!("no end within {MAX_STEPS} steps")))
    };
    Ok((steps()?, steps()?))
}
