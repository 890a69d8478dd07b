//! MSI-X: a table of messages that the driver fills, and the interrupts that wait while it masks them (PCI 3.0, 6.8.2).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::irq::{Message, MessageInterrupt};

/// Bytes of an entry of the table: address, data, and the mask in bit 0 of the last word.
pub const ENTRY_SIZE: usize = 16;
const MASK: u32 = 1;
/// Control register: MSI-X is on; all of it is masked.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

/// The vectors of one function. Devices trigger them, the transport changes them.
pub struct Msix(Vec<Vector>);

struct Vector {
    interrupt: Box<dyn MessageInterrupt>,
    state: Mutex<State>,
}

/// What a snapshot keeps of a vector, beside the control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorSaved {
    entry: [u32; 4],
    pending: bool,
}

struct State {
    entry: [u32; 4],
    control: u16,
    pending: bool,
    /// What the interrupt is at the moment.
    routed: Option<Message>,
}

impl State {
    const fn is_masked(&self) -> bool {
        self.entry[3] & MASK != 0 || self.control & MASK_ALL != 0
    }

    /// The message, if it is one that processors take (Intel SDM volume 3, 12.11.1).
    fn message(&self) -> Option<Message> {
        const PROCESSORS: u64 = 0xfee;
        let [low, high, data, _] = self.entry;
        let address = u64::from(high) << 32 | u64::from(low);
        (address as u32 >> 20 == PROCESSORS as u32).then_some(Message { address, data })
    }
}

impl Vector {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and lets out what had to wait if it need not wait any more. A masked vector keeps its route: that is
    /// KVM's table for the whole machine, which is not rewritten each time that a driver masks and unmasks.
    fn change(&self, change: impl FnOnce(&mut State)) -> io::Result<()> {
        let mut state = self.lock();
        change(&mut state);
        if state.control & ENABLE == 0 {
            state.pending = false;
            return Ok(());
        }
        if state.is_masked() {
            return Ok(());
        }
        let message = state.message();
        if message != state.routed {
            state.routed = None;
            self.interrupt.route(message)?;
            state.routed = message;
        }
        if std::mem::take(&mut state.pending) && message.is_some() {
            self.interrupt.trigger()?;
        }
        Ok(())
    }
}

impl Msix {
    /// A table with an entry for each of `interrupts`, all masked.
    #[must_use]
    pub fn new(interrupts: Vec<Box<dyn MessageInterrupt>>) -> Arc<Self> {
        let vector = |interrupt| Vector {
            interrupt,
            state: Mutex::new(State {
                entry: [0, 0, 0, MASK],
                control: 0,
                pending: false,
                routed: None,
            }),
        };
        Arc::new(Self(interrupts.into_iter().map(vector).collect()))
    }

    /// Number of vectors.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there is no vector.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Raises a vector, or notes that it waits while it is masked. One that does not exist is nobody's.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        let Some(vector) = self.0.get(usize::from(vector)) else {
            return Ok(());
        };
        let mut state = vector.lock();
        if state.control & ENABLE == 0 {
            return Ok(());
        }
        if state.is_masked() {
            state.pending = true;
            return Ok(());
        }
        match state.routed {
            Some(_) => vector.interrupt.trigger(),
            None => Ok(()),
        }
    }

    /// The driver has written the control register.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn set_control(&self, control: u16) -> io::Result<()> {
        let change = |vector: &Vector| vector.change(|state| state.control = control);
        self.0.iter().try_for_each(change)
    }

    /// What a snapshot keeps of all vectors.
    #[must_use]
    pub fn save(&self) -> Vec<VectorSaved> {
        let saved = |vector: &Vector| {
            let state = vector.lock();
            VectorSaved {
                entry: state.entry,
                pending: state.pending,
            }
        };
        self.0.iter().map(saved).collect()
    }

    /// Takes up what a snapshot has kept, and the control register, in a table that nobody has used yet.
    ///
    /// # Errors
    /// The error of a system call: that vector reaches nobody. The others are restored.
    pub fn restore(&self, saved: &[VectorSaved], control: u16) -> io::Result<()> {
        for (vector, &VectorSaved { entry, pending }) in self.0.iter().zip(saved) {
            let mut state = vector.lock();
            (state.entry, state.control, state.pending) = (entry, control, pending);
            if let Some(message) = state.message()
                && state.control & ENABLE != 0
                && !state.is_masked()
            {
                vector.interrupt.prepare(message);
            }
        }
        let restored = self.0.iter().map(|vector| vector.change(|_| {}));
        restored.fold(Ok(()), io::Result::and)
    }

    /// Reads from the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vector = self.0.get(at / ENTRY_SIZE);
            let word = vector.map_or(0, |vector| vector.lock().entry[at % ENTRY_SIZE / 4]);
            *byte = word.to_le_bytes()[at % 4];
        }
    }

    /// Writes one or two whole words of the table; other writes are ignored (PCI 3.0, 6.8.2).
    ///
    /// # Errors
    /// The error of the system call.
    pub fn write_table(&self, offset: usize, data: &[u8]) -> io::Result<()> {
        let (words, rest) = data.as_chunks::<4>();
        if !rest.is_empty() || !offset.is_multiple_of(data.len().max(4)) {
            return Ok(());
        }
        let Some(vector) = self.0.get(offset / ENTRY_SIZE) else {
            return Ok(());
        };
        let first = offset % ENTRY_SIZE / 4;
        vector.change(|state| {
            for (at, word) in (first..4).zip(words) {
                let word = u32::from_le_bytes(*word);
                state.entry[at] = if at == 3 { word & MASK } else { word };
            }
        })
    }

    /// Reads from the bits that say which vectors wait.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vectors = self.0.iter().skip(at.saturating_mul(8)).take(8);
            let bits = vectors.enumerate();
            *byte = bits.fold(0, |bits, (n, it)| bits | u8::from(it.lock().pending) << n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::Interrupt;

    /// Each route and each interrupt, in order.
    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Prepare(Message),
        Route(Option<Message>),
        Raised,
    }

    struct Line(Arc<Mutex<Vec<Seen>>>);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.lock().unwrap().push(Seen::Raised);
            Ok(())
        }
    }

    impl MessageInterrupt for Line {
        fn route(&self, message: Option<Message>) -> io::Result<()> {
            self.0.lock().unwrap().push(Seen::Route(message));
            match message {
                Some(Message { data: 0xbad, .. }) => Err(io::ErrorKind::InvalidInput.into()),
                _ => Ok(()),
            }
        }

        fn prepare(&self, message: Message) {
            self.0.lock().unwrap().push(Seen::Prepare(message));
        }
    }

    fn msix() -> (Arc<Msix>, Arc<Mutex<Vec<Seen>>>) {
        let seen = Arc::default();
        let line = |_| Box::new(Line(Arc::clone(&seen))) as Box<dyn MessageInterrupt>;
        (Msix::new((0..10).map(line).collect()), seen)
    }

    fn set(msix: &Msix, vector: usize, words: [u32; 4]) {
        for (n, word) in words.into_iter().enumerate() {
            let _ = msix.write_table(vector * ENTRY_SIZE + 4 * n, &word.to_le_bytes());
        }
    }

    fn pending(msix: &Msix) -> [u8; 2] {
        let mut bits = [0; 2];
        msix.read_pending(0, &mut bits);
        bits
    }

    const MESSAGE: Message = Message {
        address: 0xfee0_1000,
        data: 0x41,
    };
    const OPEN: [u32; 4] = [0xfee0_1000, 0, 0x41, 0];

    #[test]
    fn what_is_masked_waits_and_comes_once() {
        let (msix, seen) = msix();
        msix.trigger(1).unwrap();
        assert_eq!(pending(&msix), [0, 0], "off");
        msix.set_control(ENABLE).unwrap();
        for vector in [1, 9, 9] {
            msix.trigger(vector).unwrap();
        }
        assert_eq!((pending(&msix), seen.lock().unwrap().len()), ([2, 2], 0));
        set(&msix, 9, OPEN);
        assert_eq!(
            *seen.lock().unwrap(),
            [Seen::Route(Some(MESSAGE)), Seen::Raised]
        );
        assert_eq!(pending(&msix), [2, 0]);
        // All masked; the route stays.
        msix.set_control(ENABLE | MASK_ALL).unwrap();
        msix.trigger(9).unwrap();
        assert_eq!(pending(&msix), [2, 2]);
        msix.set_control(ENABLE).unwrap();
        msix.trigger(9).unwrap();
        assert_eq!(seen.lock().unwrap()[2..], [Seen::Raised, Seen::Raised]);
        msix.set_control(0).unwrap();
        msix.trigger(9).unwrap();
        assert_eq!((pending(&msix), seen.lock().unwrap().len()), ([0, 0], 4));
    }

    #[test]
    fn the_routes_of_a_restored_table_are_told_before_the_first_is_set() {
        let (msix, seen) = msix();
        let vector = |entry, pending| VectorSaved { entry, pending };
        let masked = [OPEN[0], OPEN[1], OPEN[2], MASK];
        let saved = [
            vector(masked, true),
            vector(OPEN, true),
            vector(OPEN, false),
        ];
        msix.restore(&saved, ENABLE).unwrap();
        let (prepare, route) = (|| Seen::Prepare(MESSAGE), || Seen::Route(Some(MESSAGE)));
        let due = [prepare(), prepare(), route(), Seen::Raised, route()];
        assert_eq!(*seen.lock().unwrap(), due);
        assert_eq!(pending(&msix), [1, 0]);
    }

    #[test]
    fn a_message_to_nobody_is_not_sent() {
        let (msix, seen) = msix();
        msix.set_control(ENABLE).unwrap();
        set(&msix, 0, [0x1000, 0, 0, 0]);
        msix.trigger(0).unwrap();
        assert_eq!(*seen.lock().unwrap(), []);
        // One that KVM refuses: the vector is dead until it gets another one.
        set(&msix, 0, [0xfee0_0000, 0, 0xbad, 1]);
        assert!(msix.write_table(12, &[0; 4]).is_err());
        msix.trigger(0).unwrap();
        assert!(!seen.lock().unwrap().contains(&Seen::Raised));
        set(&msix, 0, OPEN);
        msix.trigger(0).unwrap();
        assert!(
            seen.lock()
                .unwrap()
                .ends_with(&[Seen::Route(Some(MESSAGE)), Seen::Raised])
        );
        msix.trigger(10).unwrap();
        msix.trigger(0xffff).unwrap();
    }

    #[test]
    fn the_table_takes_whole_words_and_reads_at_any_width() {
        let (msix, _) = msix();
        msix.write_table(16, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        for (offset, data) in [
            (17, &[9u8; 4][..]),
            (16, &[9; 1]),
            (16, &[9; 2]),
            (20, &[9; 8]),
            (160, &[9; 4]),
            (1 << 20, &[9; 4]),
        ] {
            msix.write_table(offset, data).unwrap();
        }
        msix.write_table(28, &[0xfe, 0xff, 0xff, 0xff]).unwrap();
        let mut entry = [0; 18];
        msix.read_table(15, &mut entry);
        assert_eq!(
            entry,
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        let mut beyond = [7; 4];
        msix.read_table(160, &mut beyond);
        assert_eq!(beyond, [0; 4]);
        msix.read_pending(usize::MAX - 8, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }
}
