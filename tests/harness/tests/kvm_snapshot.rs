//! Machines that are paused and resumed, saved, killed and restored.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::network::{Tap, connect_through};
use ebb_harness::page_server::PageServer;
use ebb_harness::small::SmallFileSystem;
use ebb_harness::wait::{LONG, settled, until, until_often};
use ebb_harness::{Api, Guest, Images, Launch, Monitor};
use ebb_hypercall_abi::Operation;
use ebb_hypercall_abi::granule::{State, Word};
use ebb_hypercall_abi::status::LAST_RANGE;
use ebb_payload::{Program, Transport, page};
use serde_json::json;

const SERIAL: u16 = 0x3f8;

/// A guest that frees `pages` lazily and writes to the serial port from then on, without an end.
fn talker(pages: u64) -> Program {
    let mut guest = Program::kernel();
    guest.fill(page(0), pages, 7);
    guest.call(Transport::Port, Operation::LazyFree, page(0), pages);
    guest.output_byte(SERIAL, b'x', u64::MAX);
    guest
}

/// A monitor with a guest of our own, whose serial port is a file.
struct Talking {
    monitor: Monitor,
}

impl Talking {
    fn start(guest: &Program, launch: Launch) -> Result<Self> {
        let launch = launch.memory("size=64M");
        let kernel = launch.folder().join("kernel");
        guest.write(&kernel).context("write the guest")?;
        let serial = format!("file={}", launch.folder().join("serial").display());
        let monitor = launch.kernel(&kernel).serial(&serial).start()?;
        Ok(Self { monitor })
    }

    /// Bytes that the guest has written.
    fn said(&self) -> u64 {
        let serial = fs::metadata(self.monitor.folder().join("serial"));
        serial.map_or(0, |it| it.len())
    }

    fn says_more(&self) -> Result<()> {
        let before = self.said();
        until_often("the guest writes", LONG, || {
            Ok((self.said() > before + 10_000).then_some(()))
        })
    }
}

/// A machine that may be saved to files of its folder.
fn savable() -> Result<Launch> {
    let launch = Launch::new()?;
    let folder = launch.folder().canonicalize().context("the folder")?;
    Ok(launch.option("--allow-paths", &folder.to_string_lossy()))
}

fn state(api: &Api) -> Result<String> {
    Ok(api.get("/")?["state"].as_str().unwrap_or("?").to_owned())
}

fn ctl(monitor: &Monitor, word: &str) -> Result<()> {
    let output = monitor.ctl(&[word])?;
    assert!(output.status.success(), "{output:?}");
    Ok(())
}

/// Saves a machine to the files `state` and `memory` of its folder.
fn snapshot(monitor: &Monitor) -> Result<()> {
    let output = save(monitor, ["state", "memory"], &[])?;
    assert!(output.status.success(), "{output:?}\n{}", monitor.stderr());
    Ok(())
}

/// Has a machine saved to two files of its folder.
fn save(monitor: &Monitor, files: [&str; 2], more: &[&str]) -> Result<Output> {
    let files = files.map(|it| monitor.folder().join(it).to_string_lossy().into_owned());
    let [state, memory] = &files;
    monitor.ctl(&[&["snapshot", "--state", state, "--memory", memory], more].concat())
}

/// Saves a machine that was restored to the files `state2` and `memory2` of its folder, which hold a difference.
fn difference(monitor: &Monitor) -> Result<()> {
    let output = save(monitor, ["state2", "memory2"], &["--diff"])?;
    assert!(output.status.success(), "{output:?}\n{}", monitor.stderr());
    Ok(())
}

#[test]
fn a_paused_guest_does_nothing_and_its_free_memory_can_be_taken() -> Result<()> {
    const PAGES: u64 = 2048;
    let mut talking = Talking::start(&talker(PAGES), savable()?)?;
    let api = talking.monitor.api();
    until_often("the API answers", LONG, || {
        Ok(api.is_running(talking.monitor.pid()).then_some(()))
    })?;
    for _ in 0..2 {
        talking.says_more()?;
        // The second time it changes nothing.
        ctl(&talking.monitor, "pause")?;
        ctl(&talking.monitor, "pause")?;
        assert_eq!(state(&api)?, "Paused");
        let said = settled("the guest is silent", Duration::from_millis(300), || {
            Ok(talking.said())
        })?;
        // What was reclaimed is not taken twice.
        let due = api.lazy()?["lazy_bytes"];
        assert_eq!(api.reclaim(PAGES * 4096)?.reclaimed_bytes, due);
        assert_eq!(talking.said(), said);
        ctl(&talking.monitor, "resume")?;
        ctl(&talking.monitor, "resume")?;
        assert_eq!(state(&api)?, "Running");
    }
    assert_eq!(api.lazy()?["discarded_bytes"], PAGES * 4096);
    talking.says_more()?;
    ctl(&talking.monitor, "pause")?;
    ctl(&talking.monitor, "stop")?;
    assert_eq!(talking.monitor.wait()?, 0, "{}", talking.monitor.log());
    Ok(())
}

#[test]
fn a_stock_guest_with_devices_at_work_is_paused_many_times() -> Result<()> {
    let launch = Launch::new()?
        .cpus(2)
        .option("--balloon", "size=0,statistics=1");
    let disk = launch.folder().join("disk");
    let content: Vec<u8> = (0..8 << 20)
        .map(|at: usize| (at / 4096 % 251) as u8)
        .collect();
    fs::write(&disk, content).context("write a disk")?;
    let mut monitor = launch.disk(&disk, false).start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let read = "dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum";
    let sum = guest.must(read)?;
    guest.send(&format!("sh for n in 1 2 3; do {read}; done"))?;
    api.set_balloon(32 << 20)?;
    for _ in 0..20 {
        api.must("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        assert_eq!(state(&api)?, "Paused");
        api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    }
    let line = guest
        .console
        .find("the sums", LONG, |line| line.contains("EBB-GUEST-OK sh"))?;
    assert_eq!(
        line.matches(sum.split(' ').next().unwrap_or("?")).count(),
        3,
        "{line}"
    );
    until("the balloon grows", LONG, || {
        Ok((api.balloon()?.actual_mib == 32).then_some(()))
    })?;
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Bytes of the disk that a file takes.
fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).context(path.display())?.blocks() * 512)
}

#[test]
fn dead_memory_is_left_out_and_the_rest_comes_back() -> Result<()> {
    const PAGES: u64 = 1024;
    const TALK: u64 = 60_000;
    let (kept, freed) = (page(0), page(PAGES));
    let mut guest = Program::kernel();
    guest.fill(kept, PAGES, 7);
    guest.fill(freed, PAGES, 9);
    guest.call(Transport::Port, Operation::LazyFree, freed, PAGES);
    guest.output_byte(SERIAL, b'x', TALK);
    guest.count_filled(kept, PAGES, 7);
    guest.call(Transport::Port, Operation::Reuse, freed, PAGES);
    guest.count_equal(freed, PAGES, 0);
    guest.output_byte(SERIAL, b'y', u64::MAX);
    let mut talking = Talking::start(&guest, savable()?)?;
    talking.says_more()?;
    let api = talking.monitor.api();
    // One half of it is returned to the host before, the other half is not.
    assert_eq!(
        api.reclaim(PAGES / 2 * 4096)?.reclaimed_bytes,
        PAGES / 2 * 4096
    );
    snapshot(&talking.monitor)?;
    // It goes on after that.
    talking.says_more()?;
    // The initial RAM disk is in the guest's memory, too.
    let initramfs = Images::from_environment()?.initramfs;
    let initramfs = fs::metadata(initramfs)
        .context("the initial RAM disk")?
        .len();
    let size = allocated(&talking.monitor.folder().join("memory"))?;
    assert!(
        (PAGES * 4096..PAGES * 4096 + initramfs + (2 << 20)).contains(&size),
        "{size}"
    );

    let serial = talking.monitor.folder().join("restored");
    let serial = format!("file={}", serial.display());
    talking
        .monitor
        .kill_and_restore(&["--verify", "--serial", &serial])?;
    let api = talking.monitor.api();
    until_often("the API answers", LONG, || {
        Ok(api
            .get("/")
            .is_ok_and(|it| it["state"] == "Paused")
            .then_some(()))
    })?;
    assert_eq!(api.lazy()?["discarded_bytes"], PAGES * 4096);
    ctl(&talking.monitor, "resume")?;
    let text = until("the guest comes to its end", LONG, || {
        let text = fs::read(talking.monitor.folder().join("restored")).unwrap_or_default();
        Ok(text.contains(&b'y').then_some(text))
    })?;
    // The results of the steps after those that talk: counts, and a status between.
    let end = text.iter().position(|byte| *byte == b'y').unwrap_or(0);
    let results = ebb_payload::results(&text[end - 3 * 8..end]);
    assert_eq!(results, [PAGES, LAST_RANGE.cast_unsigned(), PAGES]);
    let left = text[..end].iter().filter(|byte| **byte == b'x').count() as u64;
    assert!(left > 0 && left < TALK, "{left} of {TALK}");
    ctl(&talking.monitor, "stop")?;
    assert_eq!(talking.monitor.wait()?, 0, "{}", talking.monitor.log());
    Ok(())
}

/// A program that fills three parts of the memory, talks, fills a half of the first anew, frees the last, talks, and looks at all.
fn changing(pages: u64) -> Program {
    const TALK: u64 = 60_000;
    let [first, second, freed] = [0, pages, 2 * pages].map(page);
    let mut guest = Program::kernel();
    guest.fill(first, pages, 7);
    guest.fill(second, pages, 8);
    guest.fill(freed, pages, 9);
    guest.output_byte(SERIAL, b'x', TALK);
    guest.fill(first, pages / 2, 5);
    guest.call(Transport::Port, Operation::LazyFree, freed, pages);
    guest.output_byte(SERIAL, b'z', TALK);
    guest.count_filled(first, pages / 2, 5);
    guest.count_filled(page(pages / 2), pages / 2, 7);
    guest.count_filled(second, pages, 8);
    guest.call(Transport::Port, Operation::Reuse, freed, pages);
    guest.count_equal(freed, pages, 0);
    guest.output_byte(SERIAL, b'y', u64::MAX);
    guest
}

/// Makes the full snapshot `state4` and `memory4` of the difference `state2`.
fn merge(folder: &Path) -> Result<()> {
    let mut command = Command::new(Images::from_environment()?.ebb);
    let files = [
        "--state", "state2", "--memory", "memory", "--memory", "memory2",
    ];
    let to = ["--to-state", "state4", "--to-memory", "memory4"];
    command.arg("merge").args(files).args(to);
    let output = command.current_dir(folder).output().context("ebb merge")?;
    assert!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn a_difference_holds_what_is_new_and_fits_one_snapshot_only() -> Result<()> {
    const PAGES: u64 = 512;
    let mut talking = Talking::start(&changing(PAGES), savable()?)?;
    let monitor = &mut talking.monitor;
    let folder = monitor.folder().to_owned();
    until_often("the guest talks", LONG, || {
        Ok(fs::read(folder.join("serial"))
            .is_ok_and(|it| it.contains(&b'x'))
            .then_some(()))
    })?;
    ctl(monitor, "pause")?;
    let output = save(monitor, ["s", "m"], &["--diff"])?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("was not restored"), "{text}");
    // Two of the same content, and of two snapshots all the same.
    let output = save(monitor, ["other", "foreign"], &[])?;
    assert!(output.status.success(), "{output:?}");
    snapshot(monitor)?;

    let text = folder.join("restored");
    let serial = format!("file={}", text.display());
    monitor.kill_and_restore(&["--resume", "--serial", &serial])?;
    until_often("the guest has changed its memory", LONG, || {
        Ok(fs::read(&text)
            .is_ok_and(|it| it.contains(&b'z'))
            .then_some(()))
    })?;
    ctl(monitor, "pause")?;
    let output = save(monitor, ["state2", "memory"], &["--diff"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("memory: this machine was restored from it"),
        "{said}"
    );
    difference(monitor)?;
    let size = allocated(&folder.join("memory2"))?;
    let half = PAGES / 2 * 4096;
    assert!((half..half + (256 << 10)).contains(&size), "{size}");
    // Its file may be replaced; nothing comes after that.
    fs::rename(folder.join("memory"), folder.join("base")).context("rename")?;
    fs::copy(folder.join("base"), folder.join("memory")).context("copy")?;
    fs::remove_file(folder.join("base")).context("remove")?;
    let output = save(monitor, ["state3", "memory3"], &["--diff"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is deleted or replaced"), "{said}");

    for (files, part) in [
        (&["memory"][..], "state2: is of 2 memory files, but 1 given"),
        (&["foreign", "memory2"], "foreign: does not belong"),
        (&["memory2", "memory"], "memory2: does not belong"),
    ] {
        let said = refused_files(&folder, "state2", files, &[])?;
        assert!(said.contains(part), "{said}");
    }
    merge(&folder)?;
    let more = ["--verify", "--resume", "--serial", &serial];
    monitor.kill_and_restore_from("state4", &["memory4"], &more)?;
    let text = until("the guest comes to its end", LONG, || {
        let text = fs::read(&text).unwrap_or_default();
        Ok(text.contains(&b'y').then_some(text))
    })?;
    let end = text.iter().position(|byte| *byte == b'y').unwrap_or(0);
    let found = ebb_payload::results(&text[end - 5 * ebb_payload::RESULT_SIZE..end]);
    let last = LAST_RANGE.cast_unsigned();
    assert_eq!(found, [PAGES / 2, PAGES / 2, PAGES, last, PAGES]);
    ctl(monitor, "stop")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Restores a machine to another serial file, and returns what its guest has written there once that has a `y`. Until then
/// `meanwhile` is called again and again.
fn restored_text(monitor: &mut Monitor, meanwhile: impl Fn()) -> Result<Vec<u8>> {
    let path = monitor.folder().join("restored");
    let serial = format!("file={}", path.display());
    monitor.kill_and_restore(&["--verify", "--resume", "--serial", &serial])?;
    let text = until("the guest comes to its end", LONG, || {
        meanwhile();
        let text = fs::read(&path).unwrap_or_default();
        Ok(text.contains(&b'y').then_some(text))
    });
    text.map_err(|error| monitor.explain(error))
}

#[test]
fn an_arena_goes_on_where_it_was_saved() -> Result<()> {
    const GRANULE: u64 = 2 << 20;
    const PAGES: u64 = GRANULE / 4096;
    // Where the first arena of a small machine lies.
    const ARENA: u64 = 4 << 30;
    let granule = |index: u64| ARENA + index * GRANULE;
    let word = |index: u64| ARENA + 4096 + 8 * index;
    let raw = |state| Word::new(state, 0).raw();
    let [in_use, lazy, discarded] = [State::InUse, State::Lazy, State::Discarded].map(raw);
    let (kept, freed, taken) = (3, 4, 5);
    let mut guest = Program::kernel();
    for index in [kept, freed, taken] {
        guest.fill(granule(index), PAGES, index);
    }
    guest.compare_exchange(word(taken), in_use, lazy);
    guest.wait_for(word(taken), discarded);
    guest.compare_exchange(word(freed), in_use, lazy);
    guest.output_byte(SERIAL, b'x', 60_000);
    let first = guest.results();
    guest.count_filled(granule(kept), PAGES, kept);
    guest.load(word(taken));
    guest.compare_exchange(word(freed), discarded, in_use);
    guest.count_equal(granule(freed), PAGES, 0);
    guest.compare_exchange(word(kept), in_use, lazy);
    let results = guest.results() - first;
    guest.wait_for(word(kept), discarded);
    guest.output_byte(SERIAL, b'y', u64::MAX);
    let launch = savable()?.option("--arena", "size=64M,id=heap");
    let mut talking = Talking::start(&guest, launch)?;
    let api = talking.monitor.api();
    until_often("the host takes a granule", LONG, || {
        let done = api.reclaim(GRANULE);
        Ok(done
            .is_ok_and(|it| it.reclaimed_bytes == GRANULE)
            .then_some(()))
    })?;
    talking.says_more()?;
    snapshot(&talking.monitor)?;
    let initramfs = Images::from_environment()?.initramfs;
    let initramfs = fs::metadata(initramfs).context("the initial RAM disk")?;
    let size = allocated(&talking.monitor.folder().join("memory"))?;
    let most = GRANULE + initramfs.len() + (1 << 20);
    assert!((GRANULE..most).contains(&size), "{size}");

    let text = restored_text(&mut talking.monitor, || {
        // It may not answer yet.
        let _ = api.reclaim(GRANULE);
    })?;
    let end = text.iter().position(|byte| *byte == b'y').unwrap_or(0);
    let end = end - ebb_payload::RESULT_SIZE;
    let found = ebb_payload::results(&text[end - results * ebb_payload::RESULT_SIZE..end]);
    assert_eq!(found, [PAGES, discarded, discarded, PAGES, in_use]);
    ctl(&talking.monitor, "stop")?;
    assert_eq!(talking.monitor.wait()?, 0, "{}", talking.monitor.log());
    Ok(())
}

/// The one line that `ebb restore` says.
fn refused(folder: &Path, more: &[&str]) -> Result<String> {
    refused_files(folder, "state", &["memory"], more)
}

fn refused_files(folder: &Path, state: &str, memory: &[&str], more: &[&str]) -> Result<String> {
    let mut command = Command::new(Images::from_environment()?.ebb);
    command
        .args(["restore", "--state", state])
        .args(memory.iter().flat_map(|it| ["--memory", it]))
        .args(more)
        .current_dir(folder);
    let output = command.output().context("ebb restore")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(35), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    Ok(text)
}

fn alter(path: &Path, at: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.context(path.display())?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).context("read")?;
    file.write_all_at(&[byte[0] ^ 1], at).context("write")
}

/// The files of a folder, in order.
fn names(folder: &Path) -> Result<Vec<OsString>> {
    let entries = fs::read_dir(folder).context("list")?;
    let mut names: Vec<_> = entries.flatten().map(|it| it.file_name()).collect();
    names.sort();
    Ok(names)
}

/// Alters the files of a snapshot, of which `good` and `whole` are copies, in several ways.
fn altered_files(folder: &Path) -> Result<()> {
    let path = |name: &str| folder.join(name);
    alter(&path("state"), 300)?;
    assert!(refused(folder, &[])?.contains("state: was altered"));
    fs::copy(path("good"), path("state")).context("copy")?;
    alter(&path("state"), 8)?;
    assert!(refused(folder, &[])?.contains("state: has version 2"));
    let half = fs::read(path("good")).context("read")?;
    fs::write(path("state"), &half[..half.len() / 2]).context("write")?;
    assert!(refused(folder, &[])?.contains("state: is truncated"));
    fs::copy(path("good"), path("state")).context("copy")?;

    alter(&path("memory"), 1 << 20)?;
    assert!(refused(folder, &["--verify"])?.contains("memory: was altered"));
    fs::copy(path("whole"), path("memory")).context("copy")?;
    alter(&path("memory"), (64 << 20) + 10)?;
    assert!(refused(folder, &[])?.contains("memory: does not belong"));
    let file = OpenOptions::new().write(true).open(path("memory"));
    file.context("open")?.set_len(1 << 20).context("truncate")?;
    assert!(refused(folder, &[])?.contains("truncated"));
    fs::copy(path("whole"), path("memory")).context("copy")?;
    Ok(())
}

#[test]
fn what_is_no_whole_snapshot_is_refused_in_one_line() -> Result<()> {
    let launch = savable()?.memory("size=64M").serial("null");
    let folder = launch.folder().to_owned();
    let path = |name: &str| folder.join(name);
    fs::write(path("disk"), vec![1; 1 << 20]).context("write a disk")?;
    talker(16)
        .write(&path("kernel"))
        .context("write the guest")?;
    let mut monitor = launch
        .kernel(&path("kernel"))
        .disk(&path("disk"), false)
        .start()?;
    until_often("the API answers", LONG, || {
        Ok(monitor.api().is_running(monitor.pid()).then_some(()))
    })?;
    let names = || names(&folder);
    // A running machine, files elsewhere, a name that is taken by a folder: the machine goes on and leaves nothing.
    fs::create_dir(path("folder")).context("make a folder")?;
    let at = |name: &str| path(name).to_string_lossy().into_owned();
    let before = names()?;
    let ask = |state: &str, memory: &str| {
        let body = json!({ "snapshot_path": state, "mem_file_path": memory });
        monitor.api().request("PUT", "/snapshot/create", &body)
    };
    let answer = ask(&at("s"), &at("m"))?;
    assert!(
        answer.body["fault_message"]
            .as_str()
            .unwrap_or("")
            .contains("pause it first")
    );
    ctl(&monitor, "pause")?;
    for (state, memory, part) in [
        (&*at("s"), "/nowhere/m", "/nowhere/m: may not be written"),
        ("/tmp/s", &*at("m"), "--allow-paths"),
        (&*at("../s"), &*at("m"), "may not be written"),
        (&*at("s"), &*at("s"), "different names"),
        (&*at("s"), &*at("folder"), "folder: "),
    ] {
        let answer = ask(state, memory)?;
        let message = answer.body["fault_message"]
            .as_str()
            .unwrap_or("")
            .to_owned();
        assert!(answer.status == 400 && message.contains(part), "{message}");
    }
    assert_eq!(
        (names()?, state(&monitor.api())?),
        (before, "Paused".to_owned())
    );
    snapshot(&monitor)?;
    fs::copy(path("memory"), path("whole")).context("copy")?;
    fs::copy(path("state"), path("good")).context("copy")?;
    ctl(&monitor, "stop")?;
    assert_eq!(monitor.wait()?, 0);
    let before = names()?;

    altered_files(&folder)?;
    alter(&path("disk"), 0)?;
    assert!(refused(&folder, &[])?.contains("was changed since the snapshot"));
    fs::write(path("small"), vec![1; 1 << 19]).context("write a disk")?;
    assert!(refused(&folder, &["--disk", "0=small"])?.contains("had 1048576"));
    assert!(refused(&folder, &["--disk", "1=small"])?.contains("no such disk"));
    fs::remove_file(path("small")).context("remove")?;
    assert_eq!(names()?, before);
    Ok(())
}

#[test]
fn what_cannot_be_saved_says_why_and_goes_on() -> Result<()> {
    for (memory, lazy, what) in [
        ("size=64M", "strict=on", "strict mode"),
        ("size=64M,shared=on", "strict=off", "shared memory"),
    ] {
        let launch = savable()?.memory(memory).serial("null");
        let folder = launch.folder().canonicalize().context("the folder")?;
        let at = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let kernel = folder.join("kernel");
        talker(16).write(&kernel).context("write the guest")?;
        let mut monitor = launch.kernel(&kernel).option("--lazy", lazy).start()?;
        until_often("the API answers", LONG, || {
            Ok(monitor.api().is_running(monitor.pid()).then_some(()))
        })?;
        ctl(&monitor, "pause")?;
        let before = names(&folder)?;
        let body = json!({ "snapshot_path": at("s"), "mem_file_path": at("m") });
        let answer = monitor.api().request("PUT", "/snapshot/create", &body)?;
        let message = answer.body["fault_message"].as_str().unwrap_or("");
        assert!(answer.status == 400 && message.contains(what), "{message}");
        assert_eq!(names(&folder)?, before);
        ctl(&monitor, "resume")?;
        ctl(&monitor, "stop")?;
        assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    }
    Ok(())
}

/// Its files do not fit where they should go: nothing of them stays, the guest goes on, and is saved elsewhere.
#[test]
fn a_full_disk_ends_the_snapshot_and_nothing_else() -> Result<()> {
    let small = SmallFileSystem::new(8 << 20)?;
    let room = small.path().to_string_lossy();
    let mut monitor = savable()?.option("--allow-paths", &room).start()?;
    let mut guest = monitor.guest()?;
    let kept = guest.checksum("keep 32M")?;
    for _ in 0..2 {
        let [state, memory] = ["state", "memory"].map(|name| format!("{room}/{name}"));
        let output = monitor.ctl(&["snapshot", "--state", &state, "--memory", &memory])?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{output:?}");
        assert!(said.contains(&memory) && said.contains("room"), "{said}");
        assert_eq!(names(small.path())?, [""; 0]);
        assert_eq!(guest.checksum("verify")?, kept);
    }
    snapshot(&monitor)?;
    monitor.kill_and_restore(&["--resume"])?;
    assert_eq!(monitor.restored_guest()?.checksum("verify")?, kept);
    ctl(&monitor, "stop")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

const PORT: u16 = 5201;

/// A tap for a guest, in a network of its own.
struct Network {
    name: &'static str,
    number: u8,
    _tap: Tap,
}

/// Connections of the host to a server in the guest.
struct Talk {
    tcp: TcpStream,
    vsock: UnixStream,
    /// Of the guest's program, which has one for each connection.
    threads: u64,
}

impl Network {
    fn create(name: &'static str, number: u8) -> Result<Self> {
        let tap = Tap::create(name, Ipv4Addr::new(10, 77, number, 1), 1500)?;
        Ok(Self {
            name,
            number,
            _tap: tap,
        })
    }

    /// Connects to the guest by both ways.
    fn talk(&self, guest: &mut Guest, vsock: &Path) -> Result<Talk> {
        let address = format!("10.77.{}.2", self.number);
        guest.must(&format!(
            "ip addr add {address}/24 dev eth0 && ip link set dev eth0 up"
        ))?;
        guest.ask(&format!("talk {PORT}"))?;
        guest.ask(&format!("talk vsock {PORT}"))?;
        let tcp = until("the guest answers", LONG, || {
            Ok(TcpStream::connect((&*address, PORT)).ok())
        })?;
        tcp.set_read_timeout(Some(LONG)).context("a stream")?;
        let mut talk = Talk {
            tcp,
            vsock: connect_through(vsock, PORT.into())?,
            threads: 0,
        };
        echo(&mut talk.tcp, b"p")?;
        echo(&mut talk.vsock, b"p")?;
        talk.threads = threads(guest)?;
        Ok(talk)
    }
}

impl Talk {
    /// After a restore: the network's connection lives, the vsock's is gone on both sides, and who listens there goes on.
    fn goes_on(&mut self, guest: &mut Guest, vsock: &Path) -> Result<()> {
        echo(&mut self.tcp, b"")?;
        assert_eq!(self.vsock.read(&mut [0]).context("the old stream")?, 0);
        until("the guest's end of it is gone", LONG, || {
            Ok((threads(guest)? < self.threads).then_some(()))
        })?;
        self.vsock = connect_through(vsock, PORT.into())?;
        echo(&mut self.vsock, b"p")
    }
}

/// A byte there and back, after `first`.
fn echo(stream: &mut (impl Read + Write), first: &[u8]) -> Result<()> {
    stream.write_all(&[first, b"."].concat()).context("send")?;
    stream.read_exact(&mut [0]).context("receive")
}

/// Threads of the program that drives the guest.
fn threads(guest: &mut Guest) -> Result<u64> {
    let count = guest
        .must("ls /proc/$(pidof ebb-guest | tr ' ' '\\n' | sort -n | head -1)/task | wc -l")?;
    count.trim().parse().context(count)
}

#[test]
fn a_stock_guest_goes_on_where_it_was_saved() -> Result<()> {
    goes_on("mmio", Network::create("ebbsave1", 6)?, |monitor| {
        // Over the files that it runs from.
        snapshot(monitor)?;
        let server = env!("CARGO_BIN_EXE_ebb-page-server");
        let server = PageServer::start(server, &monitor.folder().join("memory"), "0")?;
        let socket = server.socket().to_string_lossy().into_owned();
        monitor.kill_and_restore_from("state", &[], &["--resume", "--page-server", &socket])?;
        Ok(Some(server))
    })
}

#[test]
fn a_stock_guest_on_pci_goes_on_where_it_was_saved() -> Result<()> {
    goes_on("pci", Network::create("ebbsave2", 7)?, |monitor| {
        difference(monitor)?;
        let [full, new] = ["memory", "memory2"].map(|it| allocated(&monitor.folder().join(it)));
        let (full, new) = (full?, new?);
        assert!(new < full / 2, "{new} of {full}");
        monitor.kill_and_restore_from("state2", &["memory", "memory2"], &["--resume"])?;
        Ok(None)
    })
}

/// `again` saves the machine another time, kills it, and has it go on, maybe with a page server.
fn goes_on(
    transport: &str,
    network: Network,
    again: impl FnOnce(&mut Monitor) -> Result<Option<PageServer>>,
) -> Result<()> {
    let launch = savable()?.cpus(2).option("--rng", "on");
    let launch = launch.option("--balloon", "size=64M,statistics=1");
    let launch = launch.option("--transport", transport);
    let launch = launch.option("--net", &format!("tap={}", network.name));
    let vsock = launch.folder().join("vsock");
    let launch = launch.option("--vsock", &format!("cid=9,path={}", vsock.display()));
    let disk = launch.folder().join("disk");
    let content: Vec<u8> = (0..2 << 20)
        .map(|at: usize| (at / 4096 % 251) as u8)
        .collect();
    fs::write(&disk, content).context("write a disk")?;
    let mut monitor = launch.disk(&disk, false).start()?;
    let mut guest = monitor.guest()?;
    until("the balloon grows", LONG, || {
        Ok((monitor.api().balloon()?.actual_mib == 64).then_some(()))
    })?;
    let read = "dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum";
    let sum = guest.must(read)?;
    let random = "dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null; sha256sum </tmp/data";
    let kept = guest.must(random)?;
    // Nobody looks at this before the second restore.
    let rest = guest
        .must("dd if=/dev/urandom of=/tmp/rest bs=1M count=3 2>/dev/null; sha256sum </tmp/rest")?;
    // It hashes what is in memory and on the disk all the time.
    let both = format!("{{ {read}; sha256sum </tmp/data; }}");
    guest.must(&format!(
        "(while :; do {both} >>/tmp/sums; done) >/dev/null 2>&1 </dev/null &"
    ))?;
    let mut talk = network.talk(&mut guest, &vsock)?;
    let uptime = "cut -d. -f1 /proc/uptime";
    let before: u64 = guest.must(uptime)?.parse().unwrap_or(0);
    snapshot(&monitor)?;
    // Between the two moments lies what the guest must not see: the first machine's end.
    monitor.kill_and_restore(&["--resume"])?;
    let mut guest = monitor.restored_guest()?;
    let after: u64 = guest.must(uptime)?.parse().unwrap_or(0);
    assert!(after >= before, "{before} {after}");
    assert_eq!(guest.must("sha256sum </tmp/data")?, kept);
    assert_eq!(guest.must(read)?, sum);
    talk.goes_on(&mut guest, &vsock)?;
    let rounds = "wc -l </tmp/sums";
    let now: u64 = guest.must(rounds)?.trim().parse().unwrap_or(0);
    until("it hashes on", LONG, || {
        let then: u64 = guest.must(rounds)?.trim().parse().unwrap_or(0);
        Ok((then > now + 2).then_some(()))
    })?;
    assert_eq!(guest.must("sort -u /tmp/sums | wc -l")?.trim(), "2");
    let said = guest.must("dmesg | grep -c 'virtual machine fork'")?;
    assert_eq!(said.trim(), "1");
    // What was in the balloon is the guest's again, and what it hands back can be taken.
    let api = monitor.api();
    assert!(api.lazy()?["discarded_bytes"] >= 60 << 20);
    for target in [0, 96] {
        api.set_balloon(target << 20)?;
        until("the balloon follows", LONG, || {
            Ok((api.balloon()?.actual_mib == target).then_some(()))
        })?;
    }
    assert!(api.reclaim(96 << 20)?.reclaimed_bytes >= 90 << 20);
    let _server = again(&mut monitor)?;
    let mut guest = monitor.restored_guest()?;
    assert_eq!(guest.must("sha256sum </tmp/data")?, kept);
    assert_eq!(guest.must(read)?, sum);
    let said = guest.must("dmesg | grep -c 'virtual machine fork'")?;
    assert_eq!(said.trim(), "2");
    assert_eq!(guest.must("sha256sum </tmp/rest")?, rest);
    api.set_balloon(0)?;
    let write = "dd if=/tmp/data of=/dev/vda bs=1M count=2 conv=fsync,notrunc 2>/dev/null";
    guest.must(&format!("{write}; cmp -n 2097152 /tmp/data /dev/vda"))?;
    assert_eq!(guest.must("sha256sum </tmp/data")?, kept);
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
