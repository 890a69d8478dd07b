//! Locks a machine in: namespaces, a root with nothing but what it needs, a user without privileges, a cgroup of its own, and
//! Landlock. Filters of system calls are the machine's own affair, as everywhere.
//!
//! The files that the options name keep their paths inside. They are opened before the root is closed, by root and without
//! following a link; the machine's user must be allowed to use them all the same.

mod cgroup;
mod error;
mod folder;
mod landlock;
mod plan;
mod root;
mod supervise;

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Access as Permission, AtFlags, CWD, accessat};
use rustix::process::Pid;

use crate::config::MachineSpec;
use crate::exit;
use crate::sys::mounts::Access;
use crate::sys::tap::Tap;
use crate::sys::{self, Request, Signals, Terminal, privileges};
use cgroup::Group;
pub use error::JailError;
use folder::Folder;
use plan::Item;
pub use plan::Plan;

/// Bytes of the header of a frame; the machine sets it again.
const HEADER: usize = 12;

/// Runs `machine` in a jail by `start`, waits for its end and until nothing is left of it, and returns its exit status: 128
/// and the signal's number if a signal has ended it. `complain` is told what is not as it should be.
///
/// Call this while this process has one thread.
///
/// # Errors
/// The jail cannot be made. An error that is met inside is told to `complain`, and the status is that of bad arguments.
pub fn run(
    mut plan: Plan,
    mut machine: MachineSpec,
    complain: &dyn Fn(&dyn Display),
    start: impl FnOnce(MachineSpec) -> u8,
) -> Result<u8, JailError> {
    if !rustix::process::geteuid().is_root() {
        return Err(JailError::NotRoot);
    }
    let signals = Signals::block(Request::HangUp).map_err(JailError::step("signalfd(2)"))?;
    let terminal = Terminal::at_stdin();
    let folder = Folder::take(&plan)?;
    let taps = open_taps(&mut plan, &mut machine).inspect_err(|_| folder.remove())?;
    let group = Group::create(&plan).inspect_err(|_| folder.remove())?;
    let outer = Outer {
        plan: &plan,
        signals: &signals,
        has_terminal: terminal.is_some(),
        folder: &folder,
        group: &group,
        complain,
    };
    let inner = outer.start(|| start(machine));
    let inner = inner.inspect_err(|_| outer.clean_up())?;
    drop(taps);
    let status = supervise::wait_for(inner, &signals, None);
    if let Some(terminal) = &terminal {
        // If all were killed, nobody else has done it.
        terminal.leave_raw_mode();
    }
    outer.clean_up();
    Ok(status)
}

/// Opens the taps that `machine` names, because it will not see them, and has it inherit them instead. They are closed when
/// what is returned is dropped.
fn open_taps(plan: &mut Plan, machine: &mut MachineSpec) -> Result<Vec<OwnedFd>, JailError> {
    let netns = plan.jail.netns.clone();
    let mut open = || -> Result<Vec<OwnedFd>, JailError> {
        let mut taps = Vec::new();
        for net in &mut machine.nets {
            if let Some(name) = net.tap.take() {
                let tap = Tap::open(&name, HEADER)?.into_descriptor();
                net.fd = Some(tap.as_raw_fd());
                plan.inherited.push(tap.as_raw_fd());
                taps.push(tap);
            }
        }
        Ok(taps)
    };
    let Some(path) = netns else {
        return open();
    };
    let within = privileges::within_network(&path, open);
    within.map_err(|source| JailError::Network { path, source })?
}

/// The process that has been called, outside of the jail.
struct Outer<'a> {
    plan: &'a Plan,
    signals: &'a Signals,
    has_terminal: bool,
    folder: &'a Folder,
    group: &'a Group,
    complain: &'a dyn Fn(&dyn Display),
}

impl Outer<'_> {
    /// Starts process 1 of the jail's namespace.
    fn start(&self, machine: impl FnOnce() -> u8) -> Result<Pid, JailError> {
        let step = JailError::step;
        let outer = sys::own_process().map_err(step("pidfd_open(2)"))?;
        privileges::give_children_own_pids().map_err(step("unshare(2) of process ids"))?;
        let inner = || self.run_inner(&outer, machine);
        sys::process::fork(inner).map_err(step("fork(2)"))
    }

    /// What that process does: it starts the machine, and waits for its end and that of its helpers.
    fn run_inner(&self, outer: &OwnedFd, machine: impl FnOnce() -> u8) -> u8 {
        let started =
            sys::process::fork_without_files(&self.plan.inherited, || match self.lock_in() {
                Ok(()) => machine(),
                Err(error) => {
                    (self.complain)(&error);
                    exit::BAD_ARGUMENTS
                }
            });
        let _ = rustix::thread::set_name(c"ebb-jail");
        let status = match started {
            Ok(machine) => {
                // If it fails, this process has more privileges than it needs, as the outer one has.
                let _ = privileges::keep_for_cleaning_up();
                let status = supervise::wait_for(machine, self.signals, Some(outer));
                supervise::wait_for_orphans();
                status
            }
            Err(error) => {
                (self.complain)(&JailError::step("fork(2)")(error));
                exit::BAD_ARGUMENTS
            }
        };
        if supervise::has_ended(outer.as_fd()) {
            self.clean_up();
        }
        status
    }

    /// Locks the calling process in.
    fn lock_in(&self) -> Result<(), JailError> {
        let (plan, step) = (self.plan, JailError::step);
        if !self.has_terminal && rustix::termios::isatty(rustix::stdio::stdin()) {
            // Another job's. Inside nobody could tell.
            let null = File::open("/dev/null").map_err(step("open(2) of /dev/null"))?;
            rustix::stdio::dup2_stdin(null).map_err(|error| step("dup2(2)")(error.into()))?;
        }
        // It is asked for at the end, when the host's files are out of reach.
        let _ = sys::nodes::all();
        self.group.enter()?;
        privileges::leave_host().map_err(step("unshare(2)"))?;
        root::enter(plan, self.group)?;
        privileges::become_user(plan.jail.uid, plan.jail.gid)
            .map_err(step("giving up privileges"))?;
        plan.items
            .iter()
            .try_for_each(|item| check_permission(plan, item))?;
        let restricted = landlock::restrict(plan, self.group);
        let restricted = restricted.map_err(|error| step("Landlock")(io::Error::other(error)))?;
        if !restricted {
            (self.complain)(
                &"the jail goes without Landlock, which this host's kernel does not have",
            );
        }
        Ok(())
    }

    fn clean_up(&self) {
        if !self.group.remove() {
            let path = self.group.path().display();
            (self.complain)(&format!("{path} is left: it has processes"));
        }
        self.folder.remove();
    }
}

/// Checks that the machine's user may do with a file what the machine needs.
fn check_permission(plan: &Plan, item: &Item) -> Result<(), JailError> {
    let (wanted, what, hint) = match item.access {
        Access::Read => (Permission::READ_OK, "read", ""),
        Access::Write => (
            Permission::READ_OK | Permission::WRITE_OK,
            "read and write",
            ", or add readonly=on",
        ),
    };
    accessat(CWD, &item.path, wanted, AtFlags::EACCESS).map_err(|_| JailError::Denied {
        option: item.option,
        path: item.path.clone(),
        uid: plan.jail.uid,
        gid: plan.jail.gid,
        what,
        hint,
    })
}
