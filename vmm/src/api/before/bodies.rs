//! The bodies of Firecracker's requests, and the options of `ebb run` that they stand for. What is null is what is left out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{LoadMemory, LoadSpec, LoggerSpec};
use crate::api::drives::Limiter;
use crate::api::routes::{Fault, or_default};
use crate::config::quote;

/// `PUT /boot-source`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    pub kernel_image_path: String,
    pub initrd_path: Option<String>,
    pub boot_args: Option<String>,
}

/// `PUT /machine-config`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub vcpu_count: u32,
    pub mem_size_mib: u64,
    /// Threads of a core are not told apart from cores.
    pub smt: Option<bool>,
    pub cpu_template: Option<String>,
    /// Accepted: what a restored machine writes is known without.
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<String>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: Some(false),
            cpu_template: None,
            track_dirty_pages: Some(false),
            huge_pages: None,
        }
    }
}

impl Machine {
    /// The size is rounded up to blocks of 2 MiB.
    pub fn words(&self) -> Result<Vec<String>, Fault> {
        let template = self.cpu_template.as_deref();
        if let Some(other) = template.filter(|it| *it != "None") {
            return refuse(format!(
                "cpu_template {other}: guests see the host's processor, there are no templates; leave it out"
            ));
        }
        let huge = match self.huge_pages.as_deref() {
            None | Some("None") => "off",
            Some("2M") => "on",
            Some(other) => return refuse(format!("huge_pages {other}: write None or 2M")),
        };
        let mib = self.mem_size_mib.checked_next_multiple_of(2);
        let mib = mib.unwrap_or(self.mem_size_mib);
        Ok(vec![
            format!("--cpus=boot={}", self.vcpu_count),
            format!("--memory=size={mib}M,hugepages={huge}"),
        ])
    }
}

/// `PATCH /machine-config`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineUpdate {
    pub vcpu_count: Option<u32>,
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub cpu_template: Option<String>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<String>,
}

/// `PUT /drives/{id}`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: Option<String>,
    pub path_on_host: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub is_root_device: bool,
    pub is_read_only: Option<bool>,
    pub partuuid: Option<String>,
    /// Accepted: a guest may always ask for a flush.
    pub cache_type: Option<String>,
    pub io_engine: Option<String>,
    pub rate_limiter: Option<Limiter>,
    pub socket: Option<String>,
}

impl Drive {
    pub fn word(&self, id: &str) -> Result<String, Fault> {
        if self.socket.is_some() {
            return refuse("socket: there are no vhost-user disks; give path_on_host");
        }
        let Some(path) = &self.path_on_host else {
            return refuse("path_on_host is missing");
        };
        let readonly = on_off(self.is_read_only.unwrap_or(false));
        let mut word = format!(
            "--disk=path={},readonly={readonly},id={}",
            quote(path),
            quote(id)
        );
        match self.io_engine.as_deref() {
            None => {}
            Some("Sync") => word.push_str(",engine=threads"),
            Some("Async") => word.push_str(",engine=io_uring"),
            Some(other) => return refuse(format!("io_engine {other}: write Sync or Async")),
        }
        push_limits(&mut word, self.rate_limiter.as_ref(), "")?;
        Ok(word)
    }

    /// What the kernel is told of the root device.
    pub fn root(&self) -> String {
        let mode = if self.is_read_only.unwrap_or(false) {
            "ro"
        } else {
            "rw"
        };
        match &self.partuuid {
            Some(id) => format!(" root=PARTUUID={id} {mode}"),
            None => format!(" root=/dev/vda {mode}"),
        }
    }
}

/// `PUT /network-interfaces/{id}`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    pub iface_id: Option<String>,
    pub host_dev_name: String,
    pub guest_mac: Option<String>,
    pub mtu: Option<u16>,
    pub rx_rate_limiter: Option<Limiter>,
    pub tx_rate_limiter: Option<Limiter>,
}

impl Net {
    pub fn word(&self, id: &str) -> Result<String, Fault> {
        let mut word = format!("--net=tap={},id={}", quote(&self.host_dev_name), quote(id));
        if let Some(mac) = &self.guest_mac {
            word.push_str(&format!(",mac={}", quote(mac)));
        }
        if let Some(mtu) = self.mtu {
            word.push_str(&format!(",mtu={mtu}"));
        }
        push_limits(&mut word, self.rx_rate_limiter.as_ref(), "rx_")?;
        push_limits(&mut word, self.tx_rate_limiter.as_ref(), "tx_")?;
        Ok(word)
    }
}

/// `PUT /vsock`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    pub vsock_id: Option<String>,
    pub guest_cid: u64,
    pub uds_path: String,
}

impl Vsock {
    pub fn word(&self) -> String {
        format!(
            "--vsock=cid={},path={}",
            self.guest_cid,
            quote(&self.uds_path)
        )
    }
}

/// `PUT /entropy`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    pub rate_limiter: Option<Limiter>,
}

impl Entropy {
    pub fn words(&self) -> Result<Vec<String>, Fault> {
        let mut keys = String::new();
        push_limits(&mut keys, self.rate_limiter.as_ref(), "")?;
        let keys = keys.strip_prefix(',');
        let limits = keys.map(|keys| format!("--rng-limits={keys}"));
        Ok([Some("--rng=on".to_owned()), limits]
            .into_iter()
            .flatten()
            .collect())
    }
}

/// `PUT /balloon`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    pub amount_mib: u64,
    pub deflate_on_oom: bool,
    #[serde(default, deserialize_with = "or_default")]
    pub stats_polling_interval_s: u32,
    pub free_page_reporting: Option<bool>,
    pub free_page_hinting: Option<bool>,
}

impl Default for Balloon {
    /// What a guest has unasked: it costs nothing until the host is short of memory.
    fn default() -> Self {
        Self {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: 0,
            free_page_reporting: None,
            free_page_hinting: None,
        }
    }
}

impl Balloon {
    pub fn word(&self) -> Result<String, Fault> {
        if self.free_page_hinting == Some(true) {
            return refuse(HINTING);
        }
        let mut word = format!(
            "--balloon=size={}M,deflate_on_oom={},statistics={}",
            self.amount_mib,
            on_off(self.deflate_on_oom),
            self.stats_polling_interval_s,
        );
        if self.free_page_reporting != Some(false) {
            word.push_str(",reporting=lazy");
        }
        Ok(word)
    }
}

/// Why there is no hinting.
pub const HINTING: &str =
    "hinting is not needed: the host reads the guest kernel's free lists; leave it out";

/// `PUT /serial`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    pub serial_out_path: Option<String>,
    pub rate_limiter: Option<Limiter>,
}

impl Serial {
    pub fn word(&self) -> Result<String, Fault> {
        if self.rate_limiter.is_some() {
            return refuse(
                "rate_limiter: output that nobody takes is dropped, it has no limit; leave it out",
            );
        }
        Ok(match &self.serial_out_path {
            Some(path) => format!("--serial=file={}", quote(path)),
            None => "--serial=tty".to_owned(),
        })
    }
}

/// `PUT /metrics`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    pub metrics_path: String,
}

impl Metrics {
    pub fn word(&self) -> String {
        format!("--metrics-path={}", self.metrics_path)
    }
}

/// `PUT /logger`. Lines always have their level and where they come from.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "what is accepted and changes nothing")]
pub struct Logger {
    log_path: Option<PathBuf>,
    level: Option<String>,
    show_level: Option<bool>,
    show_log_origin: Option<bool>,
    module: Option<String>,
}

impl Logger {
    pub fn spec(self) -> Result<LoggerSpec, Fault> {
        let level = self.level.as_deref().map(log_level).transpose();
        Ok(LoggerSpec {
            path: self.log_path,
            level: level.map_err(Fault::bad_request)?,
        })
    }
}

/// Firecracker's names of levels, in any case.
///
/// # Errors
/// Another name.
pub fn log_level(name: &str) -> Result<tracing::Level, String> {
    match name.to_ascii_lowercase().as_str() {
        "off" | "error" => Ok(tracing::Level::ERROR),
        "warn" | "warning" => Ok(tracing::Level::WARN),
        "info" => Ok(tracing::Level::INFO),
        "debug" => Ok(tracing::Level::DEBUG),
        "trace" => Ok(tracing::Level::TRACE),
        _ => Err(format!(
            "level {name}: write Off, Error, Warn, Info, Debug or Trace"
        )),
    }
}

/// `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub action_type: String,
}

/// `PUT /snapshot/load`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "what is accepted and changes nothing")]
pub struct Load {
    snapshot_path: PathBuf,
    mem_file_path: Option<PathBuf>,
    mem_backend: Option<Backend>,
    resume_vm: Option<bool>,
    enable_diff_snapshots: Option<bool>,
    track_dirty_pages: Option<bool>,
    network_overrides: Option<Vec<NetOverride>>,
    vsock_override: Option<VsockOverride>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Backend {
    backend_path: PathBuf,
    backend_type: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockOverride {
    uds_path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetOverride {
    iface_id: String,
    host_dev_name: String,
}

impl Load {
    pub fn spec(self) -> Result<LoadSpec, Fault> {
        let memory = match (self.mem_file_path, self.mem_backend) {
            (Some(path), None) => LoadMemory::File(path),
            (None, Some(backend)) => match backend.backend_type.as_str() {
                "File" => LoadMemory::File(backend.backend_path),
                "Uffd" => LoadMemory::Server(backend.backend_path),
                other => return refuse(format!("backend_type {other}: write File or Uffd")),
            },
            _ => return refuse("give one of mem_backend and mem_file_path"),
        };
        let taps = self.network_overrides.unwrap_or_default().into_iter();
        Ok(LoadSpec {
            state: self.snapshot_path,
            memory,
            vsock: self.vsock_override.map(|it| it.uds_path),
            resume: self.resume_vm.unwrap_or(false),
            taps: taps.map(|it| (it.iface_id, it.host_dev_name)).collect(),
        })
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Adds the limits of a limiter, if it sets any, to the keys of a device.
fn push_limits(word: &mut String, limiter: Option<&Limiter>, prefix: &str) -> Result<(), Fault> {
    let limits = limiter.map(Limiter::limits).transpose()?.flatten();
    let limits = limits.unwrap_or_default();
    for (name, rate) in [("bw", limits.bandwidth), ("ops", limits.operations)] {
        if let Some(rate) = rate {
            word.push_str(&format!(",{prefix}{name}={rate}"));
        }
    }
    Ok(())
}

fn refuse<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::bad_request(message))
}
