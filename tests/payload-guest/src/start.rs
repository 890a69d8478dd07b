//! Entry of the guest. The monitor starts the first vCPU in 64-bit mode, which starts the others in real mode. Compiled for the
//! guest only.

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::ptr::with_exposed_provenance_mut;

use crate::cpu::{Ram, halt, now, power_off, send};
use crate::records::WordMemory;
use crate::{Parameters, Task, integrity, interpreter, isolation, map, marker, meter, storm};

global_asm!(
    ".pushsection .text.start, \"ax\"",
    ".globl start",
    "start:",
    "movq ${pml4}, %rax",
    "movq %rax, %cr3",
    "lgdt descriptors(%rip)",
    // Enable SSE, which compiled code uses.
    "movq %cr0, %rax",
    "andq $~4, %rax",
    "orq $2, %rax",
    "movq %rax, %cr0",
    "movq %cr4, %rax",
    "orq $0x600, %rax",
    "movq %rax, %cr4",
    // Take a number, and the stack of that number.
    "2:",
    "movl $1, %edi",
    "movl ${shared}, %eax",
    "lock xaddq %rdi, (%rax)",
    "leaq 1(%rdi), %rax",
    "imulq ${stack_size}, %rax, %rax",
    "leaq {stacks}(%rax), %rsp",
    "xorl %ebp, %ebp",
    "call guest",
    "ud2",
    ".balign 8",
    "table:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "descriptors:",
    ".word 23",
    ".quad table",
    // Copied below 1 MiB: switches from real mode to 64-bit mode.
    ".balign 8",
    ".globl trampoline",
    ".globl trampoline_end",
    "trampoline:",
    ".code16",
    "cli",
    "xorw %ax, %ax",
    "movw %ax, %ds",
    "lgdtl {trampoline} + (near_descriptors - trampoline)",
    "movl $0x620, %eax",
    "movl %eax, %cr4",
    "movl ${pml4}, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl $0x80000013, %eax",
    "movl %eax, %cr0",
    "ljmpl $8, $from_trampoline",
    ".balign 8",
    "near_descriptors:",
    ".word 23",
    ".long table",
    "trampoline_end:",
    ".code64",
    "from_trampoline:",
    "movw $16, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "jmp 2b",
    ".popsection",
    pml4 = const map::PML4,
    shared = const map::SHARED,
    stacks = const map::STACKS,
    stack_size = const map::STACK_SIZE,
    trampoline = const map::TRAMPOLINE,
    options(att_syntax)
);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// The local APIC's interrupt command register.
const ICR: u64 = 0xfee0_0300;
/// Commands to all vCPUs but the sender: INIT, and start at the trampoline's page.
const INIT: u32 = 0xc_4500;
const START: u32 = 0xc_4600 | (map::TRAMPOLINE >> 12) as u32;

/// Starts the other vCPUs (Intel SDM volume 3, 11.4.4).
fn start_others() {
    let (from, end) = (&raw const trampoline, &raw const trampoline_end);
    let to = with_exposed_provenance_mut::<u8>(map::TRAMPOLINE as usize);
    for offset in 0..end.addr() - from.addr() {
        // SAFETY: the two symbols bound the bytes, and the trampoline's page is unused.
        unsafe { to.add(offset).write_volatile(from.add(offset).read()) };
    }
    let icr = with_exposed_provenance_mut::<u32>(ICR as usize);
    for command in [INIT, START] {
        // SAFETY: a register of the local APIC, which lies in the mapped first 4 GiB.
        unsafe { icr.write_volatile(command) };
        let begin = now();
        while now().wrapping_sub(begin) < 10_000_000 {
            core::hint::spin_loop();
        }
    }
}

/// Entry of each vCPU, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn guest(index: u64) -> ! {
    // SAFETY: this image has its machine for itself, the page tables identity-map 4 GiB, and the tasks divide the memory
    // among the vCPUs.
    let mut ram = unsafe { Ram::new() };
    let word = |field: usize| ram.load(map::PARAMETERS + field as u64);
    let parameters = Parameters {
        task: word(core::mem::offset_of!(Parameters, task)),
        vcpus: word(core::mem::offset_of!(Parameters, vcpus)),
        ram: word(core::mem::offset_of!(Parameters, ram)),
        operations: word(core::mem::offset_of!(Parameters, operations)),
        seed: word(core::mem::offset_of!(Parameters, seed)),
    };
    if index == 0 && parameters.vcpus > 1 {
        start_others();
    }
    const INTEGRITY: u64 = Task::Integrity as u64;
    const STORM: u64 = Task::Storm as u64;
    const METER: u64 = Task::Meter as u64;
    const CALLER: u64 = Task::Caller as u64;
    const SCRIPTS: u64 = Task::Scripts as u64;
    const ISOLATION: u64 = Task::Isolation as u64;
    match parameters.task {
        INTEGRITY => integrity::run(ram, &parameters, index),
        CALLER => meter::caller(ram, &parameters, index),
        SCRIPTS => {
            crate::faults::catch();
            interpreter::run(ram, &parameters, index);
        }
        STORM if index == 0 => storm::run(ram, &parameters),
        METER if index == 0 => meter::run(ram),
        ISOLATION if index == 0 => {
            isolation::run(&mut ram, &parameters);
            if parameters.operations == 0 {
                halt();
            }
        }
        _ => halt(),
    }
    if index == 0 { power_off() } else { halt() }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    send(marker::PANIC);
    power_off()
}

/// Functions that compiled code calls.
mod memory {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise, as C has it.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise, as C has it.
        unsafe {
            asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if to.addr() <= from.addr() || from.addr() + len <= to.addr() {
            // SAFETY: ascending copies overwrite nothing that is still to be read.
            return unsafe { memcpy(to, from, len) };
        }
        for offset in (0..len).rev() {
            // SAFETY: the caller's promise, as C has it.
            unsafe {
                to.add(offset)
                    .write_volatile(from.add(offset).read_volatile())
            };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        for offset in 0..len {
            // SAFETY: the caller's promise, as C has it.
            let (a, b) = unsafe { (a.add(offset).read_volatile(), b.add(offset).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        // SAFETY: the caller's promise, as C has it.
        unsafe { memcmp(a, b, len) }
    }
}
