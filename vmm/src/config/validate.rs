//! The checks that turn a spec into a machine: of values against each other, and of files.

use std::collections::BTreeSet;
use std::path::PathBuf;

use ebb_hypercall_abi::arena::{Layout, MAX_ID};

use super::ConfigError;
use super::balloon::BalloonSpec;
use super::files::{
    check_disks, check_folders, check_image, check_output, check_socket, check_vsock_path,
};
use super::keys::defaults;
use super::lazy::{LazyConfig, LazyMode};
use super::limits::{MAX_ARENAS, MAX_CMDLINE, MAX_MEMORY};
use super::machine::{ArenaConfig, BalloonConfig, KernelConfig, MachineConfig, MemoryConfig};
use super::net::NetConfig;
use super::spec::{ArenaSpec, CpusSpec, MachineSpec, MemorySpec, SerialConfig, Transport};

/// Minimum of the default reserve in bytes, unless that is more than half of the guest's memory.
const MIN_RESERVE: u64 = 64 << 20;

impl MachineSpec {
    /// Checks the spec, files included, and fills in what follows from other values.
    ///
    /// # Errors
    /// The first mistake found.
    pub fn validate(self) -> Result<MachineConfig, ConfigError> {
        check_image("--kernel", &self.kernel)?;
        if let Some(path) = &self.initramfs {
            check_image("--initramfs", path)?;
        }
        self.validate_without_images()
    }

    /// As [`MachineSpec::validate`], but for the kernel and the initial RAM disk: these may not be known yet.
    ///
    /// # Errors
    /// The first mistake found.
    pub fn validate_without_images(self) -> Result<MachineConfig, ConfigError> {
        check_id(&self.id)?;
        check_cmdline(&self.cmdline)?;
        let lazy = self.lazy.map_or_else(defaults, Ok)?;
        let cpus: CpusSpec = self.cpus.map_or_else(defaults, Ok)?;
        let memory = check_memory(self.memory.map_or_else(defaults, Ok)?, lazy.strict)?;
        let arenas = check_arenas(self.arenas)?;
        let (transport, cmdline) = transport(self.transport, self.cmdline, !arenas.is_empty())?;
        let balloon = self
            .balloon
            .map(|spec| check_balloon(&spec, memory.size, &lazy));
        check_disks(&self.disks)?;
        check_names(
            "disks",
            self.disks.iter().enumerate().map(|(at, it)| it.name(at)),
        )?;
        let allow_paths = check_folders("--allow-paths", self.allow_paths)?;
        check_nets(&self.nets)?;
        check_names(
            "interfaces",
            self.nets.iter().enumerate().map(|(at, it)| it.name(at)),
        )?;
        if let SerialConfig::File(path) = &self.serial {
            check_output("--serial", path)?;
        }
        let api_socket = self.api_socket.map(|socket| socket.path);
        if let Some(path) = &api_socket {
            check_socket("--api-socket", path)?;
        }
        if let Some(path) = &self.metrics_path {
            check_output("--metrics-path", path)?;
        }
        if let Some(vsock) = &self.vsock {
            check_vsock_path(&vsock.path)?;
        }
        Ok(MachineConfig {
            id: self.id,
            kernel: KernelConfig {
                path: self.kernel,
                entry: self.kernel_entry,
                cache: self.kernel_cache.map_or_else(user_cache, |cache| cache.0),
            },
            initramfs: self.initramfs,
            cmdline,
            transport,
            vcpus: cpus.boot,
            nested: cpus.nested,
            memory,
            arenas,
            disks: self.disks,
            allow_paths,
            nets: self.nets,
            vsock: self.vsock,
            serial: self.serial,
            balloon: balloon.transpose()?,
            rng: self.rng,
            rng_limits: self.rng_limits.unwrap_or_default(),
            lazy,
            api_socket,
            metrics_path: self.metrics_path,
            metrics_listen: self.metrics_listen,
            guardian: self.guardian,
            words: Vec::new(),
            as_firecracker: false,
            seccomp: self.seccomp.into(),
        })
    }
}

/// Where a user's programs keep what they can make again (XDG Base Directory Specification); nowhere for a user without a home.
fn user_cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = || {
        folder("HOME")
            .filter(absolute)
            .map(|home| home.join(".cache"))
    };
    let cache = folder("XDG_CACHE_HOME").filter(absolute).or_else(home)?;
    Some(cache.join("ebb/kernels"))
}

/// Checks the name of a machine.
///
/// # Errors
/// [`ConfigError::Id`].
pub fn check_id(id: &str) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if (1..=64).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(());
    }
    Err(ConfigError::Id(id.escape_debug().to_string()))
}

fn check_cmdline(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(ConfigError::CmdlineTooLong(cmdline.len()));
    }
    if let Some(char) = cmdline.chars().find(|char| char.is_control()) {
        return Err(ConfigError::CmdlineControl(char));
    }
    if cmdline.split(' ').any(|word| word == "acpi=off") {
        return Err(ConfigError::CmdlineWithoutAcpi);
    }
    Ok(())
}

fn check_memory(spec: MemorySpec, strict: bool) -> Result<MemoryConfig, ConfigError> {
    if spec.size == 0 {
        return Err(ConfigError::NoMemory);
    }
    if spec.hugepages && spec.thp == Some(true) {
        return Err(ConfigError::ThpWithHugepages);
    }
    let huge = [
        ("hugepages", spec.hugepages),
        ("thp", spec.thp == Some(true)),
    ];
    if let Some((key, _)) = huge.into_iter().find(|&(_, on)| strict && on) {
        return Err(ConfigError::StrictHugePages { key });
    }
    Ok(MemoryConfig {
        size: spec.size,
        thp: spec.thp.unwrap_or(!spec.hugepages && !strict),
        hugepages: spec.hugepages,
        prefault: spec.prefault,
        shared: spec.shared,
    })
}

/// How the guest reaches its devices, and the command line that it gets. With `pci=off` Linux finds no arena and no device on
/// PCI.
fn transport(
    given: Option<Transport>,
    cmdline: String,
    arenas: bool,
) -> Result<(Transport, String), ConfigError> {
    const NO_PCI: &str = "pci=off";
    let is_off = cmdline.split(' ').any(|word| word == NO_PCI);
    if is_off && arenas {
        return Err(ConfigError::ArenaWithoutPci);
    }
    match given {
        Some(Transport::Pci) if is_off => Err(ConfigError::TransportWithoutPci),
        None if is_off => Ok((Transport::Mmio, cmdline)),
        None | Some(Transport::Pci) => Ok((Transport::Pci, cmdline)),
        // Linux complains on the console if it looks for a bus and there is none.
        Some(Transport::Mmio) if !arenas && cmdline.starts_with(MachineSpec::DEFAULT_CMDLINE) => {
            Ok((Transport::Mmio, format!("{cmdline} {NO_PCI}")))
        }
        Some(Transport::Mmio) => Ok((Transport::Mmio, cmdline)),
    }
}

fn check_arenas(specs: Vec<ArenaSpec>) -> Result<Vec<ArenaConfig>, ConfigError> {
    if specs.len() > MAX_ARENAS {
        let given = specs.len();
        return Err(ConfigError::TooManyArenas { given });
    }
    let (mut arenas, mut total): (Vec<ArenaConfig>, u64) = (Vec::new(), 0);
    for (number, ArenaSpec { size, granule, id }) in specs.into_iter().enumerate() {
        total = total.saturating_add(size);
        if total > MAX_MEMORY {
            return Err(ConfigError::ArenaTooLarge(size));
        }
        if !size.is_multiple_of(granule) {
            return Err(ConfigError::ArenaSize { size, granule });
        }
        if Layout::new(size, granule).is_none() {
            return Err(ConfigError::ArenaTooSmall { size, granule });
        }
        let id = id.unwrap_or_else(|| format!("arena{number}"));
        if id.len() > MAX_ID || check_id(&id).is_err() {
            return Err(ConfigError::ArenaId(id.escape_debug().to_string()));
        }
        if arenas.iter().any(|other| other.id == id) {
            return Err(ConfigError::ArenaIdTwice(id));
        }
        arenas.push(ArenaConfig { size, granule, id });
    }
    Ok(arenas)
}

/// A client of the API tells devices of one kind by their names.
fn check_names(
    devices: &'static str,
    names: impl Iterator<Item = String>,
) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for id in names {
        if !seen.insert(id.clone()) {
            return Err(ConfigError::DeviceIdTwice { devices, id });
        }
    }
    Ok(())
}

/// Each interface has its own tap and its own address.
fn check_nets(nets: &[NetConfig]) -> Result<(), ConfigError> {
    for (index, net) in nets.iter().enumerate() {
        let others = nets.iter().take(index);
        for other in others {
            let twice = if net.tap.is_some() && net.tap == other.tap {
                net.tap.as_ref().map(|tap| format!("tap={tap}"))
            } else if net.fd == other.fd {
                net.fd.map(|fd| format!("fd={fd}"))
            } else {
                let same = net.mac.filter(|_| net.mac == other.mac);
                same.map(|mac| format!("mac={mac}"))
            };
            if let Some(twice) = twice {
                return Err(ConfigError::NetTwice(twice));
            }
        }
    }
    Ok(())
}

fn check_balloon(
    spec: &BalloonSpec,
    memory: u64,
    lazy: &LazyConfig,
) -> Result<BalloonConfig, ConfigError> {
    if spec.size > memory {
        return Err(ConfigError::BalloonTooLarge {
            balloon: spec.size,
            memory,
        });
    }
    if spec.auto && lazy.mode == LazyMode::Off {
        let key = if lazy.strict { "strict=on" } else { "mode=off" };
        return Err(ConfigError::AutoWithoutReclaim { key });
    }
    let reserve = spec.reserve.unwrap_or_else(|| default_reserve(memory));
    if reserve >= memory {
        return Err(ConfigError::ReserveTooLarge { reserve, memory });
    }
    Ok(BalloonConfig {
        size: spec.size,
        deflate_on_oom: spec.deflate_on_oom.unwrap_or(spec.auto),
        statistics_interval_s: spec.statistics.unwrap_or(spec.auto.into()),
        auto_reserve: spec.auto.then_some(reserve),
        free_page_reporting: spec.reporting,
    })
}

/// What a balloon that runs itself leaves available to a guest with so much memory: an eighth, at least 64 MiB, but at
/// most half.
fn default_reserve(memory: u64) -> u64 {
    (memory / 8).max(MIN_RESERVE).min(memory / 2)
}
