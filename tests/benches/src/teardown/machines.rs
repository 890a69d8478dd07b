//! Whole machines: how soon an end is seen, and when memory is free. The guest sleeps; its memory was touched by
//! its monitor before.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::ending::{End, Times, Watch, compared};
use super::{Arguments, GIB, Results};
use crate::{BenchError, system};
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Context;
use ebb_harness::host::{REAPER, processes_named, rss_estimate};
use ebb_harness::idle::{Idle, Place, signal_to};
use ebb_harness::wait::{LONG, until_often};

/// Sizes in GiB whose stop is timed.
const SIZES: [u64; 3] = [1, 4, 12];

/// What is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// Ebb as it is.
    Ebb,
    /// Ebb without its helpers.
    Alone,
    Qemu,
    /// QEMU with a process that frees its memory behind it.
    QemuAsync,
}

impl Subject {
    /// Its name in the report.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ebb => "ebb",
            Self::Alone => "ebb-alone",
            Self::Qemu => "qemu",
            Self::QemuAsync => "qemu-async",
        }
    }

    /// Ends a machine of so many GiB, with transparent huge pages or without.
    pub(super) fn end(
        self,
        place: &Place,
        memory: (u64, bool),
        end: End,
    ) -> Result<Times, BenchError> {
        match self {
            Self::Ebb => ebb(place, memory, ("on", end)),
            Self::Alone => ebb(place, memory, ("off", end)),
            Self::Qemu | Self::QemuAsync => qemu(memory, end, self == Self::QemuAsync),
        }
    }
}

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let place = Place::new()?;
    let (gib, qemu) = (arguments.gib, !arguments.no_qemu);
    let mut subjects = vec![Subject::Ebb, Subject::Alone];
    if qemu {
        subjects.extend([Subject::Qemu, Subject::QemuAsync]);
    }
    for run in 1..=arguments.runs {
        for size in SIZES.into_iter().filter(|size| *size <= gib) {
            let times = ebb(&place, (size, false), ("on", End::Stop))?;
            times.record(results, ("ebb", &format!("stop {size}G")));
        }
        for (thp, end) in ENDS {
            for subject in &subjects {
                let times = subject.end(&place, (gib, thp), end)?;
                times.record(results, (subject.name(), &case_of(end, thp)));
            }
        }
        subjects.rotate_left(1);
        eprintln!("teardown: machines, run {run} of {}", arguments.runs);
    }
    compare(results);
    Ok(())
}

/// What is compared: with transparent huge pages or without, and how it ends.
const ENDS: [(bool, End); 5] = [
    (false, End::Stop),
    (false, End::Kill),
    (false, End::KillAll),
    (true, End::Stop),
    (true, End::Kill),
];

fn compare(results: &mut Results) {
    let kill = case_of(End::Kill, false);
    let by = compared(results, [("ebb-alone", &kill), ("ebb", &kill)]);
    for (name, metric) in [("kill_speedup", by), ("kill_speedup_gone", "gone")] {
        results.divide(name, ["ebb-alone", &kill, metric], ["ebb", &kill, metric]);
    }
    for (thp, end) in ENDS {
        let case = case_of(end, thp);
        let suffix = if thp { "_thp" } else { "" };
        let name = format!("vs_qemu_{}{suffix}", end.name().replace('-', "_"));
        for (qemu, suffix) in [("qemu", ""), ("qemu-async", "_async")] {
            let by = compared(results, [(qemu, &case), ("ebb", &case)]);
            let name = format!("{name}{suffix}");
            results.divide(&name, [qemu, &case, by], ["ebb", &case, by]);
        }
    }
    results.smallest("vs_qemu", &["vs_qemu_stop", "vs_qemu_kill"]);
    results.smallest("vs_qemu_thp", &["vs_qemu_stop_thp", "vs_qemu_kill_thp"]);
    for gib in SIZES {
        if let Some(ms) = results.median("ebb", &format!("stop {gib}G"), "visible") {
            results.lower(&format!("visible_stop_ms_{gib}g"), ms);
        }
    }
}

/// Ends a machine of so many GiB.
fn ebb(
    place: &Place,
    (gib, thp): (u64, bool),
    (guardian, end): (&str, End),
) -> Result<Times, BenchError> {
    let cgroup = Cgroup::counting("ebb")?;
    let idle = place.running_in(&cgroup, &memory(gib, thp), guardian)?;
    let before = cgroup.cpu_seconds()?;
    let mut times = ended(place, idle, (guardian, end), gib * GIB)?;
    times.cpu = Some((cgroup.cpu_seconds()? - before) * 1e3);
    Ok(times)
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
    let helpers = relatives.iter().filter(|it| it.name == REAPER);
    let helpers: Vec<_> = helpers.map(|it| it.pid).collect();
    let times = Watch::new(idle.pid(), &helpers, bytes)?.end(|| match end {
        End::Stop => stop(place),
        End::Kill => {
            idle.signal(end.signal());
            Ok(())
        }
        End::KillAll => {
            for process in &relatives {
                signal_to(process.pid, end.signal());
            }
            Ok(())
        }
    })?;
    finish(place, &mut idle, guardian == "on" && end != End::KillAll)?;
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

fn finish(place: &Place, idle: &mut Idle, has_guardian: bool) -> Result<(), BenchError> {
    idle.wait()?;
    if !has_guardian {
        // Nobody removes then what a killed monitor leaves.
        for path in place.litter()? {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(place.vanished(LONG)?)
}

/// QEMU with the same memory touched; its CPUs never start.
fn qemu((gib, thp): (u64, bool), end: End, is_async: bool) -> Result<Times, BenchError> {
    let cgroup = Cgroup::counting("qemu")?;
    // Inherited: QEMU asks for huge pages by itself.
    let small = |small| rustix::thread::disable_transparent_huge_pages(small);
    small(!thp).map_err(system("prctl"))?;
    let child = cgroup
        .command(Path::new("qemu-system-x86_64"))
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
        .args(is_async.then_some("-async-teardown"))
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
    if let Some(status) = child.0.try_wait().map_err(system("wait for QEMU"))? {
        return Err(BenchError::from(ebb_harness::Error::new(format!(
            "QEMU has ended by itself: {status}"
        ))));
    }
    let mut helpers = processes_named(&format!("cleanup/{pid}"));
    helpers.truncate(usize::from(is_async));
    let before = cgroup.cpu_seconds()?;
    let mut times = Watch::new(pid, &helpers, gib * GIB)?.end(|| {
        for pid in
            std::iter::once(pid).chain(helpers.iter().copied().filter(|_| end == End::KillAll))
        {
            signal_to(pid, end.signal());
        }
        Ok(())
    })?;
    let _ = child.0.wait();
    times.cpu = Some((cgroup.cpu_seconds()? - before) * 1e3);
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
