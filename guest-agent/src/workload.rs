//! `ebb-guest workload`: lets the host control the guest's use of memory, by a line protocol on the console.
//!
//! Each request is one line, and so is its answer: `EBB-GUEST-OK REQUEST …` or `EBB-GUEST-ERR REQUEST …`. The prefix tells
//! answers from kernel messages on the same console. The first line is `EBB-GUEST-OK ready`.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::system::{RebootCommand, reboot};

use crate::pattern::{self, LostPage, PatternPages};
use crate::terminal::RawMode;
use crate::{balloon, meminfo, shell, size, talk};

const HELP: &str = "keep SIZE | fill SIZE | drop | churn SIZE SECONDS | verify | meminfo | rebind | sync | \
                    talk [vsock] PORT | sh COMMAND | reboot | panic | exit";

/// Text of the answer, or of the error.
type Answer = Result<String, String>;

/// Memory that the workload holds.
#[derive(Default)]
struct Workload {
    kept: Option<PatternPages>,
    filled: Option<PatternPages>,
    /// Seed of the last pages: all have different content.
    seed: u64,
}

/// Serves requests until `exit` or the end of the input.
pub fn serve() -> ExitCode {
    let raw_mode = RawMode::enter();
    let mut workload = Workload::default();
    answer("ready", &Ok(String::new()));
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let line = line.trim();
        let (name, argument) = line.split_once(' ').unwrap_or((line, ""));
        match name {
            "" => continue,
            "exit" => {
                answer(name, &Ok(String::new()));
                break;
            }
            _ => answer(name, &workload.execute(name, argument.trim())),
        }
    }
    drop(raw_mode);
    ExitCode::SUCCESS
}

/// Writes one answer. It begins with a line end, because the kernel's last message may lack one.
fn answer(name: &str, result: &Answer) {
    let (word, text) = match result {
        Ok(text) => ("OK", text),
        Err(text) => ("ERR", text),
    };
    let line = format!("\nEBB-GUEST-{word} {name} {text}");
    let mut out = io::stdout().lock();
    // Errors mean that the console is gone.
    let _ = out.write_all(format!("{}\n", line.trim_end()).as_bytes());
    let _ = out.flush();
}

impl Workload {
    fn execute(&mut self, name: &str, argument: &str) -> Answer {
        match name {
            "help" => Ok(HELP.to_owned()),
            "keep" => {
                let pages = self.fill(argument)?;
                let done = describe(&pages, "kept");
                self.kept = Some(pages);
                done
            }
            "fill" => {
                // First free the old pages: there may not be enough memory for both.
                self.filled = None;
                let start = Instant::now();
                let pages = self.fill(argument)?;
                let done = format!(
                    "filled={} ms={}",
                    pages.bytes(),
                    start.elapsed().as_millis()
                );
                self.filled = Some(pages);
                Ok(done)
            }
            "drop" => {
                let bytes = self.filled.take().map_or(0, |pages| pages.bytes());
                Ok(format!("dropped={bytes}"))
            }
            "churn" => churn(argument),
            "verify" => self.verify(),
            "meminfo" => meminfo::line().map_err(|error| error.to_string()),
            "rebind" => match balloon::rebind() {
                Ok(devices) => Ok(devices.join(" ")),
                Err(error) => Err(error.to_string()),
            },
            "sync" => {
                rustix::fs::sync();
                Ok(String::new())
            }
            "talk" => match talk::serve(argument) {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
            "sh" => shell::run(argument).map_err(|error| error.to_string()),
            "reboot" => match reboot(RebootCommand::Restart) {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
            "panic" => match std::fs::write("/proc/sysrq-trigger", "c") {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
            _ => Err(format!("unknown request; {HELP}")),
        }
    }

    fn fill(&mut self, argument: &str) -> Result<PatternPages, String> {
        let bytes = size::parse(argument)
            .ok_or_else(|| format!("{argument:?} is not a size, such as 64M"))?;
        self.seed += 1;
        PatternPages::fill(bytes, self.seed).ok_or_else(|| format!("no memory for {bytes} bytes"))
    }

    /// Checks all pages. Returns the size and checksum of the kept ones.
    fn verify(&self) -> Answer {
        if let Some(filled) = &self.filled {
            let lost = |lost: LostPage| format!("lost page {} of fill", lost.page);
            filled.verify().map_err(lost)?;
        }
        match &self.kept {
            Some(kept) => describe(kept, "intact"),
            None => Err("nothing is kept; use keep SIZE first".to_owned()),
        }
    }
}

/// Allocates, touches and frees memory for some time, at least once.
fn churn(argument: &str) -> Answer {
    let parsed = argument.split_once(' ').and_then(|(bytes, seconds)| {
        let seconds = seconds.trim().parse().ok()?;
        Some((size::parse(bytes)?, Duration::from_secs(seconds)))
    });
    let (bytes, limit) =
        parsed.ok_or_else(|| format!("{argument:?} is not SIZE SECONDS, such as 64M 10"))?;
    let (start, mut passes, mut pages) = (Instant::now(), 0, 0);
    while passes == 0 || start.elapsed() < limit {
        passes += 1;
        pages += pattern::stamp_fresh_pages(bytes, passes)
            .map_err(|lost| format!("lost page {} in pass {passes}", lost.page))?;
    }
    let ms = start.elapsed().as_millis();
    Ok(format!("pages={pages} passes={passes} ms={ms}"))
}

fn describe(pages: &PatternPages, word: &str) -> Answer {
    match pages.verify() {
        Ok(sum) => Ok(format!("{word}={} checksum={sum:016x}", pages.bytes())),
        Err(lost) => Err(format!("lost page {}", lost.page)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_pages_stay_while_others_are_allocated_and_freed() {
        let mut workload = Workload::default();
        assert!(
            workload
                .verify()
                .is_err_and(|error| error.starts_with("nothing is kept"))
        );
        let kept = workload.execute("keep", "64K").unwrap();
        let sum = kept.strip_prefix("kept=65536 checksum=").unwrap();
        assert!(
            workload
                .execute("fill", "1M")
                .unwrap()
                .starts_with("filled=1048576 ms=")
        );
        let intact = Ok(format!("intact=65536 checksum={sum}"));
        assert_eq!(workload.execute("verify", ""), intact);
        assert_eq!(workload.execute("drop", "").unwrap(), "dropped=1048576");
        assert_eq!(workload.execute("drop", "").unwrap(), "dropped=0");
        assert_eq!(workload.execute("verify", ""), intact);
    }

    #[test]
    fn a_churn_makes_at_least_one_pass() {
        let mut workload = Workload::default();
        let churned = workload.execute("churn", "64K 0").unwrap();
        assert!(churned.starts_with("pages=16 passes=1 ms="), "{churned}");
        for argument in ["", "64K", "64K x", "x 1"] {
            assert!(workload.execute("churn", argument).is_err(), "{argument}");
        }
    }

    #[test]
    fn invalid_requests_are_refused() {
        let mut workload = Workload::default();
        assert!(
            workload
                .execute("fill", "lots")
                .unwrap_err()
                .contains("\"lots\" is not a size")
        );
        assert!(
            workload
                .execute("fill", "8000000G")
                .unwrap_err()
                .contains("no memory")
        );
        assert!(
            workload
                .execute("dance", "")
                .unwrap_err()
                .starts_with("unknown request; keep SIZE")
        );
    }
}
