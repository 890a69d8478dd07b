//! The serial console in a terminal.

use std::time::Duration;

use ebb_harness::error::{Error, Result};
use ebb_harness::terminal::Terminal;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor};
use rustix::process::Signal;

/// Waits until the monitor has made the terminal its own.
fn becomes_raw(monitor: &Monitor, terminal: &Terminal) -> Result<()> {
    let raw = until("the terminal is raw", LONG, || {
        Ok(terminal.is_raw()?.then_some(()))
    });
    raw.map_err(|error| monitor.explain(error))
}

#[test]
fn a_shell_takes_every_key_but_ours() -> Result<()> {
    let mut terminal = Terminal::open()?;
    let before = terminal.modes()?;
    let mut monitor = Launch::new()?.mode("shell").start_in(&terminal)?;
    terminal.screen.wait_for("EBB-GUEST-READY", LONG)?;
    becomes_raw(&monitor, &terminal)?;
    terminal.type_in("echo one-$((40 + 2))\r")?;
    terminal.screen.wait_for("one-42", LONG)?;
    // Ctrl-C is the guest's, and so is one Ctrl-A of two.
    terminal.type_in("echo busy-$((40 + 2)); cat\r")?;
    terminal.screen.wait_for("busy-42", LONG)?;
    // A key that comes while the shell hands the terminal to its child misses both: try again.
    let back = until("the shell is back", LONG, || {
        terminal.type_in("\x03echo two-$((40 + 2))\r")?;
        Ok(terminal
            .screen
            .wait_for("two-42", Duration::from_secs(5))
            .ok())
    });
    back.map_err(|error| Error::new(format!("{error}\n{}", terminal.screen.tail())))?;
    terminal.type_in("\x01\x01echo three-$((40 + 2))\r")?;
    terminal.screen.wait_for("three-42", LONG)?;
    terminal.type_in("\x01x")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert_eq!(terminal.modes()?, before);
    Ok(())
}

#[test]
fn the_terminal_is_restored_on_every_way_out() -> Result<()> {
    let terminal = Terminal::open()?;
    let before = terminal.modes()?;
    let mut monitor = Launch::new()?.mode("panic").start_in(&terminal)?;
    becomes_raw(&monitor, &terminal)?;
    assert_eq!(monitor.wait()?, 34, "{}", terminal.screen.tail());
    assert_eq!(terminal.modes()?, before);
    let mut monitor = Launch::new()?.start_in(&terminal)?;
    becomes_raw(&monitor, &terminal)?;
    monitor.signal(Signal::TERM)?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert_eq!(terminal.modes()?, before);
    Ok(())
}
