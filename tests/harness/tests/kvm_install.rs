//! A Debian that boots with its own initramfs and systemd: what `ebb-guest install` does for a service there, and how it
//! is asked to shut down.

use std::time::Duration;

use ebb_harness::error::Result;
use ebb_harness::{Launch, Monitor};

/// An emulated processor takes 20 s.
const PATIENCE: Duration = Duration::from_secs(180);

fn start(words: &str, arena: bool) -> Result<Monitor> {
    let launch = Launch::new()?;
    let (disk, initramfs) = {
        let images = launch.images();
        (images.system_disk.clone(), images.system_initramfs.clone())
    };
    let launch = launch.initramfs(&initramfs).disk(&disk, true);
    let words = format!("root=/dev/vda ro {words}");
    let launch = launch.cmdline(&words).memory("size=768M");
    if arena {
        launch.option("--arena", "size=1G").start()
    } else {
        launch.start()
    }
}

/// Boots it; what the console said before the service began, and what the service said.
fn boot(arena: bool) -> Result<(String, String)> {
    let mut monitor = start("", arena)?;
    let ended = monitor.console.wait_for("EBB-SYSTEM end", PATIENCE);
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
    let words = "systemd.mask=system.service systemd.show_status=yes";
    let mut monitor = start(words, false)?;
    let up = monitor.console.wait_for("Multi-User System", PATIENCE);
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
