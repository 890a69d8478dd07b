//! What a client sends to the API's socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Parser;
use ebb_vmm::api::{Front, Server, serve};
use ebb_vmm::config::{MachineConfig, MachineSpec};
use ebb_vmm::control::{
    ArenaState, BalloonState, BalloonStatistics, CommandError, Controller, DevicesState,
    DriveState, DriveUpdate, Instance, InstanceInfo, LazyMemoryState, NetUpdate, ReclaimOutcome,
    SnapshotKind, TeardownState,
};
use tempfile::TempDir;

/// A machine that does what it is told, at once.
struct Machine(MachineConfig);

impl Instance for Machine {
    fn info(&self) -> InstanceInfo {
        InstanceInfo::default()
    }

    fn config(&self) -> &MachineConfig {
        &self.0
    }

    fn stop(&self) {}

    fn flush_metrics(&self) -> Result<(), CommandError> {
        Ok(())
    }

    fn press_ctrl_alt_del(&self) -> Result<(), CommandError> {
        Ok(())
    }
}

impl Controller for Machine {
    fn balloon(&self) -> Result<BalloonState, CommandError> {
        Err(CommandError::NoDevice {
            device: "balloon",
            option: "--balloon",
        })
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), CommandError> {
        assert!(bytes.is_multiple_of(4096), "{bytes}");
        Ok(())
    }

    fn balloon_statistics(&self) -> Result<BalloonStatistics, CommandError> {
        Ok(BalloonStatistics::default())
    }

    fn set_statistics_interval(&self, seconds: u16) -> Result<(), CommandError> {
        assert!(seconds > 0, "0 seconds");
        Ok(())
    }

    fn devices(&self) -> DevicesState {
        DevicesState::default()
    }

    fn lazy_memory(&self) -> LazyMemoryState {
        LazyMemoryState::default()
    }

    fn arenas(&self) -> Vec<ArenaState> {
        Vec::new()
    }

    fn reclaim(&self, _bytes: u64, _timeout: Option<Duration>) -> ReclaimOutcome {
        ReclaimOutcome::default()
    }

    fn drives(&self) -> Vec<DriveState> {
        Vec::new()
    }

    fn update_drive(&self, id: &str, _update: &DriveUpdate) -> Result<(), CommandError> {
        assert!(!id.contains('/'), "{id}");
        Ok(())
    }

    fn pause(&self) -> Result<(), CommandError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), CommandError> {
        Ok(())
    }

    fn update_net(&self, _: &str, _: &NetUpdate) -> Result<(), CommandError> {
        Ok(())
    }

    fn snapshot(
        &self,
        kind: SnapshotKind,
        memory: PathBuf,
        state: PathBuf,
    ) -> Result<(), CommandError> {
        let _ = (kind, memory, state);
        Ok(())
    }

    fn teardown(&self) -> TeardownState {
        TeardownState::default()
    }

    fn set_teardown(
        &self,
        _workers: Option<usize>,
        _batch: Option<u64>,
    ) -> Result<(), CommandError> {
        Ok(())
    }
}

/// A server for all runs, and the folder of its socket.
struct Running {
    socket: PathBuf,
    _folder: TempDir,
    _server: Server,
}

fn server() -> &'static Running {
    static RUNNING: OnceLock<Running> = OnceLock::new();
    RUNNING.get_or_init(|| {
        let folder = TempDir::new().expect("a folder");
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, "kernel").expect("written");
        let words = [PathBuf::from("--kernel"), kernel];
        let spec = MachineSpec::try_parse_from(words).expect("a machine");
        let config = spec.validate().expect("a good one");
        let socket = folder.path().join("api");
        let machine = Arc::new(Machine(config));
        let server = serve(&socket, Front::Machine(machine.clone())).expect("a server");
        server.set_machine(machine);
        Running {
            socket,
            _folder: folder,
            _server: server,
        }
    })
}

pub fn run(input: &[u8]) {
    let mut stream = UnixStream::connect(&server().socket).expect("the server listens");
    let patience = Some(Duration::from_secs(30));
    stream.set_read_timeout(patience).expect("a limit");
    // It may close the connection at any time.
    let _ = stream.write_all(input);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert!(
            error.kind() != std::io::ErrorKind::WouldBlock,
            "no answer and no end"
        ),
    }
    let is_http = answer.is_empty() || answer.starts_with(b"HTTP/1.");
    assert!(is_http, "{}", String::from_utf8_lossy(&answer));
    assert!(
        !answer.starts_with(b"HTTP/1.1 500"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}
