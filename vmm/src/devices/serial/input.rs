//! Passes standard input on to the serial port.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{SerialPort, lock};

/// The key with which commands to the monitor begin: Ctrl-A.
const ESCAPE: u8 = 1;
/// Maximum number of bytes read at once.
const CHUNK: usize = 256;
/// Keys that wait for a guest that takes none. Further ones are dropped: the key that ends the machine may be among them.
const MAX_KEYS: usize = 64 << 10;

/// Feeds standard input to a serial port. In a terminal, Ctrl-A X ends the machine and Ctrl-A Ctrl-A is
/// one Ctrl-A. Other input than a terminal waits until the guest has taken what came before it.
pub struct ConsoleInput {
    port: Arc<Mutex<SerialPort>>,
    drained: EventFd,
    pending: VecDeque<u8>,
    keys: Option<Keys>,
    on_quit: Box<dyn Fn() + Send>,
    /// Standard input can be polled and has not ended.
    open: bool,
    /// It is being polled. A closed pipe that is polled but not read would wake the thread again and again.
    watching: bool,
}

/// Remembers if the last key was the escape key.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// Moves the bytes that are meant for the guest to `out`. Returns true if the operator wants to quit.
    fn filter(&mut self, bytes: &[u8], out: &mut VecDeque<u8>) -> bool {
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') => return true,
                (true, ESCAPE) => out.push_back(ESCAPE),
                (true, other) => out.extend([ESCAPE, other]),
                (false, ESCAPE) => self.escaped = true,
                (false, other) => out.push_back(other),
            }
        }
        false
    }
}

impl ConsoleInput {
    /// Input for `port`, which signals `drained`. `terminal`: look for the escape key, and call
    /// `on_quit` when the operator quits.
    pub fn new(
        port: Arc<Mutex<SerialPort>>,
        drained: EventFd,
        terminal: bool,
        on_quit: Box<dyn Fn() + Send>,
    ) -> Self {
        let keys = terminal.then(Keys::default);
        Self {
            port,
            drained,
            pending: VecDeque::new(),
            keys,
            on_quit,
            open: false,
            watching: false,
        }
    }

    fn stdin() -> Events {
        Events::new(&io::stdin(), EventSet::IN)
    }

    fn watch(&mut self, wanted: bool, ops: &mut EventOps) {
        if wanted != self.watching {
            let result = if wanted {
                ops.add(Self::stdin())
            } else {
                ops.remove(Self::stdin())
            };
            self.report(result);
            self.watching = wanted;
        }
    }

    /// Gives the guest as much as it has room for. More is read only when all is given, but from a terminal always.
    fn pump(&mut self, ops: &mut EventOps) {
        let taken = lock(&self.port).enqueue(self.pending.make_contiguous());
        self.pending.drain(..taken);
        let wanted = self.keys.is_some() || self.pending.is_empty();
        self.watch(self.open && wanted, ops);
    }

    fn read(&mut self) {
        let mut bytes = [0; CHUNK];
        match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) | Ok(0) => self.open = false,
            Ok(n) => self.accept(&bytes[..n]),
        }
    }

    fn accept(&mut self, bytes: &[u8]) {
        match &mut self.keys {
            None => self.pending.extend(bytes),
            Some(keys) => {
                if keys.filter(bytes, &mut self.pending) {
                    (self.on_quit)();
                }
                self.pending.truncate(MAX_KEYS);
            }
        }
    }

    fn report(&self, result: event_manager::Result<()>) {
        if let Err(error) = result {
            tracing::warn!("console input: {error}");
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps) {
        self.report(ops.add(Events::new(&self.drained, EventSet::IN)));
        // A regular file or /dev/null cannot be polled: there is no input then.
        self.open = ops.add(Self::stdin()).is_ok();
        self.watching = self.open;
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        use std::os::fd::AsRawFd;
        if events.fd() == self.drained.as_raw_fd() {
            let _ = self.drained.read();
        } else {
            self.read();
        }
        self.pump(ops);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(chunks: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut keys, mut out) = (Keys::default(), VecDeque::new());
        let quit = chunks.iter().any(|chunk| keys.filter(chunk, &mut out));
        (out.into(), quit)
    }

    #[test]
    fn the_escape_key_is_found_across_reads() {
        assert_eq!(filter(&[b"ab\x01", b"xcd"]), (b"ab".to_vec(), true));
        assert_eq!(filter(&[b"a\x01X"]), (b"a".to_vec(), true));
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01b"]), (b"\x01b".to_vec(), false));
    }
}
