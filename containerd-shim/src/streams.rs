//! A process' standard streams: from containerd's FIFOs to the guest and back.

use std::fs::{File, OpenOptions};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use ebb_pod::{End, Stream, carry_bytes};

use crate::agent;
use crate::error::{Context, Result};
use crate::machine::Machine;

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
    outputs: Mutex<Vec<JoinHandle<()>>>,
}

fn both_ways(path: &str) -> Result<File> {
    // A FIFO that is opened for both does not wait for anybody, and does not break when nobody reads.
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.context(path)
}

impl Carried {
    /// Starts to carry those of a process that has been started.
    pub fn start(&self, machine: &Machine, id: &str, process: &str, paths: &Paths) -> Result<()> {
        let stream = |end| Stream {
            container: id.to_owned(),
            process: process.to_owned(),
            end,
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
            let thread = std::thread::spawn(move || copy_out(&connection, &file));
            self.outputs().push(thread);
        }
        let connection = agent::stream(machine, &stream(End::Input))?;
        if paths.input.is_empty() || !Path::new(&paths.input).exists() {
            return connection.shutdown(Shutdown::Write).context("no input");
        }
        let kept = OpenOptions::new().read(true).write(true).open(&paths.input);
        *self.input.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept.context("input")?);
        let file = File::open(&paths.input).context(&paths.input)?;
        std::thread::spawn(move || copy_in(&file, &connection));
        Ok(())
    }

    fn outputs(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets its input end when no client has it open.
    pub fn close_input(&self) {
        self.input
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Waits until all that the process has written has been carried: after its end.
    pub fn finish(&self) {
        self.close_input();
        let outputs = std::mem::take(&mut *self.outputs());
        for thread in outputs {
            let _ = thread.join();
        }
    }
}

fn copy_out(mut connection: &UnixStream, mut file: &File) {
    carry_bytes(&mut connection, &mut file);
}

fn copy_in(mut file: &File, mut connection: &UnixStream) {
    carry_bytes(&mut file, &mut connection);
    // The guest's process has no more input.
    let _ = connection.shutdown(Shutdown::Write);
}
