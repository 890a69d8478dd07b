//! Which writes of model-specific registers a vCPU leaves the guest for: those that tell that a kernel starts or ends.
//!
//! KVM passes them on before it carries them out (Linux, `Documentation/virt/kvm/api.rst`, `KVM_X86_SET_MSR_FILTER` and
//! `KVM_CAP_X86_USER_SPACE_MSR`). Linux writes them when a CPU comes up or goes down, and at no other time.

use kvm_bindings::{Msrs, kvm_enable_cap, kvm_msr_entry};
use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};

use super::{Hypervisor, KickTarget, KvmError, Machine, call};

/// Where SYSCALL enters the kernel: set by each CPU that starts (Linux, `syscall_init` in `arch/x86/kernel/cpu/common.c`).
pub const MSR_LSTAR: u32 = 0xc000_0082;
/// kvmclock: set by each CPU that starts, and switched off by each one before kexec, and before a crash kernel runs (Linux,
/// `kvmclock_disable` in `arch/x86/kernel/kvmclock.c`). Kernels that use the older number, 0x12, are not read: before a write
/// of that, KVM would have to know that it comes from the guest (`kvm_write_system_time` in `arch/x86/kvm/x86.c`). Bit 0 is
/// set to switch it on.
pub const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

impl Hypervisor {
    /// Makes each vCPU of `machine` leave the guest at a write of [`MSR_LSTAR`] or [`MSR_KVM_SYSTEM_TIME_NEW`]. Must be called
    /// before vCPUs are created. Returns false if KVM cannot do that (before Linux 5.10).
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn report_kernels(&self, machine: &Machine) -> Result<bool, KvmError> {
        let needed = [Cap::X86UserSpaceMsr, Cap::X86MsrFilter];
        if !needed.iter().all(|cap| self.kvm.check_extension(*cap)) {
            return Ok(false);
        }
        let cap = kvm_enable_cap {
            cap: Cap::X86UserSpaceMsr as u32,
            args: [MsrExitReason::Filter.bits().into(), 0, 0, 0],
            ..Default::default()
        };
        let set = machine.fd.enable_cap(&cap);
        set.map_err(call("KVM_CAP_X86_USER_SPACE_MSR"))?;
        // The bit of each register is 0: its writes are denied to KVM, and passed on.
        let ranges = [MSR_LSTAR, MSR_KVM_SYSTEM_TIME_NEW].map(|base| MsrFilterRange {
            flags: MsrFilterRangeFlags::WRITE,
            base,
            msr_count: 1,
            bitmap: &[0],
        });
        let set = machine
            .fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges);
        set.map_err(call("KVM_X86_SET_MSR_FILTER"))?;
        Ok(true)
    }
}

impl KickTarget {
    /// Carries out the write of `data` to register `index` that caused the last exit. If KVM refuses it, the guest gets the
    /// exception (#GP) that it would have got without us.
    pub fn write_msr(&mut self, index: u32, data: u64) {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]);
        let written = msrs.is_ok_and(|msrs| self.fd.set_msrs(&msrs).is_ok_and(|count| count == 1));
        let run = self.fd.get_kvm_run();
        if run.exit_reason == kvm_bindings::KVM_EXIT_X86_WRMSR {
            // KVM reads it at the next entry.
            run.__bindgen_anon_1.msr.error = (!written).into();
        }
    }
}
