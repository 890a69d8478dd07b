//! The unit `ebb@.service` on a running systemd: start, restart, kill, stop (docs/operating.md, "As a service").

use std::fs;

use ebb_harness::error::{Context, Result};
use ebb_harness::service::{Service, UNIT};

/// What the guest's kernel says when it does what Ctrl-Alt-Del asks for.
const SHUT_DOWN: &str = "reboot: Restarting system";

#[test]
fn the_life_of_a_unit() -> Result<()> {
    let service = Service::boot()?;
    assert_eq!(service.systemctl(&["start", UNIT])?, "");
    service.guest_is_ready()?;
    let first = service.property("MainPID")?;
    assert_eq!(service.property("ActiveState")?, "active");
    let status = ["ebb", "ctl", "--api-socket", "/run/ebb/web.sock", "status"];
    let said = service.run(&status)?;
    assert!(said.contains("web, running"), "{said}");

    service.forget_console()?;
    assert_eq!(service.systemctl(&["restart", UNIT])?, "");
    service.guest_is_ready()?;
    let second = service.property("MainPID")?;
    assert_ne!(first, second);

    // The monitor is killed, and then, at once, everything that the unit has.
    let drop_in = service.path("/etc/systemd/system/ebb@web.service.d");
    fs::create_dir_all(&drop_in).context("a drop-in")?;
    let options = "[Service]\nRestart=on-failure\nMemoryHigh=400M\nMemoryMax=500M\n";
    fs::write(drop_in.join("own.conf"), options).context("a drop-in")?;
    assert_eq!(service.systemctl(&["daemon-reload"])?, "");
    service.forget_console()?;
    for (times, whom) in [("1", "main"), ("2", "all")] {
        let whom = format!("--kill-whom={whom}");
        let killed = service.systemctl(&["kill", "--signal=KILL", &whom, UNIT])?;
        assert_eq!(killed, "");
        service.await_property("NRestarts", |it| it == times)?;
        service.await_property("SubState", |it| it == "running")?;
    }
    service.guest_is_ready()?;
    assert_ne!(service.property("MainPID")?, second);
    assert_eq!(service.property("MemoryMax")?, (500 << 20).to_string());

    assert_eq!(service.systemctl(&["stop", UNIT])?, "");
    assert_eq!(service.property("ActiveState")?, "inactive");
    let console = service.console();
    assert!(console.contains(SHUT_DOWN), "{console}");
    let left = fs::read_dir(service.path("/run/ebb")).context("/run/ebb")?;
    let left: Vec<_> = left.flatten().map(|it| it.file_name()).collect();
    assert_eq!(left, ["peers"]);
    Ok(())
}
