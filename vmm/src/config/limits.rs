//! Bounds of a machine that the command line and the error messages name.

/// Maximum length of the kernel's command line in bytes: `COMMAND_LINE_SIZE` of x86 without the final zero.
pub const MAX_CMDLINE: usize = 2047;
/// Maximum number of vCPUs. KVM may allow fewer on a host.
pub const MAX_VCPUS: u32 = 255;
/// Maximum memory in bytes: the physical address width of common hosts. This host's may be less.
pub const MAX_MEMORY: u64 = 1 << 46;
/// Maximum number of arenas: a memory map has room for 128 entries.
pub const MAX_ARENAS: usize = 16;
