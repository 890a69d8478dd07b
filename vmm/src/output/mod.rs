//! Output that holds up nobody: the guest's console, and the log.
//!
//! Whoever writes puts bytes into a bounded buffer and goes on. A thread of the [`Outlet`] writes them to a terminal, a pipe
//! or a file, however long that takes. What does not fit is dropped and counted, and a line among the output says so.

mod event_file;
mod lines;
mod log;

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::sys::panic_point;
use crate::sys::seccomp::Role;

pub use event_file::{EventFile, EventTarget, for_log};
pub use lines::Lines;
pub use log::Log;

ebb_core::metrics! {
    /// Output that was lost: nobody took it in time, or its target failed.
    pub struct OutputStats {
        /// Bytes of the guest's console that were lost: nobody took them in time, or their target failed.
        console_dropped_bytes_total: Counter of Bytes,
        /// Bytes of the log that were lost in the same ways.
        log_dropped_bytes_total: Counter of Bytes,
        /// Bytes of the files of `--metrics-path` and `--event-monitor` that were lost in the same ways.
        json_dropped_bytes_total: Counter of Bytes,
    }
}

/// At the end, output that nobody has taken for so long is given up.
const PATIENCE: Duration = Duration::from_millis(200);

/// At the end, it is given up after this time even if it is being taken, slowly.
const LAST: Duration = Duration::from_secs(5);

/// Time until output is tried again that a target takes only later (`EAGAIN`).
const RETRY: Duration = Duration::from_millis(10);

/// From so many bytes on, what waits is written without waiting for more.
const ENOUGH: usize = 4 << 10;

/// A bounded buffer, and the thread that writes it. Dropping it does not wait for the thread.
#[derive(Debug)]
pub struct Outlet {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    capacity: usize,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// What stands among the output instead of so many bytes.
    instead: fn(u64) -> String,
    /// For so long the thread waits for more.
    gather: Duration,
    /// Something was put into an empty buffer, there is enough, or no more will be.
    filled: Condvar,
    /// Something was written, or all.
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    buffer: Vec<u8>,
    /// Bytes that were dropped since the last line about that.
    lost: u64,
    /// Bytes that were dropped in all.
    dropped: u64,
    /// The thread has bytes that it has not written yet.
    writing: bool,
    /// Grows whenever the target has taken something.
    progress: u64,
    /// Somebody waits for the end: nothing is gathered any more.
    ending: bool,
    closed: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.buffer.is_empty() && !self.writing
    }
}

impl Shared {
    fn new(gather: Duration, instead: fn(u64) -> String) -> Self {
        Self {
            state: Mutex::default(),
            instead,
            gather,
            filled: Condvar::new(),
            written: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what there is; `None` when no more will come.
    fn take(&self) -> Option<Vec<u8>> {
        let idle = |state: &mut State| state.buffer.is_empty() && state.lost == 0 && !state.closed;
        let state = self.filled.wait_while(self.lock(), idle);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        // The guest writes byte by byte: a system call for each would take longer than its exit.
        let more = |state: &mut State| state.buffer.len() < ENOUGH && !state.ending;
        let waited = self.filled.wait_timeout_while(state, self.gather, more);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut bytes = mem::take(&mut state.buffer);
        // What was dropped came after what is in the buffer.
        let lost = mem::take(&mut state.lost);
        if lost > 0 {
            bytes.extend((self.instead)(lost).bytes());
        }
        state.writing = !bytes.is_empty();
        state.writing.then_some(bytes)
    }

    /// The thread: writes until no more will come. Where the target fails, the rest of what was taken is dropped.
    fn run(&self, mut target: impl Write) {
        while let Some(bytes) = self.take() {
            panic_point();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                match target.write(rest) {
                    Ok(0) => break,
                    Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        thread::sleep(RETRY);
                        continue;
                    }
                    Err(_) => break,
                }
                self.lock().progress += 1;
                self.written.notify_all();
            }
            let mut state = self.lock();
            state.dropped += rest.len() as u64;
            state.writing = false;
            self.written.notify_all();
        }
    }
}

impl Outlet {
    /// Starts a thread called `name` that writes to `target`. Up to `capacity` bytes wait for it. It waits for `gather` after
    /// the first byte, so that more bytes are written by one call.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(
        name: &str,
        capacity: usize,
        gather: Duration,
        target: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let instead = |lost| format!("\r\n[ebb: {lost} bytes of output dropped]\r\n");
        Self::spawn(name, capacity, Shared::new(gather, instead), target)
    }

    /// As [`Outlet::start`], for JSON in lines.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn of_json(name: &str, capacity: usize, target: Lines) -> io::Result<Self> {
        let instead = |lost| format!("{{\"dropped_bytes\":{lost}}}\n");
        Self::spawn(name, capacity, Shared::new(Duration::ZERO, instead), target)
    }

    fn spawn(
        name: &str,
        capacity: usize,
        shared: Shared,
        target: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new().name(name.to_owned());
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread.spawn(move || {
                Role::Output.enter();
                own.run(target);
            })?)),
            capacity,
        })
    }

    /// Takes `bytes`, all of them or none, and never waits for the target.
    pub fn put(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let before = (state.lost, state.buffer.len());
        // What follows on dropped bytes must not come before the line about them.
        if state.closed || state.lost > 0 || state.buffer.len() + bytes.len() > self.capacity {
            state.lost += bytes.len() as u64;
            state.dropped += bytes.len() as u64;
        } else {
            state.buffer.extend_from_slice(bytes);
        }
        let reaches_enough = before.1 < ENOUGH && state.buffer.len() >= ENOUGH;
        drop(state);
        // Waking the thread is a system call: not for each byte.
        if before == (0, 0) || reaches_enough {
            self.shared.filled.notify_one();
        }
    }

    /// Bytes that were dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.lock().dropped
    }

    /// Waits until all is written, but not for a target that takes nothing for 200 ms, nor longer than 5 s. What is put from
    /// now on is dropped.
    pub fn finish(&self) {
        let end = Instant::now() + LAST;
        let mut state = self.shared.lock();
        state.ending = true;
        self.shared.filled.notify_one();
        while !state.is_idle() && Instant::now() < end {
            let before = state.progress;
            let stands_still = |state: &mut State| !state.is_idle() && state.progress == before;
            let waited = (self.shared.written).wait_timeout_while(state, PATIENCE, stands_still);
            let (next, result) = waited.unwrap_or_else(PoisonError::into_inner);
            state = next;
            if result.timed_out() {
                break;
            }
        }
        state.closed = true;
        let is_idle = state.is_idle();
        drop(state);
        self.shared.filled.notify_one();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that its target holds ends with the process.
        if let Some(thread) = thread.take().filter(|_| is_idle) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Says when it is written to, and waits then until it may go on.
    struct Gate(Sender<Vec<u8>>, Receiver<()>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(bytes.to_vec());
            match self.1.recv() {
                Ok(()) => Ok(bytes.len()),
                Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_does_not_fit_is_dropped_counted_and_told() {
        let (written, writes) = channel();
        let (go, going) = channel();
        let outlet = Outlet::start("test", 4, Duration::ZERO, Gate(written, going)).unwrap();
        outlet.put(b"a");
        assert_eq!(writes.recv().unwrap(), b"a");
        // The thread is held by its target now.
        for bytes in [&b"bcd"[..], b"ef", b"g"] {
            outlet.put(bytes);
        }
        assert_eq!(outlet.dropped(), 3);
        go.send(()).unwrap();
        let next = writes.recv().unwrap();
        let text = String::from_utf8(next).unwrap();
        assert_eq!(text, "bcd\r\n[ebb: 3 bytes of output dropped]\r\n");
        outlet.put(b"h");
        go.send(()).unwrap();
        assert_eq!(writes.recv().unwrap(), b"h");
        // From here on the target fails.
        drop(go);
        outlet.finish();
        assert_eq!(outlet.dropped(), 4);
    }

    #[test]
    fn bytes_are_gathered_until_there_are_enough_or_the_end_comes() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (written, writes) = channel();
        let (go, going) = channel();
        let outlet = Outlet::start("test", 1 << 20, HOUR, Gate(written, going)).unwrap();
        go.send(()).unwrap();
        go.send(()).unwrap();
        (0..ENOUGH).for_each(|_| outlet.put(b"x"));
        assert_eq!(writes.recv().unwrap().len(), ENOUGH);
        outlet.put(b"the ");
        outlet.put(b"rest");
        outlet.finish();
        assert_eq!(writes.recv().unwrap(), b"the rest");
    }

    #[test]
    fn the_end_does_not_wait_for_a_target_that_takes_nothing() {
        let (written, writes) = channel();
        let (_go, going) = channel();
        let outlet = Outlet::start("test", 4, Duration::ZERO, Gate(written, going)).unwrap();
        outlet.put(b"a");
        assert_eq!(writes.recv().unwrap(), b"a");
        outlet.finish();
        outlet.put(b"b");
        assert_eq!(outlet.dropped(), 1);
    }

    #[test]
    fn the_end_waits_for_what_is_being_taken() {
        const LEN: usize = 1 << 20;
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::start("test", LEN, Duration::ZERO, writer).unwrap();
        outlet.put(&vec![b'x'; LEN]);
        thread::scope(|scope| {
            let read = scope.spawn(move || {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).map(|_| bytes.len())
            });
            outlet.finish();
            assert_eq!(read.join().unwrap().unwrap(), LEN);
        });
    }
}
