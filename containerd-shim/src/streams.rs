//! A process' standard streams: from containerd's FIFOs to the guest and back.

use std::fs::{File, OpenOptions};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ebb_pod::answers::locked;
use ebb_pod::error::{Context, Result};
use ebb_pod::{Connection, End, Stream, carry_bytes};

use crate::agent;
use crate::machine::Machine;

/// How long what a process has written may take to be carried after its end.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The paths of its FIFOs; an empty one: the stream is not wanted.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// Standard input.
    pub input: String,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
    /// It has a terminal.
    pub terminal: bool,
}

/// Streams that are being carried.
#[derive(Default)]
pub struct Carried {
    /// Keeps the input open when its last writer goes: containerd says when it ends.
    input: Mutex<Option<File>>,
    outputs: Mutex<Outputs>,
    changed: Condvar,
}

/// The outputs that have not ended, and the connections of all streams.
#[derive(Default)]
struct Outputs {
    running: usize,
    connections: Vec<UnixStream>,
}

fn both_ways(path: &str) -> Result<File> {
    // A FIFO that is opened for both does not wait for anybody, and does not break when nobody reads.
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.context(path)
}

impl Carried {
    /// Starts to carry those of a process that has been started.
    pub fn start(
        self: &Arc<Self>,
        machine: &Machine,
        id: &str,
        process: &str,
        paths: &Paths,
    ) -> Result<()> {
        let stream = |end| {
            Connection::Stream(Stream {
                container: id.to_owned(),
                process: process.to_owned(),
                end,
            })
        };
        let mut outputs = vec![(&paths.output, End::Output)];
        if !paths.terminal {
            outputs.push((&paths.errors, End::Errors));
        }
        for (path, end) in outputs {
            let connection = agent::stream(machine, &stream(end))?;
            let file = if path.is_empty() {
                // What the process writes must go somewhere.
                both_ways("/dev/null")?
            } else {
                both_ways(path)?
            };
            self.carry_out(connection, file)?;
        }
        let connection = agent::stream(machine, &stream(End::Input))?;
        if paths.input.is_empty() || !Path::new(&paths.input).exists() {
            return connection.shutdown(Shutdown::Write).context("no input");
        }
        let kept = OpenOptions::new().read(true).write(true).open(&paths.input);
        *locked(&self.input) = Some(kept.context("input")?);
        let file = File::open(&paths.input).context(&paths.input)?;
        self.carry_in(connection, file)
    }

    /// Starts the thread of the input.
    fn carry_in(&self, connection: UnixStream, file: File) -> Result<()> {
        let copy = connection.try_clone().context("dup")?;
        locked(&self.outputs).connections.push(copy);
        std::thread::spawn(move || copy_in(&file, &connection));
        Ok(())
    }

    /// Starts the thread of one output.
    fn carry_out(self: &Arc<Self>, connection: UnixStream, file: File) -> Result<()> {
        let copy = connection.try_clone().context("dup")?;
        let mut outputs = locked(&self.outputs);
        outputs.running += 1;
        outputs.connections.push(copy);
        let own = Arc::clone(self);
        std::thread::spawn(move || {
            carry_bytes(&mut &connection, &mut &file);
            locked(&own.outputs).running -= 1;
            own.changed.notify_all();
        });
        Ok(())
    }

    /// Lets its input end when no client has it open.
    pub fn close_input(&self) {
        locked(&self.input).take();
    }

    /// Waits until all that the process has written has been carried: after its end. What the guest does not end by then, or
    /// nobody reads, is left.
    pub fn finish(&self) {
        self.close_input();
        let outputs = locked(&self.outputs);
        let waited = self
            .changed
            .wait_timeout_while(outputs, PATIENCE, |it| it.running > 0);
        let mut outputs = waited.unwrap_or_else(PoisonError::into_inner).0;
        for connection in outputs.connections.drain(..) {
            // It may have ended.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn copy_in(mut file: &File, mut connection: &UnixStream) {
    carry_bytes(&mut file, &mut connection);
    // The guest's process has no more input.
    let _ = connection.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn output_is_whole_before_the_end_is_told() {
        let carried = Arc::new(Carried::default());
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let copy = file.try_clone().unwrap();
        carried.carry_out(connection, copy).unwrap();
        guest.write_all(&[7; 300_000]).unwrap();
        drop(guest);
        carried.finish();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, [7; 300_000]);
    }

    #[test]
    fn a_guest_that_does_not_end_its_output_holds_nothing_up() {
        let carried = Arc::new(Carried::default());
        let (mut guest, connection) = UnixStream::pair().unwrap();
        carried
            .carry_out(connection, tempfile::tempfile().unwrap())
            .unwrap();
        guest.write_all(b"something").unwrap();
        carried.finish();
        // It is cut off.
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_guest_that_reads_no_input_is_sent_no_more_after_the_end() {
        const LEN: u64 = 4 << 20;
        let carried = Carried::default();
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        carried.carry_in(connection, file).unwrap();
        carried.finish();
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).unwrap();
        assert!((rest.len() as u64) < LEN, "{}", rest.len());
    }
}
