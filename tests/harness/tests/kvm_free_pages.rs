//! A stock guest frees memory and says nothing: the host gets it back by the guest kernel's free lists.

use ebb_harness::api::Metrics;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::host::rss;
use ebb_harness::size::{MIB, Size};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Api, Guest, Launch, Monitor};

/// Memory that a program takes and lets go.
const FREED: u64 = 256 * MIB;
/// What of it must come back at least: the guest keeps some on its CPUs' own lists, and in pieces below 64 KiB.
const TAKEN: u64 = FREED / 4 * 3;

/// Loads the stock driver that tells where the kernel's note is; or a program tells.
const LOAD: &str = "while read -r module; do insmod $module; done </etc/modules.note";

/// A machine whose guest has told where its note is, keeps some data, and has touched and freed [`FREED`].
struct Scene {
    monitor: Monitor,
    guest: Guest,
    api: Api,
    checksum: String,
}

impl Scene {
    fn start(launch: Launch, tell: &str) -> Result<Self> {
        let mut monitor = launch.start()?;
        let mut guest = monitor.guest()?;
        let api = monitor.api();
        guest.must(tell)?;
        let read = until("its free lists are read", LONG, || {
            let state = api.get("/lazy-memory")?;
            let kernel = state["free_pages"]["kernel"].as_str().map(str::to_owned);
            Ok(kernel)
        });
        let release = read.map_err(|error| monitor.explain(error))?;
        assert_eq!(guest.must("uname -r")?.trim(), release);
        let checksum = guest.checksum("keep 64M")?;
        guest.ask(&format!("fill {}M", FREED / MIB))?;
        guest.ask("drop")?;
        Ok(Self {
            monitor,
            guest,
            api,
            checksum,
        })
    }

    fn free_pages(&self) -> Result<Metrics> {
        Ok(self.api.lazy()?.part("free_pages"))
    }

    /// The guest has all that it kept, and can use the rest again.
    fn finish(mut self) -> Result<()> {
        assert_eq!(self.guest.checksum("verify")?, self.checksum);
        self.guest.ask("churn 200M 4")?;
        assert_eq!(self.guest.checksum("verify")?, self.checksum);
        self.guest.ask("exit")?;
        assert_eq!(self.monitor.wait()?, 0, "{}", self.monitor.log());
        Ok(())
    }
}

/// Takes all that there is on request. Returns how far the RSS has fallen.
fn take_all(launch: Launch, tell: &str) -> Result<(Scene, u64)> {
    let scene = Scene::start(launch, tell)?;
    let (pid, before) = (scene.monitor.pid(), scene.free_pages()?);
    let full = rss(pid)?;
    assert!(before["resident_bytes"] >= FREED / 2, "{before:?}");
    let outcome = scene.api.reclaim(4096 * MIB)?;
    let (rest, after) = (rss(pid)?, scene.free_pages()?);
    println!(
        "RSS {} -> {}; {outcome:?} {after:?}",
        Size(full),
        Size(rest)
    );
    println!("{:?}", scene.api.lazy()?.part("gate"));
    assert_eq!(after["taken_bytes_total"], outcome.reclaimed_bytes);
    assert!(after["resident_bytes"] <= FREED / 10, "{after:?}");
    assert_eq!(after["failures_total"], 0, "{after:?}");
    Ok((scene, full.saturating_sub(rest)))
}

/// With the options that everybody has.
#[test]
fn what_a_guest_frees_without_a_word_is_given_back_on_request() -> Result<()> {
    let (scene, fallen) = take_all(Launch::new()?.memory("size=512M").cpus(2), LOAD)?;
    assert!(fallen >= TAKEN, "{fallen}");
    scene.finish()
}

#[test]
fn pages_of_4_kib_are_given_back_in_pieces() -> Result<()> {
    // On an emulated processor a piece takes milliseconds, and the usual share of time would make this a long test.
    let launch = Launch::new()?.option("--lazy", "share=50");
    let (scene, fallen) = take_all(launch.memory("size=512M,thp=off"), LOAD)?;
    assert!(fallen >= TAKEN, "{fallen}");
    scene.finish()
}

/// Linux 6.1 marks free pages in another way.
#[test]
fn an_older_kernel_is_read_too() -> Result<()> {
    let launch = Launch::new()?;
    let images = launch.images().clone();
    let launch = launch
        .kernel(&images.other_vmlinuz)
        .initramfs(&images.other_initramfs)
        .option("--lazy", "share=50");
    let (mut scene, fallen) = take_all(launch.memory("size=512M"), "ebb-guest note")?;
    assert!(scene.guest.must("uname -r")?.starts_with("6.1."));
    assert!(fallen >= TAKEN, "{fallen}");
    scene.finish()
}

#[test]
fn a_cgroup_over_its_limit_gets_it_by_itself() -> Result<()> {
    let cgroup = Cgroup::new("silent")?;
    let launch = Launch::new()?.within(&cgroup).memory("size=512M");
    let mut scene = Scene::start(launch, LOAD)?;
    // The guest rests, so nothing stalls. Only a little over the limit, because far over it the kernel makes every thread of
    // a cgroup sleep, those that free memory too.
    cgroup.set("memory.high", cgroup.number("memory.current")? - 4 * MIB)?;
    let taken = until("the host takes free memory", LONG, || {
        Ok(Some(scene.free_pages()?["taken_bytes_total"]).filter(|taken| *taken >= 64 * MIB))
    })?;
    scene.guest.ask("fill 96M")?;
    until("the host takes more of it", LONG, || {
        Ok((scene.free_pages()?["taken_bytes_total"] > taken).then_some(()))
    })?;
    cgroup.set("memory.high", 4096 * MIB)?;
    scene.finish()
}

#[test]
fn nothing_is_taken_where_it_is_off() -> Result<()> {
    let launch = Launch::new()?.memory("size=256M");
    let mut monitor = launch.option("--lazy", "free_pages=off").start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    guest.must(LOAD)?;
    guest.ask("fill 96M")?;
    guest.ask("drop")?;
    assert_eq!(api.reclaim(4096 * MIB)?.reclaimed_bytes, 0);
    let state = api.get("/lazy-memory")?;
    assert_eq!(state["free_pages"]["why_not"], "--lazy free_pages=off");
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
