//! The registers of a vCPU at its first instruction.

use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// How the boot vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode without paging, start info in EBX
    /// (Xen, `docs/misc/pvh.pandoc`).
    Pvh {
        /// First instruction.
        rip: u64,
    },
    /// Linux's 64-bit boot protocol: long mode, zero page in RSI
    /// (Linux, `Documentation/arch/x86/boot.rst`).
    Linux64 {
        /// First instruction.
        rip: u64,
    },
}

impl Entry {
    /// General registers at the entry.
    #[must_use]
    pub fn regs(self) -> kvm_regs {
        let stack = layout::BOOT_STACK;
        let base = kvm_regs {
            rflags: 2,
            rsp: stack,
            rbp: stack,
            ..Default::default()
        };
        match self {
            Self::Pvh { rip } => kvm_regs {
                rip,
                rbx: layout::PVH_START_INFO,
                ..base
            },
            Self::Linux64 { rip } => kvm_regs {
                rip,
                rsi: layout::ZERO_PAGE,
                ..base
            },
        }
    }

    /// System registers at the entry. Those that do not matter keep their value after reset.
    #[must_use]
    pub fn sregs(self, reset: &kvm_sregs) -> kvm_sregs {
        let mut sregs = *reset;
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(1, Descriptor::Code { long });
        let data = segment(2, Descriptor::Data);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.tr = segment(3, Descriptor::Task);
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = (gdt(long).len() * 8 - 1) as u16;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        if long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        sregs
    }

    /// Writes the descriptor table, and for long mode the page tables, that [`Self::sregs`] points to.
    ///
    /// # Errors
    /// Guest memory is too small.
    pub fn write_tables(self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        let long = matches!(self, Self::Linux64 { .. });
        for (index, entry) in gdt(long).into_iter().enumerate() {
            memory.write_obj(entry, GuestAddress(layout::GDT + index as u64 * 8))?;
        }
        if long {
            identity_map(memory)?;
        }
        Ok(())
    }
}

/// Identity-maps the first GiB with pages of 2 MiB.
fn identity_map(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    for index in 0..512u64 {
        let entry = index << 21 | LARGE | PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(pd + index * 8))?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Descriptor {
    Code { long: bool },
    Data,
    Task,
}

impl Descriptor {
    /// Type and attribute bits as in bytes 5 and 6 of a descriptor (Intel SDM volume 3, 3.4.5).
    const fn flags(self) -> u16 {
        match self {
            Self::Code { long: true } => 0xa09b,
            Self::Code { long: false } => 0xc09b,
            Self::Data => 0xc093,
            Self::Task => 0x008b,
        }
    }

    const fn limit(self) -> u32 {
        match self {
            Self::Task => 0x67,
            _ => 0xf_ffff,
        }
    }

    /// The 8 bytes in memory, base 0.
    const fn encode(self) -> u64 {
        let (flags, limit) = (self.flags() as u64, self.limit() as u64);
        limit & 0xffff | (flags & 0xf0ff) << 40 | (limit & 0xf_0000) << 32
    }
}

fn gdt(long: bool) -> [u64; 4] {
    [
        0,
        Descriptor::Code { long }.encode(),
        Descriptor::Data.encode(),
        Descriptor::Task.encode(),
    ]
}

fn segment(index: u16, descriptor: Descriptor) -> kvm_segment {
    let flags = descriptor.flags();
    let bit = |n: u16| (flags >> n & 1) as u8;
    let granular = bit(15) == 1;
    kvm_segment {
        base: 0,
        limit: if granular {
            descriptor.limit() << 12 | 0xfff
        } else {
            descriptor.limit()
        },
        selector: index * 8,
        type_: (flags & 0xf) as u8,
        s: bit(4),
        dpl: 0,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

/// The x87 and SSE state after FNINIT, all exceptions masked.
#[must_use]
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Model-specific registers that firmware would have set: fast strings, write-back as default memory type.
///
/// # Panics
/// Never: two entries fit.
#[must_use]
pub fn msrs() -> Msrs {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(IA32_MISC_ENABLE, 1),
        entry(IA32_MTRR_DEF_TYPE, 1 << 11 | 6),
    ];
    Msrs::from_entries(&entries).expect("two entries fit")
}

/// Connects LINT0 to the legacy interrupt controller and LINT1 to NMI, as firmware does.
pub fn wire_local_interrupts(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u32 = 7;
    const NMI: u32 = 4;
    for (register, mode) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
        let bytes = &mut lapic.regs[register..register + 4];
        let mut value = 0u32;
        for (shift, byte) in bytes.iter().enumerate() {
            value |= u32::from(*byte as u8) << (8 * shift);
        }
        value = value & !0x700 | mode << 8;
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_flat_ones() {
        assert_eq!(
            gdt(true),
            [
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x8b00_0000_0067
            ]
        );
        assert_eq!(gdt(false)[1], 0x00cf_9b00_0000_ffff);
        let code = segment(1, Descriptor::Code { long: true });
        assert_eq!(
            (code.selector, code.l, code.db, code.limit),
            (8, 1, 0, 0xffff_ffff)
        );
    }

    #[test]
    fn long_mode_maps_its_own_tables_onto_themselves() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        Entry::Linux64 { rip: 0x100_0200 }
            .write_tables(&memory)
            .unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let pdpt = read(layout::PAGE_TABLES) & !0xfff;
        let pd = read(pdpt) & !0xfff;
        assert_eq!(read(pd + 8 * 511), 511 << 21 | 0x83);
    }

    #[test]
    fn local_interrupts_keep_their_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x352] = 1;
        wire_local_interrupts(&mut lapic);
        let word = |at: usize| [0, 1, 2, 3].map(|i| lapic.regs[at + i] as u8);
        assert_eq!((word(0x350), word(0x360)), ([0, 7, 1, 0], [0, 4, 0, 0]));
    }
}
