//! Messages on standard error, without allocating.

use std::fmt::{self, Write};

/// Bytes of a line. Longer messages are cut off.
const MAX_LINE: usize = 512;

struct Line {
    bytes: [u8; MAX_LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Leaves one byte for the line end.
        let room = MAX_LINE - 1 - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}

/// Writes one line.
pub fn print(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; MAX_LINE],
        len: 0,
    };
    // Formatting into a line never fails, and standard error may be closed.
    let _ = write!(line, "ebb-malloc: {text}");
    line.bytes[line.len] = b'\n';
    let _ = rustix::io::write(rustix::stdio::stderr(), &line.bytes[..=line.len]);
}
