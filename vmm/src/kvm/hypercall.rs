//! How the guest's hypercalls reach this process.

use std::ptr;

use ebb_hypercall_abi::Features;
use ebb_hypercall_abi::call::KVM_HC_MAP_GPA_RANGE;
use kvm_bindings::{KVM_SYNC_X86_REGS, kvm_enable_cap, kvm_regs};
use kvm_ioctls::{Cap, SyncReg, VcpuFd};

use super::{Hypervisor, KickTarget, KvmError, Machine, call};

impl Hypervisor {
    /// The instruction by which guests make hypercalls on this host's processors. If they used the other one, KVM's
    /// emulator would have to replace it in the guest's code.
    fn hypercall_instruction(&self) -> Features {
        const AMD: &[u8] = b"AuthenticAMD";
        const HYGON: &[u8] = b"HygonGenuine";
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 0);
        let vendor = leaf.map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes));
        match vendor.as_ref().map(|vendor| vendor.as_flattened()) {
            Some(AMD | HYGON) => Features::VMMCALL,
            _ => Features::VMCALL,
        }
    }

    /// Has KVM pass the hypercalls of `machine` on to this process. Returns the instruction by which guests make them, or
    /// `None` if KVM cannot do that (before Linux 5.14).
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn take_hypercalls(&self, machine: &Machine) -> Result<Option<Features>, KvmError> {
        const OURS: u32 = 1 << KVM_HC_MAP_GPA_RANGE;
        let offered = machine.fd.check_extension_int(Cap::ExitHypercall);
        if offered.cast_unsigned() & OURS == 0 {
            return Ok(None);
        }
        let cap = kvm_enable_cap {
            cap: Cap::ExitHypercall as u32,
            args: [OURS.into(), 0, 0, 0],
            ..Default::default()
        };
        machine
            .fd
            .enable_cap(&cap)
            .map_err(call("KVM_CAP_EXIT_HYPERCALL"))?;
        Ok(Some(self.hypercall_instruction()))
    }

    /// Has KVM copy the registers of `vcpu` to the shared page at each exit, if it can. That is 18 words per exit; without
    /// them each hypercall by port needs one more system call.
    pub fn share_registers(&self, vcpu: &mut VcpuFd) {
        let offered = self.kvm.check_extension_int(Cap::SyncRegs);
        if offered.cast_unsigned() & KVM_SYNC_X86_REGS != 0 {
            vcpu.set_sync_valid_reg(SyncReg::Register);
        }
    }
}

impl KickTarget {
    /// The general registers at the last exit.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn registers(&mut self) -> Result<kvm_regs, KvmError> {
        let shared = self.fd.get_kvm_run().kvm_valid_regs;
        if shared & u64::from(KVM_SYNC_X86_REGS) != 0 {
            return Ok(self.fd.sync_regs().regs);
        }
        self.fd.get_regs().map_err(call("KVM_GET_REGS"))
    }

    /// Makes `value` the result of the port read that caused the last exit. Does nothing unless the last exit was a read
    /// of one 32-bit value.
    pub fn answer_input(&mut self, value: u32) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != kvm_bindings::KVM_EXIT_IO {
            return;
        }
        // SAFETY: after an exit for this reason KVM has set `io`.
        let io = unsafe { run.__bindgen_anon_1.io };
        let is_input = u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN;
        if !is_input || io.size != 4 || io.count != 1 {
            return;
        }
        let run = ptr::from_mut(run).cast::<u8>();
        // SAFETY: `data_offset` is where KVM expects the value, in the vCPU's mapped pages. These exist as long as the
        // descriptor, which is borrowed here, and there is no other reference to them.
        unsafe {
            let data = run.add(io.data_offset as usize);
            data.cast::<u32>().write_unaligned(value);
        }
    }
}
