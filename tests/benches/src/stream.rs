//! What is measured of a stream to a guest, whose other end is guest-agent/src/talk.rs.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Result};
use ebb_harness::host::kvm_counters;
use rustix::net::{Shutdown, shutdown};

use super::results::{Metric, Results};

/// The port of the guest's server.
pub const PORT: u16 = 5201;
/// Bytes that are moved at a time, as by iperf3.
const PIECE: usize = 128 << 10;
/// Bytes there and back that do not count.
const WARM: usize = 50;

/// From the host to the guest.
pub const DOWN: Metric = ("to guest", "MB/s");
/// From the guest to the host.
pub const UP: Metric = ("from guest", "MB/s");
/// The median of a round.
pub const PING: Metric = ("there and back", "µs");
/// What leaves the guest meanwhile, by KVM's counter of the machine: for each MB, and for each byte there and back.
const DOWN_EXITS: Metric = ("exits to guest", "per MB");
const UP_EXITS: Metric = ("exits from guest", "per MB");
const PING_EXITS: Metric = ("exits there and back", "each");

/// One of Ebb's two transports, each of which is measured.
pub struct Ebb {
    /// What the results call it.
    pub name: &'static str,
    /// As `--transport` has it.
    pub transport: &'static str,
    /// Tells its names and addresses from the others'.
    pub number: u8,
}

/// What Ebb does by default, and as QEMU's devices are.
pub const EBB: Ebb = Ebb {
    name: "ebb",
    transport: "pci",
    number: 1,
};
/// The other transport.
pub const EBB_ON_MMIO: Ebb = Ebb {
    name: "ebb-mmio",
    transport: "mmio",
    number: 2,
};

/// How long is measured.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each machine
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Seconds of each transfer
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Bytes there and back in each round
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pings: u32,
}

/// A connected stream, on which nothing was said yet.
pub struct Stream(File);

impl<T: Into<OwnedFd>> From<T> for Stream {
    fn from(socket: T) -> Self {
        Self(File::from(socket.into()))
    }
}

impl Stream {
    /// Says what the server is to do.
    fn wish(mut self, wish: u8) -> Result<Self> {
        self.0.write_all(&[wish]).context("ask the guest")?;
        Ok(self)
    }

    /// The server answers.
    ///
    /// # Errors
    /// It does not.
    pub fn is_answered(self) -> Result<()> {
        self.wish(b'p')?.ping(1).map(drop)
    }

    /// Bytes, and the seconds until the other side has all of them.
    fn send(mut self, time: Duration) -> Result<(usize, f64)> {
        let (piece, start, mut bytes) = (vec![0; PIECE], Instant::now(), 0);
        while start.elapsed() < time {
            self.0.write_all(&piece).context("send")?;
            bytes += piece.len();
        }
        shutdown(self.0.as_fd(), Shutdown::Write).context("send")?;
        self.0.read_exact(&mut [0]).context("send")?;
        Ok((bytes, start.elapsed().as_secs_f64()))
    }

    /// Bytes and seconds.
    fn receive(mut self, time: Duration) -> Result<(usize, f64)> {
        let (mut piece, start, mut bytes) = (vec![0; PIECE], Instant::now(), 0);
        while start.elapsed() < time {
            bytes += self.0.read(&mut piece).context("receive")?;
        }
        Ok((bytes, start.elapsed().as_secs_f64()))
    }

    /// The median time in microseconds.
    fn ping(mut self, count: usize) -> Result<f64> {
        let mut times = Vec::with_capacity(count);
        for round in 0..WARM + count {
            let start = Instant::now();
            self.0.write_all(b".").context("ping")?;
            self.0.read_exact(&mut [0]).context("ping")?;
            if round >= WARM {
                times.push(start.elapsed());
            }
        }
        times.sort_unstable();
        Ok(times[count / 2].as_secs_f64() * 1e6)
    }
}

/// Measures all of it once, of the system and the case `of`, whose monitor has the process number that follows.
///
/// # Errors
/// A stream breaks, or the kernel does not count.
pub fn round(
    (system, case, pid): (&str, &str, u32),
    arguments: &Arguments,
    results: &mut Results,
    connect: impl Fn() -> Result<Stream>,
) -> Result<()> {
    let (of, time) = ((system, case), Duration::from_secs(arguments.seconds));
    let exits = || kvm_counters(pid).map(|it| it.exits);
    let mut rate = |speed, each, wish, run: fn(Stream, Duration) -> Result<(usize, f64)>| {
        let stream = connect()?.wish(wish)?;
        let before = exits()?;
        let (bytes, seconds) = run(stream, time)?;
        let megabytes = bytes as f64 / 1e6;
        results.add(of, speed, megabytes / seconds);
        results.add(of, each, (exits()? - before) as f64 / megabytes);
        Ok(())
    };
    rate(DOWN, DOWN_EXITS, b's', Stream::send)?;
    rate(UP, UP_EXITS, b'g', Stream::receive)?;
    let stream = connect()?.wish(b'p')?;
    let before = exits()?;
    let count = arguments.pings as usize;
    results.add(of, PING, stream.ping(count)?);
    let each = (exits()? - before) as f64 / (WARM + count) as f64;
    results.add(of, PING_EXITS, each);
    Ok(())
}
