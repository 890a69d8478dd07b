//! The state of vCPUs and of the chips that KVM emulates, for snapshots.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::{Hypervisor, KickTarget, KvmError, Machine, call};

/// The time stamp counter, and the one time at which the local APIC's timer fires.
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The state of one vCPU.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID tells the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time stamp counter in kHz; 0: not known.
    pub tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl Hypervisor {
    /// The model-specific registers that a snapshot has to hold (`KVM_GET_MSR_INDEX_LIST`).
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn saved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list();
        Ok(list
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .to_vec())
    }
}

impl KickTarget {
    /// The vCPU's state. It must rest, with its last exit completed.
    ///
    /// The order is that of Linux, `Documentation/virt/kvm/api.rst`, and of other monitors: to read the run state first makes
    /// KVM deliver what is pending to it.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn save(&self, msrs: &[u32]) -> Result<VcpuState, KvmError> {
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        Ok(VcpuState {
            mp_state,
            regs: fd.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debugregs: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            cpuid: cpuid.map_err(call("KVM_GET_CPUID2"))?.as_slice().to_vec(),
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }
}

/// The values of `msrs`; those that KVM does not let user space read are left out.
fn read_msrs(fd: &VcpuFd, msrs: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let (mut values, mut left) = (Vec::with_capacity(msrs.len()), msrs);
    while !left.is_empty() {
        let entry = |&index: &u32| kvm_msr_entry {
            index,
            ..Default::default()
        };
        let entries: Vec<_> = left.iter().map(entry).collect();
        let mut batch =
            Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for MSRs"))?;
        let count = fd.get_msrs(&mut batch).map_err(call("KVM_GET_MSRS"))?;
        values.extend(batch.as_slice().iter().take(count));
        // It ends at the first that it does not read.
        left = left.get(count + 1..).unwrap_or_default();
    }
    Ok(values)
}

impl VcpuState {
    /// Gives `fd`, a new vCPU, this state. Its clocks go on as if `elapsed_ns` had passed. The chips and kvmclock must have
    /// their state already.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore(
        &self,
        fd: &mut VcpuFd,
        host: &Hypervisor,
        elapsed_ns: u64,
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid);
        let cpuid = cpuid.map_err(|_| KvmError::Lacks("room for the saved CPUID leaves"))?;
        fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        host.share_registers(fd);
        if self.tsc_khz != 0 && fd.get_tsc_khz().unwrap_or(0) != self.tsc_khz {
            fd.set_tsc_khz(self.tsc_khz)
                .map_err(call("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(self.mp_state)
            .map_err(call("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads 4096 bytes, unless the process has asked for larger state (AMX), which it never does.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debugregs)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_msrs(fd, elapsed_ns)?;
        // After the registers: setting these forgets pending exceptions.
        fd.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// The time stamp counter first, and the timer that is measured by it last.
    fn restore_msrs(&self, fd: &VcpuFd, elapsed_ns: u64) -> Result<(), KvmError> {
        let mut msrs = self.msrs.clone();
        msrs.sort_by_key(|entry| match entry.index {
            MSR_TSC => 0,
            MSR_TSC_DEADLINE => 2,
            _ => 1,
        });
        for entry in &mut msrs {
            if entry.index == MSR_TSC {
                let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
                entry.data = entry.data.wrapping_add(u64::try_from(ticks).unwrap_or(0));
            }
        }
        let mut left = &msrs[..];
        while !left.is_empty() {
            let batch = Msrs::from_entries(left).map_err(|_| KvmError::Lacks("room for MSRs"))?;
            let count = fd.set_msrs(&batch).map_err(call("KVM_SET_MSRS"))?;
            left = left.get(count..).unwrap_or_default();
            if let Some((refused, rest)) = left.split_first() {
                // One that cannot be written, but is as it should be.
                let is = read_msrs(fd, &[refused.index])?;
                if is.first().map(|entry| entry.data) != Some(refused.data) {
                    return Err(KvmError::Msr(refused.index));
                }
                left = rest;
            }
        }
        Ok(())
    }
}

/// The state of the interrupt controllers and the timer, and kvmclock.
#[derive(Serialize, Deserialize)]
pub struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// A handle on the chips of a machine.
#[derive(Clone)]
pub struct Chips(Arc<VmFd>);

impl Machine {
    /// A handle on its chips. The machine stays in KVM as long as it exists.
    #[must_use]
    pub fn chips(&self) -> Chips {
        Chips(Arc::clone(&self.fd))
    }
}

impl Chips {
    /// Their state. All vCPUs must rest.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn save(&self) -> Result<ChipState, KvmError> {
        let chip = |chip_id| {
            let mut state = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            let got = self.0.get_irqchip(&mut state);
            got.map_err(call("KVM_GET_IRQCHIP")).map(|()| state)
        };
        let all = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        Ok(ChipState {
            irqchips: all.into_iter().map(chip).collect::<Result<_, _>>()?,
            pit: self.0.get_pit2().map_err(call("KVM_GET_PIT2"))?,
            clock: self.0.get_clock().map_err(call("KVM_GET_CLOCK"))?,
        })
    }

    /// Gives them this state, before vCPUs get theirs. kvmclock goes on as if `elapsed_ns` had passed.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn restore(&self, state: &ChipState, elapsed_ns: u64) -> Result<(), KvmError> {
        for chip in &state.irqchips {
            self.0.set_irqchip(chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        self.0.set_pit2(&state.pit).map_err(call("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: state.clock.clock.saturating_add(elapsed_ns),
            ..Default::default()
        };
        self.0.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
    }
}
