//! A file of lines that stays one when its disk was full in the meantime.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes lines to the end of a file, a pipe or a terminal. After an error in the midst of a line the next one begins on a
/// line of its own.
#[derive(Debug)]
pub struct Lines<T = File> {
    target: T,
    /// The last byte that was written was no line break.
    within: bool,
    /// The rest of a line is lost.
    torn: bool,
}

impl Lines {
    /// Opens the file, which is made if there is none, or the FIFO, for which nobody has to wait at its other end.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        // A FIFO without a reader can be opened for reading and writing only. A terminal must not become the controlling one.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        options.read(true).append(true).create(true).mode(0o600);
        options.custom_flags(flags).open(path).map(Self::to)
    }
}

impl<T> Lines<T> {
    /// Writes to `target`.
    pub const fn to(target: T) -> Self {
        Self {
            target,
            within: false,
            torn: false,
        }
    }
}

impl<T: Write> Write for Lines<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.torn {
            self.target.write_all(b"\n")?;
            (self.torn, self.within) = (false, false);
        }
        let written = self.target.write(bytes);
        match &written {
            Ok(count) => {
                let last = bytes.get(..*count).and_then(<[u8]>::last);
                self.within = last.map_or(self.within, |byte| *byte != b'\n');
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.torn = self.within,
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Outlet;

    /// A disk with room for `0` bytes, then one that is full, then one with room again.
    struct Disk(Vec<u8>, Vec<usize>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.1.pop().unwrap_or(usize::MAX);
            if room == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            let count = bytes.len().min(room);
            self.0.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_tears_one_line_only() {
        // Three bytes, none, then all.
        let mut lines = Lines::to(Disk(Vec::new(), vec![0, 3]));
        assert_eq!(lines.write(b"first\n").unwrap(), 3);
        assert!(lines.write(b"st\n").is_err());
        lines.write_all(b"second\n").unwrap();
        lines.write_all(b"third\n").unwrap();
        assert_eq!(lines.target.0, b"fir\nsecond\nthird\n");
    }

    #[test]
    fn a_fifo_without_a_reader_holds_up_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        let outlet = Outlet::of_json("test", 1 << 20, Lines::open(&path).unwrap()).unwrap();
        // More than a pipe holds.
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        (0..256).for_each(|_| outlet.put(&line));
        outlet.finish();
        assert_eq!(outlet.dropped(), 0, "all of it fits into the buffer");
    }
}
