//! Firecracker mode with stock guests, as clients of Firecracker use it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use ebb_harness::Images;
use ebb_harness::error::{Context, Result};
use ebb_harness::firecracker::Firecracker;
use ebb_harness::page_server::PageServer;
use ebb_harness::wait::{LONG, until};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

fn signal(process: &Firecracker, signal: Signal) -> Result<()> {
    let pid = i32::try_from(process.child.id())
        .ok()
        .and_then(Pid::from_raw);
    kill_process(pid.context("no pid")?, signal).context("signal")
}

/// Everything that the process and its helpers say until all of them have closed standard error.
fn last_words(process: &mut Firecracker) -> Result<String> {
    let mut said = String::new();
    let stderr = process.child.stderr.as_mut().context("stderr")?;
    stderr.read_to_string(&mut said).context("read stderr")?;
    Ok(said)
}

/// A request that must fail with status 400; its message.
fn refused(process: &Firecracker, method: &str, path: &str, body: &Value) -> Result<String> {
    let answer = process.api().request(method, path, body)?;
    assert_eq!(answer.status, 400, "{method} {path}: {}", answer.body);
    Ok(answer.body["fault_message"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// Says what the machine is made of, the root device last.
fn describe(vm: &Firecracker) -> Result<()> {
    let (disk, later, log) = (vm.path("disk"), vm.path("later"), vm.path("log"));
    fs::write(&disk, vec![b'd'; 1 << 20]).context("a disk")?;
    fs::write(&later, []).context("an empty disk")?;
    let boot = Firecracker::boot_source(vm.images(), "");
    let vsock = json!({ "vsock_id": "root", "guest_cid": 3, "uds_path": vm.path("vsock") });
    for (path, body) in [
        ("/metrics", json!({ "metrics_path": vm.path("metrics") })),
        ("/logger", json!({ "log_path": log, "level": "Info" })),
        (
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 255 }),
        ),
        ("/boot-source", boot),
        (
            "/drives/later",
            json!({ "drive_id": "later", "path_on_host": later, "is_root_device": false, "rate_limiter": null }),
        ),
        (
            "/drives/root",
            json!({ "drive_id": "root", "path_on_host": disk, "is_root_device": true, "is_read_only": true }),
        ),
        // Kata Containers (Rust) may ask for it twice.
        ("/vsock", vsock.clone()),
        ("/vsock", vsock),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }),
        ),
    ] {
        vm.put(path, &body)?;
    }
    Ok(())
}

/// From the first request to a reset, which is the end by status 0.
#[test]
fn a_whole_life() -> Result<()> {
    let mut vm = Firecracker::serve()?;
    let api = vm.api();
    assert_eq!(api.get("/")?["state"], "Not started");
    assert_eq!(api.get("/")?["id"], "vm-1");
    let early = refused(&vm, "PATCH", "/vm", &json!({ "state": "Paused" }))?;
    assert!(early.contains("InstanceStart"), "{early}");
    let missing = json!({ "kernel_image_path": "/none" });
    let missing = refused(&vm, "PUT", "/boot-source", &missing)?;
    assert!(missing.contains("/none"), "{missing}");

    describe(&vm)?;
    vm.start_instance()?;
    let mut guest = vm.guest()?;
    assert_eq!(api.get("/")?["state"], "Running");
    let cmdline = guest.must("cat /proc/cmdline")?;
    assert!(cmdline.ends_with("root=/dev/vda ro"), "{cmdline}");
    assert_eq!(
        guest.must("cat /sys/block/vda/size /sys/block/vdb/size")?,
        "2048\\n0"
    );
    let again = refused(&vm, "PUT", "/drives/x", &json!({ "path_on_host": "/d" }))?;
    assert!(again.contains("only before"), "{again}");

    // A drive whose content comes later, as Kata Containers does it: the limiter is JSON in a string.
    let content = vm.path("content");
    fs::write(&content, vec![b'c'; 512 << 10]).context("content")?;
    let patch = json!({ "drive_id": "later", "path_on_host": content, "rate_limiter": "{}" });
    api.must("PATCH", "/drives/later", &patch)?;
    guest.must(
        "until [ $(cat /sys/block/vdb/size) = 1024 ]; do :; done; head -c 1 /dev/vdb | grep -q c",
    )?;

    api.set_balloon(64 << 20)?;
    until("the balloon grows", LONG, || {
        Ok((api.balloon()?.actual_mib == 64).then_some(()))
    })?;
    let balloon = api.balloon()?;
    assert!(balloon.lazy && balloon.free_page_reporting, "{balloon:?}");
    until("statistics", LONG, || {
        Ok(api.get("/balloon/statistics")?["total_memory"].as_u64())
    })?;
    api.must("PATCH", "/vm", &json!({ "state": "Paused" }))?;
    assert_eq!(api.get("/")?["state"], "Paused");
    let files = json!({ "snapshot_path": vm.path("state"), "mem_file_path": vm.path("memory") });
    let exchanged = refused(&vm, "PUT", "/snapshot/create", &files)?;
    assert!(exchanged.contains("later is on "), "{exchanged}");
    api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    vm.put("/actions", &json!({ "action_type": "FlushMetrics" }))?;
    until("a line of metrics", LONG, || {
        let metrics = fs::read_to_string(vm.path("metrics")).context("the metrics")?;
        Ok(metrics.contains("utc_timestamp_ms").then_some(()))
    })?;
    guest.send("reboot")?;
    assert_eq!(vm.wait()?.code(), Some(0), "{}", vm.console.tail());
    assert_eq!(last_words(&mut vm)?, "");
    // As Firecracker's: clients remove it, and some fail if they cannot.
    assert!(vm.path("api").exists(), "the socket is gone");
    let log = fs::read_to_string(vm.path("log")).context("the log")?;
    assert!(log.contains("machine ends: Reset"), "{log}");
    Ok(())
}

/// FIFOs and empty files of a folder, and the part of a configuration file that names them, as Kata Containers (Go) writes it: disks
/// whose content comes later, and limiters without a limit.
fn kata_devices(folder: &Path) -> Result<Value> {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    for fifo in ["log", "metrics"] {
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, path(fifo), FileType::Fifo, mode, 0).context("make a FIFO")?;
    }
    let drive = |number: u32| {
        let id = format!("drive_{number}");
        fs::write(path(&id), []).context("an empty disk")?;
        let limiter = json!({ "bandwidth": {}, "ops": {} });
        Ok(json!({
            "drive_id": id, "path_on_host": path(&id), "is_root_device": false, "is_read_only": false, "rate_limiter": limiter,
        }))
    };
    let drives = (0..KATA_DRIVES).map(drive).collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "drives": drives,
        "logger": { "log_path": path("log"), "level": "Info", "show_level": true, "show_log_origin": false },
        "metrics": { "metrics_path": path("metrics") },
    }))
}

const KATA_DRIVES: u32 = 8;

/// What was written to a FIFO whose reader this is.
fn written(fifo: &File) -> Result<String> {
    let mut bytes = [0; 16 << 10];
    let length = rustix::io::read(fifo, &mut bytes).context("read a FIFO")?;
    let bytes = bytes.get(..length).unwrap_or_default();
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The machine of a file has a vsock and starts at once; it is killed, and its helpers close standard error.
#[test]
fn a_file_describes_a_machine_that_is_killed() -> Result<()> {
    let images = Images::from_environment()?;
    let readers = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let mut file = kata_devices(readers.path())?;
    // Both ends, so that neither side waits for the other.
    let reader = |name: &str| {
        let both = File::options().read(true).write(true).clone();
        both.open(readers.path().join(name)).context("open a FIFO")
    };
    let (log, metrics) = (reader("log")?, reader("metrics")?);
    file["boot-source"] = Firecracker::boot_source(&images, "");
    file["machine-config"] = json!({ "vcpu_count": 1, "mem_size_mib": 192, "smt": false });
    file["balloon"] = Value::Null;
    let flags = |folder: &Path| {
        let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let mut file = file.clone();
        file["vsock"] = json!({ "guest_cid": 3, "uds_path": path("vsock") });
        // The file is read before the test can look.
        let _ = fs::write(folder.join("config"), file.to_string());
        [
            "--config-file",
            &path("config"),
            "--api-sock",
            &path("api"),
            "--event-monitor",
            &path("events"),
            "--no-seccomp",
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let mut vm = Firecracker::start(flags)?;
    vm.answers()?;
    let mut guest = vm.guest()?;
    assert_eq!(vm.api().get("/")?["state"], "Running");
    assert!(written(&metrics)?.contains("utc_timestamp_ms"));
    let content = readers.path().join("content");
    fs::write(&content, vec![b'c'; 1 << 20]).context("content")?;
    let patch = json!({ "drive_id": "drive_5", "path_on_host": content, "rate_limiter": {} });
    vm.api().must("PATCH", "/drives/drive_5", &patch)?;
    let disks = guest.must(
        "until [ $(cat /sys/block/vdf/size) = 2048 ]; do :; done; ls /sys/block | grep -c vd",
    )?;
    assert_eq!(disks, KATA_DRIVES.to_string());
    assert!(guest.number("meminfo", "MemTotal")? < 192 << 20);
    assert!(vm.api().balloon()?.free_page_reporting, "unasked");
    assert!(vm.path("vsock").exists());
    let events = fs::read_to_string(vm.path("events")).context("the events")?;
    assert!(events.contains("\"event\":\"running\""), "{events}");
    signal(&vm, Signal::KILL)?;
    let said = last_words(&mut vm)?;
    assert!(said.contains("killed by signal 9"), "{said}");
    let log = written(&log)?;
    assert!(log.contains("killed by signal 9"), "{log}");
    assert!(vm.path("api").exists() && vm.path("vsock").exists());
    Ok(())
}

/// Flags that clients and their jailer give, and that change nothing.
const ACCEPTED: &[&str] = &[
    "--boot-timer",
    "--show-level",
    "--show-log-origin",
    "--module=vmm",
    "--mmds-size-limit=51200",
    "--http-api-max-payload-size=51200",
    "--start-time-us=1",
    "--start-time-cpu-us=1",
    "--parent-cpu-time-us=1",
    "--seccomp-filter=/none",
    "--level=Warning",
    "--version",
];

/// A process without a machine: signals end it, and mistakes have Firecracker's exit codes.
#[test]
fn a_process_without_a_machine_ends() -> Result<()> {
    for sent in [Signal::TERM, Signal::HUP, Signal::INT] {
        let mut vm = Firecracker::serve()?;
        signal(&vm, sent)?;
        assert_eq!(vm.wait()?.code(), Some(0), "{sent:?}");
        assert_eq!(last_words(&mut vm)?, "");
        assert!(vm.path("api").exists());
    }
    let mut vm = Firecracker::serve()?;
    // A machine that cannot be built: the client hears of it, and may try again.
    let images = vm.images().clone();
    let vsock = vm.path("vsock");
    vm.put("/boot-source", &Firecracker::boot_source(&images, ""))?;
    vm.put("/vsock", &json!({ "guest_cid": 3, "uds_path": vsock }))?;
    let other = UnixListener::bind(&vsock).context("bind")?;
    let failed = refused(
        &vm,
        "PUT",
        "/actions",
        &json!({ "action_type": "InstanceStart" }),
    )?;
    assert!(failed.contains("vsock"), "{failed}");
    drop(other);
    vm.start_instance()?;
    assert!(vsock.exists());
    signal(&vm, Signal::HUP)?;
    assert_eq!(vm.wait()?.code(), Some(0));
    for (flags, code) in [
        (&["--colour"][..], 153),
        (&["--no-api"], 153),
        (&["--metadata", "/m"], 153),
        (&["--config-file", "/none"], 152),
        (&["--api-sock", "/none/api"], 1),
        (&["--describe-snapshot", "/none"], 1),
        (&["--version"], 0),
        (ACCEPTED, 0),
    ] {
        let output = Command::new(&images.ebb)
            .arg("firecracker")
            .args(flags)
            .output();
        let output = output.context("ebb firecracker")?;
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {output:?}");
        assert_eq!(output.stdout.starts_with(b"Firecracker v1."), code == 0);
    }
    let version = Command::new(&images.ebb)
        .args(["firecracker", "--snapshot-version"])
        .output();
    assert_eq!(version.context("--snapshot-version")?.stdout, b"v3.0.0\n");
    Ok(())
}

/// A machine is saved by one process and taken up by another, which is given nothing else.
#[test]
fn a_snapshot_is_loaded() -> Result<()> {
    let mut saved = Firecracker::serve()?;
    let boot = Firecracker::boot_source(saved.images(), "");
    saved.put("/boot-source", &boot)?;
    saved.start_instance()?;
    saved.guest()?.must("echo kept > /dev/shm/word")?;
    let (state, memory) = (saved.path("state"), saved.path("memory"));
    let files = json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory });
    let running = refused(&saved, "PUT", "/snapshot/create", &files)?;
    assert!(running.contains("pause it first"), "{running}");
    let pause = json!({ "state": "Paused" });
    saved.api().must("PATCH", "/vm", &pause)?;
    saved.put("/snapshot/create", &files)?;
    signal(&saved, Signal::KILL)?;

    let mut vm = Firecracker::serve()?;
    let missing = json!({ "snapshot_path": "/none", "mem_file_path": memory });
    let missing = refused(&vm, "PUT", "/snapshot/load", &missing)?;
    assert!(missing.contains("/none"), "{missing}");
    let backend = json!({ "backend_path": memory, "backend_type": "File" });
    let load = json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": true });
    vm.put("/snapshot/load", &load)?;
    assert_eq!(vm.api().get("/")?["state"], "Running");
    let mut guest = vm.restored_guest()?;
    assert_eq!(guest.must("cat /dev/shm/word")?, "kept");

    // What is new since then becomes a difference, that and what is below it one snapshot, and a page server has its memory.
    guest.must("echo new > /dev/shm/more")?;
    vm.api().must("PATCH", "/vm", &pause)?;
    let (state2, memory2) = (vm.path("state2"), vm.path("memory2"));
    let files =
        json!({ "snapshot_type": "Diff", "snapshot_path": state2, "mem_file_path": memory2 });
    vm.put("/snapshot/create", &files)?;
    signal(&vm, Signal::KILL)?;
    let (state3, memory3) = (vm.path("state3"), vm.path("memory3"));
    let mut merge = Command::new(&vm.images().ebb);
    merge.arg("merge").arg("--state").arg(&state2);
    merge
        .arg("--memory")
        .arg(&memory)
        .arg("--memory")
        .arg(&memory2);
    merge
        .arg("--to-state")
        .arg(&state3)
        .arg("--to-memory")
        .arg(&memory3);
    let output = merge.output().context("ebb merge")?;
    assert!(output.status.success(), "{output:?}");
    let server = env!("CARGO_BIN_EXE_ebb-page-server");
    let server = PageServer::start(server, &memory3, "0")?;

    let mut vm = Firecracker::serve()?;
    let served = |socket: &Path| {
        let backend = json!({ "backend_path": socket, "backend_type": "Uffd" });
        json!({ "snapshot_path": state3, "mem_backend": backend, "resume_vm": true })
    };
    let missing = refused(&vm, "PUT", "/snapshot/load", &served(Path::new("/none")))?;
    assert!(missing.contains("/none: the page server"), "{missing}");
    vm.put("/snapshot/load", &served(server.socket()))?;
    let mut guest = vm.restored_guest()?;
    assert_eq!(
        guest.must("echo $(cat /dev/shm/word /dev/shm/more)")?,
        "kept new"
    );
    guest.send("exit")?;
    assert_eq!(vm.wait()?.code(), Some(0), "{}", vm.console.tail());
    Ok(())
}
