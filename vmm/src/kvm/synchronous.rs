//! How page faults of a vCPU are handled by its own thread and never by a kernel worker.

use kvm_bindings::{KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, kvm_enable_cap};

use super::{Hypervisor, KvmError, Machine, call};

/// The CPUID leaf that lists KVM's features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Bits of its EAX: asynchronous page faults, and their delivery by nested exit and by interrupt.
const ASYNC_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

impl Hypervisor {
    /// Does not offer asynchronous page faults to guests.
    pub fn hide_async_faults(&mut self) {
        let leaf = |e: &&mut kvm_bindings::kvm_cpuid_entry2| e.function == KVM_FEATURES;
        if let Some(entry) = self.cpuid.as_mut_slice().iter_mut().find(leaf) {
            entry.eax &= !ASYNC_FAULTS;
        }
    }
}

impl Machine {
    /// Makes each vCPU wait in `KVM_RUN` for the pages that it touches. Must be called before vCPUs are created.
    ///
    /// Otherwise KVM passes a fault that takes long to a kernel worker, and meanwhile halts the vCPU or lets the guest do
    /// something else (`kvm_can_do_async_pf` in arch/x86/kvm/x86.c). It does neither if halts stay in the guest and the guest
    /// has not asked for asynchronous faults. The price is that a halted vCPU keeps its processor busy.
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
