use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use containerd_shim::protos::api::{DeleteResponse, Empty, WaitResponse};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::ttrpc::{Code, Server, TtrpcContext, get_status};
use containerd_shim::protos::{Client, Task, TaskClient, create_task};
use ebb_pod::network::Network;
use tempfile::TempDir;

use super::*;
use crate::machine::{Disks, Machine, Wanted};
use crate::settings::Settings;
use crate::streams::Paths;

/// An agent that says what harms.
struct Liar;

fn refusal<T>(code: Code, text: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, text)))
}

impl Task for Liar {
    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        match request.id.as_str() {
            "refused" => refusal(Code::NOT_FOUND, "the process: not found"),
            _ => Ok(Empty::new()),
        }
    }

    fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        Ok(WaitResponse {
            exit_status: 7,
            exited_at: MessageField::some(Timestamp {
                seconds: i64::MAX,
                nanos: -1,
                ..Timestamp::default()
            }),
            ..WaitResponse::default()
        })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        match request.id.as_str() {
            "gone" => refusal(Code::NOT_FOUND, "container: not found"),
            _ => refusal(Code::UNKNOWN, "it stays"),
        }
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let (name, value) = match request.id.as_str() {
            "other" => ("containerd.Other", vec![]),
            "whole" => (METRICS_TYPE, vec![]),
            _ => (METRICS_TYPE, vec![0xff; 8]),
        };
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: name.to_owned(),
                value,
                ..Any::default()
            }),
            ..StatsResponse::default()
        })
    }
}

/// A guest with such an agent, whose monitor is a program that only waits.
struct Double {
    guest: Arc<Guest>,
    _server: Option<Server>,
    _folder: TempDir,
}

impl Double {
    fn of(folder: TempDir, agent: Client, server: Option<Server>) -> Self {
        let settings = Settings {
            ebb: waiting_program(folder.path()),
            kernel: "kernel".into(),
            initramfs: "initramfs".into(),
            images: folder.path().join("images"),
            pods: folder.path().join("pods"),
            memory_mib: 64,
            overhead_mib: 0,
            volume_mib: 0,
            cpus: 1,
        };
        let wanted = Wanted {
            limit: None,
            network: None,
            cgroup: None,
            disks: Disks::of_blocks(false),
        };
        let (machine, _) = Machine::start(&settings, "tests", "one", &wanted).unwrap();
        let agent = TaskClient::new(agent);
        let guest = Guest::new(machine, agent, &settings, Network::default());
        Self {
            guest: Arc::new(guest),
            _server: server,
            _folder: folder,
        }
    }

    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("agent").display());
        let service = create_task(Arc::new(Liar));
        let server = Server::new().bind(&address).unwrap();
        let mut server = server.register_service(service);
        server.start().unwrap();
        let client = Client::connect(&address).unwrap();
        Self::of(folder, client, Some(server))
    }

    fn kill(&self, id: &str) -> Result<()> {
        let process = Process::new(Paths::default());
        process.started();
        let request = KillRequest {
            id: id.to_owned(),
            signal: SIGKILL,
            ..KillRequest::default()
        };
        self.guest.kill(&process, &request)
    }

    fn delete(&self, id: &str) {
        self.guest.delete(&DeleteRequest {
            id: id.to_owned(),
            ..DeleteRequest::default()
        });
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.guest.machine.stop();
    }
}

/// A program that takes any words. Another process writes it: one that this one had open could not be executed.
fn waiting_program(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("waits");
    let script = "printf '#!/bin/sh\\nexec sleep 1000\\n' > \"$0\" && chmod +x \"$0\"";
    let status = Command::new("sh").args(["-c", script]).arg(&path).status();
    assert!(status.unwrap().success());
    path
}

#[test]
fn an_end_is_told_whatever_time_the_guest_names() {
    let double = Double::new();
    let exit = double.guest.wait(&WaitRequest::default());
    assert_eq!(exit.status, 7);
    assert!(!double.guest.machine.has_ended());
}

#[test]
fn what_does_not_end_by_sigkill_ends_with_the_machine() {
    for id in ["a lie", "refused"] {
        let double = Double::new();
        assert_eq!(double.kill(id).is_ok(), id == "a lie");
        assert!(double.guest.machine.ends_within(10 * PATIENCE), "{id}");
    }
}

#[test]
fn a_machine_that_keeps_a_container_is_ended() {
    let double = Double::new();
    double.delete("gone");
    assert!(!double.guest.machine.has_ended());
    double.delete("kept");
    assert!(double.guest.machine.has_ended());
}

#[test]
fn a_machine_whose_agent_hangs_up_is_ended_before_its_processes_are_told_dead() {
    let (host, guest) = UnixStream::pair().unwrap();
    let client = Client::new(host.into_raw_fd()).unwrap();
    let double = Double::of(tempfile::tempdir().unwrap(), client, None);
    drop(guest);
    let exit = double.guest.wait(&WaitRequest::default());
    assert_eq!(exit.status, KILLED);
    assert!(double.guest.machine.has_ended());
}

#[test]
fn only_metrics_are_passed_on() {
    let double = Double::new();
    let stats = |id: &str| {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        double.guest.stats(&request).map(|it| it.stats.is_some())
    };
    assert!(stats("whole").unwrap());
    for id in ["other", "broken"] {
        let error = stats(id).unwrap_err().to_string();
        assert!(error.contains("metrics"), "{id}: {error}");
    }
}

#[test]
fn a_sentence_of_the_guests_is_one_line_of_a_log() {
    let long = "no\ntime=\"now\" level=error\u{1b}[2J".repeat(100_000);
    let error = refusal::<()>(Code::UNKNOWN, &long).unwrap_err();
    let text = told(error).to_string();
    assert!(text.starts_with("no time="), "{text}");
    assert_eq!(text.chars().count(), SENTENCE);
    assert!(!text.contains(char::is_control), "{text:?}");
}
