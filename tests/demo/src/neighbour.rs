//! Somebody else on the host, who wants memory: a process that takes a piece for each line that it is sent.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Stdio};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::size::MIB;

/// What a line is worth.
pub const PIECE: u64 = 16 * MIB;

/// The process's own side.
///
/// # Errors
/// Whoever sends the lines is gone.
pub fn live() -> Result<bool> {
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    for line in std::io::stdin().lines() {
        line.context("standard input")?;
        pieces.push(vec![1; PIECE as usize]);
        let mut out = std::io::stdout();
        let told = writeln!(out, "{}", pieces.len()).and_then(|()| out.flush());
        told.context("standard output")?;
    }
    Ok(true)
}

/// The process as the story has it. It leaves on drop.
pub struct Neighbour {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Neighbour {
    /// Moves in.
    pub fn within(cgroup: &Cgroup) -> Result<Self> {
        let program = std::env::current_exe().context("this program")?;
        let mut command = cgroup.command(&program);
        command.args(["--out", "/", "neighbour"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("a neighbour")?;
        let said = process.stdout.take().context("a pipe")?;
        let said = BufReader::new(said);
        Ok(Self { process, said })
    }

    /// Takes another [`PIECE`], and has touched all of it afterwards.
    pub fn grow(&mut self) -> Result<()> {
        let input = self.process.stdin.as_mut().context("a pipe")?;
        writeln!(input).context("the neighbour's input")?;
        let mut line = String::new();
        match self.said.read_line(&mut line).context("the neighbour")? {
            0 => Err(Error::new("the neighbour has died".to_owned())),
            _ => Ok(()),
        }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may have died before.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
