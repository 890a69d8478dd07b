//! The API over a real socket, with a machine that only remembers what it was told.

mod document;
mod drives;
mod lasting;
mod names;
mod openapi;
mod prometheus;
mod scrape;
mod waiting;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use hyper::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ClientError, Front, Server, request, serve};
use crate::config::{DiskEngine, MachineConfig, MachineSpec, parse_keys};
use crate::control::{
    ArenaState, BalloonState, BalloonStatistics, CommandError, Controller, DeviceState,
    DevicesState, DriveState, DriveUpdate, Instance, InstanceInfo, LazyMemoryState, NetUpdate,
    ReclaimOutcome, SnapshotKind, TeardownState,
};

/// How long a test waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A machine that remembers what it was told to do. A reclaim waits until the test lets it go on.
struct Machine {
    told: Mutex<Vec<String>>,
    reclaim: Mutex<Receiver<()>>,
    config: MachineConfig,
}

impl Machine {
    fn note(&self, what: impl Into<String>) {
        self.told.lock().unwrap().push(what.into());
    }
}

impl Instance for Machine {
    fn info(&self) -> InstanceInfo {
        InstanceInfo {
            id: "test".to_owned(),
            ..InstanceInfo::default()
        }
    }

    fn config(&self) -> &MachineConfig {
        &self.config
    }

    fn stop(&self) {
        self.note("stop");
    }

    fn flush_metrics(&self) -> Result<(), CommandError> {
        self.note("flush");
        Ok(())
    }

    fn press_ctrl_alt_del(&self) -> Result<(), CommandError> {
        self.note("ctrl-alt-del");
        Ok(())
    }
}

impl Controller for Machine {
    fn balloon(&self) -> Result<BalloonState, CommandError> {
        Ok(BalloonState {
            amount_mib: 64,
            actual_mib: 32,
            deflate_on_oom: true,
            stats_polling_interval_s: 5,
            lazy: true,
            free_page_reporting: true,
            auto: None,
        })
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), CommandError> {
        self.note(format!("balloon {bytes}"));
        if bytes <= 1 << 30 {
            return Ok(());
        }
        Err(CommandError::OutOfBounds {
            what: "amount",
            value: bytes,
            bound: "the guest has less".to_owned(),
        })
    }

    fn balloon_statistics(&self) -> Result<BalloonStatistics, CommandError> {
        let mut statistics = BalloonStatistics {
            target_mib: 64,
            ..BalloonStatistics::default()
        };
        statistics.guest.free_memory = Some(4096);
        Ok(statistics)
    }

    fn set_statistics_interval(&self, seconds: u16) -> Result<(), CommandError> {
        self.note(format!("interval {seconds}"));
        assert_ne!(seconds, 13, "a bug in the machine");
        Ok(())
    }

    fn lazy_memory(&self) -> LazyMemoryState {
        let mut state = LazyMemoryState::default();
        state.lazy.lazy_bytes = 4096;
        state
    }

    fn devices(&self) -> DevicesState {
        DevicesState {
            disks: vec![DeviceState {
                id: "blk0".to_owned(),
                ..DeviceState::default()
            }],
            ..DevicesState::default()
        }
    }

    fn arenas(&self) -> Vec<ArenaState> {
        vec![ArenaState {
            id: "heap".to_owned(),
            ..ArenaState::default()
        }]
    }

    fn reclaim(&self, bytes: u64, timeout: Option<Duration>) -> ReclaimOutcome {
        let within = timeout.map(|timeout| format!(" within {timeout:?}"));
        self.note(format!("reclaim {bytes}{}", within.unwrap_or_default()));
        self.reclaim.lock().unwrap().recv().unwrap();
        ReclaimOutcome {
            reclaimed_bytes: bytes,
            duration_us: 1,
            cut_short: timeout.is_some(),
        }
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.note("pause");
        Ok(())
    }

    fn resume(&self) -> Result<(), CommandError> {
        self.note("resume");
        Err(CommandError::Failed("the machine is ending".to_owned()))
    }

    fn drives(&self) -> Vec<DriveState> {
        vec![DriveState {
            drive_id: "disk0".to_owned(),
            path_on_host: "/d".into(),
            is_read_only: true,
            size_bytes: 512,
            engine: DiskEngine::IoUring,
        }]
    }

    fn update_drive(&self, id: &str, update: &DriveUpdate) -> Result<(), CommandError> {
        self.note(format!("{id} {:?} {:?}", update.path, update.limits));
        Ok(())
    }

    fn update_net(&self, id: &str, update: &NetUpdate) -> Result<(), CommandError> {
        self.note(format!("net {id} {update:?}"));
        Ok(())
    }

    fn snapshot(
        &self,
        kind: SnapshotKind,
        memory: PathBuf,
        state: PathBuf,
    ) -> Result<(), CommandError> {
        let (memory, state) = (memory.display(), state.display());
        self.note(format!("{kind:?} {memory} {state}"));
        Ok(())
    }

    fn teardown(&self) -> TeardownState {
        TeardownState {
            workers: 3,
            batch_bytes: 4096,
            guardian: true,
        }
    }

    fn set_teardown(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError> {
        self.note(format!("teardown {workers:?} {batch:?}"));
        Ok(())
    }
}

/// A served machine.
struct Bench {
    folder: TempDir,
    machine: Arc<Machine>,
    go: Sender<()>,
    server: Server,
}

impl Bench {
    fn new() -> Self {
        let bench = Self::being_built();
        bench.server.set_machine(bench.machine.clone());
        bench
    }

    fn being_built() -> Self {
        Self::of(false)
    }

    fn of(as_firecracker: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, "MZ").unwrap();
        let kernel = kernel.to_str().unwrap();
        let spec = MachineSpec::try_parse_from(["--kernel", kernel, "--balloon=size=64M"]).unwrap();
        let mut config = spec.validate().unwrap();
        config.as_firecracker = as_firecracker;
        config.nets = vec![parse_keys("tap=tap0,mac=02:00:00:00:00:01").unwrap()];
        config.vsock = Some(parse_keys("cid=3,path=/tmp/v").unwrap());
        config.disks = vec![parse_keys("path=/d,readonly=on").unwrap()];
        let (go, reclaim) = channel();
        let machine = Arc::new(Machine {
            told: Mutex::default(),
            reclaim: Mutex::new(reclaim),
            config,
        });
        let server = serve(&folder.path().join("api"), Front::Machine(machine.clone())).unwrap();
        Self {
            folder,
            machine,
            go,
            server,
        }
    }

    fn socket(&self) -> PathBuf {
        self.server.path().to_owned()
    }

    fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, ClientError> {
        request(&self.socket(), method, path, body.as_ref(), TIMEOUT)
    }

    fn get(&self, path: &str) -> Value {
        self.ask(Method::GET, path, None).unwrap()
    }

    /// Returns the status and message of a request, which must fail.
    fn fault(&self, method: Method, path: &str, body: Value) -> (u16, String) {
        match self.ask(method, path, Some(body)) {
            Err(ClientError::Refused { status, message }) => (status, message),
            other => panic!("{other:?}"),
        }
    }

    /// What the machine was told last.
    fn last(&self) -> Option<String> {
        self.machine.told.lock().unwrap().last().cloned()
    }

    /// Sends `text` as it is, and reads until the server closes the connection.
    fn raw(&self, text: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(text).unwrap();
        let mut answer = Vec::new();
        // The server may close before it has read everything, which ends in an error after the answer.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }
}

#[test]
fn what_can_be_read() {
    let bench = Bench::new();
    let info = bench.get("/");
    assert_eq!(info["id"], "test");
    assert_eq!(info["state"], "Building");
    assert_eq!(info["output"]["console_dropped_bytes_total"], 0);
    let version = bench.get("/version");
    assert_eq!(version["vmm_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(version["firecracker_version"], "1.13.1");
    assert_eq!(bench.get("/machine-config")["mem_size_mib"], 512);
    let balloon = json!({
        "amount_mib": 64,
        "actual_mib": 32,
        "deflate_on_oom": true,
        "stats_polling_interval_s": 5,
        "lazy": true,
        "free_page_reporting": true,
    });
    assert_eq!(bench.get("/balloon"), balloon);
    let statistics = bench.get("/balloon/statistics");
    assert_eq!(statistics["target_mib"], 64);
    assert_eq!(statistics["free_memory"], 4096);
    assert_eq!(statistics.get("swap_in"), None);
    assert_eq!(bench.get("/lazy-memory")["lazy_bytes"], 4096);
    assert_eq!(bench.get("/arenas")[0]["id"], "heap");
    let teardown = json!({ "workers": 3, "batch_bytes": 4096, "guardian": true });
    assert_eq!(bench.get("/teardown"), teardown);
    let devices = bench.get("/devices");
    assert_eq!(devices["disks"][0]["id"], "blk0");
    assert!(devices["vsock"].is_null());
    let config = bench.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 512);
    assert_eq!(config["machine-config"]["vcpu_count"], 1);
    assert_eq!(config["drives"][0]["path_on_host"], "/d");
    assert_eq!(config["drives"][0]["is_read_only"], true);
    let interface = &config["network-interfaces"][0];
    assert_eq!(interface["host_dev_name"], "tap0");
    assert_eq!(interface["guest_mac"], "02:00:00:00:00:01");
    assert_eq!(config["vsock"]["guest_cid"], 3);
    assert_eq!(config["vsock"]["uds_path"], "/tmp/v");
    assert_eq!(config["balloon"]["amount_mib"], 64);
    assert_eq!(config["ebb"]["serial"], "tty");
}

#[test]
fn what_can_be_changed() {
    let bench = Bench::new();
    for (method, path, body, told) in [
        (
            Method::PATCH,
            "/balloon",
            json!({ "amount_mib": 100 }),
            "balloon 104857600",
        ),
        (
            Method::PATCH,
            "/balloon/statistics",
            json!({ "stats_polling_interval_s": 3 }),
            "interval 3",
        ),
        (
            Method::PATCH,
            "/teardown",
            json!({ "workers": 4 }),
            "teardown Some(4) None",
        ),
        (
            Method::PATCH,
            "/teardown",
            json!({ "batch_bytes": 4096 }),
            "teardown None Some(4096)",
        ),
        (Method::PATCH, "/vm", json!({ "state": "Paused" }), "pause"),
        (
            Method::PUT,
            "/actions",
            json!({ "action_type": "SendCtrlAltDel" }),
            "ctrl-alt-del",
        ),
        (
            Method::PUT,
            "/actions",
            json!({ "action_type": "FlushMetrics" }),
            "flush",
        ),
        (
            Method::PUT,
            "/actions",
            json!({ "action_type": "InstanceStop" }),
            "stop",
        ),
    ] {
        assert_eq!(bench.ask(method, path, Some(body)).unwrap(), Value::Null);
        assert_eq!(bench.last().unwrap(), told);
    }
    for amount in [
        json!({ "amount_mib": 1 }),
        json!({ "amount_bytes": 1 << 20 }),
    ] {
        bench.go.send(()).unwrap();
        let outcome = bench.ask(Method::PUT, "/lazy-memory/reclaim", Some(amount));
        assert_eq!(outcome.unwrap()["reclaimed_bytes"], 1 << 20);
        assert_eq!(bench.last().unwrap(), "reclaim 1048576");
    }
    bench.go.send(()).unwrap();
    let amount = json!({ "amount_bytes": 3, "timeout_ms": 1500 });
    let outcome = bench.ask(Method::PUT, "/lazy-memory/reclaim", Some(amount));
    assert_eq!(outcome.unwrap()["cut_short"], true);
    assert_eq!(bench.last().unwrap(), "reclaim 3 within 1.5s");
}

#[test]
fn a_snapshot_is_full_unless_a_difference_is_asked_for() {
    let bench = Bench::new();
    for (kind, told) in [
        (json!("Full"), "Full /m /s"),
        (Value::Null, "Full /m /s"),
        (json!("Diff"), "Difference /m /s"),
    ] {
        let body = json!({ "snapshot_type": kind, "snapshot_path": "/s", "mem_file_path": "/m" });
        bench
            .ask(Method::PUT, "/snapshot/create", Some(body))
            .unwrap();
        assert_eq!(bench.last().unwrap(), told);
    }
}

/// Method, path and body; status; and a part of the message.
const REFUSED: &[(&str, u16, &str)] = &[
    (
        r#"PATCH /balloon {"amount_mb": 1}"#,
        400,
        "unknown field `amount_mb`",
    ),
    (r#"PATCH /balloon {}"#, 400, "missing field `amount_mib`"),
    (r#"PATCH /balloon {"amount_mib": -1}"#, 400, "-1"),
    (
        r#"PATCH /balloon {"amount_mib": 18446744073709}"#,
        400,
        "64 bits",
    ),
    (
        r#"PATCH /balloon {"amount_mib": 4096}"#,
        400,
        "the guest has less",
    ),
    (
        r#"PATCH /balloon/statistics {"stats_polling_interval_s": 0}"#,
        400,
        "1 or more",
    ),
    (
        r#"PATCH /balloon/statistics {"stats_polling_interval_s": 13}"#,
        500,
        "failed",
    ),
    (
        r#"PUT /snapshot/create {"snapshot_type": "Half", "snapshot_path": "/s", "mem_file_path": "/m"}"#,
        400,
        "there are Full and Diff",
    ),
    (r#"PUT /snapshot/load {}"#, 400, "ebb restore"),
    (r#"PATCH /vm {"state": "Resumed"}"#, 400, "is ending"),
    (
        r#"PATCH /vm {"state": "Asleep"}"#,
        400,
        "there are Paused and Resumed",
    ),
    (
        r#"PUT /actions {"action_type": "InstanceStart"}"#,
        400,
        "not supported after starting the microVM",
    ),
    (
        r#"PUT /actions {"action_type": "Dance"}"#,
        400,
        "there are FlushMetrics, InstanceStart, InstanceStop, SendCtrlAltDel",
    ),
    (
        r#"PUT /lazy-memory/reclaim {}"#,
        400,
        "amount_mib and amount_bytes",
    ),
    (
        r#"PUT /lazy-memory/reclaim {"amount_mib": 0}"#,
        400,
        "1 or more",
    ),
    (
        r#"PUT /lazy-memory/reclaim {"amount_mib": 1, "amount_bytes": 1}"#,
        400,
        "one of",
    ),
    (
        r#"DELETE /balloon {}"#,
        405,
        "/balloon does not know DELETE; it knows GET, PATCH, PUT",
    ),
    (
        r#"PUT /balloon {}"#,
        400,
        "only before the machine is started",
    ),
    (r#"PUT /mmds {}"#, 400, "there is no metadata service"),
    (r#"PATCH / {}"#, 405, "/ does not know PATCH; it knows GET"),
    (
        r#"PUT /snapshot/other {}"#,
        404,
        "there is no /snapshot/other; there are /, /actions, /arenas",
    ),
];

#[test]
fn what_is_refused() {
    let bench = Bench::new();
    for (request, status, part) in REFUSED {
        let mut words = request.splitn(3, ' ');
        let mut word = || words.next().unwrap();
        let method = Method::from_bytes(word().as_bytes()).unwrap();
        let path = word();
        let body = serde_json::from_str(word()).unwrap();
        let (got, message) = bench.fault(method, path, body);
        assert_eq!(got, *status, "{request}: {message}");
        assert!(message.contains(part), "{request}: {message}");
    }
}

#[test]
fn bodies_that_are_no_json_or_too_long() {
    let bench = Bench::new();
    let patch = |body: &str| {
        let head = "PATCH /balloon HTTP/1.1\r\nHost: h\r\nConnection: close\r\n";
        let length = body.len();
        bench.raw(format!("{head}Content-Length: {length}\r\n\r\n{body}").as_bytes())
    };
    for body in ["", "{", "null", "[1]", "{\"amount_mib\": 1} 2", "\u{0}"] {
        let answer = patch(body);
        assert!(answer.starts_with("HTTP/1.1 400"), "{body}: {answer}");
        assert!(answer.contains("fault_message"), "{answer}");
    }
    assert!(patch("{\"amount_mib\": 1}").starts_with("HTTP/1.1 204"));
    let long = format!(
        "PATCH /balloon HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n",
        1_u64 << 40
    );
    assert!(bench.raw(long.as_bytes()).starts_with("HTTP/1.1 413"));
    let head = "PATCH /balloon HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("{:x}\r\n{}\r\n", 65 << 10, "a".repeat(65 << 10));
    assert!(
        bench
            .raw(format!("{head}{chunk}").as_bytes())
            .starts_with("HTTP/1.1 413")
    );
    assert_eq!(bench.get("/")["id"], "test");
}

#[test]
fn a_blocked_command_holds_up_no_other() {
    let bench = Bench::new();
    let socket = bench.socket();
    let body = json!({ "amount_bytes": 5 });
    let blocked = std::thread::spawn(move || {
        request(
            &socket,
            Method::PUT,
            "/lazy-memory/reclaim",
            Some(&body),
            TIMEOUT,
        )
    });
    while bench.last().as_deref() != Some("reclaim 5") {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(bench.get("/")["id"], "test");
    bench.go.send(()).unwrap();
    assert_eq!(blocked.join().unwrap().unwrap()["reclaimed_bytes"], 5);
}

#[test]
fn a_machine_that_is_being_built_says_so_and_can_be_stopped() {
    let bench = Bench::being_built();
    let socket = bench.socket();
    let early = std::thread::spawn(move || {
        request(&socket, Method::GET, "/lazy-memory", None, TIMEOUT).unwrap()
    });
    // More of those who wait than there can be threads, and one that goes away.
    let get = b"GET /lazy-memory HTTP/1.1\r\nHost: h\r\n\r\n";
    let waiting: Vec<_> = (0..super::admission::MAX_CONNECTIONS - 4)
        .map(|_| {
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            stream.write_all(get).unwrap();
            stream
        })
        .collect();
    assert_eq!(bench.get("/")["state"], "Building");
    assert!(bench.get("/vm/config")["machine-config"].is_object());
    assert_eq!(bench.fault(Method::PATCH, "/", json!({})).0, 405);
    drop(waiting);
    let stop = json!({ "action_type": "InstanceStop" });
    bench.ask(Method::PUT, "/actions", Some(stop)).unwrap();
    assert_eq!(bench.last().unwrap(), "stop");
    assert!(!early.is_finished());
    bench.server.set_machine(bench.machine.clone());
    assert_eq!(early.join().unwrap()["lazy_bytes"], 4096);
    // Those who wait when it ends do not delay that.
    let bench = Bench::being_built();
    let mut late = UnixStream::connect(bench.socket()).unwrap();
    late.write_all(get).unwrap();
    assert_eq!(bench.get("/")["id"], "test");
    drop(bench);
    let mut answer = Vec::new();
    let _ = late.read_to_end(&mut answer);
    assert_eq!(String::from_utf8_lossy(&answer), "");
}

#[test]
fn slow_and_silent_clients_are_let_go() {
    let bench = Bench::new();
    // More silent clients than the server serves at a time; every second one has begun a request.
    let clients: Vec<UnixStream> = (0..super::admission::MAX_CONNECTIONS + 4)
        .map(|index| {
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            if index % 2 == 0 {
                stream.write_all(b"GET / HT").unwrap();
            }
            stream
        })
        .collect();
    // It is heard, because some of them are let go.
    assert_eq!(bench.get("/")["id"], "test");
    drop(clients);
    // A client that announces a body and does not send it.
    let head = b"PATCH /balloon HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{";
    assert!(bench.raw(head).starts_with("HTTP/1.1 408"));
}

#[test]
fn half_a_request_does_not_delay_the_end_but_an_order_is_answered() {
    let bench = Bench::new();
    let halves = [
        &b"GET / HT"[..],
        b"PATCH /balloon HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{",
    ];
    let clients = halves.map(|half| {
        let mut stream = UnixStream::connect(bench.socket()).unwrap();
        stream.write_all(half).unwrap();
        stream
    });
    let socket = bench.socket();
    let body = json!({ "amount_bytes": 5 });
    let order = std::thread::spawn(move || {
        let (method, path) = (Method::PUT, "/lazy-memory/reclaim");
        request(&socket, method, path, Some(&body), TIMEOUT)
    });
    while bench.last().as_deref() != Some("reclaim 5") {
        std::thread::sleep(Duration::from_millis(1));
    }
    let Bench { server, go, .. } = bench;
    let end = std::thread::spawn(|| drop(server));
    for mut client in clients {
        // The server cuts them off; it may reset the connection. It does not wait until it can say that they are late.
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert_eq!(String::from_utf8_lossy(&answer), "");
    }
    go.send(()).unwrap();
    assert_eq!(order.join().unwrap().unwrap()["reclaimed_bytes"], 5);
    end.join().unwrap();
}

#[test]
fn many_clients_at_once() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| assert_eq!(bench.get("/")["id"], "test"));
        }
    });
}

#[test]
fn one_connection_serves_many_requests() {
    let bench = Bench::new();
    let get = "GET /version HTTP/1.1\r\nHost: h\r\n\r\n".repeat(3);
    let last = "GET /none HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let answer = bench.raw(format!("{get}{last}").as_bytes());
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 3, "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 404").count(), 1, "{answer}");
}

#[test]
fn the_socket_is_private_and_goes_with_the_server() {
    let Bench {
        folder,
        machine,
        server,
        ..
    } = Bench::new();
    let path = server.path().to_owned();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let taken = serve(&path, Front::Machine(machine.clone())).unwrap_err();
    assert!(taken.to_string().contains("a running server"), "{taken}");
    let idle = UnixStream::connect(&path).unwrap();
    drop(server);
    assert!(!path.exists());
    drop(idle);

    // A socket left behind by a monitor that was killed is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = serve(&path, Front::Machine(machine.clone())).unwrap();
    let version = request(&path, Method::GET, "/version", None, TIMEOUT).unwrap();
    assert!(version["vmm_version"].is_string());

    // What another put in its place is left alone.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "mine").unwrap();
    drop(server);
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    let no_socket = serve(&path, Front::Machine(machine)).unwrap_err();
    assert!(no_socket.to_string().contains("no socket"), "{no_socket}");
    drop(folder);
}

#[test]
fn a_client_without_a_server_is_told_so() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("api");
    let error = request(&path, Method::GET, "/", None, TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }));
    assert!(
        error.to_string().contains("is the machine running"),
        "{error}"
    );
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let limit = Duration::from_millis(50);
    let error = request(&path, Method::GET, "/", None, limit).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut(_)), "{error}");
    drop(listener);
}
