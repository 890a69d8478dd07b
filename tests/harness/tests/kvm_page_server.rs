//! Machines whose memory comes from a page server: one that serves, one that is slow and hangs up, one that gives nothing, and one that
//! is gone.

use std::fs;
use std::path::Path;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::figure;
use ebb_harness::page_server::PageServer;
use ebb_harness::wait::{LONG, until, until_often};
use ebb_harness::{Api, Images, Launch, Monitor};
use ebb_hypercall_abi::Operation;
use ebb_payload::{Program, RESULT_SIZE, Transport, page};
use rustix::process::Signal;
use serde_json::json;

const SERVER: &str = env!("CARGO_BIN_EXE_ebb-page-server");
const SERIAL: u16 = 0x3f8;
const PAGES: u64 = 1024;
/// Bytes that the guest writes so that there is time to do something with it.
const TALK: u64 = 60_000;
/// The monitor's exit status when its page server is gone.
const GONE: i32 = 38;
/// That after a panic.
const CRASH: i32 = 33;

/// A guest that fills three parts of its memory, frees one, talks, frees another one, talks, and looks at all.
fn guest() -> Program {
    let [kept, freed, later] = [0, PAGES, 2 * PAGES].map(page);
    let mut guest = Program::kernel();
    guest.fill(kept, PAGES, 7);
    guest.fill(freed, PAGES, 9);
    guest.fill(later, PAGES, 8);
    guest.call(Transport::Port, Operation::LazyFree, freed, PAGES);
    guest.output_byte(SERIAL, b'x', TALK);
    guest.count_filled(kept, PAGES, 7);
    guest.call(Transport::Port, Operation::LazyFree, later, PAGES);
    guest.output_byte(SERIAL, b'z', TALK);
    guest.call(Transport::Port, Operation::Reuse, later, PAGES);
    guest.count_equal(later, PAGES, 0);
    guest.call(Transport::Port, Operation::Reuse, freed, PAGES);
    guest.count_equal(freed, PAGES, 0);
    guest.output_byte(SERIAL, b'y', u64::MAX);
    guest
}

/// A guest that talks is saved to the files `state` and `memory` of the machine's folder.
fn saved() -> Result<Monitor> {
    let launch = Launch::new()?.memory("size=64M");
    let folder = launch.folder().canonicalize().context("the folder")?;
    let launch = launch.option("--allow-paths", &folder.to_string_lossy());
    let (kernel, serial) = (folder.join("kernel"), folder.join("serial"));
    guest().write(&kernel).context("write the guest")?;
    let option = format!("file={}", serial.display());
    let monitor = launch.kernel(&kernel).serial(&option).start()?;
    says(&serial, b'x')?;
    save(&monitor, ["state", "memory"], &[], "")?;
    Ok(monitor)
}

fn says(serial: &Path, byte: u8) -> Result<Vec<u8>> {
    until_often("the guest comes so far", LONG, || {
        let text = fs::read(serial).unwrap_or_default();
        Ok(text.contains(&byte).then_some(text))
    })
}

/// Has a machine saved to two files of its folder; or it is refused, and the message has `refusal` in it.
fn save(monitor: &Monitor, files: [&str; 2], more: &[&str], refusal: &str) -> Result<()> {
    let files = files.map(|it| monitor.folder().join(it).to_string_lossy().into_owned());
    let [state, memory] = &files;
    let words = [&["snapshot", "--state", state, "--memory", memory], more].concat();
    let output = monitor.ctl(&words)?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.success(),
        refusal.is_empty(),
        "{said}{}",
        monitor.log()
    );
    assert!(said.contains(refusal), "{said}");
    Ok(())
}

/// Kills the machine and restores it from a server of its memory file. Its guest talks to the file `again`.
fn serve(monitor: &mut Monitor, delay: &str, more: &[&str]) -> Result<PageServer> {
    let server = PageServer::start(SERVER, &monitor.folder().join("memory"), delay)?;
    let socket = server.socket().to_string_lossy().into_owned();
    let again = monitor.folder().join("again");
    let _ = fs::remove_file(&again);
    let serial = format!("file={}", again.display());
    let words = [&["--page-server", &socket, "--serial", &serial], more].concat();
    monitor.kill_and_restore_from("state", &[], &words)?;
    Ok(server)
}

/// Has `command` restore a state of the machine's folder from the server at `socket`; the status that it ends with, and what it says.
fn restore(
    monitor: &Monitor,
    mut command: Command,
    state: &str,
    socket: &Path,
) -> Result<(Option<i32>, String)> {
    command.args(["restore", "--state", state, "--page-server"]);
    let output = command.arg(socket).current_dir(monitor.folder()).output();
    let output = output.context("ebb restore")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), text))
}

/// Waits until a machine that was restored rests.
fn is_restored(api: &Api) -> Result<()> {
    until_often("it is restored", LONG, || {
        let state = api.get("/");
        Ok(state.is_ok_and(|it| it["state"] == "Paused").then_some(()))
    })
}

fn is_there(monitor: &Monitor, api: &Api) -> Result<()> {
    until_often("the API answers", LONG, || {
        Ok(api.is_running(monitor.pid()).then_some(()))
    })
}

/// The pages of two files that differ.
fn different_pages(one: &Path, other: &Path) -> Result<usize> {
    let [one, other] = [one, other].map(|path| fs::read(path).context(path.display()));
    let (one, other) = (one?, other?);
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(4096).zip(other.chunks(4096));
    Ok(pages.filter(|(one, other)| one != other).count())
}

#[test]
fn memory_comes_from_a_server_and_what_is_taken_of_it_reads_zero() -> Result<()> {
    let mut monitor = saved()?;
    let mut server = serve(&mut monitor, "0", &[])?;
    server.serves()?;
    let api = monitor.api();
    is_restored(&api)?;
    assert_eq!(api.lazy()?["discarded_bytes"], PAGES * 4096);
    // Nobody has read most of it yet, and all of it is saved.
    save(&monitor, ["state2", "memory2"], &[], "")?;
    let path = |name: &str| monitor.folder().join(name);
    let differ = different_pages(&path("memory"), &path("memory2"))?;
    assert!(
        (1..=2).contains(&differ),
        "{differ}: the last page, and that of the generation id"
    );
    let files = ["state3", "memory3"];
    save(
        &monitor,
        files,
        &["--diff"],
        "was not restored from memory files",
    )?;

    api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    let again = path("again");
    says(&again, b'z')?;
    until_often("the host takes what the guest frees", LONG, || {
        api.reclaim(PAGES * 4096)?;
        Ok((api.lazy()?["discarded_bytes"] == 2 * PAGES * 4096).then_some(()))
    })?;
    let text = says(&again, b'y')?;
    let end = text.iter().position(|byte| *byte == b'y').unwrap_or(0);
    let found = ebb_payload::results(&text[end - 4 * RESULT_SIZE..end]);
    let [more, last] = [0, ebb_hypercall_abi::status::LAST_RANGE.cast_unsigned()];
    assert_eq!(found, [more, PAGES, last, PAGES]);
    let first = text.iter().position(|byte| *byte == b'z').unwrap_or(0);
    let found = ebb_payload::results(&text[first - 2 * RESULT_SIZE..first]);
    assert_eq!(found[0], PAGES, "what the guest has kept");
    monitor.ctl(&["stop"])?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert!(server.given()? >= 2 * PAGES);
    Ok(())
}

#[test]
fn a_slow_server_slows_the_guest_and_one_that_is_gone_ends_the_machine() -> Result<()> {
    let mut monitor = saved()?;
    let api = monitor.api();
    // It has closed its connection before it gives anything: that is no end.
    let mut slow = serve(&mut monitor, "20 hangup", &["--resume"])?;
    slow.serves()?;
    says(&monitor.folder().join("again"), b'x')?;
    monitor.ctl(&["stop"])?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());

    let mut server = serve(&mut monitor, "20", &["--resume"])?;
    is_there(&monitor, &api)?;
    says(&monitor.folder().join("again"), b'x')?;
    server.kill()?;
    assert_eq!(monitor.wait()?, GONE, "{}", monitor.log());
    let log = monitor.log();
    assert!(log.contains("memory.pages is gone"), "{log}");
    until("nothing is left of it", LONG, || {
        let left = ["api", "api.memory"].map(|it| monitor.folder().join(it).exists());
        Ok((left == [false; 2]).then_some(()))
    })
}

#[test]
fn a_machine_whose_server_gives_nothing_ends_when_it_is_stopped_killed_or_its_watcher_panics()
-> Result<()> {
    let mut monitor = saved()?;
    let mut silent = serve(&mut monitor, "never", &["--resume"])?;
    silent.serves()?;
    monitor.signal(Signal::TERM)?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert!(monitor.log().contains("by force"), "{}", monitor.log());
    until("nothing is left of it", LONG, || {
        let left = ["api", "api.memory"].map(|it| monitor.folder().join(it).exists());
        Ok((left == [false; 2]).then_some(()))
    })?;

    // Killed while it waits for the server.
    let mut silent = serve(&mut monitor, "never", &["--resume"])?;
    silent.serves()?;
    monitor.signal(Signal::KILL)?;
    assert!(monitor.wait().is_err());

    let silent = PageServer::start(SERVER, &monitor.folder().join("memory"), "never")?;
    let mut command = Command::new(Images::debug_ebb()?);
    command.env("EBB_PANIC", "ebb-pages");
    let (status, text) = restore(&monitor, command, "state", silent.socket())?;
    assert_eq!(status, Some(CRASH), "{text}");
    assert!(text.contains("the thread ebb-pages has panicked"), "{text}");
    figure("panics", 1);
    Ok(())
}

#[test]
fn what_a_page_server_cannot_serve_is_refused() -> Result<()> {
    let mut monitor = saved()?;
    monitor.kill_and_restore_from("state", &["memory"], &[])?;
    is_restored(&monitor.api())?;
    save(&monitor, ["state2", "memory2"], &["--diff"], "")?;
    for (state, reason) in [
        ("state", "nobody: the page server cannot be asked"),
        (
            "state2",
            "is of 2 memory files, but a page server serves one",
        ),
    ] {
        let command = Command::new(Images::from_environment()?.ebb);
        let (status, text) = restore(&monitor, command, state, Path::new("nobody"))?;
        assert_eq!((status, text.lines().count()), (Some(35), 1), "{text}");
        assert!(text.contains(reason), "{text}");
    }
    Ok(())
}
