//! Machines that end when they should and live until then, whatever their guest, their terminal, and those who read
//! their output do.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::host::rss;
use ebb_harness::idle::signal_to;
use ebb_harness::terminal::Terminal;
use ebb_harness::wait::{until, until_often};
use ebb_harness::{Api, Images};
use ebb_payload::Program;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use tempfile::TempDir;

/// What should come soon, on an emulated machine too.
const PATIENCE: Duration = Duration::from_secs(60);

const PVPANIC: u16 = 0x505;
const SERIAL: u16 = 0x3f8;

/// pvpanic's events: the kernel has panicked, and a crash kernel runs.
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// A folder with a guest, where its monitor runs.
struct Bench {
    ebb: PathBuf,
    folder: TempDir,
}

/// A monitor; killed when this is dropped.
struct Monitor(Child);

impl Bench {
    fn new(guest: &Program) -> Result<Self> {
        let ebb = Images::from_environment()?.ebb;
        let folder = TempDir::with_prefix("ebb-life-").context("make a temporary folder")?;
        guest
            .write(&folder.path().join("kernel"))
            .context("write the guest")?;
        Ok(Self { ebb, folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// `ebb run` with 64 MiB unless `options` say otherwise, an API, no input, and its messages in the file `stderr`.
    fn command(&self, options: &[&str]) -> Result<Command> {
        let stderr = File::create(self.path("stderr")).context("make stderr")?;
        let mut command = Command::new(&self.ebb);
        command
            .args(["run", "--api-socket", "api", "--kernel"])
            .arg(self.path("kernel"))
            .args(options)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        if !options.contains(&"--memory") {
            command.args(["--memory", "size=64M"]);
        }
        Ok(command)
    }

    fn start(&self, options: &[&str]) -> Result<Monitor> {
        Monitor::start(&mut self.command(options)?)
    }

    /// Starts a monitor and waits until its API answers.
    fn running(&self, options: &[&str]) -> Result<Monitor> {
        let mut monitor = self.start(options)?;
        self.until_it_answers(&mut monitor)?;
        Ok(monitor)
    }

    /// It still answers, and SIGTERM ends it.
    fn ends_at_a_signal(&self, monitor: &mut Monitor) -> Result<()> {
        self.until_it_answers(monitor)?;
        monitor.signal(Signal::TERM);
        assert_eq!(monitor.wait()?.code(), Some(0));
        Ok(())
    }

    fn until_it_answers(&self, monitor: &mut Monitor) -> Result<()> {
        let pid = monitor.pid();
        until_often("the API answers", PATIENCE, || {
            if let Some(status) = monitor.0.try_wait().context("wait")? {
                let text = format!("it has ended: {status}\n{}", self.text("stderr"));
                return Err(ebb_harness::Error::new(text));
            }
            let api = Api::new(&self.path("api"));
            Ok(api.is_running(pid).then_some(()))
        })
    }
}

impl Monitor {
    fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn().context("start the monitor")?))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn signal(&self, signal: Signal) {
        signal_to(self.pid(), signal);
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        until_often("the monitor ends", PATIENCE, || {
            self.0.try_wait().context("wait")
        })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest that only halts.
fn idle() -> Program {
    let mut guest = Program::kernel();
    guest.halt();
    guest
}

#[test]
fn output_that_nobody_reads_holds_up_nothing() -> Result<()> {
    let mut guest = Program::kernel();
    guest.output_byte(SERIAL, b'x', u64::MAX);
    let bench = Bench::new(&guest)?;
    let (_reader, writer) = std::io::pipe().context("pipe")?;
    let mut command = bench.command(&[])?;
    let to_monitor = writer.try_clone().context("duplicate a pipe")?;
    let mut monitor = Monitor::start(command.stdout(to_monitor))?;
    drop(command);
    until("the pipe is full", PATIENCE, || {
        let mut fds = [PollFd::new(&writer, PollFlags::OUT)];
        let room = poll(&mut fds, Some(&Timespec::default())).context("poll")?;
        Ok((room == 0).then_some(()))
    })?;
    bench.ends_at_a_signal(&mut monitor)?;
    Ok(())
}

#[test]
fn output_that_is_read_late_is_whole() -> Result<()> {
    const BYTES: u64 = 100_000;
    let mut guest = Program::kernel();
    guest.output_byte(SERIAL, b'x', BYTES);
    guest.halt();
    let bench = Bench::new(&guest)?;
    let (mut reader, writer) = std::io::pipe().context("pipe")?;
    let mut command = bench.command(&[])?;
    let mut monitor = Monitor::start(command.stdout(writer))?;
    drop(command);
    bench.until_it_answers(&mut monitor)?;
    let mut seen = vec![0; BYTES as usize];
    reader.read_exact(&mut seen).context("read the console")?;
    assert!(seen.iter().all(|byte| *byte == b'x'));
    monitor.signal(Signal::TERM);
    assert_eq!(monitor.wait()?.code(), Some(0));
    Ok(())
}

#[test]
fn a_flood_of_panics_is_a_few_lines() -> Result<()> {
    let mut guest = Program::kernel();
    guest.output_byte(PVPANIC, CRASH_LOADED, 5_000);
    let bench = Bench::new(&guest)?;
    let mut monitor = bench.start(&["--serial", "null", "--log-file", "log"])?;
    assert_eq!(monitor.wait()?.code(), Some(0), "{}", bench.text("stderr"));
    let log = bench.text("log");
    let lines = log.lines().count();
    assert!(log.contains("crash kernel"), "{log}");
    // Eight, and one in each second.
    assert!(lines <= 8 + PATIENCE.as_secs() as usize, "{lines} lines");
    Ok(())
}

#[test]
fn a_log_that_nobody_reads_any_more_changes_nothing() -> Result<()> {
    let mut panics = Program::kernel();
    panics.output_byte(PVPANIC, CRASH_LOADED, 3);
    panics.output_byte(PVPANIC, PANICKED, 1);
    let mut crashes = Program::kernel();
    crashes.output_byte(PVPANIC, CRASH_LOADED, 3);
    crashes.crash();
    for (guest, code) in [(panics, 34), (crashes, 33)] {
        let bench = Bench::new(&guest)?;
        let (reader, writer) = std::io::pipe().context("pipe")?;
        drop(reader);
        let mut command = bench.command(&["--serial", "null", "-vv"])?;
        let mut monitor = Monitor::start(command.stderr(writer))?;
        assert_eq!(monitor.wait()?.code(), Some(code));
    }
    Ok(())
}

#[test]
fn a_log_that_nobody_drains_holds_up_nothing() -> Result<()> {
    let mut guest = Program::kernel();
    guest.output_byte(PVPANIC, CRASH_LOADED, 3);
    guest.halt();
    let bench = Bench::new(&guest)?;
    let (reader, mut writer) = std::io::pipe().context("pipe")?;
    let size = rustix::pipe::fcntl_getpipe_size(&reader).context("size")?;
    std::io::Write::write_all(&mut writer, &vec![b' '; size]).context("fill the pipe")?;
    let mut command = bench.command(&["--serial", "null", "-vv"])?;
    let mut monitor = Monitor::start(command.stderr(writer))?;
    bench.ends_at_a_signal(&mut monitor)?;
    drop(reader);
    Ok(())
}

#[test]
fn the_way_out_is_open_when_the_guest_takes_no_input() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let mut terminal = Terminal::open()?;
    let before = terminal.modes()?;
    let mut command = bench.command(&[])?;
    command.stdin(terminal.near()?).stdout(terminal.near()?);
    let mut monitor = Monitor::start(&mut command)?;
    until("the terminal is raw", PATIENCE, || {
        Ok(terminal.is_raw()?.then_some(()))
    })?;
    for _ in 0..20 {
        terminal.type_in(&"help! ".repeat(100))?;
    }
    terminal.type_in("\x01x")?;
    assert_eq!(monitor.wait()?.code(), Some(0));
    assert_eq!(terminal.modes()?, before);
    Ok(())
}

#[test]
fn a_killed_monitor_leaves_the_terminal_as_it_was() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let terminal = Terminal::open()?;
    let before = terminal.modes()?;
    let mut command = bench.command(&[])?;
    command.stdin(terminal.near()?).stdout(terminal.near()?);
    let mut monitor = Monitor::start(&mut command)?;
    until("the terminal is raw", PATIENCE, || {
        Ok(terminal.is_raw()?.then_some(()))
    })?;
    monitor.signal(Signal::KILL);
    monitor.wait()?;
    until_often("the terminal is as before", PATIENCE, || {
        Ok((terminal.modes()? == before).then_some(()))
    })
}

/// A shell with job control, whose terminal this is, starts the monitor in the background.
#[test]
fn a_job_in_the_background_runs() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let terminal = Terminal::open()?;
    let script = "set -m; \"$0\" run --kernel kernel --memory size=64M --api-socket api & wait";
    let mut command = Command::new("setsid");
    command
        .args(["--ctty", "sh", "-c", script])
        .arg(&bench.ebb)
        .current_dir(bench.folder.path())
        .stdin(terminal.near()?)
        .stdout(terminal.near()?)
        .stderr(terminal.near()?);
    let mut shell = Monitor::start(&mut command)?;
    let api = Api::new(&bench.path("api"));
    let ran = until_often("the API answers", PATIENCE, || Ok(api.get("/").ok()));
    ran.context(terminal.screen.tail())?;
    api.stop()?;
    shell.wait()?;
    Ok(())
}

#[test]
fn what_nohup_ignores_stays_ignored() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let mut command = Command::new("nohup");
    command
        .arg(&bench.ebb)
        .args(["run", "--kernel", "kernel", "--memory", "size=64M"])
        .args(["--api-socket", "api", "--serial", "null"])
        .current_dir(bench.folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut monitor = Monitor::start(&mut command)?;
    bench.until_it_answers(&mut monitor)?;
    let hangup = 1 << (Signal::HUP.as_raw() - 1);
    // A thread that starts another one blocks everything for a moment.
    until(
        "SIGHUP is ignored, and not blocked to be read",
        PATIENCE,
        || {
            let path = format!("/proc/{}/status", monitor.pid());
            let status = fs::read_to_string(path).context("status")?;
            let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
            let blocked = blocked.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
            Ok((blocked.context("SigBlk")? & hangup == 0).then_some(()))
        },
    )?;
    monitor.signal(Signal::HUP);
    bench.ends_at_a_signal(&mut monitor)?;
    Ok(())
}

#[test]
fn a_hangup_begins_a_new_log_file() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let mut monitor = bench.running(&["--serial", "null", "-v", "--log-file", "log"])?;
    fs::rename(bench.path("log"), bench.path("log.1")).context("rotate")?;
    monitor.signal(Signal::HUP);
    until_often("there is a new log", PATIENCE, || {
        if let Some(status) = monitor.0.try_wait().context("wait")? {
            return Err(ebb_harness::Error::new(format!("it has ended: {status}")));
        }
        Ok(bench.text("log").contains("reopened").then_some(()))
    })?;
    // The guardian's lines go there, too.
    monitor.signal(Signal::KILL);
    monitor.wait()?;
    until_often("the end is in the new log", PATIENCE, || {
        Ok(bench.text("log").contains("was killed").then_some(()))
    })
}

#[test]
fn a_launch_that_fails_leaves_no_log() -> Result<()> {
    let bench = Bench::new(&idle())?;
    fs::write(bench.path("kernel"), "no kernel at all".repeat(100)).context("write")?;
    let mut monitor = bench.start(&["--serial", "null", "--log-file", "log"])?;
    assert_eq!(monitor.wait()?.code(), Some(35));
    assert!(!bench.path("log").exists(), "{}", bench.text("log"));
    fs::write(bench.path("log"), "").context("write")?;
    let mut monitor = bench.start(&["--serial", "null", "--log-file", "log"])?;
    assert_eq!(monitor.wait()?.code(), Some(35));
    assert!(bench.path("log").exists(), "it was there before");
    Ok(())
}

#[test]
fn a_signal_ends_a_machine_that_is_being_built() -> Result<()> {
    const SIZE: u64 = 1 << 30;
    let bench = Bench::new(&idle())?;
    let memory = "size=1G,prefault=on,thp=off";
    let mut monitor = bench.start(&["--serial", "null", "--memory", memory])?;
    until_often("it populates", PATIENCE, || {
        let resident = rss(monitor.pid()).unwrap_or(0);
        Ok((resident > SIZE / 32).then_some(()))
    })?;
    monitor.signal(Signal::TERM);
    let mut most = 0;
    let status = until_often("the monitor ends", PATIENCE, || {
        most = most.max(rss(monitor.pid()).unwrap_or(0));
        monitor.0.try_wait().context("wait")
    })?;
    assert_eq!(status.code(), Some(0), "{}", bench.text("stderr"));
    assert!(most < SIZE / 8 * 7, "{most} bytes were populated");
    assert!(!bench.path("api").exists());
    Ok(())
}

#[test]
fn a_machine_that_is_being_built_tells_how_far_it_is_and_can_be_stopped() -> Result<()> {
    const SIZE: u64 = 1 << 30;
    let bench = Bench::new(&idle())?;
    let memory = "size=1G,prefault=on,thp=off";
    let mut monitor = bench.start(&["--serial", "null", "--memory", memory])?;
    let api = Api::new(&bench.path("api"));
    let populated = until_often("it populates", PATIENCE, || {
        let Ok(info) = api.get("/") else {
            return Ok(None);
        };
        assert_eq!(info["state"], "Building", "it is built already: {info}");
        assert_eq!(info["prefault"]["total_bytes"], SIZE);
        let populated = info["prefault"]["populated_bytes"].as_u64();
        Ok(populated.filter(|bytes| *bytes > 0))
    })?;
    assert!(populated < SIZE, "{populated}");
    api.stop()?;
    assert_eq!(monitor.wait()?.code(), Some(0), "{}", bench.text("stderr"));
    assert!(!bench.path("api").exists());
    Ok(())
}

#[test]
fn a_lock_of_somebody_else_does_not_block() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let mut options = OpenOptions::new();
    let file = options.create(true).write(true).truncate(true);
    let file = file.open(bench.path("api.memory")).context("lock file")?;
    flock(&file, FlockOperation::LockExclusive).context("lock")?;
    let mut monitor = bench.running(&["--serial", "null"])?;
    let said = bench.text("stderr");
    assert!(
        said.contains("api.memory") && said.contains("lock"),
        "{said}"
    );
    monitor.signal(Signal::TERM);
    assert_eq!(monitor.wait()?.code(), Some(0));
    Ok(())
}

/// Whoever restarts a killed machine does so at once: its disk is free then, and its socket stays the new one's.
#[test]
fn a_killed_machine_is_restarted_at_once() -> Result<()> {
    const ROUNDS: u32 = 5;
    let bench = Bench::new(&idle())?;
    fs::write(bench.path("disk"), [0; 4096]).context("make a disk")?;
    let options = [
        "--serial",
        "null",
        "--disk",
        "path=disk",
        "--memory",
        "size=256M,thp=off,prefault=on",
    ];
    let mut monitor = bench.running(&options)?;
    for round in 0..ROUNDS {
        monitor.signal(Signal::KILL);
        monitor.wait()?;
        let next = bench.running(&options);
        monitor = next.context(format_args!("round {round}"))?;
        // When all that looked after the dead one is gone, the living one still has its socket.
        let folder = bench.folder.path();
        until_often("only one guardian is left", PATIENCE, || {
            let all = ebb_harness::host::relatives(folder)?;
            let guardians = all.iter().filter(|it| it.name == "ebb-guardian");
            Ok((guardians.count() == 1).then_some(()))
        })?;
        UnixStream::connect(bench.path("api")).context(format_args!("round {round}"))?;
    }
    monitor.signal(Signal::TERM);
    assert_eq!(monitor.wait()?.code(), Some(0));
    Ok(())
}

/// Half a request keeps no machine alive.
#[test]
fn a_client_that_stops_in_the_middle_does_not_delay_the_end() -> Result<()> {
    let bench = Bench::new(&idle())?;
    let mut monitor = bench.running(&["--serial", "null"])?;
    let mut half = UnixStream::connect(bench.path("api")).context("connect")?;
    std::io::Write::write_all(&mut half, b"GET / HT").context("send")?;
    monitor.signal(Signal::TERM);
    assert_eq!(monitor.wait()?.code(), Some(0));
    Ok(())
}
