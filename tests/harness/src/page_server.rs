//! Starts `ebb-page-server`, which gives restored machines their memory.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::error::{Context, Error, Result};

/// A page server, killed when dropped.
pub struct PageServer {
    child: Child,
    output: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl PageServer {
    /// Starts `program`, `ebb-page-server`, for `memory`, a memory file, and waits until it listens on a socket beside that. `delay`
    /// is in milliseconds, or `never`; with ` hangup` behind it the server closes its connection and goes on.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(program: &str, memory: &Path, delay: &str) -> Result<Self> {
        let socket = memory.with_extension("pages");
        // One that was killed has left it.
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(program);
        command
            .arg(&socket)
            .arg(memory)
            .args(delay.split(' '))
            .stdout(Stdio::piped());
        let mut child = command.spawn().context(program)?;
        let output = child.stdout.take().context("no output")?;
        let output = BufReader::new(output);
        let mut server = Self {
            child,
            output,
            socket,
        };
        let line = server.line()?;
        assert_eq!(line, "ready");
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until a machine has asked for its memory.
    ///
    /// # Errors
    /// When it says something else.
    pub fn serves(&mut self) -> Result<()> {
        match self.line()?.as_str() {
            "serves" => Ok(()),
            other => Err(Error::new(format!("it says {other:?}"))),
        }
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it is not there.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill the page server")?;
        self.child.wait().context("wait for it").map(drop)
    }

    /// Waits for its end, after that of the machine, and returns how many pages it gave. It must have said that it serves.
    ///
    /// # Errors
    /// When it says something else.
    pub fn given(&mut self) -> Result<u64> {
        let line = self.line()?;
        let words: Vec<&str> = line.split(' ').collect();
        let ["ends:", number, "pages"] = words[..] else {
            return Err(Error::new(format!("it says {line:?}")));
        };
        number.parse().context("its number")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("its output")?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.kill();
    }
}
