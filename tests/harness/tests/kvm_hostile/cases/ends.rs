//! What ends the machine, with its exit code. Each takes a machine of its own.

use ebb_payload::script::{Kind, Script};

use super::Case;

const fn ends(
    code: i32,
    name: &'static str,
    does: &'static str,
    write: fn(&mut Script<'_>),
) -> Case {
    Case {
        name,
        does,
        write,
        ends: Some(code),
    }
}

/// Exit codes of `ebb run`: `vmm/src/exit.rs`.
const STOP: i32 = 0;
const RESET: i32 = 32;
const CRASH: i32 = 33;
const PANIC: i32 = 34;

pub const CASES: &[Case] = &[
    ends(
        CRASH,
        "triple_fault",
        "faults without a table of handlers",
        |s| {
            s.step(Kind::Crash, 0, 0, (0, 0));
        },
    ),
    ends(
        CRASH,
        "code_in_a_device",
        "jumps to a device's registers",
        |s| {
            s.step(Kind::Call, 0xd000_0000, 0, (0, 0));
        },
    ),
    ends(
        RESET,
        "reset_by_acpi",
        "writes the reset register, with a disk at work",
        |s| {
            super::transport::busy_disk(s);
            s.output(0x602, 1, 1);
        },
    ),
    ends(
        RESET,
        "reset_by_the_keyboard",
        "pulses the reset line",
        |s| {
            s.output(0x64, 1, 0xfe);
        },
    ),
    ends(
        PANIC,
        "panic_in_a_string",
        "reports a panic in the middle of a string of others",
        |s| {
            let events = s.data(&[2, 2, 2, 1, 2, 2], 1);
            s.step(Kind::OutputString, 0x505, 1, (events, 6));
        },
    ),
    ends(STOP, "power_off", "powers off, with a disk at work", |s| {
        super::transport::busy_disk(s);
        s.step(Kind::PowerOff, 0, 0, (0, 0));
    }),
];
