//! A Debian that boots with its own initramfs and systemd: what `ebb-guest install` does for a service there, and how it
//! is asked to shut down.

use ebb_harness::Launch;
use ebb_harness::error::Result;
use ebb_harness::wait::LONG;

/// Boots it; what the console said before the service began, and what the service said.
fn boot(arena: bool) -> Result<(String, String)> {
    let launch = Launch::new()?.system();
    let mut monitor = if arena {
        launch.option("--arena", "size=1G").start()?
    } else {
        launch.start()?
    };
    let ended = monitor.console.wait_for("EBB-SYSTEM end", LONG);
    ended.map_err(|error| monitor.explain(error))?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    let all = monitor.console.all();
    let (before, said) = all.split_once("EBB-SYSTEM begin").unwrap_or_default();
    println!("{said}");
    Ok((before.to_owned(), said.to_owned()))
}

#[test]
fn a_service_finds_the_arena_that_the_initramfs_has_made_ready() -> Result<()> {
    let (before, said) = boot(true)?;
    let arena = "arena: /dev/dax0.0 arena0 size=1073741824";
    assert!(before.contains(arena), "not from the initramfs: {before}");
    assert!(said.contains("mode=660"), "{said}");
    assert!(said.contains("\nactive"), "{said}");
    // By `status`, and by the unit in the journal.
    assert_eq!(said.matches(arena).count(), 2, "{said}");
    Ok(())
}

#[test]
fn a_machine_without_an_arena_boots_all_the_same() -> Result<()> {
    let (_, said) = boot(false)?;
    assert!(said.contains("\nactive"), "{said}");
    assert!(said.contains("this machine has no arena"), "{said}");
    Ok(())
}

#[test]
fn systemd_shuts_down_when_it_is_asked_to() -> Result<()> {
    let mut monitor = Launch::new()?
        .system_without_service()
        .option("--transport", "mmio")
        .start()?;
    let up = monitor.console.wait_for("Multi-User System", LONG);
    up.map_err(|error| monitor.explain(error))?;
    let asked = monitor.ctl(&["shutdown", "--timeout", "300"])?;
    assert!(asked.status.success(), "{asked:?}");
    assert_eq!(asked.stdout, b"", "it was stopped instead");
    let console = monitor.console.all();
    assert!(console.contains("reboot: Restarting system"), "{console}");
    // systemd reboots by Ctrl-Alt-Del.
    assert_eq!(monitor.wait()?, 32, "{console}");
    Ok(())
}
