//! KVM's descriptors: the hypervisor, a virtual machine, its memory slots, interrupts and doorbells.

mod hypercall;
mod irqfd;
mod kick;
mod limits;
mod msi;
mod msr;
mod run_pages;
mod state;
mod synchronous;

use std::io;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::memory::GuestRam;
use limits::Limits;
use msi::Routes;

pub use irqfd::IrqFd;
pub use kick::{KickTable, KickTarget, Registration, kick, prepare_kicks};
pub use msi::MsiFd;
pub use msr::{MSR_KVM_SYSTEM_TIME_NEW, MSR_LSTAR};
pub use run_pages::{RegisteredPage, RunPages};
pub use state::{ChipState, Chips, VcpuState};

/// What KVM refuses, or cannot do on this host.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist; load kvm_intel or kvm_amd, or enable nested virtualization for this \
         machine; `ebb doctor` tells more"
    )]
    Missing,
    /// This user may not open `/dev/kvm`.
    #[error(
        "/dev/kvm: permission denied; add your user to its group (`ls -l /dev/kvm`) or run as root"
    )]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened; `ebb doctor` tells more")]
    Open(#[source] io::Error),
    /// KVM lacks something that is needed.
    #[error("this host's KVM lacks {0}; `ebb doctor` tells what is missing")]
    Lacks(&'static str),
    /// There are more vCPUs than KVM allows.
    #[error("{asked} vCPUs were asked for, but KVM allows {max} here; lower --cpus boot=")]
    TooManyVcpus {
        /// How many were asked for.
        asked: u32,
        /// How many KVM allows.
        max: u32,
    },
    /// There is more memory than guests can address.
    #[error(
        "the guest's memory would end at {end:#x}, but guests can address {bits} bits here; lower --memory size= \
         or --arena size="
    )]
    AddressWidth {
        /// First address after the memory.
        end: u64,
        /// Width of guest-physical addresses in bits.
        bits: u32,
    },
    /// A saved register cannot be written.
    #[error(
        "this host's KVM refuses the saved value of MSR {0:#x}; restore on a host like the one that made the snapshot"
    )]
    Msr(u32),
    /// A system call failed.
    #[error("KVM: {operation} failed")]
    Call {
        /// What was being done.
        operation: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Maximum size of a memory slot in bytes. KVM takes less than 2^31 pages (Linux, `KVM_MEM_MAX_NR_PAGES`).
const MAX_SLOT: u64 = 4 << 40;

/// Makes a [`KvmError::Call`] of an error of `operation`.
pub(crate) fn call(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call {
        operation,
        source: error.into(),
    }
}

/// `/dev/kvm`, with everything that a machine needs.
pub struct Hypervisor {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Hypervisor {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`KvmError`]: no KVM, no permission, or one that lacks what every machine needs.
    pub fn open() -> Result<Self, KvmError> {
        const API_VERSION: i32 = 12;
        const NEEDED: [(Cap, &str); 7] = [
            (
                Cap::Irqchip,
                "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
            ),
            (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
            (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
            (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
            (Cap::ExtCpuid, "CPUID control (KVM_CAP_EXT_CPUID)"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (
                Cap::ImmediateExit,
                "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
            ),
        ];
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            _ => KvmError::Open(error.into()),
        })?;
        if kvm.get_api_version() != API_VERSION {
            return Err(KvmError::Lacks("API version 12"));
        }
        if let Some((_, name)) = NEEDED
            .into_iter()
            .find(|(cap, _)| !kvm.check_extension(*cap))
        {
            return Err(KvmError::Lacks(name));
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { kvm, cpuid })
    }

    /// The CPUID leaves that KVM can offer to a guest.
    #[must_use]
    pub const fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Returns true if the timer of KVM's local APIC has the TSC-deadline mode.
    #[must_use]
    pub fn tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Size in bytes of the mapping that KVM shares with the thread of a vCPU.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn vcpu_mapping(&self) -> Result<usize, KvmError> {
        let size = self.kvm.get_vcpu_mmap_size();
        size.map_err(call("KVM_GET_VCPU_MMAP_SIZE"))
    }

    /// Checks that this host's KVM allows so many `vcpus` and memory up to `memory_end`.
    ///
    /// # Errors
    /// [`KvmError::TooManyVcpus`], [`KvmError::AddressWidth`].
    pub fn check_limits(&self, vcpus: u32, memory_end: u64) -> Result<(), KvmError> {
        let limits = Limits {
            vcpus: u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            address_bits: self.address_bits(),
        };
        limits.check(vcpus, memory_end)
    }

    /// Width of guest-physical addresses (CPUID leaf 0x8000_0008, EAX bits 7..0).
    fn address_bits(&self) -> u32 {
        const ADDRESS_SIZES: u32 = 0x8000_0008;
        let leaf = self
            .cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == ADDRESS_SIZES);
        leaf.map_or(36, |entry| entry.eax & 0xff)
    }

    /// Creates a machine with KVM's own interrupt controller and timer, and without memory or vCPUs.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn create_machine(&self) -> Result<Machine, KvmError> {
        let fd = self.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        // KVM emulates the speaker port, too, by which Linux measures the frequency of its TSC.
        let pit = kvm_pit_config {
            flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
        let fd = Arc::new(fd);
        Ok(Machine {
            routes: Routes::new(Arc::clone(&fd)),
            fd,
            _ram: None,
        })
    }
}

/// A machine in KVM. It and its second-level page tables exist until the last descriptor is closed (this one and those of
/// the vCPUs and interrupts) and the last of the [`RunPages`] is unmapped.
pub struct Machine {
    fd: Arc<VmFd>,
    routes: Arc<Routes>,
    /// Keeps the memory behind the slots mapped as long as the guest can reach it.
    _ram: Option<Arc<GuestRam>>,
}

impl Machine {
    /// Makes all of `ram` the guest's memory: one slot for each region, or several if the region is too big for one.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn map_memory(&mut self, ram: Arc<GuestRam>) -> Result<(), KvmError> {
        let parts = ram.regions().iter().flat_map(|region| {
            let offsets = (0..region.gpa.len()).step_by(MAX_SLOT as usize);
            offsets.map(move |offset| (region, offset))
        });
        for (slot, (region, offset)) in parts.enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa.start() + offset,
                memory_size: (region.gpa.len() - offset).min(MAX_SLOT),
                userspace_addr: region.host as u64 + offset,
            };
            // SAFETY: the region is a mapping that `ram` owns. This value keeps `ram`, and vCPUs are dropped before it.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        self._ram = Some(ram);
        Ok(())
    }

    /// An edge-triggered interrupt with the number `gsi`.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn interrupt(&self, gsi: u32) -> Result<IrqFd, KvmError> {
        self.event_for(gsi).map(IrqFd::new)
    }

    /// An interrupt that is a message, of which it has none yet.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn message_interrupt(&self) -> Result<MsiFd, KvmError> {
        let gsi = self.routes.allocate();
        let event = self.event_for(gsi)?;
        Ok(MsiFd::new(event, gsi, Arc::clone(&self.routes)))
    }

    /// What raises the interrupt with the number `gsi` when it is signalled.
    fn event_for(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            KvmError::Call {
                operation: "eventfd",
                source,
            }
        })?;
        self.fd
            .register_irqfd(&event, gsi)
            .map_err(call("KVM_IRQFD"))?;
        Ok(event)
    }

    /// Has KVM signal `event` when the guest writes `value`, 32 bits wide, to the guest-physical address `addr`, without an
    /// exit to user space.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn doorbell(&self, addr: u64, value: u32, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(addr), value)
            .map_err(call("KVM_IOEVENTFD"))
    }

    /// The same for a write of any value and width.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn doorbell_for_any(&self, addr: u64, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(addr), NoDatamatch)
            .map_err(call("KVM_IOEVENTFD"))
    }

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn create_vcpu(&self, index: u32) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(call("KVM_CREATE_VCPU"))
    }
}
