//! The map of guest-physical addresses, I/O ports and interrupts.

use ebb_core::range::GpaRange;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// End of the conventional memory below 1 MiB that the guest may use as RAM.
pub const LOW_RAM_END: u64 = 0x9_f000;
/// Start of the RAM above 1 MiB; kernels are loaded from here on.
pub const HIGH_RAM_START: u64 = MIB;
/// RAM ends here and continues at 4 GiB. The hole between holds the windows of devices.
pub const HOLE_START: u64 = 3 * GIB;
/// End of the hole.
pub const HOLE_END: u64 = 4 * GIB;

/// The global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x500;
/// PVH start info (Linux, `include/xen/interface/hvm/start_info.h`).
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list: the initial RAM disk.
pub const PVH_MODULES: u64 = 0x6100;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// The zero page of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack of the boot vCPU, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Three pages of identity-mapping page tables: PML4, PDPT, PD.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Maximum length of the command line in bytes, including the terminating zero (Linux, x86 `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;
/// ACPI tables, the RSDP first: the BIOS area, which is not RAM to the guest.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the space for ACPI tables.
pub const ACPI_TABLES_END: u64 = VM_GENERATION;
/// The 16 bytes that change when a snapshot is restored ("Virtual Machine Generation ID", Microsoft, 2018): not RAM to the
/// guest, and at a multiple of 8.
pub const VM_GENERATION: u64 = 0xf_ff00;
/// Where an x86 processor starts after a reset, in real mode: F000:FFF0.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// Tells the guest by ACPI that its generation has changed.
pub const EVENT_GSI: u32 = 3;

/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of a virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Memory of the first virtio device on PCI; the next ones follow. The window of the root bus.
pub const PCI_MEMORY: u64 = 0xe000_0000;
/// Memory of one device.
pub const PCI_MEMORY_SIZE: u64 = 0x8000;
/// End of the window: 31 devices fit.
pub const PCI_MEMORY_END: u64 = PCI_MEMORY + 32 * PCI_MEMORY_SIZE;
/// Interrupt of the first virtio device; the next ones follow.
pub const VIRTIO_GSI: u32 = 5;
/// The I/O APIC has 24 pins.
pub const GSI_END: u32 = 24;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Four pages that KVM on Intel needs: the identity map, then the TSS
/// (Linux, `Documentation/virt/kvm/api.rst`, `KVM_SET_TSS_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;

/// First serial port.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Its number of ports.
pub const SERIAL_PORT_LEN: u64 = 8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller: data, and command at +4.
pub const I8042_PORT: u64 = 0x60;
/// Its number of ports.
pub const I8042_PORT_LEN: u64 = 5;
/// The keyboard's interrupt.
pub const KEYBOARD_GSI: u32 = 1;
/// PCI configuration: address, then data.
pub const PCI_PORT: u64 = 0xcf8;
/// Its number of ports.
pub const PCI_PORT_LEN: u64 = 8;
/// fw_cfg (QEMU, `docs/specs/fw_cfg.rst`).
pub const FW_CFG_PORT: u64 = 0x510;
/// Its number of ports.
pub const FW_CFG_PORT_LEN: u64 = 12;
/// pvpanic (QEMU, `docs/specs/pvpanic.rst`).
pub const PVPANIC_PORT: u64 = 0x505;
/// ACPI sleep control (+0), sleep status (+1) and reset (+2).
pub const POWER_PORT: u64 = 0x600;
/// The reset register among them.
pub const RESET_PORT: u64 = POWER_PORT + 2;
/// Its number of ports.
pub const POWER_PORT_LEN: u64 = 3;

/// Address ranges of `size` bytes of RAM: below the hole, and from 4 GiB on. `size` is a multiple of the page
/// size and not 0.
#[must_use]
pub fn ram(size: u64) -> Vec<GpaRange> {
    let below = size.min(HOLE_START);
    let above = size - below;
    [
        GpaRange::new(0, below),
        GpaRange::new(HOLE_END, HOLE_END + above),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Types of the entries in the guest's memory map (E820).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// Reserved for a driver (Linux, `E820_TYPE_SOFT_RESERVED`): `/dev/daxN.M`.
    SoftReserved = 0xefff_ffff,
}

/// Address ranges of arenas of `sizes` bytes: above `ram` and the hole, each at a multiple of 1 GiB. There is a gap between
/// any two, because a kernel would merge neighbours. `sizes` are multiples of the page size and not 0.
#[must_use]
pub fn arenas(ram: &[GpaRange], sizes: &[u64]) -> Vec<GpaRange> {
    let mut end = ram.last().map_or(0, |range| range.end()).max(HOLE_END - 1);
    let place = |size: &u64| {
        let start = (end + 1).next_multiple_of(GIB);
        end = start + size;
        GpaRange::new(start, end)
    };
    sizes.iter().filter_map(place).collect()
}

/// The memory map for the guest: start, length in bytes, type.
#[must_use]
pub fn memory_map(ram: &[GpaRange], arenas: &[GpaRange]) -> Vec<(u64, u64, MemoryKind)> {
    let mut map = vec![
        (0, LOW_RAM_END, MemoryKind::Ram),
        (
            LOW_RAM_END,
            HIGH_RAM_START - LOW_RAM_END,
            MemoryKind::Reserved,
        ),
    ];
    for range in ram {
        let start = range.start().max(HIGH_RAM_START);
        map.push((start, range.end().saturating_sub(start), MemoryKind::Ram));
    }
    map.retain(|(_, len, _)| *len > 0);
    let arena = |range: &GpaRange| (range.start(), range.len(), MemoryKind::SoftReserved);
    map.extend(arenas.iter().map(arena));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        let sizes = |size| {
            ram(size)
                .iter()
                .map(|r| (r.start(), r.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(GIB), [(0, GIB)]);
        assert_eq!(sizes(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(sizes(HOLE_START + MIB), [(0, HOLE_START), (HOLE_END, MIB)]);
        for size in [2 * MIB, GIB, HOLE_START, 8 * GIB] {
            assert_eq!(ram(size).iter().map(|r| r.len()).sum::<u64>(), size);
        }
    }

    #[test]
    fn arenas_lie_apart_above_everything() {
        let places = |memory, sizes: &[u64]| {
            let places = arenas(&ram(memory), sizes);
            places.iter().map(|r| r.start() / GIB).collect::<Vec<_>>()
        };
        assert_eq!(places(GIB, &[GIB, 4 * MIB, GIB]), [4, 6, 7]);
        assert_eq!(places(5 * GIB, &[GIB]), [7], "RAM ends at 6 GiB");
        assert_eq!(places(GIB, &[1 << 45, 1 << 45]), [4, 4 + (1 << 15) + 1]);
        assert_eq!(places(GIB, &[]), [0; 0]);
        let arena = arenas(&ram(GIB), &[GIB]);
        let last = memory_map(&ram(GIB), &arena).pop();
        assert_eq!(last, Some((4 * GIB, GIB, MemoryKind::SoftReserved)));
    }

    #[test]
    fn the_memory_map_never_calls_the_bios_area_ram() {
        for size in [2 * MIB, GIB, 8 * GIB] {
            for (start, len, kind) in memory_map(&ram(size), &[]) {
                let bios = start < HIGH_RAM_START && start + len > LOW_RAM_END;
                assert_eq!(bios, kind == MemoryKind::Reserved, "{start:#x}+{len:#x}");
            }
        }
    }
}
