//! What the sections of the state file hold.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ebb_core::range::GpaRange;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FormatError, MemoryMap, Reader, Writer};
use crate::guest_memory::KernelState;
use crate::kvm::{ChipState, VcpuState};

/// Where and when a snapshot was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// Version of the monitor, for the reader.
    pub vmm_version: String,
    /// Nanoseconds since 1970.
    pub taken_ns: u64,
}

impl Host {
    /// Here and now.
    #[must_use]
    pub fn now() -> Self {
        Self {
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            taken_ns: since_1970(),
        }
    }

    /// Nanoseconds since then; 0 if the clock was set back.
    #[must_use]
    pub fn elapsed_ns(&self) -> u64 {
        since_1970().saturating_sub(self.taken_ns)
    }
}

fn since_1970() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.as_ref().map_or(0, Duration::as_nanos)).unwrap_or(u64::MAX)
}

/// A disk's file as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, in nanoseconds since 1970. `None` for block devices, which do not say.
    pub written_ns: Option<i128>,
}

impl DiskFile {
    /// As the file at `path` is now.
    ///
    /// # Errors
    /// Those of opening it.
    pub fn at(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let time = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(Self {
            size: file.seek(SeekFrom::End(0))?,
            written_ns: metadata.is_file().then_some(time),
        })
    }
}

/// A machine's state.
pub struct State {
    /// Where and when it was saved.
    pub host: Host,
    /// The words of the command line that it was started with.
    pub words: Vec<String>,
    /// Its disks, in their order.
    pub disks: Vec<DiskFile>,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer and clock.
    pub chips: ChipState,
    /// Names and states of its devices.
    pub devices: Vec<(String, Value)>,
    /// What is in the memory file.
    pub memory: MemoryMap,
    /// First address and length of each lazily free range.
    pub lazily_free: Vec<(u64, u64)>,
    /// The guest's kernel.
    pub kernel: KernelState,
}

impl State {
    /// The state file.
    ///
    /// # Errors
    /// [`FormatError::Section`].
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut writer = Writer::default();
        writer.add("host", &self.host)?;
        writer.add("words", &self.words)?;
        writer.add("disks", &self.disks)?;
        writer.add("vcpus", &self.vcpus)?;
        writer.add("chips", &self.chips)?;
        writer.add("devices", &self.devices)?;
        writer.add("memory", &self.memory)?;
        writer.add("lazily_free", &self.lazily_free)?;
        writer.add("kernel", &self.kernel)?;
        Ok(writer.finish())
    }

    /// Reads a state file.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let reader = Reader::new(file)?;
        let memory: MemoryMap = reader.section("memory")?;
        if !memory.is_sound() {
            let why = "what it says of files below cannot be".into();
            return Err(FormatError::Section("memory", why));
        }
        Ok(Self {
            host: reader.section("host")?,
            words: reader.section("words")?,
            disks: reader.section("disks")?,
            vcpus: reader.section("vcpus")?,
            chips: reader.section("chips")?,
            devices: reader.section("devices")?,
            memory,
            lazily_free: reader.section("lazily_free")?,
            kernel: reader.section("kernel")?,
        })
    }

    /// The lazily free ranges that are whole pages.
    #[must_use]
    pub fn lazily_free(&self) -> Vec<GpaRange> {
        let range = |&(start, len): &(u64, u64)| GpaRange::new(start, start.checked_add(len)?);
        self.lazily_free.iter().filter_map(range).collect()
    }
}

/// This host's processor is not the one that the guest was started on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuMismatch {
    /// Another vendor or family.
    #[error("was made on another processor ({saved}, this is {here}); restore it on such a host")]
    Other {
        /// Vendor and family of the snapshot.
        saved: String,
        /// Vendor and family of this host.
        here: String,
    },
    /// Features are missing.
    #[error(
        "uses processor features that this host lacks (CPUID leaf {leaf:#x}, {register}: {missing:#x}); restore it on a host that has them"
    )]
    Features {
        /// The leaf.
        leaf: u32,
        /// The register.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
}

/// Leaves with features: leaf, and the bits of EBX, ECX and EDX that count. Those that follow from what the guest has set
/// (OSXSAVE, OSPKE), that KVM or we add (x2APIC, hypervisor, TSC deadline; HTT and CMP_LEGACY with several vCPUs) or that are no
/// features do not.
const FEATURES: [(u32, [u32; 3]); 3] = [
    (1, [0, !(1 << 21 | 1 << 24 | 1 << 27 | 1 << 31), !(1 << 28)]),
    (7, [u32::MAX, !(1 << 4), u32::MAX]),
    (0x8000_0001, [0, !(1 << 1), u32::MAX]),
];

/// Checks that a guest with the CPUID leaves `saved` can go on where KVM offers `here`: the same vendor and family, and all
/// features.
///
/// # Errors
/// [`CpuMismatch`].
pub fn check_cpu(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), CpuMismatch> {
    let leaf = |list: &[kvm_cpuid_entry2], function| {
        let found = list
            .iter()
            .find(|it| it.function == function && it.index == 0);
        found.copied().unwrap_or_default()
    };
    let model = |list| {
        let vendor = leaf(list, 0);
        let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        let signature = leaf(list, 1).eax;
        let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
        let family = if base == 0xf { base + extended } else { base };
        let vendor = String::from_utf8_lossy(vendor.as_flattened())
            .escape_debug()
            .to_string();
        format!("{vendor} family {family}")
    };
    let (was, is) = (model(saved), model(here));
    if was != is {
        return Err(CpuMismatch::Other {
            saved: was,
            here: is,
        });
    }
    for (function, masks) in FEATURES {
        let registers = |list| {
            let it = leaf(list, function);
            [it.ebx, it.ecx, it.edx]
        };
        let (was, is) = (registers(saved), registers(here));
        let names = ["EBX", "ECX", "EDX"];
        for (((was, is), mask), register) in was.into_iter().zip(is).zip(masks).zip(names) {
            let missing = was & !is & mask;
            if missing != 0 {
                return Err(CpuMismatch::Features {
                    leaf: function,
                    register,
                    missing,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: u32, signature: u32, features: u32) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, eax, ebx, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        vec![entry(0, 7, vendor, 0), entry(1, signature, 0, features)]
    }

    #[test]
    fn a_host_with_more_features_will_do_and_others_will_not() {
        let saved = cpu(1, 0x80_0f12, 0b0110);
        assert_eq!(check_cpu(&saved, &saved), Ok(()));
        // Another stepping, more features; and one that KVM adds.
        assert_eq!(check_cpu(&saved, &cpu(1, 0x80_0f13, 0b1110)), Ok(()));
        assert_eq!(check_cpu(&cpu(1, 0x80_0f12, 1 << 31), &saved), Ok(()));
        let error = check_cpu(&saved, &cpu(1, 0x80_0f12, 0b1010)).unwrap_err();
        assert!(error.to_string().contains("leaf 0x1, ECX: 0x4"), "{error}");
        for other in [cpu(2, 0x80_0f12, 0b0110), cpu(1, 0xa0_0f12, 0b0110)] {
            let error = check_cpu(&saved, &other).unwrap_err();
            assert!(matches!(error, CpuMismatch::Other { .. }), "{error}");
        }
    }
}
