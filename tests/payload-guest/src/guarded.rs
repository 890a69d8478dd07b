//! Instructions that may fault: an exception ends the instruction, and not the guest. While one runs, r13 holds [`GUARD`]
//! and r15 the address to go on at; the handler sets r14.

use core::arch::asm;

use ebb_hypercall_abi::stubs::Transport;

/// Says in r13 that an exception is expected.
pub const GUARD: u64 = 0x0e_bb5a;

/// What an instruction gives, and whether it faulted.
pub type Outcome = (u64, bool);

/// Runs instructions between which the guard is up.
macro_rules! guarded {
    ([$($instruction:literal),+], $($operands:tt)*) => {{
        let faulted: u64;
        // SAFETY: whoever runs scripts accepts whatever they do to this guest; Rust's own memory is none of it. An
        // exception uses the stack, so it is not said that none is used.
        unsafe {
            asm!(
                "lea r15, [rip + 2f]",
                $($instruction,)+
                "2:",
                // What comes next is not guarded.
                "xor r13d, r13d",
                inout("r13") GUARD => _,
                inout("r14") 0u64 => faulted,
                out("r15") _,
                $($operands)*
            )
        };
        faulted != 0
    }};
}

/// Writes `width` bytes of `value` to `port`.
#[must_use]
pub fn output(port: u16, width: u64, value: u64) -> Outcome {
    let value = value as u32;
    let faulted = match width {
        1 => guarded!(["out dx, al"], in("dx") port, in("eax") value),
        2 => guarded!(["out dx, ax"], in("dx") port, in("eax") value),
        _ => guarded!(["out dx, eax"], in("dx") port, in("eax") value),
    };
    (0, faulted)
}

/// Reads `width` bytes from `port`.
#[must_use]
pub fn input(port: u16, width: u64) -> Outcome {
    let mut value = 0u32;
    let faulted = match width {
        1 => guarded!(["in al, dx"], in("dx") port, inout("eax") value),
        2 => guarded!(["in ax, dx"], in("dx") port, inout("eax") value),
        _ => guarded!(["in eax, dx"], in("dx") port, inout("eax") value),
    };
    (value.into(), faulted)
}

/// Writes `count` elements from address `from` on to `port`.
#[must_use]
pub fn output_string(port: u16, width: u64, from: u64, count: u64) -> Outcome {
    let (mut left, mut at) = (count, from);
    let faulted = match width {
        1 => guarded!(["rep outsb"], in("dx") port, inout("rsi") at, inout("rcx") left),
        2 => guarded!(["rep outsw"], in("dx") port, inout("rsi") at, inout("rcx") left),
        _ => guarded!(["rep outsd"], in("dx") port, inout("rsi") at, inout("rcx") left),
    };
    let _ = at;
    (left, faulted)
}

/// Reads `count` elements from `port` to address `to`.
#[must_use]
pub fn input_string(port: u16, width: u64, to: u64, count: u64) -> Outcome {
    let (mut left, mut at) = (count, to);
    let faulted = match width {
        1 => guarded!(["rep insb"], in("dx") port, inout("rdi") at, inout("rcx") left),
        2 => guarded!(["rep insw"], in("dx") port, inout("rdi") at, inout("rcx") left),
        _ => guarded!(["rep insd"], in("dx") port, inout("rdi") at, inout("rcx") left),
    };
    let _ = at;
    (left, faulted)
}

/// Writes `width` bytes of `value` at `address`.
#[must_use]
pub fn store(address: u64, width: u64, value: u64) -> Outcome {
    let faulted = match width {
        1 => guarded!(["mov [rdx], al"], in("rdx") address, in("rax") value),
        2 => guarded!(["mov [rdx], ax"], in("rdx") address, in("rax") value),
        4 => guarded!(["mov [rdx], eax"], in("rdx") address, in("rax") value),
        _ => guarded!(["mov [rdx], rax"], in("rdx") address, in("rax") value),
    };
    (0, faulted)
}

/// Reads `width` bytes at `address`.
#[must_use]
pub fn load(address: u64, width: u64) -> Outcome {
    let mut value = 0u64;
    let faulted = match width {
        1 => guarded!(["mov al, [rdx]"], in("rdx") address, inout("rax") value),
        2 => guarded!(["mov ax, [rdx]"], in("rdx") address, inout("rax") value),
        4 => guarded!(["mov eax, [rdx]"], in("rdx") address, inout("rax") value),
        _ => guarded!(["mov rax, [rdx]"], in("rdx") address, inout("rax") value),
    };
    (value, faulted)
}

/// Writes a model-specific register.
#[must_use]
pub fn write_msr(register: u32, value: u64) -> Outcome {
    let (low, high) = (value as u32, (value >> 32) as u32);
    let faulted = guarded!(["wrmsr"], in("ecx") register, in("eax") low, in("edx") high);
    (0, faulted)
}

/// Reads a model-specific register.
#[must_use]
pub fn read_msr(register: u32) -> Outcome {
    let (mut low, mut high) = (0u32, 0u32);
    let faulted = guarded!(["rdmsr"], in("ecx") register, inout("eax") low, inout("edx") high);
    (u64::from(high) << 32 | u64::from(low), faulted)
}

/// KVM's hypercall `number`, with arguments of 0. Without an instruction for it, nothing is done.
#[must_use]
pub fn kvm_call(by: Transport, number: u64) -> Outcome {
    let mut value = number;
    // RBX, the first argument, is Rust's own.
    let faulted = match by {
        Transport::Port(_) => false,
        Transport::Vmcall => guarded!(
            ["push rbx", "xor ebx, ebx", "vmcall", "2:", "pop rbx"],
            inout("rax") value, in("rcx") 0u64, in("rdx") 0u64, in("rsi") 0u64
        ),
        Transport::Vmmcall => guarded!(
            ["push rbx", "xor ebx, ebx", "vmmcall", "2:", "pop rbx"],
            inout("rax") value, in("rcx") 0u64, in("rdx") 0u64, in("rsi") 0u64
        ),
    };
    (value, faulted)
}

/// Calls the code at `address`. The result is what it leaves in RAX.
#[must_use]
pub fn call(address: u64) -> Outcome {
    let mut value = address;
    let faulted = guarded!(
        [
            // Registers that Rust keeps, and that code which faults leaves as they are.
            "push rbx", "push rbp", "mov r12, rsp", "call rax", "2:", "mov rsp, r12", "pop rbp", "pop rbx"
        ],
        inout("rax") value,
        out("r12") _,
        out("rdi") _,
        out("rsi") _,
        out("rcx") _,
        out("rdx") _,
        out("r8") _,
        out("r9") _,
        out("r10") _,
        out("r11") _,
        out("xmm0") _,
        out("xmm1") _,
    );
    (value, faulted)
}
