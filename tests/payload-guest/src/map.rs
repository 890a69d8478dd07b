//! Addresses in the guest's memory.

/// The image. It is entered at its first byte, in 64-bit mode.
pub const IMAGE: u64 = 0x10_0000;
/// The image must end before this address.
pub const IMAGE_END: u64 = PML4;
/// Identity-mapping page tables of the first 8 GiB: first level.
pub const PML4: u64 = 0x12_0000;
/// Second level.
pub const PDPT: u64 = 0x12_1000;
/// Third level, eight pages.
pub const PD: u64 = 0x12_2000;
/// [`crate::Parameters`].
pub const PARAMETERS: u64 = 0x12_a000;
/// Words that the vCPUs share.
pub const SHARED: u64 = 0x12_b000;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x12_c000;
/// Code where other vCPUs start in real mode: page 8.
pub const TRAMPOLINE: u64 = 0x8000;
/// Stacks, one for each vCPU.
pub const STACKS: u64 = 0x13_0000;
/// Bytes of a stack.
pub const STACK_SIZE: u64 = 0x1_0000;
/// Batch and query blocks, one for each vCPU.
pub const BLOCKS: u64 = 0x1a_0000;
/// Bytes of a block.
pub const BLOCK_SIZE: u64 = 0x4000;
/// Arrays of [`crate::ranges::TestRange`], one for each vCPU.
pub const RANGES: u64 = 0x20_0000;
/// Bytes of an array.
pub const RANGES_SIZE: u64 = 1 << 20;
/// Scripts, see [`crate::script`]: their addresses, then steps and data of all. In place of the arrays above.
pub const SCRIPTS: u64 = RANGES;
/// Start of the memory that is freed and reused.
pub const TEST_MEMORY: u64 = 8 << 20;
/// Maximum number of vCPUs.
pub const MAX_VCPUS: u64 = 4;

const _: () = assert!(STACKS + MAX_VCPUS * STACK_SIZE <= BLOCKS);
const _: () = assert!(BLOCKS + MAX_VCPUS * BLOCK_SIZE <= RANGES);
const _: () = assert!(RANGES + MAX_VCPUS * RANGES_SIZE <= TEST_MEMORY);
