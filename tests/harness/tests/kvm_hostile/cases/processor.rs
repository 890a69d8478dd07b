//! Model-specific registers, CPUID, exceptions.

use ebb_payload::script::Kind;

use super::{Case, case};
use crate::machine::RAM;

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

const LSTAR: u64 = 0xc000_0082;
const CLOCK: u64 = 0x4b56_4d01;
const EFER: u64 = 0xc000_0080;

pub const CASES: &[Case] = &[
    case(
        "registers_that_are_not_there",
        "reads and writes model-specific registers that do not exist",
        |s| {
            for register in [0x1234_5678, 0xffff_ffff, 0x4000_00ff, 0xc001_ffff] {
                s.read_msr(register).expect_fault();
                s.write_msr(register, u64::MAX).expect_fault();
            }
        },
    ),
    case(
        "entry_points_that_are_not_canonical",
        "sets LSTAR, at which the vCPU leaves the guest, to what it cannot hold",
        |s| {
            s.write_msr(LSTAR, 1 << 63).expect_fault();
            s.write_msr(LSTAR, 0xdead_beef_0000_0000).expect_fault();
            s.write_msr(LSTAR, 0x1000).read_msr(LSTAR).expect(0x1000);
        },
    ),
    case(
        "entry_points_again_and_again",
        "sets LSTAR 1000 times",
        |s| {
            s.write_msr(LSTAR, 0x1000).times(1000, 0);
        },
    ),
    case(
        "clocks_everywhere",
        "puts kvmclock outside RAM, across its end, at 2^64 - 2, and switches it off again",
        |s| {
            for at in [RAM, RAM - 8, 0xd000_0000, u64::MAX - 1, PLAY + 1, PLAY] {
                for _ in 0..5 {
                    s.write_msr(CLOCK, at | 1).write_msr(CLOCK, at & !1);
                }
            }
            s.write_msr(CLOCK, 0);
        },
    ),
    case(
        "reserved_bits_of_efer",
        "sets reserved bits of EFER, and leaves 64-bit mode",
        |s| {
            s.write_msr(EFER, u64::MAX).expect_fault();
            s.write_msr(EFER, 0).expect_fault();
        },
    ),
    case(
        "shared_pages_of_kvm",
        "puts steal time and the end of interrupts outside RAM",
        |s| {
            for register in [0x4b56_4d00, 0x4b56_4d03, 0x4b56_4d04] {
                for at in [RAM, 0xd000_0000, 1 << 50, u64::MAX] {
                    s.write_msr(register, at & !0x3f | 1).write_msr(register, 0);
                }
            }
        },
    ),
    case(
        "ranges_of_registers",
        "reads 600 registers in all ranges",
        |s| {
            for first in [
                0,
                0x170,
                0x400,
                0x800,
                0x4000_0000,
                0x4b56_4d00,
                0xc000_0080,
                0xc001_0000,
            ] {
                s.read_msr(first).times(75, 1);
            }
        },
    ),
    case(
        "every_leaf_of_cpuid",
        "asks for 600 leaves and sub-leaves",
        |s| {
            for first in [0, 0x4000_0000, 0x8000_0000, 0x8fff_ffe0, 0xffff_ffc0] {
                for subleaf in [0, 1, 0xffff_ffff] {
                    s.step(Kind::Cpuid, first, 0, (subleaf, 0)).times(40, 1);
                }
            }
        },
    ),
    case(
        "no_virtualization_is_offered",
        "looks for VMX and SVM, and tries to switch them on",
        |s| {
            s.step(Kind::Cpuid, 1, 0, (0, 2)).expect_bits(1 << 5, 0);
            s.step(Kind::Cpuid, 0x8000_0001, 0, (0, 2))
                .expect_bits(1 << 2, 0);
            s.write_msr(EFER, 0x1d01).expect_fault();
            // vmxon, vmrun, vmload: none of them is known.
            for code in [
                &[0xf3, 0x0f, 0xc7, 0x37, 0xc3][..],
                &[0x0f, 0x01, 0xd8, 0xc3],
                &[0x0f, 0x01, 0xda, 0xc3],
            ] {
                s.run(code).expect_fault();
            }
        },
    ),
    case(
        "instructions_that_fault",
        "runs ud2, int3 and others, of which each faults",
        |s| {
            for code in [
                &[0x0f, 0x0b, 0xc3][..],
                &[0xcc, 0xc3],
                &[0x0f, 0xff, 0xc3],
                &[0x0f, 0x22, 0xc8, 0xc3],
            ] {
                s.run(code);
            }
            // wbinvd, rdtsc, pause
            s.run(&[0x0f, 0x09, 0x0f, 0x31, 0xf3, 0x90, 0xc3]);
        },
    ),
    case(
        "code_that_changes_itself",
        "overwrites the next instruction before it runs it",
        |s| {
            // lea rdi, [rip + 4]; mov byte ptr [rdi], 7; mov eax, 1; ret: the 1 becomes 7.
            s.run(&[
                0x48, 0x8d, 0x3d, 4, 0, 0, 0, 0xc6, 0x07, 7, 0xb8, 1, 0, 0, 0, 0xc3,
            ])
            .expect(7);
        },
    ),
    case(
        "interrupts_to_nobody",
        "writes noise to the I/O APIC's masked pins, and reads all of the local APIC",
        |s| {
            for pin in 8..24u64 {
                s.store(0xfec0_0000, 4, 0x10 + 2 * pin).store(
                    0xfec0_0010,
                    4,
                    0x1_0000 | (pin * 31) & 0xff,
                );
            }
            for register in [0x40, 0x7f, 0xff, 0xffff_ffff] {
                s.store(0xfec0_0000, 4, register)
                    .load(0xfec0_0010, 4)
                    .store(0xfec0_0010, 4, u64::MAX);
            }
            s.load(0xfee0_0000, 4).times(64, 16);
            for width in [1, 2, 8] {
                s.load(0xfee0_0020, width)
                    .load(0xfec0_0000, width)
                    .store(0xfec0_0001, width, 0);
            }
        },
    ),
];
