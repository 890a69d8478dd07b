//! Runs programs on the host, and prints progress.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use ebb_nested_machine::error::{Context, Error, Result};
use ebb_nested_machine::session::Stream;

/// Prints one line of progress.
pub fn progress(text: impl fmt::Display) {
    println!("==> {text}");
}

/// A number of bytes, printed as `12.3 MiB`.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..0x10_0000 => write!(f, "{} KiB", self.0.div_ceil(1024)),
            bytes => write!(f, "{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        }
    }
}

/// A duration, printed as `1.2 s`.
pub struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f32())
    }
}

/// A command from its program and arguments, without input.
pub fn command<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    command
}

/// Runs a command that must succeed, and returns its standard output. Its output is shown only if it fails.
pub fn quietly(mut command: Command) -> Result<String> {
    let what = format!("run {command:?}");
    let output = command.output().context(|| what.clone())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(20)..].join("\n  ");
    Err(Error::new(format!("{what}: {}\n  {last}", output.status)))
}

/// Runs a command whose output the user sees. Returns true if it succeeded.
pub fn visibly(mut command: Command) -> Result<bool> {
    let status = command.status().context(|| format!("run {command:?}"))?;
    Ok(status.success())
}

/// As [`visibly`]; appends the command's standard output to `printed`.
pub fn recorded(mut command: Command, printed: &mut Vec<u8>) -> Result<bool> {
    command.stdout(Stdio::piped());
    let what = format!("run {command:?}");
    let what = || what.clone();
    let mut child = command.spawn().context(what)?;
    let mut buffer = [0; 4096];
    if let Some(mut output) = child.stdout.take() {
        while let length @ 1.. = output.read(&mut buffer).context(what)? {
            printed.extend_from_slice(&buffer[..length]);
            show(Stream::Stdout, &buffer[..length]);
        }
    }
    Ok(child.wait().context(what)?.success())
}

/// Writes a command's output to the same stream of this process.
pub fn show(stream: Stream, bytes: &[u8]) {
    // A closed standard output is no reason to stop.
    let _ = match stream {
        Stream::Stdout => write_out(std::io::stdout().lock(), bytes),
        Stream::Stderr => write_out(std::io::stderr().lock(), bytes),
    };
}

fn write_out(mut to: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
