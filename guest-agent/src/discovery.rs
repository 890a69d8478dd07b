//! Looks for Ebb's CPUID leaves.

use std::process::ExitCode;

use ebb_hypercall_abi::discovery::{
    CPUID_BASE, CPUID_END, CPUID_STEP, CPUID_VERSION_OFFSET, signature_registers,
};

/// CPUID leaf 1, ECX: set in virtual machines only.
const HYPERVISOR: u32 = 1 << 31;

/// EAX, EBX, ECX and EDX of a leaf.
type Registers = [u32; 4];

/// The hypercall interface, of any version.
#[derive(Debug, PartialEq, Eq)]
struct FoundInterface {
    leaf: u32,
    version: u32,
    features: u32,
}

/// Prints the interface. Fails if this machine does not run under Ebb.
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

fn find(cpuid: impl Fn(u32) -> Registers) -> Option<FoundInterface> {
    if cpuid(1)[2] & HYPERVISOR == 0 {
        return None;
    }
    let signature = signature_registers();
    let leaf = (CPUID_BASE..CPUID_END)
        .step_by(CPUID_STEP as usize)
        .find(|leaf| {
            let [_, ebx, ecx, edx] = cpuid(*leaf);
            [ebx, ecx, edx] == signature
        })?;
    let [version, features, ..] = cpuid(leaf + CPUID_VERSION_OFFSET);
    Some(FoundInterface {
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

    /// CPUID of a machine with Ebb's signature at leaf `at`.
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
    fn the_interface_is_found_at_each_possible_leaf() {
        for leaf in [CPUID_BASE, CPUID_BASE + CPUID_STEP, CPUID_END - CPUID_STEP] {
            let found = FoundInterface {
                leaf,
                version: 0x2_0003,
                features: 5,
            };
            assert_eq!(find(machine(leaf)), Some(found));
        }
    }

    #[test]
    fn other_machines_are_not_ebb() {
        assert_eq!(find(|_| [0; 4]), None);
        assert_eq!(find(machine(CPUID_BASE + 1)), None);
        // Without a hypervisor, processors answer unknown leaves with arbitrary values.
        let ebb = machine(CPUID_BASE);
        assert_eq!(
            find(move |leaf| if leaf == 1 { [0; 4] } else { ebb(leaf) }),
            None
        );
    }
}
