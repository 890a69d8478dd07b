//! Loads a kernel, its command line and its initial RAM disk into guest memory.

mod cache;
mod handover;
pub mod image;

use std::fs::File;
use std::io::{self, Cursor, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use ebb_core::range::{GpaRange, PAGE_SIZE};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::layout;
use crate::arch::registers::Entry;
use crate::config::{KernelConfig, KernelEntry};
use cache::{Cache, Contents, Unpacked};
use image::{Image, ImageError};

/// A guest cannot be booted from the given files.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image is not usable.
    #[error("kernel {path}: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The kernel does not fit, or its headers refer to something outside the file or the guest's memory.
    #[error(
        "kernel {path} cannot be loaded into {memory} MiB of guest memory: {reason}; \
         give the guest more memory (--memory size=) or check that the file is complete"
    )]
    Load {
        /// The file.
        path: PathBuf,
        /// Size of the guest's memory below the hole, in MiB.
        memory: u64,
        /// The error of the loader.
        reason: String,
    },
    /// The initial RAM disk cannot be read.
    #[error("initramfs {path}: {source}; give a readable file with --initramfs")]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The initial RAM disk does not fit.
    #[error(
        "initramfs {path} has {size} bytes, but only {room} are free beside the kernel; \
         give the guest more memory (--memory size=)"
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes that are free.
        room: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {0} bytes, but Linux takes at most {max}", max = layout::CMDLINE_MAX - 1)]
    Cmdline(usize),
    /// Guest memory is too small for the boot structures.
    #[error("boot structures could not be written to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// What to boot.
pub struct Payload<'a> {
    /// The kernel.
    pub kernel: &'a KernelConfig,
    /// The initial RAM disk.
    pub initramfs: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Memory that the guest's memory map calls soft-reserved.
    pub arenas: &'a [GpaRange],
}

/// Loads the payload and everything that its entry needs. `rsdp` is where the ACPI tables are.
///
/// # Errors
/// [`BootError`].
pub fn load(
    memory: &GuestMemoryMmap,
    ram: &[GpaRange],
    payload: &Payload<'_>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let low_end = ram.first().map_or(0, |r| r.end());
    let kernel = load_kernel(memory, payload.kernel, low_end)?;
    let initramfs = payload
        .initramfs
        .map(|path| load_initramfs(memory, path, kernel.end, kernel.initrd_max.min(low_end)))
        .transpose()?;
    write_cmdline(memory, payload.cmdline)?;
    let handover = handover::Handover {
        ram,
        arenas: payload.arenas,
        initramfs,
        cmdline_len: payload.cmdline.len(),
        rsdp,
        setup_header: kernel.setup_header,
    };
    match kernel.entry {
        Entry::Pvh { .. } => handover.write_start_info(memory),
        Entry::Linux64 { .. } => handover.write_zero_page(memory),
    }
    .and_then(|()| kernel.entry.write_tables(memory))
    .map_err(BootError::Write)?;
    Ok(kernel.entry)
}

/// A kernel in guest memory.
struct Loaded {
    entry: Entry,
    /// First address after it.
    end: u64,
    /// The initial RAM disk must end at or below this.
    initrd_max: u64,
    setup_header: Option<linux_loader::loader::bootparam::setup_header>,
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    config: &KernelConfig,
    low_end: u64,
) -> Result<Loaded, BootError> {
    let unusable = |source| BootError::Kernel {
        path: config.path.clone(),
        source,
    };
    let through_elf = config.entry == KernelEntry::Auto;
    let image = Image::open(&config.path, through_elf).map_err(unusable)?;
    let start = Some(GuestAddress(layout::HIGH_RAM_START));
    let (result, is_bzimage) = match image {
        Image::Elf(mut file) => (Elf::load(memory, None, &mut file, start), false),
        Image::BzImage(mut file) => (BzImage::load(memory, None, &mut file, start), true),
        Image::Packed(mut packed) => {
            let unread = |error: io::Error| unusable(error.into());
            let reader = packed.reader().map_err(unread)?;
            let folder = config.cache.as_deref();
            let cache = folder.and_then(|folder| Cache::open(folder, reader));
            let cached = cache.as_ref().and_then(|cache| cache.load(memory, low_end));
            if let Some(unpacked) = cached {
                return Ok(unpacked.into());
            }
            let bytes = packed.read().map_err(unread)?;
            match image::unpack(&bytes, low_end).map_err(unusable)? {
                Some(elf) => {
                    let loaded = load_inner(memory, config, low_end, &elf)?;
                    if let (Some(cache), Some(contents)) = (cache, contents(&elf, &loaded)) {
                        cache.save(&bytes, &contents);
                    }
                    return Ok(loaded);
                }
                None => {
                    let mut file = packed.into_file();
                    (BzImage::load(memory, None, &mut file, start), true)
                }
            }
        }
    };
    finish(result, is_bzimage, config, low_end)
}

/// Loads the ELF that was packed in a bzImage.
fn load_inner(
    memory: &GuestMemoryMmap,
    config: &KernelConfig,
    low_end: u64,
    elf: &[u8],
) -> Result<Loaded, BootError> {
    let start = Some(GuestAddress(layout::HIGH_RAM_START));
    let result = Elf::load(memory, None, &mut Cursor::new(elf), start);
    finish(result, false, config, low_end)
}

/// What the cache keeps of it.
fn contents<'a>(elf: &'a [u8], loaded: &Loaded) -> Option<Contents<'a>> {
    let (entry, end) = (loaded.entry, loaded.end);
    Contents::new(elf, Unpacked { entry, end })
}

/// What was loaded, if it lies within guest memory.
fn finish(
    result: linux_loader::loader::Result<KernelLoaderResult>,
    is_bzimage: bool,
    config: &KernelConfig,
    low_end: u64,
) -> Result<Loaded, BootError> {
    let refuse = |reason| BootError::Load {
        path: config.path.clone(),
        memory: low_end >> 20,
        reason,
    };
    let loaded = result.map_err(|error| refuse(error.to_string()))?;
    if loaded.kernel_end > low_end {
        return Err(refuse(format!("it ends at {:#x}", loaded.kernel_end)));
    }
    Ok(entry_of(&loaded, is_bzimage))
}

impl From<Unpacked> for Loaded {
    fn from(Unpacked { entry, end }: Unpacked) -> Self {
        Self {
            entry,
            end,
            initrd_max: layout::HOLE_START,
            setup_header: None,
        }
    }
}

fn entry_of(loaded: &KernelLoaderResult, is_bzimage: bool) -> Loaded {
    /// Offset of the 64-bit entry of a bzImage in its protected-mode part.
    const BZIMAGE_ENTRY64: u64 = 0x200;
    let load = loaded.kernel_load.0;
    let entry = match loaded.pvh_boot_cap {
        _ if is_bzimage => Entry::Linux64 {
            rip: load + BZIMAGE_ENTRY64,
        },
        PvhBootCapability::PvhEntryPresent(rip) => Entry::Pvh { rip: rip.0 },
        _ => Entry::Linux64 { rip: load },
    };
    // A bzImage unpacks itself in place: what it needs is in its header, not in the file's size.
    let unpacked = loaded
        .setup_header
        .map_or(0, |h| h.pref_address.saturating_add(h.init_size.into()));
    let initrd_max = loaded.setup_header.map_or(layout::HOLE_START, |header| {
        u64::from(header.initrd_addr_max) + 1
    });
    Loaded {
        entry,
        end: loaded.kernel_end.max(unpacked),
        initrd_max,
        setup_header: loaded.setup_header,
    }
}

/// Loads the file at the top of the RAM below `limit`. Returns its address and size.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64), BootError> {
    let fail = |source| BootError::Initramfs {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(fail)?;
    let size = file.seek(SeekFrom::End(0)).map_err(fail)?;
    file.rewind().map_err(fail)?;
    let free = kernel_end.checked_next_multiple_of(PAGE_SIZE);
    let room = free.map_or(0, |free| limit.saturating_sub(free));
    let too_large = || BootError::InitramfsTooLarge {
        path: path.to_owned(),
        size,
        room,
    };
    let padded = size
        .checked_next_multiple_of(PAGE_SIZE)
        .filter(|padded| *padded <= room);
    let start = (limit & !(PAGE_SIZE - 1)) - padded.ok_or_else(too_large)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|error| fail(io::Error::other(error.to_string())))?;
    Ok((start, size))
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Write)
}
