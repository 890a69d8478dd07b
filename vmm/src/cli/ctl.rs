//! `ebb ctl`: controls a running machine through its API.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ebb_vmm::api::{self, ClientError};
use ebb_vmm::config::{
    DiskEngine, SocketSpec, TeardownSpec, format_size, human, parse_keys, parse_size,
};
use ebb_vmm::control::{
    ArenaState, AutoBalloonState, BalloonDoing, BalloonState, DriveState, FreePages, InstanceInfo,
    InstanceState, LazyMemoryState, ReclaimOutcome, ReportingMode, ReportingState, TeardownState,
};
use ebb_vmm::exit;
use ebb_vmm::guardian::lock;
use ebb_vmm::guest_kernel::NoteSource;
use hyper::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Time limit for requests that only read or change a setting.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a reclaim.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(3600);

/// Time limit for a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Control a running machine
///
/// Exit status: 0 done, 1 refused or failed, 35 bad arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path of the socket, as given to `ebb run --api-socket`
    #[arg(long, value_name = "PATH", alias = "api-sock")]
    api_socket: SocketSpec,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show the state of the machine, its balloon and its lazily free memory
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show the balloon, or set its size: how much the guest should hand back, in whole MiB
    Balloon {
        /// For instance 512M; a balloon that runs itself does not go below that
        #[arg(value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Return up to this much lazily freed memory to the host now
    Reclaim {
        /// For instance 512M
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Show how memory will be freed at the end, or change it: workers=N, batch=SIZE
    Teardown {
        /// For instance workers=4 or batch=1G
        #[arg(value_name = "KEY=VALUE", value_parser = parse_keys::<TeardownSpec>)]
        settings: Vec<TeardownSpec>,
    },
    /// Pause the machine: no vCPU runs and no device uses its memory until it is resumed
    Pause,
    /// Let a paused machine run again
    Resume,
    /// Show the disks, or have one take on the size that its file has now, or another file
    Disk {
        /// For instance disk0, the first one on the command line
        disk: Option<String>,
        /// The file that it shall be on, in a folder that `ebb run --allow-paths` names
        #[arg(long, requires = "disk")]
        path: Option<PathBuf>,
    },
    /// Save the machine to two new files, from which `ebb restore` starts it; it is paused meanwhile
    Snapshot {
        /// The file for the state
        #[arg(long, value_name = "FILE")]
        state: PathBuf,
        /// The file for the memory
        #[arg(long, value_name = "FILE")]
        memory: PathBuf,
        /// Save only what is new since the machine was restored; to restore it takes the memory files of then, too
        #[arg(long)]
        diff: bool,
    },
    /// End the machine
    Stop,
    /// Ask the guest to shut down, by Ctrl-Alt-Del, and wait; end the machine if it does not
    ///
    /// The kernel needs the drivers i8042 and atkbd, and the first process must handle Ctrl-Alt-Del: systemd does, by a
    /// reboot, which ends the machine.
    Shutdown {
        /// How long the guest may take, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
    },
    /// Wait until the machine has ended
    Wait {
        /// Wait until its memory is free, too; works also for a machine that has ended already
        #[arg(long, required = true)]
        memory_free: bool,
    },
}

/// Runs the subcommand and returns the process's exit status.
pub fn main(args: Args) -> u8 {
    let socket = args.api_socket.path;
    let done = match args.command {
        Command::Status { json } => status(&socket, json),
        Command::Balloon { size: None } => show_balloon(&socket),
        Command::Balloon { size: Some(size) } if !size.is_multiple_of(1 << 20) => {
            let size = format_size(size);
            super::complain(&format!(
                "balloon {size}: give whole MiB, for instance 512M"
            ));
            return exit::BAD_ARGUMENTS;
        }
        Command::Balloon { size: Some(size) } => balloon(&socket, size),
        Command::Reclaim { size: 0 } => {
            super::complain(&"reclaim 0: give more, for instance 512M");
            return exit::BAD_ARGUMENTS;
        }
        Command::Reclaim { size } => reclaim(&socket, size),
        Command::Teardown { settings } if settings.is_empty() => teardown(&socket),
        Command::Teardown { settings } => set_teardown(&socket, &settings),
        Command::Pause => set_state(&socket, "Paused"),
        Command::Resume => set_state(&socket, "Resumed"),
        Command::Disk { disk: None, .. } => disks(&socket),
        Command::Disk {
            disk: Some(disk),
            path,
        } => update_disk(&socket, &disk, path.as_deref()),
        Command::Snapshot {
            state,
            memory,
            diff,
        } => snapshot(&socket, &state, &memory, diff),
        Command::Stop => stop(&socket),
        Command::Shutdown { timeout } => shutdown(&socket, Duration::from_secs(timeout)),
        Command::Wait { memory_free: _ } => return wait(&socket),
    };
    match done {
        Ok(text) => {
            if !text.is_empty() {
                super::say(&text);
            }
            exit::STOP
        }
        Err(error) => {
            super::complain(&error);
            exit::FAILED
        }
    }
}

fn status(socket: &Path, json: bool) -> Result<String, ClientError> {
    let info = get(socket, "/")?;
    let machine: InstanceInfo = parse(info.clone())?;
    if matches!(
        machine.state,
        InstanceState::NotStarted | InstanceState::Building
    ) {
        // It has nothing else to tell yet.
        return Ok(match json {
            true => format!("{:#}", json!({ "info": info })),
            false => format!("machine      {}", describe_machine(&machine)),
        });
    }
    let balloon = if_present(get(socket, "/balloon"))?;
    let lazy = get(socket, "/lazy-memory")?;
    let arenas = get(socket, "/arenas")?;
    if json {
        let all = json!({
            "info": info, "balloon": balloon, "lazy_memory": lazy, "arenas": arenas,
        });
        return Ok(format!("{all:#}"));
    }
    let balloon: Option<BalloonState> = parse(balloon)?;
    let lazy: LazyMemoryState = parse(lazy)?;
    let balloon = balloon.as_ref().map(describe_balloon);
    let mut lines = vec![
        format!("machine      {}", describe_machine(&machine)),
        format!("balloon      {}", balloon.as_deref().unwrap_or("none")),
        format!("lazy memory  {}", describe_lazy(&lazy)),
    ];
    lines.push(format!(
        "free lists   {}",
        describe_free_pages(&lazy.free_pages)
    ));
    lines.extend(describe_reporting(&lazy.reporting).map(|text| format!("reporting    {text}")));
    lines.extend(parse::<Vec<_>>(arenas)?.iter().map(describe_arena));
    Ok(lines.join("\n"))
}

fn show_balloon(socket: &Path) -> Result<String, ClientError> {
    parse(get(socket, "/balloon")?).map(|balloon| describe_balloon(&balloon))
}

fn balloon(socket: &Path, size: u64) -> Result<String, ClientError> {
    let body = json!({ "amount_mib": size >> 20 });
    api::request(socket, Method::PATCH, "/balloon", Some(&body), TIMEOUT)?;
    Ok(String::new())
}

fn reclaim(socket: &Path, size: u64) -> Result<String, ClientError> {
    let timeout_ms = u64::try_from(RECLAIM_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
    let body = json!({ "amount_bytes": size, "timeout_ms": timeout_ms });
    let path = "/lazy-memory/reclaim";
    let limit = RECLAIM_TIMEOUT + TIMEOUT;
    let answer = api::request(socket, Method::PUT, path, Some(&body), limit)?;
    let outcome: ReclaimOutcome = parse(answer)?;
    let time = Duration::from_micros(outcome.duration_us);
    let bytes = human(outcome.reclaimed_bytes);
    let more = if outcome.cut_short {
        ", then it was cut short"
    } else {
        ""
    };
    Ok(format!("{bytes} returned to the host in {time:?}{more}"))
}

fn set_state(socket: &Path, state: &str) -> Result<String, ClientError> {
    let body = json!({ "state": state });
    api::request(socket, Method::PATCH, "/vm", Some(&body), TIMEOUT)?;
    Ok(String::new())
}

/// The monitor may have another working directory, and compares real paths, so it gets such.
fn whole(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize();
    match (folder, path.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

fn snapshot(socket: &Path, state: &Path, memory: &Path, diff: bool) -> Result<String, ClientError> {
    let machine: InstanceInfo = parse(get(socket, "/")?)?;
    set_state(socket, "Paused")?;
    let kind = if diff { "Diff" } else { "Full" };
    let body = json!({
        "snapshot_type": kind, "snapshot_path": whole(state), "mem_file_path": whole(memory),
    });
    let path = "/snapshot/create";
    let saved = api::request(socket, Method::PUT, path, Some(&body), SNAPSHOT_TIMEOUT);
    if machine.state == InstanceState::Running {
        set_state(socket, "Resumed")?;
    }
    saved.map(|_| String::new())
}

fn stop(socket: &Path) -> Result<String, ClientError> {
    let body = json!({ "action_type": "InstanceStop" });
    api::request(socket, Method::PUT, "/actions", Some(&body), TIMEOUT)?;
    Ok(String::new())
}

fn shutdown(socket: &Path, timeout: Duration) -> Result<String, ClientError> {
    let start = Instant::now();
    let body = json!({ "action_type": "SendCtrlAltDel" });
    api::request(socket, Method::PUT, "/actions", Some(&body), TIMEOUT)?;
    // Any other error may be that of a busy monitor.
    let has_ended = |error: &ClientError| matches!(error, ClientError::Connect { .. });
    while start.elapsed() < timeout {
        if get(socket, "/").is_err_and(|error| has_ended(&error)) {
            return Ok(String::new());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let seconds = timeout.as_secs();
    match stop(socket) {
        Err(error) if has_ended(&error) => Ok(String::new()),
        stopped => stopped
            .map(|_| format!("the guest did not shut down within {seconds} s and was stopped")),
    }
}

fn teardown(socket: &Path) -> Result<String, ClientError> {
    let state: TeardownState = parse(get(socket, "/teardown")?)?;
    let behind = if state.guardian {
        "behind the monitor's end"
    } else {
        "before the monitor ends"
    };
    Ok(format!(
        "{} workers in batches of {}, {behind}",
        state.workers,
        human(state.batch_bytes),
    ))
}

fn disks(socket: &Path) -> Result<String, ClientError> {
    let disks: Vec<DriveState> = parse(get(socket, "/drives")?)?;
    let describe = |disk: &DriveState| {
        let readonly = if disk.is_read_only { ", read-only" } else { "" };
        let engine = match disk.engine {
            DiskEngine::Threads => "threads",
            _ => "io_uring",
        };
        let path = disk.path_on_host.display();
        let size = human(disk.size_bytes);
        format!("{}  {path}, {size}{readonly}, {engine}", disk.drive_id)
    };
    Ok(disks.iter().map(describe).collect::<Vec<_>>().join("\n"))
}

fn update_disk(socket: &Path, disk: &str, path: Option<&Path>) -> Result<String, ClientError> {
    let request = format!("/drives/{disk}");
    let body = json!({ "drive_id": disk, "path_on_host": path });
    api::request(socket, Method::PATCH, &request, Some(&body), TIMEOUT)?;
    let disks: Vec<DriveState> = parse(get(socket, "/drives")?)?;
    let state = disks.iter().find(|it| it.drive_id == disk);
    let size = state.map_or_else(String::new, |it| human(it.size_bytes));
    Ok(format!("{disk} has {size}"))
}

fn set_teardown(socket: &Path, settings: &[TeardownSpec]) -> Result<String, ClientError> {
    let mut body = json!({});
    for spec in settings {
        if let Some(workers) = spec.workers {
            body["workers"] = workers.into();
        }
        if let Some(batch) = spec.batch {
            body["batch_bytes"] = batch.into();
        }
    }
    let asked = api::request(socket, Method::PATCH, "/teardown", Some(&body), TIMEOUT);
    match (asked, body["workers"].as_u64()) {
        // The monitor has ended. The process that frees its memory holds the lock and takes a new number of workers.
        (Err(ClientError::Connect { .. }), Some(workers))
            if matches!(lock::request_workers(socket, workers), Ok(true)) =>
        {
            Ok(
                "the machine has ended; its memory is freed with so many workers from now on"
                    .to_owned(),
            )
        }
        (asked, _) => asked.map(|_| String::new()),
    }
}

/// Waits until the machine's memory is free. Draws a progress bar if standard error is a terminal.
fn wait(socket: &Path) -> u8 {
    let shown = io::stderr().is_terminal();
    let mut last = None;
    let waited = lock::wait(socket, |done, total| {
        if shown && total > 0 && last != Some(done) {
            last = Some(done);
            let filled = usize::try_from(done.saturating_mul(40) / total)
                .unwrap_or(40)
                .min(40);
            let (done, total) = (human(done), human(total));
            let _ = write!(
                io::stderr(),
                "\r[{:<40}] {done} of {total}  ",
                "#".repeat(filled)
            );
        }
    });
    if last.is_some() {
        let _ = writeln!(io::stderr());
    }
    match waited {
        Ok(()) => exit::STOP,
        Err(error) => {
            super::complain(&format!(
                "the lock beside {}: {error}; wait as the user who runs the machine",
                socket.display()
            ));
            exit::FAILED
        }
    }
}

fn get(socket: &Path, path: &str) -> Result<Value, ClientError> {
    api::request(socket, Method::GET, path, None, TIMEOUT)
}

/// Turns the refusal "no such device" into null.
fn if_present(answer: Result<Value, ClientError>) -> Result<Value, ClientError> {
    match answer {
        Err(ClientError::Refused { status: 400, .. }) => Ok(Value::Null),
        answer => answer,
    }
}

/// Reads an answer of the API.
fn parse<T: DeserializeOwned>(answer: Value) -> Result<T, ClientError> {
    serde_json::from_value(answer).map_err(|error| ClientError::Broken {
        what: "the answer is not understood",
        cause: error.to_string(),
    })
}

fn describe_machine(info: &InstanceInfo) -> String {
    let seconds = info.uptime_ms / 1000;
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    let uptime = match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{seconds} s"),
        (0, minutes) => format!("{minutes} min {seconds} s"),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    };
    let doing = match (info.state, info.prefault) {
        (InstanceState::NotStarted, _) => "not started".to_owned(),
        (InstanceState::Running, _) => "running".to_owned(),
        (InstanceState::Paused, _) => "paused".to_owned(),
        (InstanceState::Building, None) => "being built".to_owned(),
        (InstanceState::Building, Some(prefault)) => {
            let (done, total) = (human(prefault.populated_bytes), human(prefault.total_bytes));
            format!("being built ({done} of {total} populated)")
        }
    };
    format!(
        "{}, {doing} for {uptime}, process {}, {} {}",
        info.id, info.pid, info.app_name, info.vmm_version,
    )
}

fn describe_balloon(balloon: &BalloonState) -> String {
    let frees = if balloon.lazy {
        "lazy"
    } else {
        "not lazy: no driver yet, or one that does not tell before it reuses a page"
    };
    let (actual, target) = (
        human(balloon.actual_mib << 20),
        human(balloon.amount_mib << 20),
    );
    let auto = balloon.auto.as_ref().map(describe_auto);
    format!("{actual} of {target}, {frees}{}", auto.unwrap_or_default())
}

fn describe_auto(auto: &AutoBalloonState) -> String {
    let doing = match auto.doing {
        BalloonDoing::Idle => "nothing is needed",
        BalloonDoing::Inflating => "grows",
        BalloonDoing::Deflating => "shrinks, there has been plenty for a while",
        BalloonDoing::NoDriver => "waits for a driver that tells before it reuses a page",
        BalloonDoing::NoStatistics => "waits for the guest's statistics",
        BalloonDoing::Following => "waits for the guest to follow",
        BalloonDoing::OtherSources => "waits, memory that the guest does not use is taken first",
        BalloonDoing::NotLasting => "waits, memory has not been short for long",
        BalloonDoing::Reserve => "holds, the guest has no more than its reserve",
        BalloonDoing::Faults => "rests, the guest had to read pages from disk again",
        BalloonDoing::OutOfMemory => "rests, the guest has killed a process for lack of memory",
        BalloonDoing::TakenBack => "rests, the guest took pages back by itself",
        BalloonDoing::Stuck => "rests, the guest did not hand over what it was asked for",
    };
    let (floor, reserve) = (human(auto.floor_mib << 20), human(auto.reserve_mib << 20));
    format!("; runs itself above {floor}, leaves {reserve} available to the guest: {doing}")
}

fn describe_lazy(state: &LazyMemoryState) -> String {
    let lazy = &state.lazy;
    format!(
        "{} free and still here, {} returned to the host, {} of both resident; so far {} freed, {} reused, {} reclaimed",
        human(lazy.lazy_bytes),
        human(lazy.discarded_bytes),
        human(state.reclaim.lazy_resident_bytes),
        human(lazy.freed_bytes_total),
        human(lazy.reused_bytes_total),
        human(lazy.reclaimed_bytes_total),
    )
}

fn describe_free_pages(free: &FreePages) -> String {
    let Some(kernel) = &free.state.kernel else {
        let why_not = free
            .state
            .why_not
            .as_deref()
            .unwrap_or("no reason is known");
        return format!("not read: {why_not}");
    };
    let source = match free.state.note_from {
        Some(NoteSource::FwCfg) => " (told by fw_cfg)",
        Some(NoteSource::Hypercall) => " (told by a hypercall)",
        None => "",
    };
    format!(
        "read from Linux {kernel}{source}; {} free in blocks and resident; so far {} taken",
        human(free.stats.resident_bytes),
        human(free.stats.taken_bytes_total),
    )
}

fn describe_arena(arena: &ArenaState) -> String {
    format!(
        "arena        {}, {}: {} free and still here, {} returned to the host; so far {} reclaimed",
        arena.id,
        human(arena.size_bytes),
        human(arena.stats.lazy_bytes),
        human(arena.stats.discarded_bytes),
        human(arena.stats.reclaimed_bytes_total),
    )
}

/// Free pages that the guest has reported, and what was done with them; `None` where reporting is off.
fn describe_reporting(state: &ReportingState) -> Option<String> {
    let mode = match state.mode {
        ReportingMode::Off => return None,
        ReportingMode::Eager => "eager",
        ReportingMode::Lazy => "lazy",
    };
    Some(format!(
        "{mode}; so far {} reported, {} of it returned to the host, {} there for it to take",
        human(state.found.bytes_total),
        human(state.taken.discarded_bytes_total),
        human(state.taken.marked_bytes_total),
    ))
}

#[cfg(test)]
mod tests {
    use ebb_vmm::control::Prefault;

    use super::*;

    #[test]
    fn a_status_in_words() {
        let mut info = InstanceInfo {
            id: "m".to_owned(),
            state: InstanceState::Running,
            vmm_version: "1".to_owned(),
            app_name: "Ebb".to_owned(),
            pid: 7,
            uptime_ms: 61_000,
            ..InstanceInfo::default()
        };
        assert_eq!(
            describe_machine(&info),
            "m, running for 1 min 1 s, process 7, Ebb 1"
        );
        info.state = InstanceState::Building;
        info.prefault = Some(Prefault {
            populated_bytes: 1 << 30,
            total_bytes: 4 << 30,
        });
        assert_eq!(
            describe_machine(&info),
            "m, being built (1 GiB of 4 GiB populated) for 1 min 1 s, process 7, Ebb 1"
        );
        let balloon = json!({
            "amount_mib": 512, "actual_mib": 100, "lazy": true, "deflate_on_oom": false,
            "stats_polling_interval_s": 0, "free_page_reporting": false,
        });
        let mut balloon: BalloonState = parse(balloon).unwrap();
        assert_eq!(describe_balloon(&balloon), "100 MiB of 512 MiB, lazy");
        balloon.auto = Some(AutoBalloonState {
            reserve_mib: 96,
            doing: BalloonDoing::Reserve,
            ..AutoBalloonState::default()
        });
        let text = "100 MiB of 512 MiB, lazy; runs itself above 0 B, leaves 96 MiB available to the guest: \
                    holds, the guest has no more than its reserve";
        assert_eq!(describe_balloon(&balloon), text);
        let mut state = LazyMemoryState::default();
        state.lazy.lazy_bytes = 4096;
        assert!(describe_lazy(&state).starts_with("4 KiB free and still here, 0 B returned"));
        state.free_pages.state.why_not = Some("it is off".to_owned());
        assert_eq!(
            describe_free_pages(&state.free_pages),
            "not read: it is off"
        );
        state.free_pages.state.kernel = Some("6.12.117".to_owned());
        state.free_pages.state.note_from = Some(NoteSource::FwCfg);
        state.free_pages.stats.resident_bytes = 4 << 20;
        assert_eq!(
            describe_free_pages(&state.free_pages),
            "read from Linux 6.12.117 (told by fw_cfg); 4 MiB free in blocks and resident; so far 0 B taken"
        );
        assert_eq!(describe_reporting(&state.reporting), None);
        state.reporting.mode = ReportingMode::Eager;
        state.reporting.found.bytes_total = 8192;
        state.reporting.taken.discarded_bytes_total = 4096;
        assert_eq!(
            describe_reporting(&state.reporting).unwrap(),
            "eager; so far 8 KiB reported, 4 KiB of it returned to the host, 0 B there for it to take"
        );
    }
}
