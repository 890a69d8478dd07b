//! Clients of the API that send a byte at a time, to a process that waits for its machine: others are heard, its memory and
//! descriptors stay bounded, and it ends while they are there. `cargo xtask bench api` has more of them, and a guest.

use std::fs;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::firecracker::Firecracker;
use ebb_harness::host::own;
use ebb_harness::size::MIB;
use ebb_harness::slow_clients::SlowClients;
use ebb_harness::wait::{LONG, until};
use rustix::process::{Pid, Signal, kill_process};

/// More than the server has places for, those that wait included.
const CLIENTS: usize = 300;
/// Connections that the server has at a time, those that wait, and what it has besides.
const DESCRIPTORS: usize = 16 + 256 + 32;

#[test]
fn slow_clients_take_neither_all_turns_nor_memory() -> Result<()> {
    let mut vm = Firecracker::serve()?;
    let process = Pid::from_child(&vm.child);
    let before = own(vm.child.id())?;
    let slow = SlowClients::start(&vm.path("api"), CLIENTS)?;
    until("each has had a turn", LONG, || {
        Ok((slow.cut_off() >= CLIENTS as u64).then_some(()))
    })?;
    // Unlike a thread of this process, it is another client.
    let mut other = Command::new(&vm.images().ebb);
    other.args(["ctl", "--api-socket"]).arg(vm.path("api"));
    let heard = other.arg("status").output().context("ebb ctl")?;
    assert!(heard.status.success(), "{heard:?}");
    let grown = own(vm.child.id())?.saturating_sub(before);
    assert!(grown < 4 * MIB, "{grown}");
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.child.id())).context("fd")?;
    assert!(descriptors.count() <= DESCRIPTORS);
    kill_process(process, Signal::TERM).context("signal")?;
    assert_eq!(vm.wait()?.code(), Some(0));
    slow.end();
    Ok(())
}
