//! `ebb-guest install` in a Debian that boots with its own initramfs and systemd: what a service finds there.

use std::time::Duration;

use ebb_harness::Launch;
use ebb_harness::error::Result;

/// An emulated processor takes 20 s.
const PATIENCE: Duration = Duration::from_secs(180);

/// Boots it; what the console said before the service began, and what the service said.
fn boot(arena: bool) -> Result<(String, String)> {
    let launch = Launch::new()?;
    let (disk, initramfs) = {
        let images = launch.images();
        (images.system_disk.clone(), images.system_initramfs.clone())
    };
    let launch = launch.initramfs(&initramfs).disk(&disk, true);
    let launch = launch.cmdline("root=/dev/vda ro").memory("size=768M");
    let mut monitor = if arena {
        launch.option("--arena", "size=1G").start()?
    } else {
        launch.start()?
    };
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
