//! CPUID: the leaves that KVM supports, changed for the topology, and the leaf of Ebb's own interface.

use ebb_hypercall_abi::Interface;
use ebb_hypercall_abi::discovery::{CPUID_BASE, CPUID_VERSION_OFFSET, signature_registers};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the local APIC timer has a TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: Intel's virtualization.
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX: AMD's virtualization.
const SVM: u32 = 1 << 2;
/// Leaf 1, EDX: several logical processors in the package.
const HTT: u32 = 1 << 28;

/// The place of one vCPU in the topology.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Index of the vCPU and its APIC id.
    pub apic_id: u32,
    /// Number of vCPUs: that many cores of one thread in one package.
    pub vcpus: u32,
    /// KVM's local APIC has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// The guest may run virtual machines of its own, where the host can.
    pub nested: bool,
}

/// Makes the CPUID of one vCPU from the CPUID that KVM `supported`. `interface` is what the guest is offered.
///
/// # Errors
/// The number of entries, if there are more than KVM accepts.
pub fn for_vcpu(
    supported: &CpuId,
    topology: Topology,
    interface: Interface,
) -> Result<CpuId, usize> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .copied()
        // The leaf of the extended topology is written anew below: hosts differ in the number of levels.
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026))
        .collect();
    for entry in &mut entries {
        adapt(entry, topology);
    }
    let limit = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if limit >= 0xb {
        entries.extend(extended_topology(topology));
    }
    entries.extend(signature(interface));
    CpuId::from_entries(&entries).map_err(|_| entries.len())
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let Topology {
        apic_id,
        vcpus,
        tsc_deadline,
        nested,
    } = topology;
    match entry.function {
        0x0 => entry.eax = entry.eax.clamp(0xb, 0x1e),
        0x1 => {
            // Initial APIC id, logical processors, CLFLUSH size (8 × 8 bytes).
            entry.ebx = (apic_id & 0xff) << 24 | vcpus.min(255) << 16 | 8 << 8 | entry.ebx & 0xff;
            entry.ecx |= HYPERVISOR;
            if !nested {
                entry.ecx &= !VMX;
            }
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if vcpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Intel, deterministic caches: cores in the package.
        0x4 if entry.eax != 0 => {
            entry.eax = entry.eax & !0xfc00_0000 | (vcpus.min(64) - 1) << 26;
        }
        // AMD: number of threads, minus one, and the APIC id's size.
        0x8000_0008 => {
            let bits = topology_bits(vcpus);
            entry.ecx = bits << 12 | (vcpus - 1) & 0xff;
        }
        0x8000_0001 if !nested => entry.ecx &= !SVM,
        // AMD: what its virtualization can do.
        0x8000_000a if !nested => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
        _ => {}
    }
}

/// Leaf 0xb: one thread per core, then all cores (Intel SDM volume 2, CPUID leaf 0BH).
fn extended_topology(topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: topology.apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, topology_bits(topology.vcpus), topology.vcpus, 2),
        level(2, 0, 0, 0),
    ]
}

/// Bits of an APIC id that number the vCPUs of the package.
const fn topology_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn signature(interface: Interface) -> [kvm_cpuid_entry2; 2] {
    let [ebx, ecx, edx] = signature_registers();
    let [version, features, port, batch_max] = interface.registers();
    let last = CPUID_BASE + CPUID_VERSION_OFFSET;
    [
        kvm_cpuid_entry2 {
            function: CPUID_BASE,
            eax: last,
            ebx,
            ecx,
            edx,
            ..Default::default()
        },
        kvm_cpuid_entry2 {
            function: last,
            eax: version,
            ebx: features,
            ecx: port,
            edx: batch_max,
            ..Default::default()
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACE: Interface = Interface {
        version: ebb_hypercall_abi::discovery::VERSION,
        features: ebb_hypercall_abi::Features::PORT,
        port: 0x77,
        batch_max: 9,
    };

    fn host() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x20),
            leaf(1, 0),
            leaf(0xb, 7),
            leaf(0x8000_0008, 0),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid
            .as_slice()
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} appears twice");
        entry
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_the_same_topology() {
        for (apic_id, vcpus, bits) in [(0, 1, 0), (3, 4, 2), (4, 5, 3)] {
            let topology = Topology {
                apic_id,
                vcpus,
                tsc_deadline: true,
                nested: false,
            };
            let cpuid = for_vcpu(&host(), topology, INTERFACE).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, apic_id);
            assert_eq!(find(&cpuid, 1, 0).ecx & HYPERVISOR, HYPERVISOR);
            let cores = find(&cpuid, 0xb, 1);
            assert_eq!((cores.eax, cores.ebx, cores.edx), (bits, vcpus, apic_id));
        }
    }

    #[test]
    fn our_signature_stands_after_kvms_own_leaves() {
        let topology = Topology {
            apic_id: 0,
            vcpus: 1,
            tsc_deadline: false,
            nested: false,
        };
        let cpuid = for_vcpu(&host(), topology, INTERFACE).unwrap();
        let found = Interface::discover(|leaf| {
            let entries = cpuid.as_slice().iter();
            let entry = entries.copied().find(|e| e.function == leaf);
            entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        });
        assert_eq!(found, Some(INTERFACE));
    }

    #[test]
    fn virtualization_is_hidden_unless_it_is_asked_for() {
        let full = |function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ecx: u32::MAX,
            ..Default::default()
        };
        let host = CpuId::from_entries(&[1, 0x8000_0001, 0x8000_000a].map(full)).unwrap();
        for nested in [false, true] {
            let topology = Topology {
                apic_id: 0,
                vcpus: 1,
                tsc_deadline: false,
                nested,
            };
            let cpuid = for_vcpu(&host, topology, INTERFACE).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ecx & VMX != 0, nested);
            assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & SVM != 0, nested);
            assert_eq!(find(&cpuid, 0x8000_000a, 0).eax != 0, nested);
        }
    }
}
