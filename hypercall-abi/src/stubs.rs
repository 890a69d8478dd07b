//! The guest's side of the transports, for 64-bit guests.
//!
//! The functions are naked: a few instructions without addresses, so that a guest may copy them anywhere.

use core::arch::{naked_asm, x86_64::__cpuid};

use crate::call::{Attributes, KVM_HC_MAP_GPA_RANGE};
use crate::discovery::{Features, Interface};
use crate::status::{self, Error, Success};

/// Makes a call by VMCALL, for processors of Intel.
///
/// # Safety
/// Only at privilege level 0, in a machine with [`Features::VMCALL`]. The caller must not touch memory that the
/// operation frees.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn vmcall(gpa: u64, pages: u64, attributes: u64) -> i64 {
    naked_asm!(
        "push rbx",
        "mov rbx, rdi",
        "mov rcx, rsi",
        "mov eax, {call}",
        "vmcall",
        "pop rbx",
        "ret",
        call = const KVM_HC_MAP_GPA_RANGE,
    )
}

/// Makes a call by VMMCALL, for processors of AMD.
///
/// # Safety
/// As for [`vmcall`], with [`Features::VMMCALL`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn vmmcall(gpa: u64, pages: u64, attributes: u64) -> i64 {
    naked_asm!(
        "push rbx",
        "mov rbx, rdi",
        "mov rcx, rsi",
        "mov eax, {call}",
        "vmmcall",
        "pop rbx",
        "ret",
        call = const KVM_HC_MAP_GPA_RANGE,
    )
}

/// Makes a call by reading `port`.
///
/// # Safety
/// The port is Ebb's ([`Features::PORT`]) and the caller may read it. The caller must not touch memory that the
/// operation frees.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn port(gpa: u64, pages: u64, attributes: u64, port: u64) -> i64 {
    naked_asm!(
        "push rbx",
        "mov rbx, rdi",
        "mov rdi, rcx",
        "mov rcx, rsi",
        "mov rsi, rdx",
        "mov edx, edi",
        "in eax, dx",
        "cdqe",
        "pop rbx",
        "ret",
    )
}

/// Looks for the interface.
#[must_use]
pub fn discover() -> Option<Interface> {
    Interface::discover(|leaf| {
        let found = __cpuid(leaf);
        [found.eax, found.ebx, found.ecx, found.edx]
    })
}

/// A way to the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// [`vmcall`].
    Vmcall,
    /// [`vmmcall`].
    Vmmcall,
    /// [`port`], at this port.
    Port(u16),
}

impl Transport {
    /// The transport for code at privilege level 0 (`kernel`) or above it.
    #[must_use]
    pub const fn choose(interface: Interface, kernel: bool) -> Option<Self> {
        let features = interface.features;
        if kernel && features.contains(Features::VMCALL) {
            Some(Self::Vmcall)
        } else if kernel && features.contains(Features::VMMCALL) {
            Some(Self::Vmmcall)
        } else if features.contains(Features::PORT) {
            Some(Self::Port(interface.port))
        } else {
            None
        }
    }

    /// Makes a call.
    ///
    /// # Errors
    /// The error that the monitor returns.
    ///
    /// # Safety
    /// The transport is from [`Transport::choose`] for the present privilege level. Memory that the call frees is not
    /// touched until it is reused.
    pub unsafe fn call(self, gpa: u64, pages: u64, what: Attributes) -> Result<Success, Error> {
        let attributes = what.encode();
        // SAFETY: the caller's promise.
        status::decode(unsafe {
            match self {
                Self::Vmcall => vmcall(gpa, pages, attributes),
                Self::Vmmcall => vmmcall(gpa, pages, attributes),
                Self::Port(at) => port(gpa, pages, attributes, u64::from(at)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{PORT, VERSION};

    #[test]
    fn without_an_instruction_the_port_serves_all() {
        let mut interface = Interface {
            version: VERSION,
            features: Features::PORT.union(Features::LAZY),
            port: PORT,
            batch_max: 1,
        };
        for kernel in [true, false] {
            let chosen = Transport::choose(interface, kernel);
            assert_eq!(chosen, Some(Transport::Port(PORT)));
        }
        interface.features = interface.features.union(Features::VMMCALL);
        assert_eq!(Transport::choose(interface, true), Some(Transport::Vmmcall));
        let user = Transport::choose(interface, false);
        assert_eq!(user, Some(Transport::Port(PORT)));
        interface.features = Features::LAZY;
        assert_eq!(Transport::choose(interface, true), None);
    }
}
