//! Free page reporting with the stock driver: what the host gets, when, and what the guest keeps.

use std::time::{Duration, Instant};

use ebb_harness::api::Metrics;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::host::{lazy_free, rss};
use ebb_harness::size::{MIB, Size};
use ebb_harness::wait::{LONG, settled, until};
use ebb_harness::{Api, Guest, Launch, Monitor};

/// Memory that the guest takes and lets go.
const FREED: u64 = 256 * MIB;

/// The driver reports every 2 s; when it has not for this long, there is nothing left.
const QUIET: Duration = Duration::from_secs(6);

/// A running machine and everybody's way to it.
struct Scene {
    monitor: Monitor,
    guest: Guest,
    api: Api,
    checksum: String,
}

impl Scene {
    /// Boots, waits for the driver, and has the guest keep some data.
    fn start(balloon: &str) -> Result<Self> {
        Self::launch(Launch::new()?, balloon)
    }

    fn launch(launch: Launch, balloon: &str) -> Result<Self> {
        // One vCPU: several trip over the nested machine's emulation of code patching, and reporting is one
        // kernel thread however many there are.
        let launch = launch.memory("size=512M");
        let mut monitor = launch.option("--balloon", balloon).start()?;
        let mut guest = monitor.guest()?;
        let checksum = guest.checksum("keep 48M")?;
        let api = monitor.api();
        Ok(Self {
            monitor,
            guest,
            api,
            checksum,
        })
    }

    fn reporting(&self) -> Result<Metrics> {
        Ok(self.api.lazy()?.part("reporting"))
    }

    /// The guest takes memory and lets it go; waits until the driver has reported it.
    fn free(&mut self) -> Result<(u64, Metrics)> {
        let before = self.reporting()?;
        self.guest.ask(&format!("fill {}M", FREED / MIB))?;
        let full = rss(self.monitor.pid())?;
        self.guest.ask("drop")?;
        let reported = until("reports", LONG, || {
            let now = self.reporting()?;
            Ok((now["bytes_total"] >= before["bytes_total"] + FREED / 2).then_some(()))
        });
        reported.map_err(|error| self.monitor.explain(error))?;
        let now = settled("reports", QUIET, || self.reporting())?;
        Ok((full, now))
    }

    fn verify(&mut self) -> Result<()> {
        assert_eq!(self.guest.checksum("verify")?, self.checksum);
        Ok(())
    }

    /// Memory comes and goes for a while, and so do reports.
    fn churn(&mut self) -> Result<()> {
        self.guest.ask("churn 200M 8")?;
        self.guest.ask("fill 200M")?;
        self.verify()
    }

    fn rebind(&mut self) -> Result<()> {
        self.guest.ask("rebind")?;
        let bound = until("the driver", LONG, || {
            Ok(self.api.balloon()?.free_page_reporting.then_some(()))
        });
        bound.map_err(|error| self.monitor.explain(error))
    }

    /// The guest ends, and the monitor with 0, without a complaint about the guest.
    fn finish(mut self) -> Result<()> {
        self.guest.ask("exit")?;
        assert_eq!(self.monitor.wait()?, 0, "{}", self.monitor.log());
        let log = self.monitor.log();
        assert!(!log.contains("balloon:"), "{log}");
        Ok(())
    }
}

#[test]
fn eager_reports_are_gone_when_they_are_acknowledged() -> Result<()> {
    let mut scene = Scene::start("free_page_reporting=on,reporting=eager,statistics=5")?;
    let (full, reporting) = scene.free()?;
    let rest = rss(scene.monitor.pid())?;
    println!("{reporting:?}; RSS {} -> {}", Size(full), Size(rest));
    assert!(
        full.saturating_sub(rest) >= FREED / 10 * 9,
        "RSS {full} -> {rest}"
    );
    assert_eq!(reporting["discarded_bytes_total"], reporting["bytes_total"]);
    assert_eq!(
        (reporting["marked_bytes_total"], reporting["failures_total"]),
        (0, 0)
    );
    assert!(reporting["calls_total"] <= reporting["ranges_total"]);
    assert_eq!(
        scene.api.lazy()?["lazy_bytes"],
        0,
        "reports are not tracked"
    );
    scene.verify()?;
    scene.churn()?;
    scene.rebind()?;
    let (full, _) = scene.free()?;
    let rest = rss(scene.monitor.pid())?;
    assert!(
        full.saturating_sub(rest) >= FREED / 10 * 9,
        "RSS {full} -> {rest}"
    );
    scene.verify()?;
    scene.finish()
}

#[test]
fn lazy_reports_are_there_for_a_host_that_needs_memory() -> Result<()> {
    let cgroup = Cgroup::new("lazy")?;
    let launch = Launch::new()?.within(&cgroup);
    let mut scene = Scene::launch(launch, "free_page_reporting=on,reporting=lazy")?;
    let (full, reporting) = scene.free()?;
    let pid = scene.monitor.pid();
    let (kept, free) = (rss(pid)?, lazy_free(pid)?);
    println!(
        "{reporting:?}; RSS {} -> {}, LazyFree {}",
        Size(full),
        Size(kept),
        Size(free)
    );
    assert_eq!(reporting["marked_bytes_total"], reporting["bytes_total"]);
    assert_eq!(
        (
            reporting["discarded_bytes_total"],
            reporting["failures_total"]
        ),
        (0, 0)
    );
    assert!(free >= FREED / 10 * 8, "LazyFree {free}");
    // Now the host needs it.
    cgroup.set("memory.high", kept.saturating_sub(free / 4 * 3))?;
    let fell = until("RSS falls", LONG, || {
        let rest = rss(pid)?;
        Ok((kept.saturating_sub(rest) >= FREED / 2).then_some(rest))
    })?;
    println!("under pressure RSS {} -> {}", Size(kept), Size(fell));
    scene.verify()?;
    cgroup.set("memory.high", "max")?;
    scene.churn()?;
    scene.rebind()?;
    scene.free()?;
    scene.verify()?;
    scene.finish()
}

/// What the guest writes after a report is kept, however short of memory the host is.
#[test]
fn data_in_use_survives_pressure_with_lazy_reports() -> Result<()> {
    let cgroup = Cgroup::new("pressed")?;
    let launch = Launch::new()?.within(&cgroup);
    let mut scene = Scene::launch(launch, "free_page_reporting=on,reporting=lazy")?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        scene.free()?;
        let pid = scene.monitor.pid();
        let before = rss(pid)?;
        let (lazy, taken) = (lazy_free(pid)?, cgroup.lazily_freed()?);
        // Written anew where it was reported, while the host takes what is left.
        scene.guest.send("fill 120M")?;
        cgroup.set("memory.high", before.saturating_sub(lazy / 2))?;
        scene.guest.console.wait_for("EBB-GUEST-OK fill", LONG)?;
        cgroup.set("memory.high", "max")?;
        let taken = cgroup.lazily_freed()? - taken;
        println!(
            "of {} lazily free the host took {}",
            Size(lazy),
            Size(taken)
        );
        assert!(taken > 0, "there was no pressure");
        scene.verify()?;
        scene.guest.ask("drop")?;
    }
    scene.finish()
}

/// A guest that clears memory when it frees it, and not when it takes it: what was reported must read as zero. (Linux
/// reports nothing in this mode unless `PAGE_POISON` is offered; a poison other than zero is left to the unit tests, as
/// Debian's kernel is built without.)
fn memory_cleared_on_free_stays_clear(mode: &str) -> Result<()> {
    let launch = Launch::new()?.cmdline("init_on_free=1 init_on_alloc=0");
    let balloon = format!("free_page_reporting=on,reporting={mode}");
    let mut scene = Scene::launch(launch, &balloon)?;
    let poison = "cut -c5 /sys/bus/virtio/drivers/virtio_balloon/virtio*/features";
    assert_eq!(
        scene.guest.must(poison)?,
        "1",
        "PAGE_POISON is not negotiated"
    );
    let (_, reporting) = scene.free()?;
    println!("{reporting:?}");
    assert_eq!(reporting["poisoned_bytes_total"], 0);
    // Fresh memory that is not zero fails this.
    scene.churn()?;
    scene.finish()
}

#[test]
fn memory_cleared_on_free_is_reported_eagerly_and_stays_clear() -> Result<()> {
    memory_cleared_on_free_stays_clear("eager")
}

#[test]
fn memory_cleared_on_free_is_reported_lazily_and_stays_clear() -> Result<()> {
    memory_cleared_on_free_stays_clear("lazy")
}

#[test]
fn without_the_option_nothing_is_reported() -> Result<()> {
    let mut scene = Scene::start("size=0")?;
    scene.guest.ask("fill 200M")?;
    scene.guest.ask("drop")?;
    std::thread::sleep(QUIET);
    assert!(scene.reporting()?.are_zero());
    assert!(!scene.api.balloon()?.free_page_reporting);
    scene.finish()
}
