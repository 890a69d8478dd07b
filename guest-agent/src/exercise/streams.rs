//! Pipes and sockets: their content is in pages and slabs of the kernel, until it is read.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use ebb_guest_agent::memory::PAGE_SIZE;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::words::{Owner, bytes, bytes_mut};
use super::{Holding, Options, Random, Stop};

/// The largest pipe that everybody may have.
const LARGEST: usize = 1 << 20;

/// A stream and what was written into it, and not read.
struct Stream<R, W> {
    what: &'static str,
    reader: R,
    writer: W,
    /// Bytes in it, whole words.
    bytes: usize,
    owner: Owner,
}

impl<R: Read, W: Write> Stream<R, W> {
    /// Writes up to `most` bytes: as many as the kernel takes at once.
    fn fill(&mut self, most: usize) -> Result<(), Stop> {
        let mut words = vec![0; most / size_of::<u64>()];
        self.owner.fill(&mut words, 0);
        let mut written = 0;
        while written < most {
            match self.writer.write(&bytes(&words)[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    return Err(Stop::Failed(format!("write into {}: {error}", self.what)));
                }
            }
        }
        self.bytes = written;
        Ok(())
    }
}

impl<R: Read, W: Write> Holding for Stream<R, W> {
    fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads all and writes as much again.
    fn check(&mut self, _: &mut Random) -> Result<(), Stop> {
        let mut words = vec![0; self.bytes.div_ceil(size_of::<u64>())];
        let read = self
            .reader
            .read_exact(&mut bytes_mut(&mut words)[..self.bytes]);
        read.map_err(Stop::failed("read a stream"))?;
        let whole = self.bytes / size_of::<u64>();
        self.owner.check(self.what, &words[..whole], 0)?;
        self.owner = Owner::new();
        let bytes = self.bytes;
        self.fill(bytes)
    }
}

/// Fills a pipe of 4 KiB to 1 MiB.
pub fn take_pipe(
    random: &mut Random,
    most: usize,
    _: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let bytes = random.size(PAGE_SIZE, most.min(LARGEST));
    let flags = PipeFlags::NONBLOCK | PipeFlags::CLOEXEC;
    let (reader, writer) = pipe_with(flags).map_err(Stop::failed("pipe"))?;
    if fcntl_setpipe_size(writer.as_fd(), bytes).is_err() {
        return Ok(None); // There may be a limit on all pipes together.
    }
    let mut stream = Stream {
        what: "a pipe",
        reader: std::fs::File::from(reader),
        writer: std::fs::File::from(writer),
        bytes: 0,
        owner: Owner::new(),
    };
    stream.fill(bytes)?;
    Ok(Some(Box::new(stream)))
}

/// Fills a socket with messages of 64 B to 64 KiB.
pub fn take_socket(
    random: &mut Random,
    most: usize,
    _: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let (reader, writer) = UnixStream::pair().map_err(Stop::failed("socketpair"))?;
    writer
        .set_nonblocking(true)
        .map_err(Stop::failed("fcntl"))?;
    // The reader may read only what is there: then it never waits.
    reader
        .set_nonblocking(true)
        .map_err(Stop::failed("fcntl"))?;
    let bytes = random.size(64, most.min(64 << 10));
    let mut stream = Stream {
        what: "a socket",
        reader,
        writer,
        bytes: 0,
        owner: Owner::new(),
    };
    stream.fill(bytes)?;
    Ok(Some(Box::new(stream)))
}
