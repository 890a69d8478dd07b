//! The balloon that runs itself, with the stock driver: a guest that is larger than the limit of its monitor's cgroup, and
//! whose page cache grows.

use std::fs::File;

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Launch, Monitor};
use serde_json::Value;

/// The limit of the cgroup. The guest has half as much more.
const LIMIT: u64 = 512 * MIB;

/// MiB of the guest's memory beyond the limit.
const EXCESS: u64 = 256;

/// The file that the guest reads fits into its memory, but not into the cgroup.
const FILE: u64 = 700 * MIB;

struct Scene {
    cgroup: Cgroup,
    monitor: Monitor,
    guest: Guest,
}

impl Scene {
    /// A guest of 768 MiB in a cgroup of 512 MiB, without swap, and with a file for a disk.
    fn start(name: &str, balloon: &str) -> Result<Self> {
        let cgroup = Cgroup::new(name)?;
        cgroup.set("memory.max", LIMIT)?;
        cgroup.set("memory.swap.max", 0)?;
        let launch = Launch::new()?.within(&cgroup).memory("size=768M");
        let path = launch.folder().join("file");
        let file = File::create(&path).and_then(|file| file.set_len(FILE));
        file.context(path.display())?;
        let launch = launch.option("--balloon", balloon).disk(&path, true);
        let mut monitor = launch.start()?;
        let guest = monitor.guest()?;
        let api = monitor.api();
        let bound = until("the balloon's driver", LONG, || {
            Ok(api.balloon()?.lazy.then_some(()))
        });
        bound.map_err(|error| monitor.explain(error))?;
        Ok(Self {
            cgroup,
            monitor,
            guest,
        })
    }

    /// How often the kernel has killed for the limit.
    fn kills(&self) -> Result<u64> {
        let events = self.cgroup.text("memory.events")?;
        let kills = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        kills.context(events)
    }

    fn balloon(&self) -> Result<Value> {
        self.monitor.api().get("/balloon")
    }
}

fn mib(balloon: &Value, name: &str) -> u64 {
    balloon[name].as_u64().unwrap_or(0)
}

#[test]
fn a_page_cache_that_grows_meets_no_limit() -> Result<()> {
    let mut scene = Scene::start("auto", "auto=on")?;
    let checksum = scene.guest.checksum("keep 64M")?;
    let grown = until("the balloon grows", LONG, || {
        Ok(Some(scene.balloon()?).filter(|balloon| mib(balloon, "actual_mib") >= EXCESS))
    });
    let balloon = match grown {
        Ok(balloon) => balloon,
        Err(error) => {
            let error = Error::new(format!("{error}: {}", scene.balloon()?));
            return Err(scene.monitor.explain(error));
        }
    };
    println!("before the guest reads: {balloon}");
    for _ in 0..2 {
        scene.guest.must_within("cat /dev/vda >/dev/null", LONG)?;
    }
    let (balloon, state) = (scene.balloon()?, scene.monitor.api().lazy()?);
    let current = scene.cgroup.number("memory.current")?;
    let statistics = scene.monitor.api().get("/balloon/statistics")?;
    println!("after it has read: {balloon}, {statistics}, {current} bytes in the cgroup");
    println!("{state:?}\n{}", scene.cgroup.text("memory.events")?);
    assert_eq!(scene.kills()?, 0);
    assert!(mib(&balloon, "actual_mib") >= EXCESS, "{balloon}");
    // Its cache was as large as it could be: the guest's kernel had to make room, again and again.
    let made = statistics["async_reclaim"].as_u64() > Some(256 * MIB);
    assert!(made, "{statistics}");
    let available = statistics["available_memory"].as_u64();
    assert!(available >= Some(96 * MIB), "{statistics}");
    let printed = scene.monitor.ctl(&["balloon"])?;
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(printed.contains("leaves 96 MiB available"), "{printed}");
    assert_eq!(scene.guest.checksum("verify")?, checksum);

    scene.cgroup.set("memory.max", "max")?;
    let balloon = until("the balloon is empty again", LONG, || {
        Ok(Some(scene.balloon()?).filter(|balloon| mib(balloon, "actual_mib") == 0))
    });
    let balloon = balloon.map_err(|error| scene.monitor.explain(error))?;
    println!("after the limit: {balloon}");
    assert!(
        mib(&balloon["auto"], "deflations_total") > 8,
        "in small steps"
    );
    assert_eq!(mib(&balloon["auto"], "taken_back_total"), 0, "{balloon}");
    assert_eq!(scene.guest.checksum("verify")?, checksum);
    scene.guest.ask("exit")?;
    assert_eq!(scene.monitor.wait()?, 0, "{}", scene.monitor.log());
    Ok(())
}

/// The same without: what the balloon is for.
#[test]
fn without_it_the_kernel_kills_the_monitor() -> Result<()> {
    let mut scene = Scene::start("set", "size=0")?;
    scene.guest.send("sh cat /dev/vda >/dev/null")?;
    until("the kernel kills", LONG, || {
        Ok((scene.kills()? > 0).then_some(()))
    })
}
