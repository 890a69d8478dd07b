//! A guest has a time for all that it takes or gives, however little that is at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connection to a guest that has to be done with it by `end`.
pub struct Hurried<'a> {
    connection: &'a UnixStream,
    end: Instant,
}

impl<'a> Hurried<'a> {
    /// The guest has this time from now on.
    pub fn new(connection: &'a UnixStream, limit: Duration) -> Self {
        let end = Instant::now() + limit;
        Self { connection, end }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            late()
        } else {
            Ok(Some(left))
        }
    }
}

fn late<T>() -> io::Result<T> {
    let text = "the guest takes too long";
    Err(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// What a socket says whose time is over.
fn in_time(done: io::Result<usize>) -> io::Result<usize> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => late(),
        done => done,
    }
}

impl Write for Hurried<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.set_write_timeout(self.left()?)?;
        in_time(self.connection.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Hurried<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.connection.set_read_timeout(self.left()?)?;
        in_time(self.connection.read(bytes))
    }
}
