//! The structures that describe the machine to a kernel: PVH start info, or Linux's zero page.

use ebb_core::range::GpaRange;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::layout;

/// What these structures describe.
pub struct Handover<'a> {
    /// The guest's RAM.
    pub ram: &'a [GpaRange],
    /// Its arenas.
    pub arenas: &'a [GpaRange],
    /// Address and size in bytes of the initial RAM disk.
    pub initramfs: Option<(u64, u64)>,
    /// Length in bytes of the command line, without its terminating zero.
    pub cmdline_len: usize,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
    /// The setup header of a bzImage.
    pub setup_header: Option<setup_header>,
}

/// linux-loader's own errors say no more than that guest memory was too small.
fn too_small<E>(_: E) -> GuestMemoryError {
    GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::ZERO_PAGE))
}

impl Handover<'_> {
    /// Writes the PVH start info (Linux, `include/xen/interface/hvm/start_info.h`, version 1).
    pub fn write_start_info(&self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        const MAGIC: u32 = 0x336e_c578;
        let map: Vec<_> = layout::memory_map(self.ram, self.arenas)
            .into_iter()
            .map(|(addr, size, kind)| hvm_memmap_table_entry {
                addr,
                size,
                type_: kind as u32,
                reserved: 0,
            })
            .collect();
        let info = hvm_start_info {
            magic: MAGIC,
            version: 1,
            nr_modules: u32::from(self.initramfs.is_some()),
            modlist_paddr: layout::PVH_MODULES,
            cmdline_paddr: layout::CMDLINE,
            rsdp_paddr: self.rsdp,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
        params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
        if let Some((paddr, size)) = self.initramfs {
            let module = hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            };
            params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
        }
        PvhBootConfigurator::write_bootparams(&params, memory).map_err(too_small)
    }

    /// Writes the zero page (Linux, `Documentation/arch/x86/zero-page.rst`).
    pub fn write_zero_page(&self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        /// "undefined": a loader that has no number assigned.
        const LOADER_TYPE: u8 = 0xff;
        let mut page = boot_params {
            hdr: self.setup_header.unwrap_or_else(elf_setup_header),
            acpi_rsdp_addr: self.rsdp,
            ..Default::default()
        };
        page.hdr.type_of_loader = LOADER_TYPE;
        page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        page.hdr.cmdline_size = self.cmdline_len as u32;
        if let Some((start, size)) = self.initramfs {
            // Both fit into 32 bits: the initial RAM disk is below the 3 GiB hole.
            page.hdr.ramdisk_image = start as u32;
            page.hdr.ramdisk_size = size as u32;
        }
        let map = layout::memory_map(self.ram, self.arenas);
        page.e820_entries = map.len() as u8;
        for (slot, (addr, size, kind)) in page.e820_table.iter_mut().zip(map) {
            *slot = boot_e820_entry {
                addr,
                size,
                r#type: kind as u32,
            };
        }
        let params = BootParams::new(&page, GuestAddress(layout::ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, memory).map_err(too_small)
    }
}

/// The header of a kernel that has none: an ELF without a PVH note.
fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}
