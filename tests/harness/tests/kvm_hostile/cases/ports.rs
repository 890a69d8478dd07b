//! Ports: serial port, fw_cfg, PCI configuration, the keyboard controller, pvpanic, power; and those without a device.

use ebb_payload::script::{Kind, Script};

use super::{Case, case};
use crate::machine::RAM;

const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

const SERIAL: u64 = 0x3f8;
const FW_CFG: u64 = 0x510;

/// A request to fw_cfg by DMA.
fn dma(s: &mut Script<'_>, control: u32, len: u32, address: u64) -> u64 {
    let mut bytes = control.to_be_bytes().to_vec();
    bytes.extend(len.to_be_bytes());
    bytes.extend(address.to_be_bytes());
    let at = s.data(&bytes, 16);
    start(s, at);
    at
}

fn start(s: &mut Script<'_>, at: u64) {
    s.output(FW_CFG + 4, 4, u64::from(((at >> 32) as u32).swap_bytes()));
    s.output(FW_CFG + 8, 4, u64::from((at as u32).swap_bytes()));
}

const READ: u32 = 2;
const SKIP: u32 = 4;
const SELECT: u32 = 8;
const WRITE: u32 = 16;
const NOTE: u32 = 0x20 << 16 | SELECT;
/// The error bit, as it is in memory.
const ERROR: u64 = 1 << 24;

pub const CASES: &[Case] = &[
    case(
        "ports_without_a_device",
        "reads and writes 500 ports that nobody has, at all widths",
        |s| {
            for width in [1, 2, 4] {
                s.input(0x1000, width).times(500, 97);
                s.output(0x1000, width, u64::MAX).times(500, 97);
            }
            s.input(0x1000, 4).expect_bits(0xffff_ffff, 0xffff_ffff);
        },
    ),
    case(
        "ports_at_the_edges",
        "accesses ports that begin in one device and end outside, and the last port",
        |s| {
            for (port, width) in [
                (0x5f, 4),
                (0x63, 4),
                (0x3f7, 4),
                (0x3fe, 4),
                (0x50f, 4),
                (0x51a, 4),
                (0xcfe, 4),
                (0x5ff, 2),
                (0x602, 4),
                (0xffff, 1),
                (0xfffe, 4),
            ] {
                s.input(port, width).output(port, width, 0);
            }
        },
    ),
    case(
        "strings_to_ports",
        "writes and reads 512 elements to and from ports with one instruction",
        |s| {
            for port in [SERIAL + 7, FW_CFG + 1, 0xcfc, 0x1234, 0x505, 0x61] {
                for width in [1, 2, 4] {
                    s.step(Kind::InputString, port, width, (PLAY, 512));
                }
            }
            s.step(Kind::OutputString, 0xcfc, 4, (PLAY, 64));
            s.step(Kind::OutputString, 0x1234, 2, (PLAY, 64));
        },
    ),
    case(
        "strings_from_nowhere",
        "has strings read from and written to what is no RAM",
        |s| {
            for at in [0xd000_0000, RAM, 0xfee0_0000, RAM - 2] {
                s.step(Kind::InputString, 0xcfc, 4, (at, 4));
                s.step(Kind::OutputString, 0xcfc, 4, (at, 4));
            }
        },
    ),
    case(
        "cve_2020_27173_serial_loopback",
        "writes 3000 bytes to the serial port in loopback mode",
        |s| {
            s.output(SERIAL + 4, 1, 0x1f);
            s.output(SERIAL, 1, 0x55).times(3000, 0);
            s.input(SERIAL, 1).times(100, 0);
            s.output(SERIAL + 4, 1, 8);
            // What is left in its queue is taken out, or it would be taken for the name of a script.
            s.input(SERIAL, 1).times(4000, 0);
        },
    ),
    case(
        "serial_registers_with_noise",
        "writes all values to the serial port's registers",
        |s| {
            for register in [1, 2, 4, 5, 6, 7] {
                for value in [0, 1, 0x55, 0x80, 0xff] {
                    s.output(SERIAL + register, 1, value);
                }
            }
            s.output(SERIAL + 3, 1, 0x80)
                .output(SERIAL, 1, 0)
                .output(SERIAL + 1, 1, 0);
            s.output(SERIAL + 3, 1, 3).output(SERIAL + 4, 1, 8);
            for width in [2, 4] {
                s.output(SERIAL, width, u64::MAX).input(SERIAL, width);
            }
        },
    ),
    case(
        "serial_interrupts_again_and_again",
        "switches the serial port's interrupts on and off 500 times",
        |s| {
            s.output(SERIAL + 1, 1, 2).times(500, 0);
            s.output(SERIAL + 1, 1, 0xf).output(SERIAL + 1, 1, 0);
        },
    ),
    case(
        "fw_cfg_dma_to_itself",
        "reads by DMA over the request that asks for it",
        |s| {
            // Its own address is known only when it is written: the memory that is freed.
            for key in [0u32, 0x19 << 16, 0x20 << 16] {
                let word = u64::from((key | SELECT | READ).swap_bytes())
                    | u64::from(64u32.swap_bytes()) << 32;
                s.store(PLAY, 8, word).store(PLAY + 8, 8, PLAY.swap_bytes());
                start(s, PLAY);
                s.load(PLAY, 4).expect_bits(0xffff_ffff, 0);
                start(s, PLAY);
            }
        },
    ),
    case(
        "fw_cfg_dma_outside_ram",
        "has requests and data outside RAM, at its end, and where addresses wrap",
        |s| {
            for at in [RAM, RAM - 8, 0xd000_0000, 1 << 40, u64::MAX - 7, u64::MAX] {
                start(s, at);
                for control in [SELECT | READ, NOTE | WRITE] {
                    let request = dma(s, control, 16, at);
                    s.load(request, 4).expect_bits(0xffff_ffff, ERROR);
                }
            }
        },
    ),
    case(
        "fw_cfg_dma_of_four_gib",
        "reads, writes and skips 2^32 - 1 bytes, again and again",
        |s| {
            for control in [SELECT | READ, NOTE | WRITE, READ, WRITE] {
                for len in [4097, 17, 1 << 20, u32::MAX] {
                    dma(s, control, len, PLAY);
                }
            }
            let skip = dma(s, NOTE | SKIP, u32::MAX, 0);
            for _ in 0..20 {
                s.store(skip, 8, u64::from(SKIP.swap_bytes()) | 0xffff_ffff << 32);
                start(s, skip);
            }
            let write = dma(s, WRITE, 16, PLAY);
            s.load(write, 4).expect_bits(0xffff_ffff, ERROR);
        },
    ),
    case(
        "fw_cfg_items_that_are_not_there",
        "selects all kinds of keys, and reads and writes what is there",
        |s| {
            for key in [0, 1, 2, 0x19, 0x20, 0x21, 0x4000, 0x8000, 0xffff] {
                s.output(FW_CFG, 2, key).input(FW_CFG + 1, 1).times(100, 0);
                s.output(FW_CFG + 1, 1, 0xff);
                dma(s, key as u32 & !0x20 | SELECT | WRITE, 4, PLAY);
            }
        },
    ),
    case(
        "fw_cfg_note_that_wraps",
        "says by fw_cfg that the kernel's note is at 2^64 - 1, and 4 GiB long",
        |s| {
            for (len, start) in [
                (u32::MAX, u64::MAX),
                (0, 0),
                (u32::MAX, 0),
                (4096, RAM),
                (1, u64::MAX),
                (4096, 0xd000_0000),
            ] {
                let mut file = vec![1, 0, 1, 0];
                file.extend(len.to_le_bytes());
                file.extend(start.to_le_bytes());
                let at = s.data(&file, 8);
                let request = dma(s, NOTE | WRITE, 16, at);
                s.load(request, 4).expect_bits(0xffff_ffff, 0);
            }
        },
    ),
    case(
        "fw_cfg_registers_at_all_widths",
        "writes to fw_cfg's ports at widths that they do not have",
        |s| {
            for port in 0..12 {
                for width in [1, 2] {
                    s.output(FW_CFG + port, width, 0)
                        .input(FW_CFG + port, width);
                }
                s.input(FW_CFG + port, 4);
            }
        },
    ),
    case(
        "pci_devices_that_are_not_there",
        "reads and writes the configuration of 300 PCI devices",
        |s| {
            for address in (0..300u64).map(|n| 0x8000_0000 | (n * 0x1_2345) & 0xff_fffc) {
                s.output(0xcf8, 4, address)
                    .input(0xcfc, 4)
                    .output(0xcfe, 2, address);
            }
            s.output(0xcf9, 1, 0x06).input(0xcfb, 4);
        },
    ),
    case(
        "keyboard_commands",
        "sends the keyboard controller all commands but the reset",
        |s| {
            for command in (0..0xfe).step_by(7) {
                s.output(0x64, 1, command)
                    .input(0x64, 1)
                    .input(0x60, 1)
                    .output(0x60, 1, command);
            }
            s.output(0x64, 2, 0xfe)
                .output(0x63, 2, 0xfe00)
                .output(0x64, 4, 0xfefe_fefe);
        },
    ),
    case(
        "panics_with_a_crash_kernel",
        "says 500 times that its crash kernel runs",
        |s| {
            s.output(0x505, 1, 2).times(500, 0);
            s.output(0x505, 2, 1)
                .output(0x504, 2, 0x0100)
                .output(0x505, 4, 0xffff_ffff);
        },
    ),
    case(
        "sleep_of_other_types",
        "asks for sleep states that do not exist, and at other widths",
        |s| {
            for value in [0x20, 0x24, 0x28, 0x3c, 0x14, 0xdf & !0x34] {
                s.output(0x600, 1, value);
            }
            s.output(0x600, 2, 0x34)
                .output(0x600, 4, 0x3434_3434)
                .output(0x601, 1, 0x34);
            s.output(0x602, 1, 0xff)
                .output(0x602, 2, 1)
                .input(0x600, 1)
                .input(0x601, 2);
        },
    ),
];
