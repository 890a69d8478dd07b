//! A machine that is not started: what clients may ask for, and what it becomes.

use std::fs;
use std::path::PathBuf;

use clap::Parser;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::api::routes::Reply;
use crate::config::{DiskEngine, MachineConfig, SerialConfig, Transport};

/// A draft, and files to name.
struct Bench {
    folder: TempDir,
    draft: Draft,
}

impl Bench {
    fn new(words: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        for (name, content) in [("kernel", "MZ"), ("initrd", "x"), ("empty", "")] {
            fs::write(folder.path().join(name), content).unwrap();
        }
        for disk in ["a", "b", "c"] {
            fs::write(folder.path().join(disk), [0; 4096]).unwrap();
        }
        let draft = Draft::new(Process {
            id: "vm".to_owned(),
            api_socket: Some("/run/api".into()),
            words: words.iter().map(|it| (*it).to_owned()).collect(),
        });
        Self { folder, draft }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A body, with the folder of the files instead of `@`.
    fn json(&self, text: &str) -> Value {
        let folder = self.folder.path().to_str().unwrap();
        serde_json::from_str(&text.replace('@', folder)).unwrap()
    }

    fn request(&mut self, method: Method, path: &str, body: Value) -> Result<Step, Fault> {
        request(&mut self.draft, &method, path, body.to_string().as_bytes())
    }

    fn put(&mut self, path: &str, body: Value) {
        match self.request(Method::PUT, path, body) {
            Ok(Step::Reply(Reply::Done)) => {}
            Ok(_) => panic!("{path}: another step"),
            Err(fault) => panic!("{path}: {fault}"),
        }
    }

    fn get(&mut self, path: &str) -> Value {
        match self.request(Method::GET, path, Value::Null) {
            Ok(Step::Reply(Reply::Json(value))) => value,
            _ => panic!("{path}: no answer"),
        }
    }

    fn refused(&mut self, method: Method, path: &str, body: Value) -> String {
        let before = self.draft.view();
        let fault = match self.request(method, path, body) {
            Err(fault) => fault,
            Ok(_) => panic!("{path}: not refused"),
        };
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{fault}");
        assert!(!fault.message.contains('\n'), "{fault}");
        assert_eq!(self.draft.view(), before, "{path}: refused, but changed");
        fault.message
    }

    fn boot(&mut self) {
        let body = json!({ "kernel_image_path": self.path("kernel"), "boot_args": "quiet" });
        self.put("/boot-source", body);
    }

    fn start(&mut self) -> MachineConfig {
        let start = json!({ "action_type": "InstanceStart" });
        match self.request(Method::PUT, "/actions", start) {
            Ok(Step::Start(config)) => *config,
            Ok(_) => panic!("another step"),
            Err(fault) => panic!("{fault}"),
        }
    }
}

#[test]
fn a_kernel_alone_is_a_machine_with_a_lazy_balloon() {
    // As in Firecracker mode.
    let mut bench = Bench::new(&["--transport=mmio"]);
    assert_eq!(bench.get("/")["state"], "Not started");
    assert_eq!(bench.get("/machine-config")["mem_size_mib"], 128);
    let kernel = json!({ "kernel_image_path": bench.path("kernel"), "initrd_path": null, "boot_args": null });
    bench.put("/boot-source", kernel);
    let config = bench.start();
    assert_eq!((config.vcpus, config.memory.size), (1, 128 << 20));
    assert_eq!(config.transport, Transport::Mmio);
    assert_eq!(config.cmdline, "console=ttyS0 quiet panic=-1 pci=off");
    let balloon = config.balloon.unwrap();
    assert_eq!((balloon.size, balloon.deflate_on_oom), (0, true));
    assert!(balloon.free_page_reporting.is_some() && config.lazy.free_pages);
    assert_eq!(config.api_socket, Some("/run/api".into()));
    assert_eq!(
        (config.id.as_str(), config.serial),
        ("vm", SerialConfig::Tty)
    );
    assert!(config.as_firecracker && !config.rng && config.disks.is_empty());
}

/// As clients send it: with nulls and empty limiters, sizes that are no multiple of 2 MiB, the root device last, and everything
/// twice. `@` is the folder of the files.
const WHOLE: &[(&str, &str)] = &[
    (
        "/boot-source",
        r#"{"kernel_image_path": "@/kernel", "initrd_path": "@/initrd", "boot_args": "console=ttyS0"}"#,
    ),
    (
        "/machine-config",
        r#"{"vcpu_count": 2, "mem_size_mib": 255, "smt": true, "cpu_template": "None", "track_dirty_pages": true, "huge_pages": "None"}"#,
    ),
    (
        "/drives/data",
        r#"{"drive_id": "data", "path_on_host": "@/a", "is_root_device": false, "is_read_only": true, "rate_limiter": {},
            "cache_type": "Writeback", "io_engine": "Sync", "partuuid": null, "socket": null}"#,
    ),
    (
        "/drives/later_1",
        r#"{"drive_id": "later_1", "path_on_host": "@/empty", "is_root_device": null, "is_read_only": null, "rate_limiter": null}"#,
    ),
    (
        "/drives/root",
        r#"{"drive_id": "root", "path_on_host": "@/b", "is_root_device": true, "is_read_only": false,
            "rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100, "one_time_burst": null}, "ops": null}}"#,
    ),
    (
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": null,
            "rx_rate_limiter": {"bandwidth": {}, "ops": {"size": null, "refill_time": null}},
            "tx_rate_limiter": {"ops": {"size": 5, "refill_time": 10}}}"#,
    ),
    (
        "/vsock",
        r#"{"vsock_id": "root", "guest_cid": 3, "uds_path": "@/vsock"}"#,
    ),
    (
        "/entropy",
        r#"{"rate_limiter": {"bandwidth": {"size": 64, "refill_time": 10}, "ops": null}}"#,
    ),
    (
        "/balloon",
        r#"{"amount_mib": 64, "deflate_on_oom": false, "stats_polling_interval_s": 1}"#,
    ),
    ("/serial", r#"{"serial_out_path": "@/serial"}"#),
    ("/metrics", r#"{"metrics_path": "@/metrics"}"#),
];

#[test]
fn what_clients_ask_for_becomes_a_machine() {
    let mut bench = Bench::new(&["--transport=pci"]);
    for (request, body) in WHOLE {
        let body = bench.json(body);
        bench.put(request, body.clone());
        bench.put(request, body);
    }
    let config = bench.start();
    assert_eq!((config.vcpus, config.memory.size), (2, 256 << 20));
    assert_eq!(config.cmdline, "console=ttyS0 root=/dev/vda rw");
    let disks = config.disks.iter().enumerate();
    let names: Vec<_> = disks.map(|(index, disk)| disk.name(index)).collect();
    assert_eq!(names, ["root", "data", "later_1"]);
    let [root, data, later] = config.disks.as_slice() else {
        panic!("{:?}", config.disks);
    };
    assert_eq!(root.bw, "1000/100".parse().ok());
    assert_eq!((root.readonly, root.engine), (false, DiskEngine::Auto));
    assert_eq!((data.readonly, data.engine), (true, DiskEngine::Threads));
    assert_eq!(
        (&data.path, &later.path),
        (&bench.path("a"), &bench.path("empty"))
    );
    assert_eq!((data.bw, data.ops), (None, None));
    let net = &config.nets[0];
    assert_eq!(
        (net.name(0), net.tap.as_deref()),
        ("eth0".into(), Some("tap0"))
    );
    let limits = (net.rx_bw.map(|it| it.size), net.tx_ops);
    assert_eq!(limits, (Some(0), "5/10".parse().ok()));
    assert_eq!(config.vsock.unwrap().cid, 3);
    let balloon = config.balloon.unwrap();
    assert_eq!((balloon.size, balloon.statistics_interval_s), (64 << 20, 1));
    assert!(!balloon.deflate_on_oom && balloon.free_page_reporting.is_some());
    assert_eq!(config.serial, SerialConfig::File(bench.path("serial")));
    assert_eq!(config.metrics_path, Some(bench.path("metrics")));
    assert!(config.rng && config.transport == Transport::Pci);
    let limits = config.rng_limits;
    assert_eq!((limits.bw, limits.ops), ("64/10".parse().ok(), None));
    // A snapshot is restored by these words.
    let spec = crate::config::MachineSpec::try_parse_from(&config.words).unwrap();
    assert_eq!(spec.disks, config.disks);
}

#[test]
fn a_balloon_with_nulls_is_one_with_defaults() {
    let mut bench = Bench::new(&[]);
    bench.boot();
    let body = r#"{"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": null, "free_page_reporting": null}"#;
    let body = bench.json(body);
    bench.put("/balloon", body);
    let balloon = bench.start().balloon.unwrap();
    assert_eq!((balloon.size, balloon.statistics_interval_s), (8 << 20, 0));
    assert!(balloon.free_page_reporting.is_some());
}

#[test]
fn the_counters_go_to_one_place() {
    let mut bench = Bench::new(&["--metrics-path=/run/m"]);
    let other = json!({ "metrics_path": bench.path("metrics") });
    let refused = bench.refused(Method::PUT, "/metrics", other);
    assert!(
        refused.contains("go to /run/m already, by --metrics-path"),
        "{refused}"
    );
}

#[test]
fn before_the_start_prometheus_is_told_of_no_machine() {
    let mut bench = Bench::new(&[]);
    match bench.request(Method::GET, "/metrics", Value::Null) {
        Ok(Step::Reply(Reply::Text(text))) => {
            assert!(
                text.contains("\nebb_info{machine=\"vm\",version="),
                "{text}"
            );
            assert_eq!(text.lines().count(), 3, "{text}");
        }
        _ => panic!("no text"),
    }
}

#[test]
fn a_partition_is_named_by_its_id_and_one_device_is_the_root() {
    let mut bench = Bench::new(&[]);
    bench.boot();
    let (a, b) = (bench.path("a"), bench.path("b"));
    let root = json!({ "path_on_host": a, "is_root_device": true, "is_read_only": true, "partuuid": "0eaa91a0-01" });
    bench.put("/drives/a", root);
    let second = json!({ "path_on_host": b, "is_root_device": true, "is_read_only": true });
    let refused = bench.refused(Method::PUT, "/drives/b", second);
    assert!(
        refused.contains("a is the root device already"),
        "{refused}"
    );
    assert_eq!(bench.start().cmdline, "quiet root=PARTUUID=0eaa91a0-01 ro");
}

#[test]
fn parts_of_the_machine_change_one_by_one() {
    let mut bench = Bench::new(&[]);
    bench.put(
        "/machine-config",
        json!({ "vcpu_count": 4, "mem_size_mib": 512 }),
    );
    let changed = bench.request(Method::PATCH, "/machine-config", json!({ "vcpu_count": 3 }));
    assert!(matches!(changed, Ok(Step::Reply(Reply::Done))));
    let machine = bench.get("/machine-config");
    assert_eq!(
        (&machine["vcpu_count"], &machine["mem_size_mib"]),
        (&json!(3), &json!(512))
    );
    let view = bench.get("/vm/config");
    assert_eq!(view["machine-config"]["vcpu_count"], 3);
    assert_eq!(view["boot-source"], Value::Null);
}

/// Path and body of what is refused, and a part of the message.
const REFUSED: &[(&str, &str, &str)] = &[
    (
        "/boot-source",
        r#"{"kernel_image_path": "/none"}"#,
        "--kernel /none: there is no such file",
    ),
    (
        "/boot-source",
        r#"{"kernel_image_path": "@/kernel", "boot_args": "a\nb"}"#,
        "--cmdline",
    ),
    (
        "/boot-source",
        r#"{"kernel_image_path": "@/kernel", "boot_args": "reboot=k acpi=off pci=off"}"#,
        "leave acpi=off out",
    ),
    (
        "/machine-config",
        r#"{"vcpu_count": 1000, "mem_size_mib": 128}"#,
        "boot=1000",
    ),
    (
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 0}"#,
        "a guest needs memory",
    ),
    (
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 18446744073709551615}"#,
        "18446744073709551615",
    ),
    (
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2"}"#,
        "there are no templates",
    ),
    ("/machine-config", r#"{"vcpu_count": 1}"#, "mem_size_mib"),
    (
        "/drives/x",
        r#"{"drive_id": "y", "path_on_host": "@/a"}"#,
        "drive_id is y, but the path names x",
    ),
    (
        "/drives/a,b",
        r#"{"path_on_host": "@/a"}"#,
        "letters, digits",
    ),
    (
        "/drives/x",
        r#"{"path_on_host": "/none"}"#,
        "there is no such file",
    ),
    ("/drives/x", r#"{"path_on_host": ""}"#, "path"),
    ("/drives/x", r#"{"socket": "/s"}"#, "no vhost-user"),
    (
        "/drives/x",
        r#"{"path_on_host": "@/a", "colour": 1}"#,
        "unknown field `colour`",
    ),
    (
        "/drives/x",
        r#"{"path_on_host": "@/a", "rate_limiter": {"ops": {"size": 1, "refill_time": 18446744073709551615}}}"#,
        "not a limit",
    ),
    (
        "/network-interfaces/x",
        r#"{"host_dev_name": "a/b"}"#,
        "no interface can have this name",
    ),
    (
        "/network-interfaces/x",
        r#"{"host_dev_name": "a", "guest_mac": "01:00:00:00:00:00"}"#,
        "multicast",
    ),
    ("/vsock", r#"{"guest_cid": 2, "uds_path": "/v"}"#, "cid=2"),
    (
        "/entropy",
        r#"{"rate_limiter": {"ops": {"size": 18446744073709551615, "refill_time": 1}}}"#,
        "not a limit",
    ),
    (
        "/balloon",
        r#"{"amount_mib": 129, "deflate_on_oom": true}"#,
        "the guest has only 128M",
    ),
    (
        "/balloon",
        r#"{"amount_mib": 1, "deflate_on_oom": true, "free_page_hinting": true}"#,
        "free lists",
    ),
    ("/logger", r#"{"level": "Loud"}"#, "write Off, Error"),
    (
        "/actions",
        r#"{"action_type": "InstanceStart"}"#,
        "PUT /boot-source first",
    ),
    (
        "/actions",
        r#"{"action_type": "SendCtrlAltDel"}"#,
        "not possible before the start",
    ),
    (
        "/snapshot/create",
        r#"{"snapshot_path": "/s", "mem_file_path": "/m"}"#,
        "start it first",
    ),
    (
        "/snapshot/load",
        r#"{"snapshot_path": "/s"}"#,
        "give one of",
    ),
    (
        "/snapshot/load",
        r#"{"snapshot_path": "/s", "mem_backend": {"backend_path": "/m", "backend_type": "Tape"}}"#,
        "backend_type Tape: write File or Uffd",
    ),
    (
        "/mmds/config",
        r#"{"network_interfaces": []}"#,
        "no metadata service",
    ),
    ("/cpu-config", r#"{}"#, "no templates"),
];

#[test]
fn what_cannot_be_is_refused_with_the_reason_and_changes_nothing() {
    let mut bench = Bench::new(&[]);
    for (request, body, part) in REFUSED {
        let body = bench.json(body);
        let refused = bench.refused(Method::PUT, request, body);
        assert!(refused.contains(part), "{request}: {refused}");
    }
    let patched = bench.refused(Method::PATCH, "/drives/x", json!({}));
    assert!(patched.contains("start it first"), "{patched}");
    for id in 0..=64 {
        let net = json!({ "host_dev_name": format!("t{id}") });
        let added = bench.request(Method::PUT, &format!("/network-interfaces/n{id}"), net);
        assert_eq!(added.is_ok(), id < 64, "{id}");
    }
}

#[test]
fn a_snapshot_is_loaded_only_into_nothing() {
    let mut bench = Bench::new(&[]);
    let load = json!({
        "snapshot_path": "/s", "mem_backend": { "backend_path": "/m", "backend_type": "File" }, "resume_vm": true,
        "vsock_override": { "uds_path": "/v" }, "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap1" }],
    });
    match bench.request(Method::PUT, "/snapshot/load", load.clone()) {
        Ok(Step::Load(spec)) => assert_eq!(
            spec,
            LoadSpec {
                state: "/s".into(),
                memory: LoadMemory::File("/m".into()),
                resume: true,
                vsock: Some("/v".into()),
                taps: vec![("eth0".into(), "tap1".into())],
            }
        ),
        _ => panic!("not loaded"),
    }
    let served = json!({ "snapshot_path": "/s", "mem_backend": { "backend_path": "/u", "backend_type": "Uffd" } });
    match bench.request(Method::PUT, "/snapshot/load", served) {
        Ok(Step::Load(spec)) => assert_eq!(spec.memory, LoadMemory::Server("/u".into())),
        _ => panic!("not loaded"),
    }
    bench.boot();
    let refused = bench.refused(Method::PUT, "/snapshot/load", load);
    assert!(refused.contains("before anything"), "{refused}");
}

#[test]
fn a_file_stands_for_requests() {
    let file = json!({
        "boot-source": { "kernel_image_path": "/k" },
        "drives": [{ "drive_id": "a" }, { "drive_id": "b" }],
        "network-interfaces": [{ "iface_id": "n" }],
        "vsock": null,
        "mmds-config": { "x": 1 },
    });
    let requests = requests_of(file).unwrap();
    let paths: Vec<_> = requests.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "/boot-source",
            "/drives/a",
            "/drives/b",
            "/mmds/config",
            "/network-interfaces/n"
        ]
    );
    assert!(requests_of(json!([])).is_err());
    assert!(requests_of(json!({ "drives": {} })).is_err());
    let nameless = requests_of(json!({ "drives": [{}] })).unwrap_err();
    assert_eq!(nameless, "drives: a device without drive_id");
}

/// Every request before the start has a row in the document for users of Firecracker.
#[test]
fn the_document_of_firecracker_mode_has_every_request() {
    let text = include_str!("../../../../docs/firecracker.md");
    let refused = routes::REFUSED.iter().map(|it| (&it.0, it.1));
    for (method, path) in ROUTES.iter().map(|it| (&it.0, it.1)).chain(refused) {
        let row = format!("`{method} {path}`");
        assert!(text.contains(&row), "docs/firecracker.md lacks {row}");
    }
}
