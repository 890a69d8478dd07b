//! A guest for measurements: each vCPU writes to its own pages without an exit, and touches other memory on command.
//!
//! The host sends commands through a mailbox in memory. The guest runs in flat 32-bit mode without paging, and makes no
//! hypercalls.

use std::arch::global_asm;
use std::slice;

/// Address of the code and its entry. EDI holds the address of the vCPU's mailbox.
pub const ENTRY: u64 = 0x10_0000;

/// From this address on, the guest touches memory only on command.
pub const FREE_START: u64 = 32 << 20;

/// Maximum number of vCPUs.
pub const MAX_VCPUS: usize = 16;

/// Byte offsets of the 32-bit words of a mailbox.
pub mod word {
    /// Iterations of the loop, modulo 2^32.
    pub const WORK: u64 = 0;
    /// Differs from [`DONE`] while there is a command. The host writes it after all other words.
    pub const COMMAND: u64 = 4;
    /// The guest sets it to [`COMMAND`] when it has touched the memory.
    pub const DONE: u64 = 8;
    /// Address of the first range to touch.
    pub const FIRST: u64 = 12;
    /// Bytes from the start of one range to the next.
    pub const STRIDE: u64 = 16;
    /// Number of ranges, at least 1.
    pub const RANGES: u64 = 20;
    /// Pages of each range, at least 1.
    pub const PAGES: u64 = 24;
    /// Address of the 256 pages that the loop writes to in turn.
    pub const SET: u64 = 28;
}

/// Address of the mailbox of a vCPU.
#[must_use]
pub const fn mailbox(vcpu: usize) -> u64 {
    0x11_0000 + vcpu as u64 * 0x1000
}

/// Address of the pages that the loop of a vCPU writes to.
#[must_use]
pub const fn working_set(vcpu: usize) -> u64 {
    (16 << 20) + ((vcpu as u64) << 20)
}

global_asm!(
    ".pushsection .rodata.ebb_busy, \"a\"",
    ".globl ebb_busy_start",
    ".globl ebb_busy_end",
    ".code32",
    "ebb_busy_start:",
    "10:",
    "mov eax, [edi]",
    "inc eax",
    "mov [edi], eax",
    "and eax, 0xff",
    "shl eax, 12",
    "add eax, [edi + {set}]",
    "inc dword ptr [eax]",
    "mov eax, [edi + {command}]",
    "cmp eax, [edi + {done}]",
    "je 10b",
    "mov esi, [edi + {first}]",
    "mov ecx, [edi + {ranges}]",
    "11:",
    "mov edx, [edi + {pages}]",
    "mov ebx, esi",
    "12:",
    "mov [ebx], ebx",
    "add ebx, 4096",
    "dec edx",
    "jnz 12b",
    "add esi, [edi + {stride}]",
    "dec ecx",
    "jnz 11b",
    "mov eax, [edi + {command}]",
    "mov [edi + {done}], eax",
    "jmp 10b",
    ".code64",
    "ebb_busy_end:",
    ".popsection",
    set = const word::SET,
    command = const word::COMMAND,
    done = const word::DONE,
    first = const word::FIRST,
    ranges = const word::RANGES,
    pages = const word::PAGES,
    stride = const word::STRIDE,
);

unsafe extern "C" {
    static ebb_busy_start: u8;
    static ebb_busy_end: u8;
}

/// The code. It belongs at [`ENTRY`].
#[must_use]
pub fn code() -> Vec<u8> {
    let (start, end) = (&raw const ebb_busy_start, &raw const ebb_busy_end);
    // SAFETY: the two symbols bound the bytes of one section, the start before the end.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_mailboxes_and_working_sets_do_not_overlap() {
        assert!(ENTRY + code().len() as u64 <= mailbox(0));
        assert!(mailbox(MAX_VCPUS) <= working_set(0));
        assert!(working_set(MAX_VCPUS) <= FREE_START);
    }
}
