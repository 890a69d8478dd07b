//! System calls that fail, one at a time, through the whole life of a machine. Expected is, for each:
//!
//! | Where | Outcome |
//! |---|---|
//! | the monitor's main thread | the machine runs and ends with status 0; or it is refused with status 35 and one line; where memory for the monitor itself is missing, it is aborted (SIGABRT) |
//! | all threads, while memory is taken | what cannot be taken stays free, and can be taken later; or it is aborted, as above |
//! | who discards: the kernel takes long | who wants that memory back waits for it; everything else goes on, and a stop ends the machine |
//! | reaper and guardian | the memory is freed, and the machine can be started again |
//!
//! In every case the machine is started again at once, with the same id, socket and disk, runs, and leaves nothing behind.
//!
//! The suite takes a sample; `EBB_FAULT_STEP=1` takes every call.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::thread;

use ebb_harness::error::{Context, Result};
use ebb_harness::host::threads;
use ebb_harness::idle::signal_to;
use ebb_harness::inject::{Attached, Call, calls, tracing};
use ebb_harness::restart::{LAZY_PAGES, Life, Site, setting};
use ebb_harness::wait::{LONG, until_often};
use ebb_harness::{Error, figure};
use ebb_hypercall_abi::Operation;
use ebb_payload::{FREE_START, Transport};
use rustix::process::Signal;

/// Of so many calls one fails in the suite.
const STEP: u64 = 12;

/// Calls by which the monitor gets memory for itself. If one fails, Rust's allocator aborts, and so does the start of a thread.
const MEMORY: [&str; 3] = ["mmap", "brk", "mprotect"];

/// The calls that shall fail.
fn sample(calls: &[Call]) -> Result<Vec<Call>> {
    let step = setting("EBB_FAULT_STEP", STEP)?.max(1) as usize;
    let able = calls.iter().filter(|call| call.error().is_some());
    Ok(able.skip(step / 2).step_by(step).cloned().collect())
}

/// Takes each of these points, and says at which of them what went wrong.
fn each(site: &Site, points: &[Call], one: impl Fn(&Call) -> Result<()>) -> Result<()> {
    let mut wrong = String::new();
    for call in points {
        if let Err(error) = one(call) {
            let log = site.text("log");
            let last = log.lines().last().unwrap_or_default();
            let said = error.to_string();
            let said: Vec<&str> = said.lines().take(3).collect();
            let fails = call.error().unwrap_or_default();
            let stderr = site.text("stderr");
            let _ = writeln!(
                wrong,
                "{fails} of {}\n  {said:?}\n  {last}\n{stderr}",
                call.text
            );
        }
    }
    if !wrong.is_empty() {
        return Err(Error::new(wrong));
    }
    figure("fault_points", points.len() as u64);
    Ok(())
}

fn site() -> Result<Site> {
    let site = Site::new()?.without_filters()?;
    site.guest("guest", |_| {})?;
    Ok(site)
}

/// The machine starts and ends as if nothing had happened, and nothing is left of it and those before it.
fn starts_again(site: &Site) -> Result<()> {
    let mut life = site.running("guest").context("restart")?;
    life.signal(Signal::TERM);
    let status = life.wait()?;
    if status.code() != Some(0) {
        return Err(Error::new(format!("restart: {status}: {}", life.said())));
    }
    site.vanished()
}

/// Starts a machine under strace with these options, and ends it if it runs.
fn live(site: &Site, options: &[String]) -> Result<Life> {
    let command = tracing(&site.path("calls"), options, site.ebb());
    let mut life = site.start(command, "guest", &[])?;
    life.until_it_runs_or_ends()?;
    life.signal(Signal::TERM);
    life.wait()?;
    Ok(life)
}

/// The monitor has been aborted because it got no memory for itself.
fn is_aborted(status: ExitStatus, call: &Call) -> bool {
    status.signal() == Some(libc::SIGABRT) && MEMORY.contains(&call.name.as_str())
}

/// The machine was refused in one line, or ran to its end.
fn refused_or_ran(mut life: Life, call: &Call) -> Result<()> {
    let said = life.said();
    let status = life.wait()?;
    let is_refused = said.lines().count() == 1 && said.starts_with("ebb: ");
    match status.code() {
        Some(0) if said.is_empty() => Ok(()),
        Some(35) if is_refused => Ok(()),
        _ if is_aborted(status, call) => Ok(()),
        _ => Err(Error::new(format!("{status}, it said: {said:?}"))),
    }
}

#[test]
fn a_call_that_fails_while_a_machine_starts_or_ends_refuses_it_or_does_no_harm() -> Result<()> {
    let site = Site::new()?.without_filters()?;
    // It does not leave KVM by itself.
    site.halting_guest("guest")?;
    live(&site, &[])?;
    let all = calls(&site.text("calls"));
    // What comes before are the loader and Rust's runtime.
    let own = all.iter().position(|call| call.text.contains("/guest"));
    let points = sample(&all[own.context("the kernel is not looked at")?..])?;
    each(&site, &points, |call| {
        let life = live(&site, &call.failing())?;
        refused_or_ran(life, call)?;
        starts_again(&site)
    })
}

/// Runs `act` with strace attached to the thread that `of` finds in a running machine, first to learn its calls, then
/// with each of a sample failing.
fn each_call_of(
    site: &Site,
    of: impl Fn(&Life) -> Result<u32>,
    act: impl Fn(&mut Life) -> Result<()>,
) -> Result<()> {
    let course = |options: &[String]| {
        let mut life = site.running("guest")?;
        let folder = site.path("");
        let attached = Attached::to(of(&life)?, &folder, options)?;
        act(&mut life)?;
        attached.finish()
    };
    let points = sample(&course(&[])?)?;
    each(site, &points, |call| {
        course(&call.failing())?;
        starts_again(site)
    })
}

#[test]
fn a_call_that_fails_while_memory_is_taken_loses_nothing() -> Result<()> {
    let site = site()?;
    let calls = [
        "process_madvise",
        "madvise",
        "openat",
        "pread64",
        "read",
        "mmap",
        "clone3",
    ];
    let call = |name: &str, number| Call {
        name: name.to_owned(),
        number,
        text: format!("{name} number {number}"),
    };
    let points = calls.map(|name| [1, 2, 3, 4].map(|number| call(name, number)));
    let points = sample(points.as_flattened())?;
    each(&site, &points, |call| {
        let mut life = site.running("guest")?;
        let done = taken_despite(&site, call, &mut life);
        if done.is_err() && MEMORY.contains(&call.name.as_str()) && is_aborted(life.wait()?, call) {
            return starts_again(&site);
        }
        done
    })
}

/// All that the guest frees can be taken although a call fails meanwhile, and the machine ends as always.
fn taken_despite(site: &Site, call: &Call, life: &mut Life) -> Result<()> {
    const ALL: u64 = LAZY_PAGES * 4096;
    // The guest has freed its memory when it asks for the first time.
    until_often("all is free", LONG, || {
        Ok((life.api().lazy()?["lazy_bytes"] == ALL).then_some(()))
    })?;
    let options = call.failing().into_iter().chain(["-f".to_owned()]);
    let attached = Attached::to(life.pid(), &site.path(""), &options.collect::<Vec<_>>())?;
    // Refused or answered: what could not be taken is still free afterwards.
    let first = life.api().reclaim(64 << 20);
    let first = first.map_or(0, |it| it.reclaimed_bytes);
    attached.detach()?;
    let lazy = life.api().lazy()?;
    let free = lazy["lazy_bytes"] + lazy["discarded_bytes"];
    life.api().reclaim(64 << 20)?;
    let taken = life.api().lazy()?["discarded_bytes"];
    life.signal(Signal::TERM);
    let status = life.wait()?;
    if (free, taken, status.code()) != (ALL, ALL, Some(0)) {
        return Err(Error::new(format!(
            "{first} taken, {free} free or taken, later {taken} taken; {status}"
        )));
    }
    site.vanished()
}

/// The host's kernel takes a third of a second for each discard. Who wants that memory back waits for that one, however long it takes,
/// because nobody can take memory out of a running madvise(2). Everybody else goes on, and a stop ends the machine.
#[test]
fn a_discard_that_stalls_holds_only_who_wants_that_memory() -> Result<()> {
    const PAGES: u64 = 1024;
    const TIMES: usize = 20_000;
    let site = Site::new()?;
    // It begins when the host has taken what it has freed before.
    site.guest("guest", |guest| {
        for _ in 0..TIMES {
            guest.call(Transport::Port, Operation::LazyFree, FREE_START, PAGES);
            guest.call(Transport::Port, Operation::Reuse, FREE_START, PAGES);
        }
    })?;
    let mut life = site.running("guest")?;
    let stall = "inject=madvise,process_madvise:delay_enter=300000";
    let options = ["-f", "-e", "trace=madvise,process_madvise", "-e", stall].map(str::to_owned);
    let attached = Attached::to(life.pid(), &site.path(""), &options)?;
    let api = life.api().clone();
    let orders = thread::spawn(move || while api.reclaim(64 << 20).is_ok() {});
    until_often("a reuse waits for a discard", LONG, || {
        Ok((life.api().lazy()?["reuse_waits_total"] > 0).then_some(()))
    })?;
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{}", life.said());
    attached.finish()?;
    assert!(orders.join().is_ok());
    figure("fault_points", 1);
    starts_again(&site)
}

#[test]
fn a_request_that_finds_no_thread_fails_alone() -> Result<()> {
    let site = site()?;
    let mut life = site.running("guest")?;
    let options = [
        "-f",
        "-e",
        "trace=clone3",
        "-e",
        "inject=clone3:error=EAGAIN",
    ];
    let attached = Attached::to(life.pid(), &site.path(""), &options.map(str::to_owned))?;
    let answer = life.api().request("GET", "/", &serde_json::Value::Null)?;
    assert_eq!(answer.status, 503, "{}", answer.body);
    attached.detach()?;
    assert!(life.api().is_running(life.pid()));
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{}", life.said());
    figure("fault_points", 1);
    site.vanished()
}

/// The helper of this name of a site's machine.
fn helper(site: &Site, name: &str) -> Result<u32> {
    // It gives itself its name.
    until_often(format_args!("there is {name}"), LONG, || {
        let all = site.relatives()?;
        Ok(all.iter().find(|it| it.name == name).map(|it| it.pid))
    })
}

#[test]
fn a_call_that_fails_in_a_helper_leaves_a_machine_that_can_be_started() -> Result<()> {
    let site = site()?;
    for name in ["ebb-guardian", "ebb-reaper"] {
        let of = |_: &Life| helper(&site, name);
        each_call_of(&site, of, |life| {
            signal_to(life.pid(), Signal::KILL);
            life.wait().map(drop)
        })?;
    }
    Ok(())
}

/// Every third call of all threads that can be interrupted is.
#[test]
fn interrupted_calls_are_made_again() -> Result<()> {
    const CALLS: &str = "poll,ppoll,epoll_wait";
    let site = site()?;
    for step in 2..=4 {
        let storm = format!("inject={CALLS}:error=EINTR:when={step}+{step}");
        // The loader, which reads before, does not expect it.
        let reads = format!("inject=read:error=EINTR:when=20+{step}");
        // The first ioctls of the main thread ask what KVM can do, which waits for nothing; those of a vCPU are KVM_RUN.
        let runs = format!("inject=ioctl:error=EINTR:when=60+{step}");
        let options = ["-f", "-e", &storm, "-e", &reads, "-e", &runs].map(str::to_owned);
        let command = tracing(&site.path("calls"), &options, site.ebb());
        let mut life = site.start(command, "guest", &[])?;
        life.until_it_runs()?;
        life.api().reclaim(64 << 20)?;
        life.api().stop()?;
        let status = life.wait()?;
        assert_eq!(status.code(), Some(0), "{}", life.said());
        starts_again(&site)?;
    }
    Ok(())
}

/// The guest's output and the log go to a full disk.
#[test]
fn a_full_disk_takes_output_and_log_and_harms_nothing() -> Result<()> {
    let site = Site::new()?;
    site.guest("guest", |guest| {
        guest.output_byte(0x3f8, b'x', 100);
    })?;
    let command = Command::new(site.ebb());
    let more = ["--serial", "file=/dev/full", "--log-file", "/dev/full"];
    let mut life = site.start(command, "guest", &more)?;
    life.until_it_runs()?;
    life.api().reclaim(64 << 20)?;
    let lost = |name: &str| -> Result<Option<u64>> {
        let info = life.api().get("/")?;
        Ok(info["output"][name].as_u64().filter(|lost| *lost > 0))
    };
    for name in ["console_dropped_bytes_total", "log_dropped_bytes_total"] {
        until_often(name, LONG, || lost(name))?;
    }
    life.api().stop()?;
    assert_eq!(life.wait()?.code(), Some(0));
    starts_again(&site)
}

/// What the monitor's descriptors are of, and the names of its threads.
fn resources(life: &Life) -> Result<[Vec<String>; 2]> {
    let path = format!("/proc/{}/fd", life.pid());
    let entries = fs::read_dir(&path).context(&path)?.flatten();
    // One that has been closed meanwhile is of nothing.
    let of = entries.filter_map(|it| Some(fs::read_link(it.path()).ok()?.display().to_string()));
    Ok([of.collect(), threads(life.pid())?])
}

#[test]
fn clients_that_vanish_leave_nothing_and_delay_nothing() -> Result<()> {
    const CLIENTS: usize = 64;
    let site = site()?;
    let mut life = site.running("guest")?;
    let before = resources(&life)?;
    let requests = [
        "",
        "PUT /lazy-mem",
        "PUT /actions HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n{",
        "GET /lazy-memory HTTP/1.1\r\nHost: h\r\n\r\n",
        "PUT /lazy-memory/reclaim HTTP/1.1\r\nHost: h\r\nContent-Length: 19\r\n\r\n{\"amount_bytes\": 4}",
    ];
    for request in requests.iter().cycle().take(CLIENTS) {
        let mut client = UnixStream::connect(site.path("api")).context("connect")?;
        client.write_all(request.as_bytes()).context("send")?;
    }
    assert!(life.api().is_running(life.pid()));
    let mut now = before.clone();
    let gone = until_often("descriptors and threads are as before", LONG, || {
        now = resources(&life)?;
        let as_before = now
            .iter()
            .zip(&before)
            .all(|(now, before)| now.len() <= before.len());
        Ok(as_before.then_some(()))
    });
    gone.context(format_args!("{before:?}, now {now:?}"))?;
    life.signal(Signal::TERM);
    assert_eq!(life.wait()?.code(), Some(0), "{}", life.said());
    site.vanished()
}
