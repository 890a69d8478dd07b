//! Guests that mean harm: what they do, and that it harms nobody else.
//!
//! The first vCPU of a guest runs the cases of [`cases`], one by one. After each one the monitor is alive, or has ended with
//! the documented code; a guest beside it answers and has its memory as it was; the disks hold what they held; the monitor's
//! log, memory, descriptors and threads have not grown.
//!
//! `EBB_HOSTILE_CALLS=10000000` makes the last test as long as one likes, and `EBB_HOSTILE_SEED` repeats it: docs/testing.md.

mod cases;
mod machine;
mod panics;
mod virtio;
mod watch;

use std::time::{Duration, Instant, SystemTime};

use ebb_harness::error::{Error, Result};
use ebb_harness::figure;
use ebb_harness::network::Tap;
use ebb_payload::script::{Kind, Scripts};

use cases::{Case, ends, net, pci, races, survived};
use machine::{End, PATIENCE};
use virtio::{BALLOON, DISK, READONLY, STATUS, VSOCK};
use watch::Watch;

/// Calls and accesses of the random guest, by both vCPUs together.
const CALLS: u64 = 100_000;

/// Writes the case as a script that leaves all devices reset, and nothing lazily free.
fn add(scripts: &mut Scripts, case: &Case) -> u8 {
    scripts.add(|script| {
        (case.write)(script);
        if case.ends.is_none() {
            for device in [DISK, READONLY, BALLOON, VSOCK] {
                device.set(script, STATUS, 0);
            }
            script.call(0, 1, 0xebb0_0700).expect(12);
        }
    })
}

/// Runs cases in one machine, which has `more` options, each watched.
fn run(cases: &[&Case], vcpus: u64, more: &[&str]) -> Result<()> {
    let mut scripts = Scripts::default();
    let numbers: Vec<u8> = cases.iter().map(|case| add(&mut scripts, case)).collect();
    let mut watch = Watch::start()?;
    let mut machine = watch.machine(&scripts, vcpus, more)?;
    for (case, number) in cases.iter().zip(numbers) {
        let fault = |error| Error::new(format!("{} ({}): {error}", case.name, case.does));
        let start = Instant::now();
        let end = machine.run(number, PATIENCE).map_err(fault)?;
        let ended = match (end, case.ends) {
            (End::Passed(_), None) => false,
            (End::Exit(code), Some(wanted)) if code == wanted => true,
            _ => return Err(fault(machine.explain(format!("ended as {end:?}")))),
        };
        let time = start.elapsed().as_millis();
        watch.check(&machine, ended).map_err(fault)?;
        println!(
            "{}: {time} ms, and {} to look",
            case.name,
            start.elapsed().as_millis() - time
        );
    }
    if cases.iter().all(|case| case.ends.is_none()) {
        assert_eq!(machine.stop()?, Some(0));
    }
    figure("hostile_cases", cases.len() as u64);
    Ok(())
}

/// Those that `EBB_HOSTILE_CASE` names, or a part of their name; all if it is not set.
fn wanted(cases: impl Iterator<Item = &'static Case>) -> Vec<&'static Case> {
    let word = std::env::var("EBB_HOSTILE_CASE").unwrap_or_default();
    cases.filter(|case| case.name.contains(&word)).collect()
}

#[test]
fn every_case_harms_nobody() -> Result<()> {
    run(&wanted(survived()), 1, &[])
}

#[test]
fn a_pci_bus_harms_nobody() -> Result<()> {
    let cases = wanted(pci::CASES.iter());
    if cases.is_empty() {
        return Ok(());
    }
    run(&cases, 1, &["--transport", "pci"])
}

#[test]
fn a_network_and_random_bytes_harm_nobody() -> Result<()> {
    let cases = wanted(net::CASES.iter());
    if cases.is_empty() {
        return Ok(());
    }
    let _tap = Tap::create("ebbharm1", net::HOST, 1500)?;
    run(&cases, 1, &["--net", "tap=ebbharm1", "--rng", "on"])
}

#[test]
fn two_vcpus_harm_nobody() -> Result<()> {
    run(&wanted(races::CASES.iter()), 2, &[])
}

#[test]
fn what_ends_a_machine_ends_it_as_documented() -> Result<()> {
    let cases = wanted(ends::CASES.iter());
    cases.into_iter().try_for_each(|case| run(&[case], 1, &[]))
}

#[test]
fn random_calls_harm_nobody() -> Result<()> {
    let number = |name| {
        let text = std::env::var(name).ok()?;
        Some(
            text.parse::<u64>()
                .unwrap_or_else(|_| panic!("{name}={text} is no number")),
        )
    };
    let calls = number("EBB_HOSTILE_CALLS").unwrap_or(CALLS);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = number("EBB_HOSTILE_SEED").unwrap_or(now.map_or(1, |now| now.as_secs()));
    println!("{calls} random calls: EBB_HOSTILE_SEED={seed}");
    let mut scripts = Scripts::default();
    let run = scripts.add(|script| {
        script.beside(|script| {
            script.step(Kind::Mischief, 0, 0, (calls / 2, seed));
        });
        script.step(Kind::Mischief, 0, 0, (calls / 2, seed));
        // Waits until the other vCPU is done, too.
        script.alone();
        script.step(Kind::Load, 0, 8, (0, 0));
        for device in [DISK, READONLY, BALLOON, VSOCK] {
            device.set(script, STATUS, 0);
        }
    });
    let mut watch = Watch::start()?;
    let mut machine = watch.machine(&scripts, 2, &[])?;
    // An emulated processor makes some thousand a second.
    let limit = PATIENCE + Duration::from_millis(calls);
    match machine.run(run, limit)? {
        End::Passed(_) => {}
        end @ End::Exit(_) => return Err(machine.explain(format!("ended as {end:?}"))),
    }
    watch.check(&machine, false)?;
    assert_eq!(machine.stop()?, Some(0));
    figure("random_calls", calls);
    Ok(())
}
