//! Exceptions of the processor: those of [`crate::guarded`] instructions go on behind the instruction, and all others end the
//! guest. Compiled for the guest only.

use core::arch::{asm, global_asm};
use core::ptr::with_exposed_provenance_mut;

use crate::cpu::{power_off, send};
use crate::{guarded, map, marker};

/// The vector of the serial port's interrupt.
pub const SERIAL: usize = 0x20;

global_asm!(
    ".pushsection .text, \"ax\"",
    ".globl vectors",
    ".globl interrupted",
    ".balign 16",
    "vectors:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    // Those with an error code (AMD64 volume 2, 8.2). The others get a word in its place.
    ".if ((0x60227d00 >> vector) & 1) == 0",
    "push 0",
    ".endif",
    // push, with a byte
    ".byte 0x6a, vector",
    "jmp fault",
    ".set vector, vector + 1",
    ".endr",
    "fault:",
    "cmp r13, {guard}",
    "jne 3f",
    "mov [rsp + 16], r15",
    "mov r14d, 1",
    "add rsp, 16",
    "iretq",
    "3:",
    "mov rdi, [rsp]",
    "mov rsi, [rsp + 16]",
    "and rsp, -16",
    "call stray",
    // The serial port's: only wakes the processor. The end of the interrupt is told to the local APIC.
    "interrupted:",
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    ".popsection",
    guard = const guarded::GUARD,
);

unsafe extern "C" {
    static vectors: u8;
    static interrupted: u8;
}

/// An exception that nobody expected.
#[unsafe(no_mangle)]
extern "C" fn stray(vector: u64, rip: u64) -> ! {
    send(marker::PANIC);
    send(vector);
    send(rip);
    power_off()
}

/// A gate of the table: to address `to`, in the code segment 8 (AMD64 volume 2, 4.8.4).
const fn gate(to: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
    [
        to & 0xffff | 8 << 16 | PRESENT_INTERRUPT_GATE | (to & 0xffff_0000) << 32,
        to >> 32,
    ]
}

/// Makes this vCPU handle exceptions. Each vCPU writes the same table.
pub fn catch() {
    let table = with_exposed_provenance_mut::<[u64; 2]>(map::IDT as usize);
    let first = (&raw const vectors).addr() as u64;
    let handlers = (0..32).map(|vector| first + 16 * vector);
    for (index, to) in handlers.enumerate() {
        // SAFETY: the table's page is for nothing else.
        unsafe { table.add(index).write_volatile(gate(to)) };
    }
    // SAFETY: as above.
    unsafe {
        let to = (&raw const interrupted).addr() as u64;
        table.add(SERIAL).write_volatile(gate(to));
    }
    let descriptor: [u16; 5] = [
        (16 * (SERIAL + 1) - 1) as u16,
        map::IDT as u16,
        (map::IDT >> 16) as u16,
        0,
        0,
    ];
    // SAFETY: loads the table. Returning from exceptions needs segments of the table of descriptors that is loaded.
    unsafe {
        asm!(
            "lidt [{table}]",
            "mov {scratch:e}, 0x10",
            "mov ss, {scratch:e}",
            "mov ds, {scratch:e}",
            "mov es, {scratch:e}",
            "push 8",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            table = in(reg) &raw const descriptor,
            scratch = out(reg) _,
        );
    }
}
