//! Machines that are paused and resumed.

use std::fs;
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::wait::{LONG, settled, until, until_often};
use ebb_harness::{Api, Launch, Monitor};
use ebb_hypercall_abi::Operation;
use ebb_payload::{Program, Transport, page};
use serde_json::json;

const SERIAL: u16 = 0x3f8;

/// A guest that frees `pages` lazily and writes to the serial port from then on, without an end.
fn talker(pages: u64) -> Program {
    let mut guest = Program::kernel();
    guest.fill(page(0), pages, 7);
    guest.call(Transport::Port, Operation::LazyFree, page(0), pages);
    guest.output_byte(SERIAL, b'x', u64::MAX);
    guest
}

/// A monitor with a guest of our own, whose serial port is a file.
struct Talking {
    monitor: Monitor,
}

impl Talking {
    fn start(guest: &Program, cpus: u32) -> Result<Self> {
        let launch = Launch::new()?.memory("size=64M").cpus(cpus);
        let kernel = launch.folder().join("kernel");
        guest.write(&kernel).context("write the guest")?;
        let serial = format!("file={}", launch.folder().join("serial").display());
        let monitor = launch.kernel(&kernel).serial(&serial).start()?;
        Ok(Self { monitor })
    }

    /// Bytes that the guest has written.
    fn said(&self) -> u64 {
        let serial = fs::metadata(self.monitor.folder().join("serial"));
        serial.map_or(0, |it| it.len())
    }

    fn says_more(&self) -> Result<()> {
        let before = self.said();
        until_often("the guest writes", LONG, || {
            Ok((self.said() > before + 10_000).then_some(()))
        })
    }
}

fn state(api: &Api) -> Result<String> {
    Ok(api.get("/")?["state"].as_str().unwrap_or("?").to_owned())
}

fn ctl(monitor: &Monitor, word: &str) -> Result<()> {
    let output = monitor.ctl(&[word])?;
    assert!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn a_paused_guest_does_nothing_and_its_free_memory_can_be_taken() -> Result<()> {
    const PAGES: u64 = 2048;
    let mut talking = Talking::start(&talker(PAGES), 1)?;
    let api = talking.monitor.api();
    until_often("the API answers", LONG, || {
        Ok(api.is_running(talking.monitor.pid()).then_some(()))
    })?;
    for _ in 0..2 {
        talking.says_more()?;
        // The second time it changes nothing.
        ctl(&talking.monitor, "pause")?;
        ctl(&talking.monitor, "pause")?;
        assert_eq!(state(&api)?, "Paused");
        let said = settled("the guest is silent", Duration::from_millis(300), || {
            Ok(talking.said())
        })?;
        // What was reclaimed is not taken twice.
        let due = api.lazy()?["lazy_bytes"];
        assert_eq!(api.reclaim(PAGES * 4096)?.reclaimed_bytes, due);
        assert_eq!(talking.said(), said);
        ctl(&talking.monitor, "resume")?;
        ctl(&talking.monitor, "resume")?;
        assert_eq!(state(&api)?, "Running");
    }
    assert_eq!(api.lazy()?["discarded_bytes"], PAGES * 4096);
    talking.says_more()?;
    ctl(&talking.monitor, "pause")?;
    ctl(&talking.monitor, "stop")?;
    assert_eq!(talking.monitor.wait()?, 0, "{}", talking.monitor.log());
    Ok(())
}

#[test]
fn a_stock_guest_with_devices_at_work_is_paused_many_times() -> Result<()> {
    let launch = Launch::new()?
        .cpus(2)
        .option("--balloon", "size=0,statistics=1");
    let disk = launch.folder().join("disk");
    let content: Vec<u8> = (0..8 << 20)
        .map(|at: usize| (at / 4096 % 251) as u8)
        .collect();
    fs::write(&disk, content).context("write a disk")?;
    let mut monitor = launch.disk(&disk, false).start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let read = "dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum";
    let sum = guest.must(read)?;
    guest.send(&format!("sh for n in 1 2 3; do {read}; done"))?;
    api.set_balloon(32 << 20)?;
    for _ in 0..20 {
        api.must("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        assert_eq!(state(&api)?, "Paused");
        api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    }
    let line = guest
        .console
        .find("the sums", LONG, |line| line.contains("EBB-GUEST-OK sh"))?;
    assert_eq!(
        line.matches(sum.split(' ').next().unwrap_or("?")).count(),
        3,
        "{line}"
    );
    until("the balloon grows", LONG, || {
        Ok((api.balloon()?.actual_mib == 32).then_some(()))
    })?;
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
