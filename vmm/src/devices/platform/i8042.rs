//! The keyboard controller: a keyboard that only ever types Ctrl-Alt-Del, and the reset line.
//!
//! Commands and answers as Linux's `drivers/input/serio/i8042.c` and `drivers/input/keyboard/atkbd.c` use them. The
//! keyboard sends scan codes of set 2, which the controller does not translate.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bus::{Action, BusDevice, ExitReason};
use crate::devices::state::{SaveState, from_value, to_value};
use crate::faults::GuestFaults;
use crate::irq::Interrupt;

/// Offset of the data register.
const DATA: u64 = 0;
/// Offset of the status and command register.
const COMMAND: u64 = 4;

/// Status: there is a byte to read.
const STATUS_FULL: u8 = 1 << 0;
/// Status: the lock of the keyboard is open.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Command byte: raise an interrupt for each byte.
const INTERRUPT: u8 = 1 << 0;
/// Command byte: the keyboard is switched off.
const KEYBOARD_OFF: u8 = 1 << 4;
/// Command byte: the mouse is switched off. There is none.
const MOUSE_OFF: u8 = 1 << 5;
/// Command byte: translate scan codes to set 1. The bit stays 0, which tells the driver that nothing is translated.
const TRANSLATE: u8 = 1 << 6;

/// The keyboard's answers.
const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// Ctrl, Alt and Delete pressed, then released in the opposite order (scan codes, set 2).
const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

/// Most bytes that wait for the guest. A guest that does not read gets no more.
const CAPACITY: usize = 32;

/// Nobody in the guest reads the keyboard: no driver has switched it on, or what it was sent is still unread.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the guest does not read its keyboard: its kernel has no driver for it (i8042, atkbd), or is not up yet"
)]
pub struct NotRead;

/// A keyboard controller with a keyboard and without a mouse. Linux resets the machine by it if its command line contains
/// `reboot=k`.
pub struct I8042 {
    line: Arc<dyn Interrupt>,
    faults: GuestFaults,
    command_byte: u8,
    /// The command to the controller that the next byte in the data register belongs to.
    pending: Option<u8>,
    /// The same for commands to the keyboard.
    pending_keyboard: Option<u8>,
    /// Bytes for the guest to read.
    output: VecDeque<u8>,
}

impl I8042 {
    /// A controller that raises `line`.
    pub fn new(line: Arc<dyn Interrupt>) -> Self {
        Self {
            line,
            faults: GuestFaults::new("keyboard"),
            command_byte: KEYBOARD_OFF | MOUSE_OFF,
            pending: None,
            pending_keyboard: None,
            output: VecDeque::with_capacity(CAPACITY),
        }
    }

    /// Presses and releases Ctrl, Alt and Delete. Linux then tells its first process, see `ctrl_alt_del` in
    /// `kernel/reboot.c`; systemd shuts down and reboots.
    ///
    /// # Errors
    /// [`NotRead`].
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), NotRead> {
        let is_on = self.command_byte & (INTERRUPT | KEYBOARD_OFF) == INTERRUPT;
        if !is_on || !self.output.is_empty() {
            return Err(NotRead);
        }
        self.send(&CTRL_ALT_DEL);
        Ok(())
    }

    /// Puts bytes where the guest reads them; those that find no room are lost.
    fn send(&mut self, bytes: &[u8]) {
        let was_empty = self.output.is_empty();
        let room = CAPACITY - self.output.len();
        self.output.extend(bytes.iter().take(room));
        if was_empty {
            self.interrupt();
        }
    }

    /// Raises the interrupt if there is a byte to read.
    fn interrupt(&self) {
        let is_due = !self.output.is_empty() && self.command_byte & INTERRUPT != 0;
        if is_due && let Err(error) = self.line.trigger() {
            self.faults.report(format_args!("no interrupt: {error}"));
        }
    }

    fn controller_command(&mut self, command: u8) {
        match command {
            0x20 => self.send(&[self.command_byte]),
            // They take a byte: write the command byte, loop through the mouse's line, write to the mouse.
            0x60 | 0xd3 | 0xd4 => self.pending = Some(command),
            0xa7 => self.command_byte |= MOUSE_OFF,
            0xa8 => self.command_byte &= !MOUSE_OFF,
            // The test of the mouse's line fails, as there is none. An answer spares the driver a time-out.
            0xa9 => self.send(&[0x01]),
            0xaa => self.send(&[0x55]),
            0xab => self.send(&[0x00]),
            0xad => self.command_byte |= KEYBOARD_OFF,
            0xae => self.command_byte &= !KEYBOARD_OFF,
            _ => {}
        }
    }

    fn controller_data(&mut self, command: u8, byte: u8) {
        match command {
            0x60 => {
                self.command_byte = byte & !TRANSLATE;
                self.interrupt();
            }
            // Not what was sent: the line leads nowhere.
            0xd3 => self.send(&[!byte]),
            _ => {}
        }
    }

    fn keyboard_command(&mut self, command: u8) {
        match command {
            // They take a byte: the lights, the set of scan codes, the rate of repetition.
            0xed | 0xf0 | 0xf3 => {
                self.pending_keyboard = Some(command);
                self.send(&[ACKNOWLEDGE]);
            }
            // An AT keyboard's identity.
            0xf2 => self.send(&[ACKNOWLEDGE, 0xab, 0x83]),
            0xf4..=0xf6 => self.send(&[ACKNOWLEDGE]),
            0xff => self.send(&[ACKNOWLEDGE, SELF_TEST_PASSED]),
            _ => self.send(&[RESEND]),
        }
    }

    fn keyboard_data(&mut self, command: u8, byte: u8) {
        match (command, byte) {
            // Which set is it?
            (0xf0, 0) => self.send(&[ACKNOWLEDGE, 2]),
            _ => self.send(&[ACKNOWLEDGE]),
        }
    }
}

/// What a snapshot keeps of it.
#[derive(Serialize, Deserialize)]
struct KeyboardState {
    command_byte: u8,
    pending: Option<u8>,
    pending_keyboard: Option<u8>,
    output: Vec<u8>,
}

impl SaveState for I8042 {
    fn save(&self) -> Result<Value, String> {
        to_value(&KeyboardState {
            command_byte: self.command_byte,
            pending: self.pending,
            pending_keyboard: self.pending_keyboard,
            output: self.output.iter().copied().collect(),
        })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state: KeyboardState = from_value(state)?;
        self.command_byte = state.command_byte;
        self.pending = state.pending;
        self.pending_keyboard = state.pending_keyboard;
        self.output = state.output.into_iter().take(CAPACITY).collect();
        Ok(())
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [byte] = data else { return };
        match offset {
            DATA => {
                *byte = self.output.pop_front().unwrap_or(0);
                self.interrupt();
            }
            COMMAND if self.output.is_empty() => *byte = STATUS_UNLOCKED,
            COMMAND => *byte = STATUS_UNLOCKED | STATUS_FULL,
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        const PULSE_RESET: u8 = 0xfe;
        match (offset, data) {
            (COMMAND, [PULSE_RESET]) => return Action::Exit(ExitReason::Reset),
            (COMMAND, [command]) => {
                self.pending = None;
                self.controller_command(*command);
            }
            (DATA, [byte]) => match (self.pending.take(), self.pending_keyboard.take()) {
                (Some(command), _) => self.controller_data(command, *byte),
                (None, Some(command)) => self.keyboard_data(command, *byte),
                (None, None) => self.keyboard_command(*byte),
            },
            _ => {}
        }
        Action::Continue
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Line(AtomicUsize);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn controller() -> (I8042, Arc<Line>) {
        let line = Arc::new(Line::default());
        (I8042::new(line.clone()), line)
    }

    fn read(controller: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0xff];
        controller.read(offset, &mut byte);
        byte[0]
    }

    /// All that can be read, as the driver does it: while the status says so.
    fn drain(controller: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(controller, COMMAND) & STATUS_FULL != 0 {
            bytes.push(read(controller, DATA));
        }
        bytes
    }

    /// What Linux's driver does when it starts: the keyboard on, with interrupts.
    fn start(controller: &mut I8042) {
        controller.write(COMMAND, &[0x60]);
        controller.write(DATA, &[INTERRUPT | TRANSLATE | MOUSE_OFF]);
    }

    #[test]
    fn only_the_reset_command_resets() {
        let (mut controller, _) = controller();
        for (offset, value, action) in [
            (4, 0xfe, Action::Exit(ExitReason::Reset)),
            (4, 0xad, Action::Continue),
            (0, 0xfe, Action::Continue),
        ] {
            assert_eq!(controller.write(offset, &[value]), action);
        }
        assert_eq!(controller.write(4, &[0xfe, 0]), Action::Continue);
    }

    #[test]
    fn the_driver_finds_a_keyboard_and_no_mouse() {
        let (mut controller, _) = controller();
        for (command, answer) in [(0x20, 0x30), (0xaa, 0x55), (0xab, 0), (0xa9, 1)] {
            controller.write(COMMAND, &[command]);
            assert_eq!(drain(&mut controller), [answer], "{command:#x}");
        }
        controller.write(COMMAND, &[0xd3]);
        controller.write(DATA, &[0x5a]);
        assert_ne!(drain(&mut controller), [0x5a], "a mouse would loop it back");
        start(&mut controller);
        controller.write(COMMAND, &[0x20]);
        let translated = drain(&mut controller)[0] & TRANSLATE;
        assert_eq!(translated, 0, "scan codes are not translated");
        let conversation: [(&[u8], &[u8]); 6] = [
            (&[0xff], &[0xfa, 0xaa]),
            (&[0xf2], &[0xfa, 0xab, 0x83]),
            (&[0xed, 7], &[0xfa, 0xfa]),
            (&[0xf0, 0], &[0xfa, 0xfa, 2]),
            (&[0xf4], &[0xfa]),
            (&[0x00], &[0xfe]),
        ];
        for (bytes, answer) in conversation {
            for byte in bytes {
                controller.write(DATA, &[*byte]);
            }
            assert_eq!(drain(&mut controller), answer, "{bytes:x?}");
        }
    }

    #[test]
    fn ctrl_alt_del_is_pressed_and_released_with_an_interrupt_for_each_byte() {
        let (mut controller, line) = controller();
        start(&mut controller);
        assert_eq!(controller.press_ctrl_alt_del(), Ok(()));
        assert_eq!(drain(&mut controller), CTRL_ALT_DEL);
        assert_eq!(line.0.load(Ordering::Relaxed), CTRL_ALT_DEL.len());
    }

    #[test]
    fn a_keyboard_that_nobody_reads_is_not_pressed() {
        let (mut controller, line) = controller();
        assert_eq!(controller.press_ctrl_alt_del(), Err(NotRead));
        start(&mut controller);
        assert_eq!(controller.press_ctrl_alt_del(), Ok(()));
        assert_eq!(
            controller.press_ctrl_alt_del(),
            Err(NotRead),
            "still unread"
        );
        drain(&mut controller);
        controller.write(COMMAND, &[0xad]);
        assert_eq!(controller.press_ctrl_alt_del(), Err(NotRead), "off");
        assert_eq!(line.0.load(Ordering::Relaxed), CTRL_ALT_DEL.len());
    }

    #[test]
    fn a_guest_that_only_writes_fills_no_memory() {
        let (mut controller, line) = controller();
        start(&mut controller);
        (0..1000).for_each(|_| {
            controller.write(DATA, &[0xf2]);
            controller.write(COMMAND, &[0xaa]);
        });
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        assert_eq!(drain(&mut controller).len(), CAPACITY);
    }
}
