//! What this host gives at most: processes that share nothing, each freeing its part.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use ebb_vmm::memory::Backing;

use super::{Arguments, GIB, Results, SECONDS, engine};
use crate::{BenchError, system};

/// Such a process says it when it has its memory, and when it has freed it.
const SAID: &str = "now";

/// What one of the processes does: it frees memory of `bytes` bytes as soon as there is a byte to read.
pub(super) fn part(bytes: u64, shared: bool) -> Result<(), BenchError> {
    let backing = Backing {
        shared,
        ..Backing::default()
    };
    let ram = engine::populated(bytes, backing)?;
    println!("{SAID}");
    let mut byte = [0];
    io::stdin()
        .read_exact(&mut byte)
        .map_err(system("wait for the other processes"))?;
    drop(ram);
    println!("{SAID}");
    Ok(())
}

/// Measures by two processes and by as many as the engine has workers, up to one for each CPU, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let processes = engine::workers().filter(|&count| count > 1);
    let mut cases: Vec<_> = processes.map(|count| (count, "4k")).collect();
    cases.push((2, "files"));
    for run in 1..=arguments.runs {
        for &(count, case) in &cases {
            let time = by_processes(arguments.gib * GIB, count, case == "files");
            let time = time.map_err(system("run processes that free memory"))?;
            results.add(("processes", &engine::case_of(case, count)), SECONDS, time);
        }
        cases.rotate_left(1);
        eprintln!("teardown: ceiling, run {run} of {}", arguments.runs);
    }
    for (count, case) in cases {
        let name = match case {
            "4k" => format!("ceiling_{count}"),
            case => format!("ceiling_{count}_{case}"),
        };
        let by = engine::case_of(case, count);
        let ratio = (["munmap", case, "time"], ["processes", &by, "time"]);
        results.divide(&name, ratio.0, ratio.1);
    }
    Ok(())
}

/// Seconds until all have freed theirs.
fn by_processes(bytes: u64, count: usize, shared: bool) -> io::Result<f64> {
    let each = bytes / count as u64;
    let start = |_| Share::start(each, shared);
    let mut all = (0..count).map(start).collect::<io::Result<Vec<_>>>()?;
    all.iter_mut().try_for_each(Share::await_word)?;
    let start = Instant::now();
    all.iter_mut().try_for_each(Share::go)?;
    all.iter_mut().try_for_each(Share::await_word)?;
    let time = start.elapsed().as_secs_f64();
    for share in &mut all {
        share.child.wait()?;
    }
    Ok(time)
}

/// One of the processes; killed when this is dropped.
struct Share {
    child: Child,
    input: ChildStdin,
    output: Box<dyn BufRead>,
}

impl Share {
    fn start(bytes: u64, shared: bool) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["teardown", "--part", &bytes.to_string()])
            .args(shared.then_some("--part-in-files"))
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

impl Drop for Share {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
