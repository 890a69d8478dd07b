//! How many instructions a pair of `lazy_free` and `reuse` has: counted by single steps, so that no processor needs to count.
//!
//! A process of its own runs pairs and stops itself before and after; its parent steps it and counts (ptrace(2)).

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode};

use ebb_guest_agent::arena::Arena;
use rustix::process::{Signal, getpid, kill_process};

/// Pairs between two stops: what the stops themselves cost is in both.
const FEW: u32 = 8;
const MANY: u32 = 40;
/// Steps until something must be wrong.
const LIMIT: u64 = 1_000_000;

/// Instructions of a pair.
pub fn of_a_pair(device: &Path) -> Result<f64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.arg("steps").arg(device);
    // SAFETY: one system call, of which a child may make any.
    unsafe { command.pre_exec(|| request(libc::PTRACE_TRACEME, 0, 0)) };
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let counted = count(&child);
    // It has ended, or is of no use any more.
    let _ = child.kill();
    let _ = child.wait();
    let (few, many) = counted.map_err(|error| format!("single steps: {error}"))?;
    Ok(many.saturating_sub(few) as f64 / f64::from(MANY - FEW))
}

/// The process that is stepped.
pub fn main(words: &[&str]) -> ExitCode {
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
    stop();
    for pairs in [FEW, MANY] {
        for _ in 0..pairs {
            granule = granule.lazy_free().reuse().0;
        }
        stop();
    }
    ExitCode::SUCCESS
}

/// Never inlined, so that both counts have the same stop in them.
#[inline(never)]
fn stop() {
    // A process may stop itself.
    let _ = kill_process(getpid(), Signal::STOP);
}

fn request(request: libc::c_uint, pid: libc::pid_t, data: libc::c_int) -> std::io::Result<()> {
    let (none, data) = (
        std::ptr::null_mut::<libc::c_void>(),
        data as usize as *mut libc::c_void,
    );
    // SAFETY: no request that is made here reads or writes memory of this process.
    match unsafe { libc::ptrace(request, pid, none, data) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Waits until it stops; by which signal.
fn stopped(pid: libc::pid_t) -> std::io::Result<libc::c_int> {
    let mut status = 0;
    // SAFETY: writes the status.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    if libc::WIFSTOPPED(status) {
        Ok(libc::WSTOPSIG(status))
    } else {
        Err(std::io::Error::other("the process has ended"))
    }
}

/// Steps between the first stop and the second, and between that and the third.
fn count(child: &Child) -> std::io::Result<(u64, u64)> {
    let pid = child.id() as libc::pid_t;
    stopped(pid)?; // At its first instruction.
    request(libc::PTRACE_CONT, pid, 0)?;
    if stopped(pid)? != libc::SIGSTOP {
        return Err(std::io::Error::other("the device cannot be used"));
    }
    let steps = || {
        for steps in 1..LIMIT {
            // The signal that it has stopped by is not delivered.
            request(libc::PTRACE_SINGLESTEP, pid, 0)?;
            if stopped(pid)? == libc::SIGSTOP {
                return Ok(steps);
            }
        }
        Err(std::io::Error::other("it goes on and on"))
    };
    Ok((steps()?, steps()?))
}
