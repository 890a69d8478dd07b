//! A guest with two vCPUs. Each frees a page lazily and reads it, then reuses it, frees it again and writes to it.
//! Interrupts are enabled, as in most of a kernel's code.

use std::arch::global_asm;
use std::io;
use std::path::Path;
use std::slice;

use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::{Attributes, Operation};

use crate::{code, elf};

/// Address of the code and its entry.
const BASE: u64 = 0x18_0000;
/// Where the other vCPU starts, in real mode: SIPI vector 8.
const TRAMPOLINE: u64 = 0x8000;
/// The other vCPU sets this word at its end. What it has read is in the next word.
const DONE: u64 = 0x19_0000;

/// Addresses of the page of each vCPU.
pub const PAGES: [u64; 2] = [0x90_0000, 0xa0_0000];

global_asm!(
    ".pushsection .rodata.ebb_use_after_free, \"a\"",
    ".globl ebb_use_after_free_start",
    ".globl ebb_use_after_free_end",
    ".globl ebb_use_after_free_load",
    ".globl ebb_use_after_free_store",
    "ebb_use_after_free_start:",
    "mov rax, {pml4}",
    "mov cr3, rax",
    "mov rsp, {stack}",
    // The other vCPU's first instructions, and INIT and SIPI to all but this one.
    "cld",
    "lea rsi, [rip + 60f]",
    "mov edi, {trampoline}",
    "mov ecx, [rip + 69f]",
    "rep movsb",
    "mov eax, 0xfee00300",
    "mov dword ptr [rax], 0xc4500",
    "mov dword ptr [rax], 0xc4608",
    "mov r14, {page0}",
    "call 50f",
    "mov r15, rax",
    "mov ecx, {done}",
    "20:",
    "pause",
    "cmp qword ptr [rcx], 0",
    "je 20b",
    "mov rbx, r15",
    "call 30f",
    "mov ecx, {done}",
    "mov rbx, [rcx + 8]",
    "call 30f",
    // Power off: sleep type 5, sleep enable.
    "mov edx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "21:",
    "jmp 21b",
    // The other vCPU.
    "40:",
    "mov rsp, {stack} + 0x1000",
    "mov r14, {page1}",
    "call 50f",
    "mov ecx, {done}",
    "mov [rcx + 8], rax",
    "mov qword ptr [rcx], 1",
    "cli",
    "41:",
    "hlt",
    "jmp 41b",
    // Uses the page at r14 after freeing it. Returns what it has read there.
    "50:",
    "sti",
    "mov qword ptr [r14], 7",
    "mov rdx, {free}",
    "call 55f",
    "ebb_use_after_free_load:",
    "mov r13, [r14]",
    "mov [r14], r14",
    "mov rdx, {reuse}",
    "call 55f",
    "mov [r14], r14",
    "mov rdx, {free}",
    "call 55f",
    "ebb_use_after_free_store:",
    "mov [r14], r14",
    "mov rdx, {reuse}",
    "call 55f",
    "mov rax, r13",
    "ret",
    // A hypercall by port, for the page at r14.
    "55:",
    "mov rdi, r14",
    "mov rsi, 1",
    "mov rcx, {port}",
    "mov rax, {port_stub}",
    "jmp rax",
    // Writes rbx to the serial port.
    "30:",
    "mov ecx, 8",
    "mov edx, 0x3f8",
    "31:",
    "mov al, bl",
    "out dx, al",
    "shr rbx, 8",
    "dec ecx",
    "jnz 31b",
    "ret",
    // Copied to low memory: switches from real mode to 64-bit mode.
    ".code16",
    "60:",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    // lgdt [66f]
    ".byte 0x0f, 0x01, 0x16",
    ".word {trampoline} + (66f - 60b)",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, {pml4}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000001",
    "mov cr0, eax",
    // jmp 8:65f
    ".byte 0xea",
    ".word {trampoline} + (65f - 60b), 8",
    ".code64",
    "65:",
    "mov ax, 0x10",
    "mov ss, ax",
    "mov rax, [rip + 64f]",
    "jmp rax",
    ".balign 8",
    "64:",
    ".quad {base} + (40b - ebb_use_after_free_start)",
    // Null, code, data.
    "67:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "66:",
    ".word 23",
    ".long {trampoline} + (67b - 60b)",
    "68:",
    "69:",
    ".long 68b - 60b",
    "ebb_use_after_free_end:",
    ".popsection",
    pml4 = const code::PML4,
    stack = const code::STACK,
    trampoline = const TRAMPOLINE,
    done = const DONE,
    base = const BASE,
    page0 = const PAGES[0],
    page1 = const PAGES[1],
    free = const Attributes::new(Operation::LazyFree).encode(),
    reuse = const Attributes::new(Operation::Reuse).encode(),
    port = const PORT,
    port_stub = const code::PORT_STUB,
);

unsafe extern "C" {
    static ebb_use_after_free_start: u8;
    static ebb_use_after_free_end: u8;
    static ebb_use_after_free_load: u8;
    static ebb_use_after_free_store: u8;
}

fn address(label: *const u8) -> u64 {
    BASE + (label.addr() - (&raw const ebb_use_after_free_start).addr()) as u64
}

/// Address of the instruction that reads the freed page.
#[must_use]
pub fn load_site() -> u64 {
    address(&raw const ebb_use_after_free_load)
}

/// Address of the instruction that writes to the page after the second free.
#[must_use]
pub fn store_site() -> u64 {
    address(&raw const ebb_use_after_free_store)
}

/// Writes the guest as an ELF file. Its two results are what the vCPUs have read.
///
/// # Errors
/// The error of writing the file.
pub fn write(path: &Path) -> io::Result<()> {
    let start = &raw const ebb_use_after_free_start;
    let len = (&raw const ebb_use_after_free_end).addr() - start.addr();
    // SAFETY: the two symbols bound the bytes of one section, the start before the end.
    let bytes = unsafe { slice::from_raw_parts(start, len) }.to_vec();
    let mut segments = code::segments(false);
    segments.push((BASE, bytes));
    segments.push((DONE, vec![0; 16]));
    std::fs::write(path, elf::file(BASE, &segments))
}
