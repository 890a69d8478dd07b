//! Where things are in the guest's memory.

/// The image; it is entered at its first byte, in 64-bit mode.
pub const IMAGE: u64 = 0x10_0000;
/// Where the image must end.
pub const IMAGE_END: u64 = PML4;
/// Page tables: three levels, four pages of the third, all of the first 4 GiB.
pub const PML4: u64 = 0x12_0000;
/// Second level.
pub const PDPT: u64 = 0x12_1000;
/// Third level.
pub const PD: u64 = 0x12_2000;
/// [`crate::Parameters`].
pub const PARAMETERS: u64 = 0x12_8000;
/// Words that the vCPUs share.
pub const SHARED: u64 = 0x12_9000;
/// The code that other vCPUs start with, below 1 MiB: page 8.
pub const TRAMPOLINE: u64 = 0x8000;
/// Stacks of 64 KiB.
pub const STACKS: u64 = 0x13_0000;
/// Bytes of a stack.
pub const STACK_SIZE: u64 = 0x1_0000;
/// Batch and query blocks of 16 KiB, one for each vCPU.
pub const BLOCKS: u64 = 0x1a_0000;
/// Bytes of a vCPU's block.
pub const BLOCK_SIZE: u64 = 0x4000;
/// Slots, 1 MiB for each vCPU.
pub const SLOTS: u64 = 0x20_0000;
/// Bytes of a vCPU's slots.
pub const SLOTS_SIZE: u64 = 1 << 20;
/// The memory that is freed and reused starts here.
pub const FREE: u64 = 8 << 20;
/// Most vCPUs.
pub const MAX_VCPUS: u64 = 4;

const _: () = assert!(STACKS + MAX_VCPUS * STACK_SIZE <= BLOCKS);
const _: () = assert!(BLOCKS + MAX_VCPUS * BLOCK_SIZE <= SLOTS);
const _: () = assert!(SLOTS + MAX_VCPUS * SLOTS_SIZE <= FREE);
