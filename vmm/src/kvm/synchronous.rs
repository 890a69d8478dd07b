//! Page faults that a vCPU's own thread waits for, not a worker of the kernel.

use kvm_bindings::{KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, kvm_enable_cap};

use super::{Hypervisor, KvmError, Machine, call};

/// The CPUID leaf of KVM's features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// In its EAX: asynchronous page faults, their delivery as exits, and as interrupts.
const ASYNC_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

impl Hypervisor {
    /// Does not offer guests to be told of page faults that the host works on.
    pub fn hide_async_faults(&mut self) {
        let leaf = |e: &&mut kvm_bindings::kvm_cpuid_entry2| e.function == KVM_FEATURES;
        if let Some(entry) = self.cpuid.as_mut_slice().iter_mut().find(leaf) {
            entry.eax &= !ASYNC_FAULTS;
        }
    }
}

impl Machine {
    /// Has each vCPU wait in `KVM_RUN` for the pages that it touches. To be called before there are vCPUs.
    ///
    /// KVM otherwise hands a fault that takes long to a worker and halts the vCPU meanwhile, or lets the guest do something
    /// else (`kvm_can_do_async_pf` in arch/x86/kvm/x86.c). It does neither for a machine that halts in the guest, and whose
    /// guest has not asked for it. The price: a halted vCPU keeps its processor busy.
    ///
    /// # Errors
    /// [`KvmError::Lacks`], [`KvmError::Call`].
    pub fn fault_synchronously(&self) -> Result<(), KvmError> {
        const LACKS: KvmError = KvmError::Lacks(
            "halts in the guest (KVM_CAP_X86_DISABLE_EXITS), which --lazy strict=on needs",
        );
        let offered = self
            .fd
            .check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
        if offered.cast_unsigned() & KVM_X86_DISABLE_EXITS_HLT == 0 {
            return Err(LACKS);
        }
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_DISABLE_EXITS,
            args: [KVM_X86_DISABLE_EXITS_HLT.into(), 0, 0, 0],
            ..Default::default()
        };
        self.fd
            .enable_cap(&cap)
            .map_err(call("KVM_CAP_X86_DISABLE_EXITS"))
    }
}
