//! What this host gives at most: two processes that share nothing, each freeing one half.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use ebb_vmm::memory::Backing;

use super::{Arguments, GIB, Results, SECONDS, engine};
use crate::{BenchError, system};

/// Such a process says it when it has its memory, and when it has freed it.
const SAID: &str = "now";

/// What one of the processes does: it frees memory of `bytes` bytes as soon as there is a byte to read.
pub(super) fn half(bytes: u64, shared: bool) -> Result<(), BenchError> {
    let backing = Backing {
        shared,
        ..Backing::default()
    };
    let ram = engine::populated(bytes, backing)?;
    println!("{SAID}");
    let mut byte = [0];
    io::stdin()
        .read_exact(&mut byte)
        .map_err(system("wait for the other process"))?;
    drop(ram);
    println!("{SAID}");
    Ok(())
}

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let bytes = arguments.gib * GIB / 2;
    let mut cases = ["4k", "files"];
    for run in 1..=arguments.runs {
        cases.rotate_left(1);
        for case in cases {
            let time = two(bytes, case == "files").map_err(system("run two processes"))?;
            results.add(("two-processes", case), SECONDS, time);
        }
        eprintln!("teardown: ceiling, run {run} of {}", arguments.runs);
    }
    for (name, case) in [("ceiling_2", "4k"), ("ceiling_2_files", "files")] {
        results.divide(
            name,
            ["munmap", case, "time"],
            ["two-processes", case, "time"],
        );
    }
    Ok(())
}

/// Seconds until both have freed theirs.
fn two(bytes: u64, shared: bool) -> io::Result<f64> {
    let mut both = [Half::start(bytes, shared)?, Half::start(bytes, shared)?];
    both.iter_mut().try_for_each(Half::await_word)?;
    let start = Instant::now();
    both.iter_mut().try_for_each(Half::go)?;
    both.iter_mut().try_for_each(Half::await_word)?;
    let time = start.elapsed().as_secs_f64();
    for half in &mut both {
        half.child.wait()?;
    }
    Ok(time)
}

/// One of the processes; killed when this is dropped.
struct Half {
    child: Child,
    input: ChildStdin,
    output: Box<dyn BufRead>,
}

impl Half {
    fn start(bytes: u64, shared: bool) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["teardown", "--half", &bytes.to_string()])
            .args(shared.then_some("--half-in-files"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let output = Box::new(BufReader::new(output));
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn go(&mut self) -> io::Result<()> {
        self.input.write_all(b"!")
    }

    fn await_word(&mut self) -> io::Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.trim_end() == SAID {
            Ok(())
        } else {
            Err(io::Error::other(
                "a process has ended early; give a smaller --gib",
            ))
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
