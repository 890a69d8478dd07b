//! Each thread of a monitor and of its helpers has a filter of system calls. That the filters allow what is needed, all other
//! tests show; that they allow nothing else, `cargo xtask seccomp-check`.

use std::collections::BTreeMap;
use std::fs;

use ebb_harness::error::{Context, Result};
use ebb_harness::idle::Place;
use ebb_harness::wait::{LONG, until_often};
use rustix::process::Signal;

/// Threads that only wait, with all devices and strict mode.
const THREADS: [&str; 12] = [
    "ebb",
    "ebb-api",
    "ebb-balloon",
    "ebb-blk0",
    "ebb-console",
    "ebb-guardian",
    "ebb-log",
    "ebb-reaper",
    "ebb-reclaim",
    "ebb-report",
    "ebb-strict",
    "ebb-vcpu0",
];

/// The threads of the machine's processes by name, without those that the kernel has in them, with a field of their status each.
fn threads(place: &Place, field: &str) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for process in place.relatives()? {
        let tasks = format!("/proc/{}/task", process.pid);
        for task in fs::read_dir(&tasks).context(&tasks)?.flatten() {
            let read = |name| fs::read_to_string(task.path().join(name));
            // A thread may end meanwhile.
            if let (Ok(name), Ok(status)) = (read("comm"), read("status"))
                && name.starts_with("ebb")
            {
                let line = status.lines().find_map(|line| line.strip_prefix(field));
                found.insert(
                    name.trim().to_owned(),
                    line.unwrap_or_default().trim().to_owned(),
                );
            }
        }
    }
    Ok(found)
}

/// Runs machines that have all devices between them until the threads in [`THREADS`] that each has show `expected`: whether they
/// have a filter, and whether they may gain privileges.
fn all_show(mode: &str, expected: [&str; 2]) -> Result<()> {
    let mut seen = BTreeMap::new();
    for more in [
        ["--balloon", "free_page_reporting=on"],
        ["--lazy", "strict=on"],
    ] {
        let place = Place::new()?;
        fs::write(place.path("disk"), [0; 512]).context("make a disk")?;
        let disk = format!("path={}", place.path("disk").display());
        let words = [
            &["--serial", "tty", "--seccomp", mode, "--disk", &disk],
            &more[..],
        ]
        .concat();
        let mut machine = place.until_it_runs(place.start("size=64M", "on", &words)?)?;
        let all = until_often("all threads show it", LONG, || {
            let [filters, privileges] = ["Seccomp:", "NoNewPrivs:"].map(|it| threads(&place, it));
            let (filters, privileges) = (filters?, privileges?);
            let as_expected = filters.values().all(|it| it == expected[0])
                && privileges.values().all(|it| it == expected[1]);
            Ok((as_expected && filters.len() >= 9).then_some(filters))
        })
        .context(format_args!("{:?}", threads(&place, "Seccomp:")))?;
        seen.extend(all);
        machine.signal(Signal::TERM);
        assert_eq!(machine.wait()?, Some(0), "{}", place.text("stderr"));
    }
    let missing = THREADS.iter().find(|name| !seen.contains_key(**name));
    assert_eq!(missing, None, "{seen:?}");
    Ok(())
}

#[test]
fn every_thread_has_a_filter() -> Result<()> {
    all_show("on", ["2", "1"])
}

#[test]
fn without_filters_nothing_has_changed() -> Result<()> {
    all_show("off", ["0", "0"])
}

/// Versions of the C library differ in the system calls that they make for the same function.
#[test]
fn a_newer_c_library_makes_no_forbidden_call() -> Result<()> {
    let disk = tempfile::NamedTempFile::new().context("make a disk")?;
    disk.as_file().set_len(512).context("make a disk")?;
    let disk = format!("path={}", disk.path().display());
    for (signal, status) in [(Signal::TERM, Some(0)), (Signal::KILL, None)] {
        let place = Place::with_newer_library()?;
        let words = [
            "--balloon",
            "free_page_reporting=on",
            "--disk",
            &disk,
            "--rng",
            "on",
        ];
        let mut machine =
            place.until_it_runs(place.start("size=64M,prefault=on", "on", &words)?)?;
        let answer = place.ctl(&["status"])?;
        assert!(answer.status.success(), "{answer:?}");
        machine.signal(signal);
        assert_eq!(machine.wait()?, status, "{}", place.text("stderr"));
        place.vanished(LONG).context(place.text("stderr"))?;
        let said = place.text("stderr");
        assert!(!said.contains("forbids"), "{said}");
    }
    Ok(())
}
