//! Finds the monitor's CPUID leaf.

use std::process::ExitCode;

use ebb_hypercall_abi::discovery::{CPUID_BASE, CPUID_VERSION_OFFSET, signature_registers};

/// Distance between the leaves of two hypervisor interfaces.
const STRIDE: u32 = 0x100;
/// The last leaf at which Linux looks for one.
const LAST: u32 = 0x4001_0000;
/// CPUID.1:ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;

/// EAX, EBX, ECX and EDX of a leaf.
type Registers = [u32; 4];

/// What the monitor says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Interface {
    leaf: u32,
    version: u32,
    features: u32,
}

/// Prints what was found; fails where there is no Ebb.
pub fn report() -> ExitCode {
    let Some(found) = find(cpuid) else {
        println!("ebb: no");
        return ExitCode::FAILURE;
    };
    let (major, minor) = (found.version >> 16, found.version & 0xffff);
    println!(
        "ebb: yes\ninterface: {major}.{minor}\nfeatures: {:#x}\nleaf: {:#x}",
        found.features, found.leaf
    );
    ExitCode::SUCCESS
}

fn find(cpuid: impl Fn(u32) -> Registers) -> Option<Interface> {
    if cpuid(1)[2] & HYPERVISOR == 0 {
        return None;
    }
    let signature = signature_registers();
    let leaf = (CPUID_BASE..=LAST).step_by(STRIDE as usize).find(|leaf| {
        let [_, ebx, ecx, edx] = cpuid(*leaf);
        [ebx, ecx, edx] == signature
    })?;
    let [version, features, ..] = cpuid(leaf + CPUID_VERSION_OFFSET);
    Some(Interface {
        leaf,
        version,
        features,
    })
}

fn cpuid(leaf: u32) -> Registers {
    let found = core::arch::x86_64::__cpuid(leaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with Ebb's signature at `at`.
    fn machine(at: u32) -> impl Fn(u32) -> Registers {
        let [ebx, ecx, edx] = signature_registers();
        move |leaf| match leaf {
            1 => [0, 0, HYPERVISOR, 0],
            _ if leaf == at => [at + CPUID_VERSION_OFFSET, ebx, ecx, edx],
            _ if leaf == at + CPUID_VERSION_OFFSET => [0x2_0003, 5, 0, 0],
            _ => [0; 4],
        }
    }

    #[test]
    fn the_interface_is_found_wherever_it_may_be() {
        for leaf in [CPUID_BASE, CPUID_BASE + STRIDE, LAST] {
            let found = find(machine(leaf)).unwrap();
            assert_eq!(
                found,
                Interface {
                    leaf,
                    version: 0x2_0003,
                    features: 5
                }
            );
        }
    }

    #[test]
    fn other_machines_are_not_ebb() {
        assert_eq!(find(|_| [0; 4]), None);
        assert_eq!(find(machine(CPUID_BASE + 1)), None);
        // A processor outside of a machine may answer a leaf it does not have with anything.
        let bare = machine(CPUID_BASE);
        assert_eq!(
            find(move |leaf| if leaf == 1 { [0; 4] } else { bare(leaf) }),
            None
        );
    }
}
