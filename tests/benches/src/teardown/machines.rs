//! Whole machines: how soon an end is seen, and when memory is free. The guest sleeps; its memory was touched by
//! its monitor before.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::ending::{End, Times, Watch};
use super::{Arguments, GIB, Results};
use crate::{BenchError, system};
use ebb_harness::error::Context;
use ebb_harness::host::rss_estimate;
use ebb_harness::idle::{Idle, Place, signal_to};
use ebb_harness::wait::{LONG, until_often};

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let place = Place::new()?;
    for run in 1..=arguments.runs {
        for gib in [1, 4, 12].into_iter().filter(|gib| *gib <= arguments.gib) {
            let idle = place.running(&memory(gib, false), "on")?;
            let times = ended(&place, idle, ("on", End::Stop), gib * GIB)?;
            times.record(results, ("ebb", &format!("stop {gib}G")));
        }
        for thp in [false, true] {
            for end in [End::Stop, End::Kill] {
                for (system, guardian) in [("ebb", "on"), ("ebb-alone", "off")] {
                    let idle = place.running(&memory(arguments.gib, thp), guardian)?;
                    let bytes = arguments.gib * GIB;
                    let times = ended(&place, idle, (guardian, end), bytes)?;
                    times.record(results, (system, &case_of(end, thp)));
                }
                if !arguments.no_qemu {
                    let times = qemu(arguments.gib, thp, end)?;
                    times.record(results, ("qemu", &case_of(end, thp)));
                }
            }
        }
        eprintln!("teardown: machines, run {run} of {}", arguments.runs);
    }
    let kill = case_of(End::Kill, false);
    for (name, metric) in [("kill_speedup", "free"), ("kill_speedup_gone", "gone")] {
        results.divide(name, ["ebb-alone", &kill, metric], ["ebb", &kill, metric]);
    }
    for (end, thp) in [
        (End::Stop, false),
        (End::Kill, false),
        (End::Stop, true),
        (End::Kill, true),
    ] {
        let case = case_of(end, thp);
        let suffix = if thp { "_thp" } else { "" };
        let name = format!("vs_qemu_{}{suffix}", end.name());
        results.divide(&name, ["qemu", &case, "free"], ["ebb", &case, "free"]);
    }
    for gib in [1, 4, 12] {
        if let Some(row) = results.row("ebb", &format!("stop {gib}G"), "visible") {
            results.ratio(&format!("visible_stop_ms_{gib}g"), row.median);
        }
    }
    Ok(())
}

fn case_of(end: End, thp: bool) -> String {
    format!("{} {}", end.name(), if thp { "thp" } else { "4k" })
}

fn memory(gib: u64, thp: bool) -> String {
    let thp = if thp { "on" } else { "off" };
    format!("size={gib}G,thp={thp},prefault=on")
}

/// Ends a machine that has so many bytes.
pub(super) fn ended(
    place: &Place,
    mut idle: Idle,
    (guardian, end): (&str, End),
    bytes: u64,
) -> Result<Times, BenchError> {
    let relatives = place.relatives()?;
    let heirs = relatives.iter().filter(|it| it.name == "ebb-heir");
    let heirs: Vec<_> = heirs.map(|it| it.pid).collect();
    let times = Watch::new(idle.pid(), &heirs, bytes)?.end(|| match end {
        End::Stop => stop(place),
        End::Kill => {
            idle.signal(end.signal());
            Ok(())
        }
    })?;
    finish(place, &mut idle, guardian)?;
    Ok(times)
}

/// Asks for the stop over the API, without a client's start-up time.
fn stop(place: &Place) -> Result<(), BenchError> {
    let body = r#"{"action_type":"InstanceStop"}"#;
    let request = format!(
        "PUT /actions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let sent = UnixStream::connect(place.path("api"))
        .and_then(|mut stream| stream.write_all(request.as_bytes()).map(|()| stream));
    // Open until the answer is there: a client that hangs up is not answered.
    let mut stream = sent.map_err(system("ask for the stop"))?;
    let _ = std::io::Read::read(&mut stream, &mut [0; 256]);
    Ok(())
}

fn finish(place: &Place, idle: &mut Idle, guardian: &str) -> Result<(), BenchError> {
    idle.wait()?;
    if guardian == "off" {
        // Nobody removes what a killed monitor leaves then.
        for path in place.litter()? {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(place.vanished(LONG)?)
}

/// QEMU with the same memory touched; its CPUs never start.
fn qemu(gib: u64, thp: bool, end: End) -> Result<Times, BenchError> {
    // Inherited: QEMU asks for huge pages by itself.
    let small = |small| rustix::thread::disable_transparent_huge_pages(small);
    small(!thp).map_err(system("prctl"))?;
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-S", "-nodefaults", "-display", "none"])
        .args([
            "-m",
            &format!("{gib}G"),
            "-machine",
            "pc,memory-backend=ram",
        ])
        .args([
            "-object",
            &format!("memory-backend-ram,id=ram,size={gib}G,prealloc=on,prealloc-threads=2"),
        ])
        .stdin(Stdio::null())
        .spawn();
    small(false).map_err(system("prctl"))?;
    let child = child.map_err(system("start QEMU; leave it out with --no-qemu"))?;
    let mut child = Killed(child);
    let pid = child.0.id();
    until_often("QEMU has touched its memory", LONG, || {
        let resident = rss_estimate(pid).context("QEMU has ended")?;
        Ok((resident >= gib * GIB).then_some(()))
    })?;
    // It is still to set up its signals.
    std::thread::sleep(Duration::from_millis(500));
    let times = Watch::new(pid, &[], gib * GIB)?.end(|| {
        signal_to(pid, end.signal());
        Ok(())
    })?;
    let _ = child.0.wait();
    Ok(times)
}

/// Does not outlive an error.
pub(super) struct Killed(pub(super) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
