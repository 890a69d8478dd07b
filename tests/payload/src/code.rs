//! The code of a [`crate::Program`]'s guest: an interpreter of steps in assembly, linked at [`BASE`].

use std::arch::global_asm;
use std::ptr;
use std::slice;

use ebb_hypercall_abi::call::{Attributes, Operation};
use ebb_hypercall_abi::discovery::PORT;
use ebb_hypercall_abi::stubs;

use crate::elf;

/// Address of the code and its entry.
pub const BASE: u64 = 0x10_0000;
/// Address of a word that is not 0 if the steps run at privilege level 3.
const USER: u64 = 0x10_f000;
/// Addresses of the hypercall stubs.
pub const VMCALL_STUB: u64 = 0x10_8000;
pub const VMMCALL_STUB: u64 = 0x10_8100;
pub const PORT_STUB: u64 = 0x10_8200;
/// Bytes that are copied of each stub. None is longer.
const STUB_SIZE: usize = 64;
/// Page tables of three levels. The third has eight pages and so maps 8 GiB.
pub const PML4: u64 = 0x11_0000;
const PDPT: u64 = 0x11_1000;
const PD: u64 = 0x11_2000;
pub const STACK: u64 = 0x12_0000;
/// Address of the steps.
pub const PROGRAM: u64 = 0x20_0000;

// Kinds of steps. Kind 0 ends the program.
pub const VMCALL: u64 = 1;
pub const VMMCALL: u64 = 2;
pub const PORT_CALL: u64 = 3;
pub const STORE: u64 = 4;
pub const LOAD: u64 = 5;
pub const CPUID: u64 = 6;
pub const FILL: u64 = 7;
pub const COUNT_FILLED: u64 = 8;
pub const COUNT_EQUAL: u64 = 9;
pub const QUERY_UNTIL: u64 = 10;
pub const INPUT_BYTE: u64 = 11;
pub const OUTPUT: u64 = 12;
pub const TIME: u64 = 13;
pub const COMPARE_EXCHANGE: u64 = 14;
pub const WAIT_FOR: u64 = 15;
pub const WRITE_RANDOM: u64 = 16;
pub const PAIR: u64 = 17;
pub const HALT: u64 = 18;
pub const OUTPUT_BYTE: u64 = 19;

/// Pairs of words that one [`WRITE_RANDOM`] writes.
const RANDOM_PAIRS: u64 = 1 << 16;

global_asm!(
    ".pushsection .rodata.ebb_payload, \"a\"",
    ".globl ebb_payload_start",
    ".globl ebb_payload_end",
    "ebb_payload_start:",
    // Load our own page tables and descriptors instead of those that the monitor makes for kernels.
    "mov rax, {pml4}",
    "mov cr3, rax",
    "lgdt [rip + 90f]",
    "mov rsp, {stack}",
    "mov rax, {user}",
    "cmp qword ptr [rax], 0",
    "je 40f",
    // Go to privilege level 3 with I/O privilege level 3.
    "mov rax, rsp",
    "push 0x23",
    "push rax",
    "push 0x3002",
    "push 0x1b",
    "lea rax, [rip + 40f]",
    "push rax",
    "iretq",
    "40:",
    "mov r12, {program}",
    // The next step: its kind, three arguments, and how often to run it.
    "41:",
    "mov r13, [r12 + 32]",
    "12:",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov rcx, [r12]",
    "xor eax, eax",
    "cmp rcx, 0",
    "je 80f",
    "cmp rcx, {vmcall}",
    "je 21f",
    "cmp rcx, {vmmcall}",
    "je 22f",
    "cmp rcx, {port_call}",
    "je 23f",
    "cmp rcx, {store}",
    "je 24f",
    "cmp rcx, {load}",
    "je 25f",
    "cmp rcx, {cpuid}",
    "je 26f",
    "cmp rcx, {fill}",
    "je 27f",
    "cmp rcx, {count_filled}",
    "je 28f",
    "cmp rcx, {count_equal}",
    "je 29f",
    "cmp rcx, {query_until}",
    "je 30f",
    "cmp rcx, {input_byte}",
    "je 31f",
    "cmp rcx, {output}",
    "je 32f",
    "cmp rcx, {time}",
    "je 33f",
    "cmp rcx, {compare_exchange}",
    "je 34f",
    "cmp rcx, {wait_for}",
    "je 35f",
    "cmp rcx, {write_random}",
    "je 36f",
    "cmp rcx, {pair}",
    "je 37f",
    "cmp rcx, {halt}",
    "je 38f",
    "cmp rcx, {output_byte}",
    "je 39f",
    "ud2",
    // VMCALL, VMMCALL, PORT_CALL.
    "21:",
    "mov rax, {vmcall_stub}",
    "call rax",
    "jmp 70f",
    "22:",
    "mov rax, {vmmcall_stub}",
    "call rax",
    "jmp 70f",
    "23:",
    "mov rax, {port_stub}",
    "mov rcx, {port}",
    "call rax",
    "jmp 70f",
    // STORE, LOAD.
    "24:",
    "mov [rdi], rsi",
    "jmp 70f",
    "25:",
    "mov rax, [rdi]",
    "jmp 70f",
    // CPUID: rsi is the number of the register.
    "26:",
    "mov eax, edi",
    "xor ecx, ecx",
    "cpuid",
    "cmp rsi, 1",
    "cmove eax, ebx",
    "cmp rsi, 2",
    "cmove eax, ecx",
    "cmp rsi, 3",
    "cmove eax, edx",
    "jmp 70f",
    // FILL.
    "27:",
    "lea rcx, [rdi + rdx]",
    "mov [rdi], rcx",
    "add rdi, 4096",
    "dec rsi",
    "jnz 27b",
    "jmp 70f",
    // COUNT_FILLED.
    "28:",
    "lea rcx, [rdi + rdx]",
    "cmp [rdi], rcx",
    "jne 281f",
    "inc rax",
    "281:",
    "add rdi, 4096",
    "dec rsi",
    "jnz 28b",
    "jmp 70f",
    // COUNT_EQUAL.
    "29:",
    "cmp [rdi], rdx",
    "jne 291f",
    "inc rax",
    "291:",
    "add rdi, 4096",
    "dec rsi",
    "jnz 29b",
    "jmp 70f",
    // QUERY_UNTIL.
    "30:",
    "mov rsi, 1",
    "mov rdx, {query}",
    "mov rcx, {port}",
    "mov rax, {port_stub}",
    "call rax",
    "test rax, rax",
    "jnz 70f",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "cmp [rdi + rdx], rsi",
    "jb 30b",
    "jmp 70f",
    // INPUT_BYTE, OUTPUT, TIME, COMPARE_EXCHANGE, WAIT_FOR.
    "31:",
    "mov edx, edi",
    "in al, dx",
    "jmp 70f",
    "32:",
    "mov edx, edi",
    "mov eax, esi",
    "out dx, eax",
    "jmp 70f",
    "33:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "jmp 70f",
    "34:",
    "mov rax, rsi",
    "lock cmpxchg [rdi], rdx",
    "jmp 70f",
    "35:",
    "pause",
    "cmp [rdi], rsi",
    "jne 35b",
    "jmp 70f",
    // WRITE_RANDOM.
    "36:",
    "mov ecx, {random_pairs}",
    "361:",
    "imul rdx, rdx, 0x5851f42d",
    "add rdx, 0x14057b7f",
    "mov rax, rdx",
    "shr rax, 33",
    "and rax, rsi",
    "mov r8, rdx",
    "shr r8, 20",
    "and r8, 3",
    "mov [rdi + rax * 8], r8",
    "inc rax",
    "and rax, rsi",
    "mov [rdi + rax * 8], rdx",
    "dec ecx",
    "jnz 361b",
    "xor eax, eax",
    "jmp 70f",
    // PAIR: LAZY_FREE and REUSE by the stub in rdx, and a store, for one of 1024 ranges.
    "37:",
    "mov rbp, rdx",
    "mov rbx, r13",
    "and ebx, 1023",
    "imul rbx, rsi",
    "shl rbx, 13",
    "add rbx, rdi",
    "mov rdi, rbx",
    "mov rdx, {lazy_free}",
    "mov rcx, {port}",
    "call rbp",
    "mov rdi, rbx",
    "mov rsi, [r12 + 16]",
    "mov rdx, {reuse}",
    "mov rcx, {port}",
    "call rbp",
    "mov [rbx], r13",
    "jmp 70f",
    // HALT, again after each interrupt.
    "38:",
    "hlt",
    "jmp 38b",
    // OUTPUT_BYTE.
    "39:",
    "mov edx, edi",
    "mov eax, esi",
    "out dx, al",
    "jmp 70f",
    // Repeat the step, or write the result to the serial port.
    "70:",
    "dec r13",
    "jnz 12b",
    "mov rbx, rax",
    "mov ecx, 8",
    "mov edx, 0x3f8",
    "71:",
    "mov al, bl",
    "out dx, al",
    "shr rbx, 8",
    "dec ecx",
    "jnz 71b",
    "add r12, 40",
    "jmp 41b",
    // End: power off by sleep type 5, sleep enable.
    "80:",
    "mov edx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "81:",
    "jmp 81b",
    ".balign 8",
    // Descriptors: null, code, data, and code and data for privilege level 3.
    "91:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00affb000000ffff, 0x00cff3000000ffff",
    "90:",
    ".word 39",
    ".quad {base} + (91b - ebb_payload_start)",
    "ebb_payload_end:",
    ".popsection",
    pml4 = const PML4,
    stack = const STACK,
    user = const USER,
    program = const PROGRAM,
    base = const BASE,
    port = const PORT,
    query = const Attributes::new(Operation::Query).encode(),
    vmcall_stub = const VMCALL_STUB,
    vmmcall_stub = const VMMCALL_STUB,
    port_stub = const PORT_STUB,
    vmcall = const VMCALL,
    vmmcall = const VMMCALL,
    port_call = const PORT_CALL,
    store = const STORE,
    load = const LOAD,
    cpuid = const CPUID,
    fill = const FILL,
    count_filled = const COUNT_FILLED,
    count_equal = const COUNT_EQUAL,
    query_until = const QUERY_UNTIL,
    input_byte = const INPUT_BYTE,
    output = const OUTPUT,
    time = const TIME,
    compare_exchange = const COMPARE_EXCHANGE,
    wait_for = const WAIT_FOR,
    write_random = const WRITE_RANDOM,
    random_pairs = const RANDOM_PAIRS,
    pair = const PAIR,
    lazy_free = const Attributes::new(Operation::LazyFree).encode(),
    reuse = const Attributes::new(Operation::Reuse).encode(),
    halt = const HALT,
    output_byte = const OUTPUT_BYTE,
);

unsafe extern "C" {
    static ebb_payload_start: u8;
    static ebb_payload_end: u8;
}

fn interpreter() -> Vec<u8> {
    let (start, end) = (&raw const ebb_payload_start, &raw const ebb_payload_end);
    // SAFETY: the two symbols bound the bytes of one section, the start before the end.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }.to_vec()
}

/// The first [`STUB_SIZE`] bytes of a function.
fn stub(function: *const ()) -> Vec<u8> {
    let mut bytes = vec![0u8; STUB_SIZE];
    let from = function.cast::<u8>();
    for (offset, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the function lies in this program's text, which is readable and goes on for more than these bytes.
        *byte = unsafe { ptr::read(from.add(offset)) };
    }
    bytes
}

/// The initial memory that all payloads need, as addresses and bytes.
pub fn segments(user: bool) -> Vec<(u64, Vec<u8>)> {
    let mut segments = elf::page_tables([PML4, PDPT, PD], 8);
    segments.extend([
        (BASE, interpreter()),
        (VMCALL_STUB, stub(stubs::vmcall as *const ())),
        (VMMCALL_STUB, stub(stubs::vmmcall as *const ())),
        (PORT_STUB, stub(stubs::port as *const ())),
        (USER, u64::from(user).to_le_bytes().to_vec()),
    ]);
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_do_not_overlap_and_stubs_are_whole() {
        let mut segments = segments(true);
        segments.sort_by_key(|(address, _)| *address);
        for pair in segments.windows(2) {
            assert!(
                pair[0].0 + pair[0].1.len() as u64 <= pair[1].0,
                "{:#x}",
                pair[0].0
            );
        }
        const RET: u8 = 0xc3;
        for function in [
            stubs::vmcall as *const (),
            stubs::vmmcall as *const (),
            stubs::port as *const (),
        ] {
            let pop_ret = [0x5b, RET];
            let bytes = stub(function);
            assert!(bytes.windows(2).any(|pair| pair == pop_ret), "{bytes:x?}");
        }
    }
}
