//! The machine from its first moment to its last, as the operator can ask it, and the socket where that is done.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use super::LaunchError;
use super::events::ExitSlot;
use super::metrics_file::MetricsFile;
use crate::api::{self, ApiError, Front};
use crate::bus::ExitReason;
use crate::config::{Loopback, MachineConfig};
use crate::control::{CommandError, Controller, InstanceInfo, InstanceState, Prefault};
use crate::devices::platform::{I8042, NotRead};
use crate::output::{Log, Outlet, OutputStats};
use crate::sys::{Request, Signals};
use crate::teardown::{Socket, StatusPage};

/// A machine that is being built, runs or ends.
pub struct Instance {
    /// The configuration that it is built from.
    pub config: MachineConfig,
    /// Ends the machine.
    pub exit: Arc<ExitSlot>,
    started: Instant,
    log: Log,
    /// What FlushMetrics flushes.
    pub metrics: Option<Arc<MetricsFile>>,
    console: OnceLock<Arc<Outlet>>,
    keyboard: OnceLock<Arc<Mutex<I8042>>>,
    populated: AtomicU64,
    runs: AtomicBool,
    paused: AtomicBool,
}

impl Instance {
    /// A machine that will be built from `config`. `log` is where the log goes.
    ///
    /// # Errors
    /// [`LaunchError::MetricsFile`].
    pub fn new(
        config: MachineConfig,
        exit: Arc<ExitSlot>,
        log: &Log,
    ) -> Result<Arc<Self>, LaunchError> {
        event!("building", pid = std::process::id());
        let path = config.metrics_path.as_deref();
        let metrics = path.map(MetricsFile::start).transpose()?;
        Ok(Arc::new(Self {
            config,
            exit,
            started: Instant::now(),
            log: log.clone(),
            metrics: metrics.map(Arc::new),
            console: OnceLock::new(),
            keyboard: OnceLock::new(),
            populated: AtomicU64::new(0),
            runs: AtomicBool::new(false),
            paused: AtomicBool::new(false),
        }))
    }

    /// The guest's output goes there, if anywhere.
    pub fn set_console(&self, console: Option<&Arc<Outlet>>) {
        if let Some(console) = console {
            // A machine has one console.
            let _ = self.console.set(Arc::clone(console));
        }
    }

    /// The guest reads this keyboard.
    pub fn set_keyboard(&self, keyboard: Arc<Mutex<I8042>>) {
        // A machine has one keyboard.
        let _ = self.keyboard.set(keyboard);
    }

    /// Takes note of how much memory is populated. Returns true if that has to end, because somebody or one of `signals`
    /// has asked for the end of the machine.
    pub fn is_stopped(&self, populated: u64, signals: &Signals) -> bool {
        self.populated.store(populated, Ordering::Relaxed);
        match signals.take() {
            Ok(Some(Request::End)) => self.exit.request(ExitReason::Stop),
            Ok(Some(Request::HangUp)) => drop(self.log.reopen()),
            Ok(None) | Err(_) => {}
        }
        self.exit.reason().is_some()
    }

    /// It is built, and runs unless it is paused.
    pub fn set_running(&self) {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        event!("running", ms);
        self.runs.store(true, Ordering::Relaxed);
    }

    /// Its vCPUs and devices rest, or do not any more.
    pub fn set_paused(&self, paused: bool) {
        event!("paused", paused);
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Writes what is in the log, before the process is ended at once.
    pub fn finish_log(&self) {
        self.log.finish();
    }

    fn state(&self) -> InstanceState {
        if !self.runs.load(Ordering::Relaxed) {
            // Firecracker's clients know no other word.
            match self.config.as_firecracker {
                true => InstanceState::NotStarted,
                false => InstanceState::Building,
            }
        } else if self.paused.load(Ordering::Relaxed) {
            InstanceState::Paused
        } else {
            InstanceState::Running
        }
    }
}

impl crate::control::Instance for Instance {
    fn info(&self) -> InstanceInfo {
        let state = self.state();
        let memory = &self.config.memory;
        InstanceInfo {
            id: self.config.id.clone(),
            state,
            prefault: (memory.prefault && !self.runs.load(Ordering::Relaxed)).then(|| Prefault {
                populated_bytes: self.populated.load(Ordering::Relaxed),
                total_bytes: memory.size,
            }),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            output: OutputStats {
                console_dropped_bytes_total: self.console.get().map_or(0, |it| it.dropped()),
                log_dropped_bytes_total: self.log.dropped(),
                json_dropped_bytes_total: self.metrics.as_ref().map_or(0, |it| it.dropped())
                    + self.log.dropped_events(),
            },
            ..InstanceInfo::of_this_process()
        }
    }

    fn config(&self) -> &MachineConfig {
        &self.config
    }

    fn stop(&self) {
        self.exit.request(ExitReason::Stop);
    }

    fn flush_metrics(&self) -> Result<(), CommandError> {
        let missing = CommandError::NoDevice {
            device: "file for metrics",
            option: "--metrics-path",
        };
        self.metrics.as_ref().ok_or(missing).map(|it| it.flush())
    }

    fn press_ctrl_alt_del(&self) -> Result<(), CommandError> {
        let pressed = match self.keyboard.get() {
            Some(keyboard) => {
                let mut keyboard = keyboard.lock().unwrap_or_else(PoisonError::into_inner);
                keyboard.press_ctrl_alt_del()
            }
            None => Err(NotRead),
        };
        pressed.map_err(|error| CommandError::Failed(error.to_string()))
    }
}

/// The API of a machine, if it has a socket for it. Dropping it ends the API.
pub struct Service {
    server: Option<api::Server>,
    /// The guardian removes the socket if the monitor cannot.
    status: &'static StatusPage,
}

impl Service {
    /// Serves the API of `front` at `socket`, and its metrics at `metrics`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn start(
        socket: Option<&Path>,
        metrics: Option<Loopback>,
        front: Front,
        status: &'static StatusPage,
    ) -> Result<Self, ApiError> {
        let metrics = metrics.map(|address| api::listen(address.0)).transpose()?;
        let server = socket.map(|path| api::serve_with_metrics(path, metrics, front));
        let mut server = server.transpose()?;
        if let Some(server) = &mut server {
            if status.leaves_sockets() {
                server.leave_socket();
            }
            status.set_socket(Socket::Api, server.identity());
        }
        Ok(Self { server, status })
    }

    /// A machine is being built now; `None`: it could not be built.
    pub fn set_instance(&self, instance: Option<&Arc<Instance>>) {
        if let Some(server) = &self.server {
            server.set_instance(instance.map(|it| Arc::clone(it) as _));
        }
    }

    /// The machine runs, and can be asked for everything.
    pub fn set_machine(&self, machine: Arc<dyn Controller>) {
        if let Some(server) = &self.server {
            server.set_machine(machine);
        }
    }

    /// Ends the API, and removes the socket.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.remove_socket();
            self.status.forget_socket(Socket::Api);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
    }
}
