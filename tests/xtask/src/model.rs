//! `cargo xtask model teardown`: how long freeing takes on machines that are not at hand.
//!
//! A page costs its worker some time of its own, and some under the lock of the memory zone that it goes back to.
//! Workers meet at that lock: a closed queue, computed by mean value analysis (Reiser and Lavenberg, 1980), where a
//! lock that many wait for takes longer to change hands. A table page costs time of its own. The constants come
//! from the published series (Lu 2017) and from `target/bench/teardown.json`; the errors at the points that they
//! come from, and at those that they do not, are printed.

use std::fmt::Write;

use ebb_nested_machine::error::{Context, Result};
use serde_json::Value;

use crate::project::root;

/// Arguments of `model`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which model: teardown
    #[arg(value_parser = ["teardown"])]
    name: String,
}

/// Runs the subcommand.
pub fn run(_: &Arguments) -> Result<u8> {
    let path = root().join("target/bench/teardown.json");
    let here = std::fs::read_to_string(&path)
        .ok()
        .map(|text| serde_json::from_str(&text).context(|| format!("read {}", path.display())))
        .transpose()?;
    print!(
        "{}",
        describe(here.as_ref().and_then(Points::read).as_ref())
    );
    Ok(0)
}

const GIB: f64 = 1_073_741_824.0;
const PAGE: f64 = 4096.0;

/// Workers and seconds for 320 GiB in pages of 4 KiB, zapped by one thread and freed by `max_active` others.
const PUBLISHED: [(u32, f64); 6] = [
    (1, 8.9),
    (2, 5.65),
    (4, 4.84),
    (8, 4.77),
    (16, 4.85),
    (32, 6.21),
];
const PUBLISHED_GIB: f64 = 320.0;
/// The same with the zone lock split over 107 nodes: what is left is the one thread that zaps.
const PUBLISHED_SPLIT: f64 = 3.23;
/// Nobody frees with fewer than one.
const SPLIT_ZONES: u32 = 107;

/// What a page costs, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Costs {
    /// In its worker alone.
    own: f64,
    /// Under the zone's lock.
    locked: f64,
    /// By which fraction each further worker at a lock makes it slower.
    crowd: f64,
    /// A page of a page table.
    table: f64,
}

/// Who frees.
#[derive(Clone, Copy, Debug)]
struct Team {
    workers: u32,
    cores: u32,
    zones: u32,
}

impl Costs {
    /// Seconds for so many pages and table pages.
    fn seconds(&self, pages: f64, tables: f64, team: Team) -> f64 {
        // Workers beyond the cores wait for a core, not for a lock.
        let workers = team.workers.min(team.cores).max(1);
        let zones = f64::from(team.zones.max(1));
        let crowd = (f64::from(workers) / zones - 1.0).max(0.0);
        let locked = self.locked * (1.0 + self.crowd * crowd);
        let own = self.own + self.table * tables / pages.max(1.0);
        // Of a population of one, two … workers: how many are at the locks, and how many pages a second pass.
        let (mut waiting, mut rate) = (0.0, 0.0);
        for population in 1..=workers {
            let response = locked * (1.0 + waiting / zones);
            rate = f64::from(population) / (own + response);
            waiting = rate * response;
        }
        pages / rate
    }

    /// Seconds of the published series: its one thread zaps while so many workers free.
    fn published(&self, workers: u32) -> f64 {
        self.published_freeing(workers, 1).max(PUBLISHED_SPLIT)
    }

    /// Seconds that the workers of the published series need, were nothing else to be waited for.
    fn published_freeing(&self, workers: u32, zones: u32) -> f64 {
        let team = Team {
            workers,
            cores: workers,
            zones,
        };
        self.seconds(PUBLISHED_GIB * GIB / PAGE, 0.0, team)
    }
}

/// Finds the constants of the published series: least squares of relative errors, by a search whose steps shrink.
fn fit() -> Costs {
    let error = |costs: &Costs| -> f64 {
        let miss =
            |(workers, seconds): (u32, f64)| (costs.published(workers) / seconds).ln().powi(2);
        PUBLISHED.into_iter().map(miss).sum()
    };
    let mut best = Costs {
        own: 5e-8,
        locked: 5e-8,
        crowd: 0.01,
        table: 0.0,
    };
    let mut step = 1.5;
    while step > 1.0001 {
        let tries = [step, 1.0 / step].into_iter().flat_map(|by| {
            let mut tries = [best; 3];
            tries[0].own *= by;
            tries[1].locked *= by;
            tries[2].crowd *= by;
            tries
        });
        let found = tries.min_by(|a, b| error(a).total_cmp(&error(b)));
        match found {
            Some(found) if error(&found) < error(&best) => best = found,
            _ => step = f64::sqrt(step),
        }
    }
    best
}

/// What was measured here.
struct Points {
    gib: f64,
    cores: u32,
    /// Workers and seconds.
    sweep: Vec<(u32, f64)>,
    /// Seconds for a table page in a sparse address space, by one thread.
    table: f64,
}

impl Points {
    fn read(report: &Value) -> Option<Self> {
        let rows = report["rows"].as_array()?;
        let row = |system: &str, case: &str, metric: &str| {
            let row = rows.iter().find(|row| {
                row["system"] == system && row["case"] == case && row["metric"] == metric
            })?;
            // Of the fastest runs: the host does other work.
            row["min"].as_f64()
        };
        let sweep = [1u32, 2, 4, 8, 16, 32].into_iter().filter_map(|workers| {
            let time = row("ebb", &format!("4k, {workers}w"), "time")?;
            Some((workers, time))
        });
        let tables = row("munmap", "sparse", "tables")?;
        Some(Self {
            gib: row("munmap", "4k", "size")? / GIB,
            cores: u32::try_from(report["host"]["cpus"].as_u64()?).ok()?,
            sweep: sweep.collect(),
            table: row("munmap", "sparse", "time")? / tables,
        })
    }

    fn pages(&self) -> f64 {
        self.gib * GIB / PAGE
    }

    /// The published constants at this host's speed: so much as its one worker needs a page, in the same parts.
    /// Here each worker zaps what it frees, so what the one thread did belongs to its own part.
    fn calibrate(&self, published: &Costs) -> Option<Costs> {
        let zap = PUBLISHED_SPLIT / (PUBLISHED_GIB * GIB / PAGE);
        let there = published.own + published.locked + zap;
        let alone = self.sweep.iter().find(|(workers, _)| *workers == 1)?.1 / self.pages();
        // A table page is 512 pages' share.
        let here = alone - self.table / 512.0;
        let scale = here / there;
        Some(Costs {
            own: (published.own + zap) * scale,
            locked: published.locked * scale,
            crowd: published.crowd,
            table: self.table,
        })
    }

    fn team(&self, workers: u32) -> Team {
        Team {
            workers,
            cores: self.cores,
            zones: 1,
        }
    }
}

/// Everything in words.
fn describe(here: Option<&Points>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |words: String| {
        let _ = writeln!(text, "{words}");
    };
    let costs = fit();
    line(format!(
        "published (320 GiB): {:.1} ns own, {:.1} ns under the zone lock, {:.2} % more for each waiter",
        costs.own * 1e9,
        costs.locked * 1e9,
        costs.crowd * 100.0
    ));
    let mut worst: f64 = 0.0;
    for (workers, seconds) in PUBLISHED {
        let model = costs.published(workers);
        worst = worst.max((model / seconds - 1.0).abs());
        line(compare(&format!("{workers} workers"), seconds, model));
    }
    line(format!(
        "  lock split   measured {PUBLISHED_SPLIT:>8.3} s, all of it zapping; freeing alone {:.3} s",
        costs.published_freeing(32, SPLIT_ZONES)
    ));
    line(format!("  largest error {:.1} %", worst * 100.0));
    let Some((here, costs)) = here.and_then(|here| Some((here, here.calibrate(&costs)?))) else {
        line("nothing measured here: run `cargo xtask bench teardown` first".to_owned());
        return text;
    };
    line(format!(
        "here ({:.0} GiB, {} cores): {:.1} ns own, {:.1} ns locked, {:.0} ns a table page",
        here.gib,
        here.cores,
        costs.own * 1e9,
        costs.locked * 1e9,
        costs.table * 1e9
    ));
    let mut local: f64 = 0.0;
    for &(workers, seconds) in &here.sweep {
        let pages = here.pages();
        let model = costs.seconds(pages, pages / 512.0, here.team(workers));
        local = local.max((model / seconds - 1.0).abs());
        line(compare(&format!("{workers} workers"), seconds, model));
    }
    let error = worst.max(local) * 100.0;
    line(format!(
        "  largest error {:.1} %; one worker is the point it was calibrated with",
        local * 100.0
    ));
    line(format!(
        "seconds to free pages of 4 KiB, ± {error:.0} % (the largest error above; what lies beyond the cores and \
         sizes of both series is not covered by it)"
    ));
    line(forecast(&costs));
    text
}

fn compare(what: &str, measured: f64, model: f64) -> String {
    let error = (model / measured - 1.0) * 100.0;
    format!("  {what:<12} measured {measured:>8.3} s, model {model:>8.3} s, {error:>+6.1} %")
}

/// Machines of 8 to 128 cores with a node for each 32, with the workers that Ebb would take.
fn forecast(costs: &Costs) -> String {
    const PER_NODE: u32 = 8;
    let mut text = format!("  {:>5} {:>5} {:>7}", "cores", "nodes", "workers");
    let sizes = [1.0, 2.0, 4.0, 8.0];
    for tib in sizes {
        let _ = write!(text, " {:>7}", format!("{tib} TiB"));
    }
    let _ = write!(text, " {:>14}", "4 TiB, 1 worker");
    for cores in [8u32, 16, 32, 64, 128] {
        let zones = cores.div_ceil(32);
        let workers = cores.min(zones * PER_NODE);
        let team = Team {
            workers,
            cores,
            zones,
        };
        let _ = write!(text, "\n  {cores:>5} {zones:>5} {workers:>7}");
        let time = |tib: f64, team| {
            let pages = tib * 1024.0 * GIB / PAGE;
            costs.seconds(pages, pages / 512.0, team)
        };
        for tib in sizes {
            let _ = write!(text, " {:>7.1}", time(tib, team));
        }
        let alone = Team { workers: 1, ..team };
        let _ = write!(text, " {:>14.1}", time(4.0, alone));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEAM: Team = Team {
        workers: 4,
        cores: 4,
        zones: 1,
    };

    fn costs() -> Costs {
        Costs {
            own: 6e-8,
            locked: 4e-8,
            crowd: 0.0,
            table: 5e-7,
        }
    }

    #[test]
    fn one_worker_pays_the_sum_and_many_pay_the_lock() {
        let pages = 1e6;
        let alone = costs().seconds(pages, 0.0, Team { workers: 1, ..TEAM });
        assert!((alone - 0.1).abs() < 1e-9, "{alone}");
        let tables = costs().seconds(pages, 1e5, Team { workers: 1, ..TEAM });
        assert!((tables - 0.15).abs() < 1e-9, "{tables}");
        let many = Team {
            workers: 1000,
            cores: 1000,
            zones: 1,
        };
        let bound = costs().seconds(pages, 0.0, many);
        assert!((bound - 0.04).abs() < 1e-4, "{bound}");
    }

    #[test]
    fn more_workers_cores_and_zones_help_as_far_as_they_go() {
        let time = |workers, cores, zones| {
            let team = Team {
                workers,
                cores,
                zones,
            };
            costs().seconds(1e6, 0.0, team)
        };
        assert!(time(2, 2, 1) < time(1, 2, 1));
        assert!((time(8, 2, 1) - time(2, 2, 1)).abs() < 1e-12);
        assert!(time(8, 8, 2) < time(8, 8, 1));
        let crowded = Costs {
            crowd: 0.05,
            ..costs()
        };
        let many = Team {
            workers: 64,
            cores: 64,
            zones: 1,
        };
        assert!(crowded.seconds(1e6, 0.0, many) > crowded.seconds(1e6, 0.0, TEAM));
    }

    #[test]
    fn the_published_series_is_met() {
        let costs = fit();
        for (workers, seconds) in PUBLISHED {
            let error = costs.published(workers) / seconds - 1.0;
            assert!(error.abs() < 0.10, "{workers} workers: {error}");
        }
        // Not put in: with the lock split, freeing is quicker than the one thread that zaps.
        let split = costs.published_freeing(32, SPLIT_ZONES);
        assert!(split < PUBLISHED_SPLIT, "{split} s");
    }

    #[test]
    fn a_host_is_calibrated_by_its_one_worker() {
        let row = |system: &str, case: &str, metric: &str, min: f64| serde_json::json!({ "system": system, "case": case, "metric": metric, "min": min });
        let report = serde_json::json!({ "host": { "cpus": 2 }, "rows": [
            row("ebb", "4k, 1w", "time", 0.4),
            row("ebb", "4k, 2w", "time", 0.21),
            row("munmap", "4k", "size", 4.0 * GIB),
            row("munmap", "sparse", "time", 0.1),
            row("munmap", "sparse", "tables", 500_000.0),
        ]});
        let here = Points::read(&report).unwrap();
        let costs = here.calibrate(&fit()).unwrap();
        let pages = here.pages();
        let alone = costs.seconds(pages, pages / 512.0, here.team(1));
        assert!((alone - 0.4).abs() < 1e-6, "{alone}");
        assert!(describe(Some(&here)).contains("128     4      32"));
        assert!(describe(None).contains("bench teardown"));
        assert!(Points::read(&serde_json::json!({})).is_none());
    }
}
