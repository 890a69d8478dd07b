//! Boots real guests in every way there is, and ends them in every way there is.

use std::fs;

use ebb_harness::error::{Context, Result};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor};
use rustix::process::Signal;

/// The monitor ends with `code`, says nothing on standard error, and removes its socket.
fn ends_with(monitor: &mut Monitor, code: i32) -> Result<()> {
    let ended = monitor.wait()?;
    let (said, log) = (monitor.stderr(), monitor.log());
    assert_eq!(ended, code, "{}\n{log}\n{said}", monitor.console.tail());
    assert_eq!(said, "");
    assert!(
        !monitor.socket().exists(),
        "the API's socket is left behind"
    );
    Ok(())
}

/// Waits for the API; the guest may still be far from its init.
fn api_answers(monitor: &Monitor) -> Result<()> {
    until("the API answers", LONG, || Ok(monitor.api().get("/").ok())).map(drop)
}

#[test]
fn a_bzimage_finds_its_machine_and_powers_off() -> Result<()> {
    let mut monitor = Launch::new()?.option("--balloon", "size=0").start()?;
    let mut guest = monitor.guest()?;
    let release = ebb_harness::Images::from_environment()?.release;
    assert_eq!(guest.must("uname -r")?, release);
    assert_eq!(guest.must("nproc")?, "1");
    let status = guest.must("ebb-guest status")?;
    assert!(status.starts_with("ebb: yes\\ninterface: 1.2"), "{status}");
    let clock = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    let clock = guest.must(clock)?;
    assert!(["kvm-clock", "tsc"].contains(&clock.as_str()), "{clock}");
    guest.must("dmesg | grep -q 'Hypervisor detected: KVM'")?;
    let memory = guest.number("meminfo", "MemTotal")?;
    assert!((200 << 20..256 << 20).contains(&memory), "{memory}");
    // There is no PCI bus, and the kernel is right to say so.
    let errors = "dmesg -r | grep -E '^<[0-3]>' | grep -v 'PCI: Fatal: No config space' || true";
    let complaints = guest.must(errors)?;
    assert_eq!(complaints, "", "the guest's kernel complains");
    guest.ask("exit")?;
    ends_with(&mut monitor, 0)
}

#[test]
fn four_vcpus_enter_a_bzimage_as_it_is_and_panic() -> Result<()> {
    let launch = Launch::new()?.cpus(4).option("--kernel-entry", "image");
    let mut monitor = launch.memory("size=512M").start()?;
    let mut guest = monitor.guest()?;
    assert_eq!(guest.must("nproc")?, "4");
    // Each vCPU does some work.
    for cpu in 0..4 {
        guest.must(&format!("taskset {:x} grep -q . /proc/cpuinfo", 1 << cpu))?;
    }
    guest.send("panic")?;
    ends_with(&mut monitor, 34)
}

#[test]
fn four_vcpus_in_an_elf_kernel_reboot() -> Result<()> {
    let launch = Launch::new()?.cpus(4);
    let vmlinux = launch.images().vmlinux.clone();
    // More memory than fits below the hole for devices.
    let mut monitor = launch.kernel(&vmlinux).memory("size=5G").start()?;
    let mut guest = monitor.guest()?;
    assert_eq!(guest.must("nproc")?, "4");
    let memory = guest.number("meminfo", "MemTotal")?;
    assert!(memory > 4800 << 20, "{memory}");
    guest.send("reboot")?;
    ends_with(&mut monitor, 32)
}

#[test]
fn a_triple_fault_is_a_crash_and_serial_goes_to_a_file() -> Result<()> {
    let launch = Launch::new()?.mode("reboot").cmdline("reboot=t");
    let path = launch.folder().join("serial");
    let mut monitor = launch.serial(&format!("file={}", path.display())).start()?;
    ends_with(&mut monitor, 33)?;
    let text = fs::read_to_string(&path).context(path.display())?;
    assert!(text.contains("EBB-GUEST-READY uptime="), "{text}");
    assert_eq!(monitor.console.all(), "");
    Ok(())
}

#[test]
fn a_root_disk_is_booted() -> Result<()> {
    let launch = Launch::new()?
        .mode("root")
        .cmdline("ebb.run=sha256sum,/etc/debian_version");
    let disk = launch.images().root_disk.clone();
    let mut monitor = launch.disk(&disk, true).start()?;
    monitor.console.wait_for("EBB-ROOT-READY debian=12", LONG)?;
    monitor.console.wait_for("  /etc/debian_version", LONG)?;
    monitor.console.wait_for("EBB-ROOT-EXIT 0", LONG)?;
    ends_with(&mut monitor, 0)
}

#[test]
fn the_operator_stops_a_guest() -> Result<()> {
    let start = || {
        Launch::new()?
            .serial("null")
            .option("--balloon", "size=64M")
            .start()
    };
    let mut monitor = start()?;
    api_answers(&monitor)?;
    let output = monitor.ctl(&["stop"])?;
    assert!(output.status.success(), "{output:?}");
    ends_with(&mut monitor, 0)?;
    assert_eq!(monitor.console.all(), "", "nothing goes to standard output");
    for signal in [Signal::TERM, Signal::INT] {
        let mut monitor = start()?;
        api_answers(&monitor)?;
        monitor.signal(signal)?;
        ends_with(&mut monitor, 0)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_ignores_its_keyboard_is_stopped_after_a_while() -> Result<()> {
    let mut monitor = Launch::new()?.start()?;
    let mut guest = monitor.guest()?;
    // Ctrl-Alt-Del becomes a signal to the first process, which ignores it.
    guest.must("echo 0 > /proc/sys/kernel/ctrl-alt-del")?;
    guest.must("dmesg | grep -q 'AT Raw Set 2 keyboard'")?;
    let asked = monitor.ctl(&["shutdown", "--timeout", "1"])?;
    let said = String::from_utf8_lossy(&asked.stdout);
    assert!(said.contains("did not shut down within 1 s"), "{asked:?}");
    ends_with(&mut monitor, 0)
}

#[test]
fn a_kernel_that_restarts_by_ctrl_alt_del_does() -> Result<()> {
    let mut monitor = Launch::new()?.start()?;
    let mut guest = monitor.guest()?;
    guest.must("echo 1 > /proc/sys/kernel/ctrl-alt-del")?;
    let asked = monitor.ctl(&["shutdown"])?;
    assert!(
        asked.status.success() && asked.stdout.is_empty(),
        "{asked:?}"
    );
    ends_with(&mut monitor, 32)
}
