//! Each thread of the monitor panics once, by `EBB_PANIC`, which debug builds know. Expected is, for each:
//!
//! | Thread | Outcome |
//! |---|---|
//! | those that the machine needs | it ends with status 33, and the log names the thread |
//! | those that write the log, the console, events or metrics | the same; what they had not written is lost |
//! | one that carries out a request | the request fails, and the machine goes on |
//! | the first thread, while it builds the machine | the process ends with status 33, and the log names the thread |
//! | the guardian, when the monitor has been killed | the log says so, and the reaper frees the memory |
//!
//! Nothing is left, and the machine can be started again with the same id, socket and disk. The reaper only makes system
//! calls. Threads of devices: `kvm_hostile`; the one that watches a page server: `kvm_page_server`.

use std::process::Command;

use ebb_harness::error::Result;
use ebb_harness::figure;
use ebb_harness::restart::{Life, Site};
use ebb_harness::wait::{LONG, until_often};
use ebb_payload::FREE_START;
use rustix::process::Signal;
use serde_json::json;

/// The status of a machine whose monitor has panicked.
const CRASH: i32 = 33;

/// Starts the guest called `guest` so that `thread` will panic.
fn start(site: &Site, thread: &str, guest: &str, options: &[&str]) -> Result<Life> {
    let mut command = Command::new(site.debug_ebb()?);
    command.env("EBB_PANIC", thread);
    site.start(command, guest, options)
}

/// The machine has ended as after a panic, nothing is left of it, and another one like it runs and ends.
fn ended_and_starts_again(site: &Site, mut life: Life, thread: &str) -> Result<()> {
    let status = life.wait()?;
    assert_eq!(status.code(), Some(CRASH), "{thread}: {}", life.said());
    // All of the log, because who writes it may be who has panicked.
    let log = site.text("log");
    let named = if thread == "building" { "main" } else { thread };
    let line = format!("the thread {named} has panicked");
    assert!(
        thread == "ebb-log" || log.contains(&line),
        "{thread}: {log}"
    );
    drop(life);
    site.vanished()?;
    let mut life = site.running("guest")?;
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{thread}: {}", life.said());
    site.vanished()
}

#[test]
fn a_machine_ends_when_one_of_its_threads_panics() -> Result<()> {
    const LOG: [&str; 2] = ["--log-file", "log"];
    let site = Site::new()?;
    site.guest("guest", |_| {})?;
    site.halting_guest("idle")?;
    site.guest("talks", |guest| {
        guest.output_byte(0x3f8, b'x', 1);
    })?;
    site.guest("touches", |guest| {
        guest.store(FREE_START, 1);
    })?;
    let quiet = ["--serial", "null"];
    let cases: [(&str, &str, &[&str]); 11] = [
        ("building", "idle", &quiet),
        ("main", "idle", &quiet),
        ("ebb-vcpu0", "guest", &quiet),
        (
            "ebb-reclaim",
            "guest",
            &["--serial", "null", "--lazy", "age=1"],
        ),
        (
            "ebb-strict",
            "touches",
            &["--serial", "null", "--lazy", "strict=on"],
        ),
        ("ebb-api", "idle", &quiet),
        ("ebb-snapshot", "idle", &quiet),
        (
            "ebb-events",
            "idle",
            &["--serial", "null", "--event-monitor", "events"],
        ),
        (
            "ebb-metrics",
            "idle",
            &["--serial", "null", "--metrics-path", "metrics"],
        ),
        ("ebb-log", "idle", &quiet),
        (
            "ebb-console",
            "talks",
            &["--serial", "file=serial", "--lazy", "mode=eager"],
        ),
    ];
    for (thread, guest, options) in cases {
        let life = start(&site, thread, guest, &[&LOG, options].concat())?;
        match thread {
            // The main loop goes on at a signal, and something is logged.
            "main" | "ebb-log" => {
                until_often("the machine runs", LONG, || {
                    Ok(life.api().is_running(life.pid()).then_some(()))
                })?;
                life.signal(Signal::HUP);
            }
            "ebb-api" | "ebb-snapshot" => until_often("somebody hears the request", LONG, || {
                let files = json!({"snapshot_path": "state", "mem_file_path": "memory"});
                let _ = life.api().request("PUT", "/snapshot/create", &files);
                let line = format!("the thread {thread} has panicked");
                Ok(site.text("log").contains(&line).then_some(()))
            })?,
            _ => {}
        }
        ended_and_starts_again(&site, life, thread)?;
    }
    figure("panics", cases.len() as u64);
    Ok(())
}

#[test]
fn a_request_that_panics_fails_alone() -> Result<()> {
    let site = Site::new()?;
    site.guest("guest", |_| {})?;
    let mut life = start(&site, "ebb-api-command", "guest", &[])?;
    for _ in 0..3 {
        let answer = until_often("the API answers", LONG, || {
            Ok(life
                .api()
                .request("GET", "/", &serde_json::Value::Null)
                .ok())
        })?;
        assert_eq!(answer.status, 500, "{answer:?}");
    }
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{}", life.said());
    site.vanished()?;
    figure("panics", 1);
    Ok(())
}

#[test]
fn a_guardian_that_panics_leaves_the_memory_to_the_reaper() -> Result<()> {
    let site = Site::new()?;
    site.guest("guest", |_| {})?;
    let mut life = start(&site, "ebb-guardian", "guest", &[])?;
    life.until_it_runs()?;
    life.signal(Signal::KILL);
    assert_eq!(life.wait()?.code(), None, "{}", life.said());
    until_often("the guardian has panicked", LONG, || {
        let line = "the guardian has panicked";
        Ok(site.text("log").contains(line).then_some(()))
    })?;
    drop(life);
    let mut life = site.running("guest")?;
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{}", life.said());
    site.vanished()?;
    figure("panics", 1);
    Ok(())
}
