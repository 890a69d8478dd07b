//! Lines on standard error, where nothing may allocate.

use std::fmt::{self, Write};

/// Bytes of the longest line; the rest is cut off.
const LONGEST: usize = 512;

struct Line {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte is kept for the end of the line.
        let room = LONGEST - 1 - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}

/// Writes one line.
pub fn say(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LONGEST],
        len: 0,
    };
    // Neither fails: what does not fit is cut off, and a closed standard error is no reason to stop.
    let _ = write!(line, "ebb-malloc: {text}");
    line.bytes[line.len] = b'\n';
    let _ = rustix::io::write(rustix::stdio::stderr(), &line.bytes[..=line.len]);
}
