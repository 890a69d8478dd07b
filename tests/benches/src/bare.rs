//! The least that runs a guest: KVM_RUN in a loop, every exit answered with nothing done. What an exit costs
//! without a monitor.

use std::sync::Arc;

use ebb_core::range::GpaRange;
use ebb_payload::{ENTRY, Program, Transport};
use ebb_vmm::arch::registers::Entry;
use ebb_vmm::kvm::Hypervisor;
use ebb_vmm::memory::{Backing, GuestRam};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use ebb_harness::error::{Context, Error, Result};

/// The serial port, to which payloads write their results.
const SERIAL: u16 = 0x3f8;
/// Where they power off.
const POWER: u16 = 0x600;

/// What a payload found out.
pub struct Ran {
    /// The result of each step.
    pub results: Vec<u64>,
    /// Frequency of its time stamp counter in kHz.
    pub tsc_khz: u32,
}

/// The instruction by which this host's guests make hypercalls; `None` where KVM hands none to us.
///
/// # Errors
/// There is no KVM.
pub fn instruction() -> Result<Option<Transport>> {
    let host = Hypervisor::open().context("KVM")?;
    let machine = host.create_machine().context("KVM")?;
    let features = host.take_hypercalls(&machine).context("KVM")?;
    Ok(features.map(|features| {
        if features.contains(ebb_hypercall_abi::Features::VMCALL) {
            Transport::Vmcall
        } else {
            Transport::Vmmcall
        }
    }))
}

/// Runs a payload in `bytes` of memory to its end.
///
/// # Errors
/// It does something that payloads do not do.
pub fn run(program: &Program, bytes: u64) -> Result<Ran> {
    let host = Hypervisor::open().context("KVM")?;
    let all = GpaRange::new(0, bytes).context("no memory")?;
    let ram = Arc::new(GuestRam::allocate(Backing::default(), &[all]).context("guest memory")?);
    let memory = ram.memory();
    let mut machine = host.create_machine().context("KVM")?;
    machine.map_memory(Arc::clone(&ram)).context("KVM")?;
    host.take_hypercalls(&machine).context("KVM")?;
    let entry = Entry::Linux64 { rip: ENTRY };
    entry.write_tables(&memory).context("guest memory")?;
    for (at, bytes) in program.segments().context("payload")? {
        memory
            .write_slice(&bytes, GuestAddress(at))
            .context("guest memory")?;
    }
    let mut vcpu = machine.create_vcpu(0).context("KVM")?;
    let set_up = || {
        vcpu.set_cpuid2(host.cpuid())?;
        vcpu.set_sregs(&entry.sregs(&vcpu.get_sregs()?))?;
        vcpu.set_regs(&entry.regs())?;
        vcpu.get_tsc_khz()
    };
    let tsc_khz = set_up().context("KVM")?;
    let mut written = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(SERIAL, data)) => written.extend_from_slice(data),
            Ok(VcpuExit::IoOut(POWER, _)) => break,
            Ok(VcpuExit::IoIn(..)) => {}
            Ok(VcpuExit::Hypercall(call)) => *call.ret = 0,
            Ok(exit) => return Err(Error::new(format!("a bare machine: {exit:?}"))),
            Err(error) => return Err(Error::new(format!("a bare machine: {error}"))),
        }
    }
    Ok(Ran {
        results: ebb_payload::results(&written),
        tsc_khz,
    })
}
