//! What clients have asked for so far. It is turned into the words of a command line, which are parsed and checked like any
//! others: so there is one set of rules, and a snapshot can keep the words.

use std::path::PathBuf;
use std::time::Instant;

use clap::{CommandFactory, Parser};
use serde_json::{Value, json};

use super::bodies::{
    Balloon, BootSource, Drive, Entropy, Machine, MachineUpdate, Metrics, Net, Serial, Vsock,
};
use crate::api::drives::same_id;
use crate::api::routes::Fault;
use crate::config::{ConfigError, MachineConfig, MachineSpec, explain};
use crate::control::{InstanceInfo, InstanceState};

/// More devices of a kind than any machine has room for.
const MAX_DEVICES: usize = 64;

/// What is known of a machine when its process starts.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its name.
    pub id: String,
    /// The socket of its API.
    pub api_socket: Option<PathBuf>,
    /// Options of `ebb run` that no request changes.
    pub words: Vec<String>,
}

/// What clients have asked for so far. A change that is refused changes nothing.
#[derive(Clone, Debug)]
pub struct Draft {
    process: Process,
    started: Instant,
    boot: Option<BootSource>,
    machine: Option<Machine>,
    /// By name, in the order in which they were made; the root device is the first.
    drives: Vec<(String, Drive)>,
    nets: Vec<(String, Net)>,
    vsock: Option<Vsock>,
    entropy: Option<Entropy>,
    balloon: Option<Balloon>,
    serial: Option<Serial>,
    metrics: Option<Metrics>,
}

impl Draft {
    /// Nothing is asked for yet.
    #[must_use]
    pub fn new(process: Process) -> Self {
        Self {
            process,
            started: Instant::now(),
            boot: None,
            machine: None,
            drives: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            entropy: None,
            balloon: None,
            serial: None,
            metrics: None,
        }
    }

    /// What is known of the machine beside what clients ask for.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Returns true if nothing was asked for that a snapshot says, too.
    pub(super) fn is_empty(&self) -> bool {
        let devices = self.drives.is_empty() && self.nets.is_empty() && self.vsock.is_none();
        let others = self.entropy.is_none() && self.balloon.is_none() && self.serial.is_none();
        devices && others && self.boot.is_none() && self.machine.is_none()
    }

    pub(super) fn info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.process.id.clone(),
            state: InstanceState::NotStarted,
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..InstanceInfo::of_this_process()
        }
    }

    /// All of it, under the names of a configuration file.
    pub(super) fn view(&self) -> Value {
        let drives: Vec<&Drive> = self.drives.iter().map(|(_, it)| it).collect();
        let nets: Vec<&Net> = self.nets.iter().map(|(_, it)| it).collect();
        json!({
            "boot-source": self.boot,
            "machine-config": self.machine.clone().unwrap_or_default(),
            "drives": drives,
            "network-interfaces": nets,
            "vsock": self.vsock,
            "entropy": self.entropy,
            "balloon": self.balloon,
            "serial": self.serial,
        })
    }

    pub(super) fn machine(&self) -> Machine {
        self.machine.clone().unwrap_or_default()
    }

    pub(super) fn set_machine(&mut self, machine: Machine) -> Result<(), Fault> {
        self.change(|draft| draft.machine = Some(machine))
    }

    pub(super) fn update_machine(&mut self, update: MachineUpdate) -> Result<(), Fault> {
        let was = self.machine();
        self.set_machine(Machine {
            vcpu_count: update.vcpu_count.unwrap_or(was.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(was.mem_size_mib),
            smt: update.smt.or(was.smt),
            cpu_template: update.cpu_template.or(was.cpu_template),
            track_dirty_pages: update.track_dirty_pages.or(was.track_dirty_pages),
            huge_pages: update.huge_pages.or(was.huge_pages),
        })
    }

    pub(super) fn set_boot(&mut self, boot: BootSource) -> Result<(), Fault> {
        self.change(|draft| draft.boot = Some(boot))
    }

    pub(super) fn set_drive(&mut self, id: &str, drive: Drive) -> Result<(), Fault> {
        same_id("drive_id", drive.drive_id.as_deref(), id)?;
        let is_root = drive.is_root_device;
        let other = |(name, it): &&(String, Drive)| name != id && it.is_root_device;
        if let Some((other, _)) = self.drives.iter().find(other).filter(|_| is_root) {
            let message = format!("{other} is the root device already; there can be one");
            return Err(Fault::bad_request(message));
        }
        self.change(|draft| {
            set(&mut draft.drives, id, drive);
            // The others stay in their order.
            draft.drives.sort_by_key(|(_, it)| !it.is_root_device);
        })
    }

    pub(super) fn set_net(&mut self, id: &str, net: Net) -> Result<(), Fault> {
        same_id("iface_id", net.iface_id.as_deref(), id)?;
        self.change(|draft| set(&mut draft.nets, id, net))
    }

    pub(super) fn set_vsock(&mut self, vsock: Vsock) -> Result<(), Fault> {
        self.change(|draft| draft.vsock = Some(vsock))
    }

    pub(super) fn set_entropy(&mut self, entropy: Entropy) -> Result<(), Fault> {
        self.change(|draft| draft.entropy = Some(entropy))
    }

    pub(super) fn balloon(&self) -> Result<Balloon, Fault> {
        let none = || Fault::bad_request("no balloon was asked for yet; the machine will have one");
        self.balloon.clone().ok_or_else(none)
    }

    pub(super) fn set_balloon(&mut self, balloon: Balloon) -> Result<(), Fault> {
        self.change(|draft| draft.balloon = Some(balloon))
    }

    pub(super) fn set_serial(&mut self, serial: Serial) -> Result<(), Fault> {
        self.change(|draft| draft.serial = Some(serial))
    }

    pub(super) fn set_metrics(&mut self, metrics: Metrics) -> Result<(), Fault> {
        let mut words = self.process.words.iter();
        if let Some(path) = words.find_map(|word| word.strip_prefix("--metrics-path=")) {
            return Err(Fault::bad_request(format!(
                "the counters go to {path} already, by --metrics-path; give one of both"
            )));
        }
        self.change(|draft| draft.metrics = Some(metrics))
    }

    /// The machine that was asked for.
    ///
    /// # Errors
    /// It cannot be built, or nothing was asked for.
    pub fn finished(&self) -> Result<MachineConfig, Fault> {
        if self.boot.is_none() {
            return Err(Fault::bad_request(
                "no kernel was named; PUT /boot-source first",
            ));
        }
        self.check()
    }

    /// Makes a change if the machine could still be built then.
    fn change(&mut self, change: impl FnOnce(&mut Self)) -> Result<(), Fault> {
        let mut changed = self.clone();
        change(&mut changed);
        changed.check()?;
        *self = changed;
        Ok(())
    }

    fn check(&self) -> Result<MachineConfig, Fault> {
        if self.drives.len().max(self.nets.len()) > MAX_DEVICES {
            return Err(Fault::bad_request(format!(
                "a machine has room for fewer than {MAX_DEVICES} devices of a kind"
            )));
        }
        let words = self.words()?;
        let config = self.validate(&words);
        let config = config.map_err(|error| Fault::bad_request(error.to_string()))?;
        Ok(MachineConfig {
            words,
            api_socket: self.process.api_socket.clone(),
            as_firecracker: true,
            ..config
        })
    }

    fn validate(&self, words: &[String]) -> Result<MachineConfig, ConfigError> {
        let spec = MachineSpec::try_parse_from(words);
        let spec = spec.map_err(|error| explain(&error, &MachineSpec::command()))?;
        match self.boot {
            Some(_) => spec.validate(),
            None => spec.validate_without_images(),
        }
    }

    /// The options of `ebb run`.
    fn words(&self) -> Result<Vec<String>, Fault> {
        let mut words = vec![format!("--id={}", self.process.id)];
        words.extend(self.process.words.iter().cloned());
        match &self.boot {
            Some(boot) => words.extend(self.boot_words(boot)),
            None => words.push("--kernel=none".to_owned()),
        }
        words.extend(self.machine().words()?);
        for (id, drive) in &self.drives {
            words.push(drive.word(id)?);
        }
        for (id, net) in &self.nets {
            words.push(net.word(id)?);
        }
        words.extend(self.vsock.as_ref().map(Vsock::word));
        if let Some(entropy) = &self.entropy {
            words.extend(entropy.words()?);
        }
        words.push(self.balloon.clone().unwrap_or_default().word()?);
        if let Some(serial) = &self.serial {
            words.push(serial.word()?);
        }
        words.extend(self.metrics.as_ref().map(Metrics::word));
        Ok(words)
    }

    fn boot_words(&self, boot: &BootSource) -> Vec<String> {
        let args = boot.boot_args.as_deref();
        let root = self.drives.first().filter(|(_, it)| it.is_root_device);
        let root = root.map(|(_, drive)| drive.root()).unwrap_or_default();
        let args = args.unwrap_or(MachineSpec::DEFAULT_CMDLINE);
        let mut words = vec![
            format!("--kernel={}", boot.kernel_image_path),
            format!("--cmdline={}", format!("{args}{root}").trim_start()),
        ];
        let initrd = boot.initrd_path.as_ref();
        words.extend(initrd.map(|path| format!("--initramfs={path}")));
        words
    }
}

/// Replaces the device of this name, or adds it behind the others.
fn set<T>(devices: &mut Vec<(String, T)>, id: &str, device: T) {
    match devices.iter_mut().find(|(name, _)| name == id) {
        Some((_, place)) => *place = device,
        None => devices.push((id.to_owned(), device)),
    }
}
