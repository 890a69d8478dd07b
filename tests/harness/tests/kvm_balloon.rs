//! The lazy balloon with the stock driver: what it costs, what can be taken, what the guest keeps.

use std::time::Duration;

use ebb_harness::api::Metrics;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::{KvmCounters, guest_memory, kvm_counters, overhead, rss};
use ebb_harness::size::{MIB, Size};
use ebb_harness::strace::{MEMORY_CALLS, Watching};
use ebb_harness::wait::{LONG, settled, until};
use ebb_harness::{Api, Guest, Launch, Monitor};
use serde_json::{Value, json};

/// What the monitor's resident memory may move by while nothing is taken or given.
const NOISE: u64 = 8 * MIB;

/// The guest's memory in the lazy life.
const MEMORY: u64 = 512 * MIB;

/// A running machine and everybody's way to it.
struct Scene {
    monitor: Monitor,
    guest: Guest,
    api: Api,
}

impl Scene {
    /// Boots, and waits for the balloon's driver.
    fn start(launch: Launch) -> Result<Self> {
        let mut monitor = launch.start()?;
        let guest = monitor.guest()?;
        let api = monitor.api();
        let scene = Self {
            monitor,
            guest,
            api,
        };
        let bound = until("the balloon's driver", LONG, || {
            Ok(scene.api.balloon()?.lazy.then_some(()))
        });
        bound.map_err(|error| scene.monitor.explain(error))?;
        Ok(scene)
    }

    /// Sets the balloon and waits until the guest has followed.
    fn balloon(&self, bytes: u64) -> Result<Metrics> {
        self.api.set_balloon(bytes)?;
        self.arrives(bytes)
    }

    fn arrives(&self, bytes: u64) -> Result<Metrics> {
        let arrived = until(format_args!("a balloon of {}", Size(bytes)), LONG, || {
            Ok((self.api.balloon()?.actual_mib * MIB == bytes).then_some(()))
        });
        arrived.map_err(|error| self.monitor.explain(error))?;
        settled("lazy memory", Duration::from_millis(300), || {
            self.api.lazy()
        })
    }

    fn rss(&self) -> Result<u64> {
        rss(self.monitor.pid())
    }

    fn counters(&self) -> Result<KvmCounters> {
        kvm_counters(self.monitor.pid())
    }

    /// The guest ends, and the monitor with 0.
    fn finish(mut self) -> Result<()> {
        self.guest.ask("exit")?;
        assert_eq!(self.monitor.wait()?, 0, "{}", self.monitor.log());
        Ok(())
    }
}

/// Everything that the guest has freed and not taken back.
fn free(state: &Metrics) -> u64 {
    state["lazy_bytes"] + state["discarded_bytes"]
}

#[test]
fn a_lazy_life() -> Result<()> {
    let launch = Launch::new()?.memory("size=512M").cpus(2);
    let mut scene = Scene::start(launch.option("--balloon", "size=0,statistics=1"))?;
    let checksum = scene.guest.checksum("keep 48M")?;
    scene.guest.ask("fill 300M")?;
    scene.guest.ask("drop")?;
    inflating_costs_no_system_call(&scene)?;
    inflating_costs_no_flush(&scene)?;
    nearly_all_can_be_taken(&scene)?;
    assert_eq!(scene.guest.checksum("verify")?, checksum);
    the_guest_takes_it_back(&mut scene, &checksum)?;
    statistics(&scene)?;
    scene.finish()
}

fn inflating_costs_no_system_call(scene: &Scene) -> Result<()> {
    let before = scene.api.lazy()?;
    let memory = guest_memory(scene.monitor.pid(), MEMORY)?;
    let watching = Watching::start(scene.monitor.pid(), scene.monitor.folder(), MEMORY_CALLS)?;
    let after = scene.balloon(96 * MIB)?;
    let calls = watching.finish(&memory)?;
    assert!(calls.is_empty(), "inflating made calls: {calls:?}");
    assert!(
        after["lazy_bytes"] >= before["lazy_bytes"] + 96 * MIB,
        "{after:?}"
    );
    assert_eq!(
        (before["discard_calls_total"], after["discard_calls_total"]),
        (0, 0)
    );
    let back = scene.balloon(0)?;
    assert_eq!(free(&back), 0, "{back:?}");
    Ok(())
}

/// KVM's flushes and the monitor's resident memory while the balloon inflates, against the same time without.
fn inflating_costs_no_flush(scene: &Scene) -> Result<()> {
    let (rss_before, before) = (scene.rss()?, scene.counters()?);
    let start = std::time::Instant::now();
    let state = scene.balloon(256 * MIB)?;
    let took = start.elapsed();
    let (rss_after, after) = (scene.rss()?, scene.counters()?);
    let start = std::time::Instant::now();
    until("as much time without", LONG, || {
        Ok((start.elapsed() >= took).then_some(()))
    })?;
    let idle = scene.counters()?;
    let flushes = |from: KvmCounters, to: KvmCounters| {
        (to.remote_tlb_flush_requests - from.remote_tlb_flush_requests)
            .max(to.remote_tlb_flush - from.remote_tlb_flush)
    };
    let (caused, noise) = (flushes(before, after), flushes(after, idle));
    println!(
        "inflate of 256 MiB: {caused} flushes in {took:.1?}, {noise} while idle; {} exits; RSS {} -> {}",
        after.exits - before.exits,
        Size(rss_before),
        Size(rss_after)
    );
    // A flush for each page, or even for each message of 256 pages, would be hundreds.
    assert!(caused <= noise + 4, "{caused} flushes, {noise} while idle");
    // It may rise, as the guest touches new pages; what is taken would make it fall.
    assert!(
        rss_before.saturating_sub(rss_after) <= NOISE,
        "{rss_before} {rss_after}"
    );
    assert_eq!(state["lazy_bytes"], 256 * MIB);
    assert!(state["generation"] > 0);
    Ok(())
}

/// First half through `ebb ctl`, then the rest through the API.
fn nearly_all_can_be_taken(scene: &Scene) -> Result<()> {
    let lazy = scene.api.lazy()?["lazy_bytes"];
    let before = scene.rss()?;
    let output = scene.monitor.ctl(&["reclaim", "128M"])?;
    assert!(output.status.success(), "{output:?}");
    let half = scene.api.lazy()?;
    assert_eq!(half["reclaimed_bytes_total"], 128 * MIB, "{half:?}");
    let fell = before.saturating_sub(scene.rss()?);
    assert!(fell >= 128 * MIB / 100 * 95, "RSS fell by {}", Size(fell));
    let rest = scene.api.reclaim(lazy)?;
    let all = scene.api.lazy()?;
    let fell = before.saturating_sub(scene.rss()?);
    let taken = all["reclaimed_bytes_total"];
    println!(
        "took {} of {} in {} madvise calls, the rest in {} us; RSS fell by {}",
        Size(taken),
        Size(lazy),
        all["discard_calls_total"],
        rest.duration_us,
        Size(fell)
    );
    assert!(
        taken >= lazy / 10 * 9,
        "took {} of {}",
        Size(taken),
        Size(lazy)
    );
    assert!(
        fell >= taken / 100 * 95,
        "RSS fell by {} of {}",
        Size(fell),
        Size(taken)
    );
    // What a huge page has brought back was taken twice.
    let once = taken - all["refilled_bytes_total"];
    assert_eq!(all["discarded_bytes"], once, "{all:?}");
    assert_eq!(all["discard_failures_total"], 0);
    Ok(())
}

fn the_guest_takes_it_back(scene: &mut Scene, checksum: &str) -> Result<()> {
    let state = scene.balloon(0)?;
    assert_eq!(free(&state), 0, "{state:?}");
    assert_eq!(
        state["freed_bytes_total"], state["reused_bytes_total"],
        "{state:?}"
    );
    scene.guest.ask("fill 300M")?;
    assert_eq!(scene.guest.checksum("verify")?, checksum);
    scene.guest.ask("drop").map(drop)
}

fn statistics(scene: &Scene) -> Result<()> {
    let fresh = until("statistics", LONG, || {
        let values = scene.api.get("/balloon/statistics")?;
        Ok((values["total_memory"].as_u64() > Some(400 * MIB)).then_some(values))
    })?;
    assert!(fresh["free_memory"].as_u64() > Some(64 * MIB), "{fresh}");
    assert!(
        fresh["available_memory"].is_u64() && fresh["minor_faults"].is_u64(),
        "{fresh}"
    );
    let interval = json!({ "stats_polling_interval_s": 3 });
    scene.api.must("PATCH", "/balloon/statistics", &interval)?;
    assert_eq!(scene.api.balloon()?.stats_polling_interval_s, 3);
    Ok(())
}

#[test]
fn drivers_go_and_come_and_devices_are_reset() -> Result<()> {
    let launch = Launch::new()?.cmdline("iomem=relaxed").memory("size=384M");
    let mut scene = Scene::start(launch.option("--balloon", "size=64M,deflate_on_oom=on"))?;
    let checksum = scene.guest.checksum("keep 32M")?;
    // The size of the command line is there from the beginning.
    let state = scene.arrives(64 * MIB)?;
    assert_eq!(free(&state), 64 * MIB, "{state:?}");
    scene.api.reclaim(32 * MIB)?;

    scene.guest.ask("rebind")?;
    let state = scene.arrives(64 * MIB)?;
    assert_eq!(
        state["lazy_bytes"],
        64 * MIB,
        "a new driver starts anew: {state:?}"
    );
    assert_eq!(state["discarded_bytes"], 0, "{state:?}");
    assert_eq!(
        state["freed_bytes_total"],
        state["reused_bytes_total"] + 64 * MIB,
        "{state:?}"
    );

    out_of_memory(&mut scene)?;
    scene.balloon(128 * MIB)?;
    scene.api.reclaim(64 * MIB)?;
    reset_the_device(&mut scene)?;
    let state = until("everything is in use again", LONG, || {
        Ok(Some(scene.api.lazy()?).filter(|state| free(state) == 0))
    })?;
    assert_eq!(
        state["freed_bytes_total"], state["reused_bytes_total"],
        "{state:?}"
    );
    assert!(!scene.api.balloon()?.lazy, "no driver is bound");
    assert_eq!(scene.guest.checksum("verify")?, checksum);
    scene.finish()
}

/// A guest that needs more than it has takes pages back by itself.
fn out_of_memory(scene: &mut Scene) -> Result<()> {
    let state = scene.balloon(160 * MIB)?;
    assert_eq!(free(&state), 160 * MIB, "{state:?}");
    let available = scene.guest.number("meminfo", "MemAvailable")?;
    let wanted = (available + 64 * MIB) / MIB;
    scene.guest.ask(&format!("fill {wanted}M"))?;
    let balloon = scene.api.balloon()?;
    assert!(
        balloon.actual_mib < 160 && balloon.deflate_on_oom,
        "{balloon:?}"
    );
    scene.guest.ask("verify")?;
    scene.guest.ask("drop").map(drop)
}

/// Resets the balloon behind its driver's back, as a kernel does that was not shut down.
fn reset_the_device(scene: &mut Scene) -> Result<()> {
    let on_pci = !std::env::var("EBB_TRANSPORT").is_ok_and(|it| it == "mmio");
    let name = if on_pci { "0000:00:01.0" } else { "LNRO0005" };
    let found = format!("grep {name} /proc/iomem | head -1 | cut -d- -f1");
    let base = scene.guest.must(&found)?;
    let base = u64::from_str_radix(base.trim(), 16).context(format_args!("address {base:?}"))?;
    let (identity, reset) = if on_pci {
        let identity = format!("cat /sys/bus/pci/devices/{name}/device");
        (identity, format!("devmem {:#x} 8 0", base + 0x14))
    } else {
        let identity = format!("devmem {:#x} 32", base + 8);
        (identity, format!("devmem {:#x} 32 0", base + 0x70))
    };
    let device = scene.guest.must(&identity)?;
    let expected = if on_pci { "0x1045" } else { "0x00000005" };
    assert_eq!(device, expected, "the device is no balloon");
    scene.guest.must(&reset).map(drop)
}

#[test]
fn a_small_machine_costs_little_and_errors_are_told() -> Result<()> {
    let launch = Launch::new()?
        .memory("size=128M")
        .option("--balloon", "size=0");
    let scene = Scene::start(launch)?;
    let beside = overhead(scene.monitor.pid(), 128 * MIB)?;
    println!(
        "the monitor takes {} beside the guest's memory, and {} of files that all monitors share",
        Size(beside.own),
        Size(beside.shared)
    );
    assert!(beside.own <= MIB, "{beside:?}");
    for (method, path, body) in [
        ("GET", "/balloon/statistics", Value::Null),
        ("PATCH", "/balloon", json!({ "amount_mib": 129 })),
        ("PATCH", "/balloon", json!({ "amount_mib": -1 })),
        ("PATCH", "/balloon", json!({ "amount": 1 })),
        ("PUT", "/actions", json!({ "action_type": "Dance" })),
    ] {
        let answer = scene.api.request(method, path, &body)?;
        assert_eq!(answer.status, 400, "{method} {path} {body}: {answer:?}");
        assert!(answer.body["fault_message"].is_string(), "{answer:?}");
    }
    let output = scene.monitor.ctl(&["status", "--json"])?;
    let status: Value = serde_json::from_slice(&output.stdout).context("ctl status --json")?;
    assert_eq!(status["info"]["state"], "Running", "{status}");
    assert_eq!(status["lazy_memory"]["lazy_bytes"], 0, "{status}");
    let config = scene.api.get("/vm/config")?;
    assert_eq!(config["machine-config"]["mem_size_mib"], 128, "{config}");
    scene.finish()
}
