//! A guest's serial console: what came so far, and waiting for more.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Lines that an error shows.
const TAIL: usize = 25;

#[derive(Default)]
struct Text {
    lines: Vec<String>,
    /// A line that has not ended yet.
    rest: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    text: Mutex<Text>,
    grown: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: &[u8]) {
        let mut text = self.lock();
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut text.rest);
                text.lines.push(printable(&line));
            } else {
                text.rest.push(*byte);
            }
        }
        self.grown.notify_all();
    }

    fn end(&self) {
        let mut text = self.lock();
        let line = std::mem::take(&mut text.rest);
        text.lines.push(printable(&line));
        text.ended = true;
        self.grown.notify_all();
    }
}

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end_matches('\r')
        .to_owned()
}

/// The output of a process, read by a thread of its own.
#[derive(Clone)]
pub struct Console {
    shared: Arc<Shared>,
    /// The line to look at next.
    next: usize,
}

impl Console {
    /// Starts to read.
    pub fn read(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let writing = Arc::clone(&shared);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                writing.add(&bytes[..count]);
            }
            writing.end();
        });
        Self { shared, next: 0 }
    }

    /// The first whole line with `part` after the one that was found last.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the output ends; with the last lines of the console.
    pub fn wait_for(&mut self, part: &str, limit: Duration) -> Result<String> {
        self.find(&format!("{part:?}"), limit, |line| line.contains(part))
    }

    /// As [`Console::wait_for`], for a condition of any kind.
    ///
    /// # Errors
    /// As for [`Console::wait_for`].
    pub fn find(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut text = self.shared.lock();
        loop {
            while let Some(line) = text.lines.get(self.next) {
                self.next += 1;
                if wanted(line) {
                    return Ok(line.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if text.ended || left.is_zero() {
                drop(text);
                let why = if left.is_zero() {
                    format!("not within {} s", limit.as_secs_f32())
                } else {
                    "the console has ended".to_owned()
                };
                return Err(Error::new(format!("no {what}: {why}\n{}", self.tail())));
            }
            let waited = self.shared.grown.wait_timeout(text, left);
            text = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        let text = self.shared.lock();
        let lines = &text.lines[text.lines.len().saturating_sub(TAIL)..];
        let mut tail = String::from("last lines of the console:");
        for line in lines {
            tail.push_str("\n  ");
            tail.push_str(line);
        }
        tail
    }

    /// Everything that has come.
    pub fn all(&self) -> String {
        self.shared.lock().lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn lines_are_found_in_order_and_once() {
        let mut console = Console::read(&b"a 1\r\nb\na 2\n"[..]);
        assert_eq!(console.wait_for("a", SOON).unwrap(), "a 1");
        assert_eq!(console.wait_for("a", SOON).unwrap(), "a 2");
        let error = console.wait_for("a", SOON).unwrap_err().to_string();
        assert!(
            error.contains("has ended") && error.contains("  b\n"),
            "{error}"
        );
    }

    #[test]
    fn a_line_that_does_not_come_is_given_up() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let error = Console::read(reader)
            .wait_for("x", Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("no \"x\": not within 0 s"), "{error}");
    }
}
