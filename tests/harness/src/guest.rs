//! The workload in a guest, see guest-agent/src/workload.rs.

use std::collections::HashMap;
use std::io::Write;
use std::process::ChildStdin;
use std::time::Duration;

use crate::console::Console;
use crate::error::{Context, Error, Result};
use crate::wait::LONG;

/// Drives the workload over the serial console.
pub struct Guest {
    input: ChildStdin,
    /// What the guest writes.
    pub console: Console,
}

impl Guest {
    /// Waits for the workload to be ready.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn attach(input: ChildStdin, console: Console) -> Result<Self> {
        let mut guest = Self { input, console };
        guest.console.wait_for("EBB-GUEST-OK ready", LONG)?;
        Ok(guest)
    }

    /// Drives a workload that was ready before its machine was saved.
    pub fn restored(input: ChildStdin, console: Console) -> Self {
        Self { input, console }
    }

    /// Sends a request without waiting for an answer.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn send(&mut self, request: &str) -> Result<()> {
        let sent = self.input.write_all(format!("{request}\n").as_bytes());
        sent.and_then(|()| self.input.flush())
            .context(format_args!("send {request:?} to the guest"))
    }

    /// Makes a request; the text of its answer.
    ///
    /// # Errors
    /// When there is no answer in time, or it says that the request failed.
    pub fn ask(&mut self, request: &str) -> Result<String> {
        self.ask_within(request, LONG)
    }

    /// As [`Guest::ask`] with another limit.
    ///
    /// # Errors
    /// As for [`Guest::ask`].
    pub fn ask_within(&mut self, request: &str, limit: Duration) -> Result<String> {
        self.send(request)?;
        let name = request.split(' ').next().unwrap_or(request);
        let (ok, err) = (
            format!("EBB-GUEST-OK {name}"),
            format!("EBB-GUEST-ERR {name}"),
        );
        let what = format!("answer to {request:?}");
        let line = self.console.find(&what, limit, |line| {
            line.contains(&ok) || line.contains(&err)
        })?;
        match line.split_once(&ok) {
            Some((_, text)) => Ok(text.trim().to_owned()),
            None => Err(Error::new(format!(
                "the guest answers {request:?} with {line:?}"
            ))),
        }
    }

    /// Makes a request and reads one `name=value` of its answer.
    ///
    /// # Errors
    /// As for [`Guest::ask`], or when the value is not there.
    pub fn number(&mut self, request: &str, name: &str) -> Result<u64> {
        let answer = self.ask(request)?;
        let value = pairs(&answer)
            .get(name)
            .and_then(|value| value.parse().ok());
        value.context(format_args!("no number {name} in {answer:?}"))
    }

    /// Reads the kept data again: its checksum. An error says which page was lost.
    ///
    /// # Errors
    /// As for [`Guest::ask`].
    pub fn checksum(&mut self, request: &str) -> Result<String> {
        let answer = self.ask(request)?;
        let sum = pairs(&answer).get("checksum").map(|sum| (*sum).to_owned());
        sum.context(format_args!("no checksum in {answer:?}"))
    }

    /// Runs a command of the guest's shell: its status and its output, with `\n` for line ends.
    ///
    /// # Errors
    /// As for [`Guest::ask`].
    pub fn shell(&mut self, command: &str) -> Result<(String, String)> {
        self.shell_within(command, LONG)
    }

    /// As [`Guest::shell`] with another limit.
    ///
    /// # Errors
    /// As for [`Guest::ask`].
    pub fn shell_within(&mut self, command: &str, limit: Duration) -> Result<(String, String)> {
        let answer = self.ask_within(&format!("sh {command}"), limit)?;
        let rest = answer.strip_prefix("status=");
        let rest = rest.context(format_args!("no status in {answer:?}"))?;
        let (status, output) = rest.split_once(" output=").unwrap_or((rest, ""));
        Ok((status.to_owned(), output.to_owned()))
    }

    /// Runs a command of the guest's shell that must succeed: its output.
    ///
    /// # Errors
    /// As for [`Guest::ask`], or when the command fails.
    pub fn must(&mut self, command: &str) -> Result<String> {
        self.must_within(command, LONG)
    }

    /// As [`Guest::must`] with another limit.
    ///
    /// # Errors
    /// As for [`Guest::must`].
    pub fn must_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        match self.shell_within(command, limit)? {
            (status, output) if status == "0" => Ok(output),
            (status, output) => Err(Error::new(format!(
                "in the guest, {command:?} ends with {status}: {output}"
            ))),
        }
    }
}

/// The `name=value` words of an answer.
fn pairs(answer: &str) -> HashMap<&str, &str> {
    answer
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
}
