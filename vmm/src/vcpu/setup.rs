//! The state of a vCPU before its first instruction.

use ebb_hypercall_abi::Interface;
use kvm_ioctls::VcpuFd;

use crate::arch::cpuid::{self, Topology};
use crate::arch::registers::{self, Entry};
use crate::kvm::{Hypervisor, KvmError, call};

/// How a vCPU starts.
#[derive(Clone, Copy)]
pub struct VcpuSetup {
    /// Index of the vCPU. Number 0 boots; the others wait until it starts them.
    pub index: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The guest may run virtual machines of its own.
    pub nested: bool,
    /// Where vCPU 0 starts.
    pub entry: Entry,
    /// The hypercalls that the guest is offered.
    pub interface: Interface,
}

/// Sets the CPUID, registers and interrupt wiring of a new vCPU.
///
/// # Errors
/// [`KvmError`].
pub fn configure(fd: &mut VcpuFd, host: &Hypervisor, setup: VcpuSetup) -> Result<(), KvmError> {
    let VcpuSetup {
        index,
        vcpus,
        nested,
        entry,
        interface,
    } = setup;
    let topology = Topology {
        apic_id: index,
        vcpus,
        tsc_deadline: host.tsc_deadline(),
        nested,
    };
    let cpuid = cpuid::for_vcpu(host.cpuid(), topology, interface)
        .map_err(|_| KvmError::Lacks("room for our CPUID leaves"))?;
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    host.share_registers(fd);
    fd.set_msrs(&registers::msrs())
        .map_err(call("KVM_SET_MSRS"))?;
    fd.set_fpu(&registers::fpu()).map_err(call("KVM_SET_FPU"))?;
    let mut lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    registers::wire_local_interrupts(&mut lapic);
    fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))?;
    if index == 0 {
        let reset = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        fd.set_sregs(&entry.sregs(&reset))
            .map_err(call("KVM_SET_SREGS"))?;
        fd.set_regs(&entry.regs()).map_err(call("KVM_SET_REGS"))?;
    }
    Ok(())
}
