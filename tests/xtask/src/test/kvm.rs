//! Runs the KVM tests where KVM is: on this host one binary after the other, or in nested machines side by side.
//!
//! A nested machine's CPUs are emulated: a test keeps about one processor of this host busy. Two tests of one binary at a time
//! leave a processor idle while the last one ends; two machines with a test each go on with their next binary. The machines
//! share nothing but the host's processors and memory, and the files that they read.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::machine::Options;
use ebb_nested_machine::platform::Platform;
use ebb_nested_machine::runner::Runner;
use ebb_nested_machine::session::Stream;

use super::report::{Report, Step};
use super::{Binary, TIME_LIMIT, Tests};
use crate::project::{root, start_runner_with};
use crate::selftest;
use crate::shell::{progress, show};

/// Nested machines that run at a time, each with one test.
const MACHINES: usize = 2;

/// Bytes of memory that a nested machine and its file server may take.
const MACHINE: u64 = 9 << 30;

/// Binaries whose programs wait for a few seconds only: nothing runs beside them.
const ALONE: [&str; 1] = ["kvm_clients"];

/// What all threads that run binaries share.
struct Shared<'a> {
    tests: &'a Tests,
    binaries: Mutex<VecDeque<Binary>>,
    report: Mutex<&'a mut Report>,
    retried: Mutex<Vec<String>>,
}

/// Where one thread runs binaries.
struct Place<'a> {
    shared: &'a Shared<'a>,
    /// Number of the nested machine, from 0.
    index: usize,
    /// Tests that run at a time; `None`: as many as there are processors.
    threads: Option<usize>,
    /// What tests print is shown as it comes, not when their binary has ended.
    live: bool,
    runner: Option<Runner>,
}

/// Runs the binaries. Returns what was tried again.
pub fn run(tests: &Tests, binaries: Vec<Binary>, report: &mut Report) -> Result<Vec<String>> {
    let nested = tests.platform == Platform::Nested;
    // Words choose few tests: they do not need a second machine.
    let machines = if nested && tests.filters.is_empty() {
        MACHINES.min(usize::try_from(memory_available()? / MACHINE).unwrap_or(1))
    } else {
        1
    };
    let (alone, others): (Vec<_>, Vec<_>) = binaries
        .into_iter()
        .partition(|binary| ALONE.contains(&binary.name.as_str()));
    let shared = Shared {
        tests,
        binaries: Mutex::new(alone.into()),
        report: Mutex::new(report),
        retried: Mutex::default(),
    };
    let mut first = Place {
        shared: &shared,
        index: 0,
        threads: nested.then_some(2),
        live: true,
        runner: None,
    };
    if nested {
        progress("nested machine");
        let step = Step::run("nested machine", |_| {
            first.runner = Some(first.start()?);
            first.runner.as_ref().map_or(Ok(false), selftest::check)
        });
        lock(&shared.report).add(step);
    }
    first.run_all();
    *lock(&shared.binaries) = others.into();
    if machines > 1 {
        (first.threads, first.live) = (Some(1), false);
    }
    thread::scope(|scope| {
        for index in 1..machines {
            let mut place = Place {
                shared: &shared,
                index,
                threads: Some(1),
                live: false,
                runner: None,
            };
            scope.spawn(move || place.run_all());
        }
        first.run_all();
    });
    Ok(std::mem::take(&mut *lock(&shared.retried)))
}

impl Place<'_> {
    /// Runs binaries until none is left.
    fn run_all(&mut self) {
        loop {
            let next = lock(&self.shared.binaries).pop_front();
            let Some(binary) = next else {
                return;
            };
            let name = format!("{} (KVM)", binary.name);
            let mut printed = Vec::new();
            if self.live {
                progress(&name);
            } else {
                progress(format_args!("{name} begins"));
            }
            let step = Step::run(&name, |text| {
                let result = self.run_one(&binary, text);
                printed.clone_from(text);
                result
            });
            let mut report = lock(&self.shared.report);
            if !self.live {
                progress(&name);
                show(Stream::Stdout, &printed);
            }
            report.add(step);
        }
    }

    /// Where this place keeps the nested machine's logs.
    fn options(&self) -> Options {
        let mut options = Options::for_repository(&root());
        if self.index > 0 {
            options.log_dir.push((self.index + 1).to_string());
        }
        options
    }

    /// Starts what KVM tests run on. A nested machine that came up late only is noted.
    fn start(&self) -> Result<Runner> {
        let runner = start_runner_with(&self.shared.tests.assets, &self.options())?;
        match runner.boot_retries() {
            0 => {}
            retries => lock(&self.shared.retried).push(format!(
                "boot of the nested machine: ok after {retries} retries"
            )),
        }
        Ok(runner)
    }

    /// Runs one binary, and keeps what it printed and, if it failed, the nested machine's console.
    fn run_one(&mut self, binary: &Binary, printed: &mut Vec<u8>) -> Result<bool> {
        let running = match self.runner.take() {
            Some(running) => running,
            None => self.start()?,
        };
        // The tests of kvm_reporting use a third of a processor each: they wait for the guest's driver, which reports every 2 s.
        let many = self.threads.map(|threads| 3 * threads);
        let threads = if binary.name == "kvm_reporting" {
            many
        } else {
            self.threads
        };
        let command = self.shared.tests.command(binary, threads);
        let result = running.run(&command, TIME_LIMIT, &mut |stream, bytes| {
            printed.extend_from_slice(bytes);
            if self.live {
                show(stream, bytes);
            }
        });
        let out = &self.shared.tests.out;
        let log = out.join(format!("{}.log", binary.name));
        std::fs::write(&log, &printed).context(|| format!("write {}", log.display()))?;
        if !result.as_ref().is_ok_and(|exit| exit.success()) {
            // There is none where guests run directly.
            let console = out.join(format!("{}.console.log", binary.name));
            let _ = std::fs::copy(self.options().log_dir.join("console.log"), console);
        }
        // After an error the machine is not trusted: what comes next gets a fresh one.
        let exit = result?;
        self.runner = Some(running).filter(Runner::is_alive);
        Ok(exit.success())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of memory that the host can still give.
fn memory_available() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).context(|| format!("read {}", path.display()))?;
    available(&text).context(|| format!("find MemAvailable in {}", path.display()))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_in_bytes() {
        let text =
            "MemTotal:  24646312 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\nBuffers: 5 kB\n";
        assert_eq!(available(text), Some(1 << 20));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}
