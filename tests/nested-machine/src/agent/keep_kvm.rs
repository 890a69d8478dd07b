//! Keeps one idle VM as long as the machine runs.
//!
//! KVM patches the scheduler's code when the first VM is created and the last one destroyed (`preempt_notifier_key`), and its
//! own code when a vCPU's local APIC is enabled (`apic_sw_disabled`). QEMU before 8.1 translates code without the lock of its
//! page, so an emulated CPU may run a stale `int3` after the patching, and the kernel panics with "Oops: int3". While one VM
//! exists whose APIC is never enabled, nothing is patched.

use ebb_nested_machine::error::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// An idle VM with one vCPU that never runs.
pub struct KeptVm {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

impl KeptVm {
    /// Creates the VM, its interrupt controller and its vCPU.
    pub fn create() -> Result<Self> {
        let kvm = Kvm::new().context(|| "open /dev/kvm".into())?;
        let vm = kvm
            .create_vm()
            .context(|| "create the VM that is kept".into())?;
        vm.create_irq_chip()
            .context(|| "create its interrupt controller".into())?;
        let vcpu = vm.create_vcpu(0).context(|| "create its vCPU".into())?;
        Ok(Self {
            _vcpu: vcpu,
            _vm: vm,
        })
    }
}
