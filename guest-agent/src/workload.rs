//! A line protocol by which the host drives the guest's use of memory.
//!
//! A request is one line; its answer is one line, `EBB-GUEST-OK REQUEST …` or `EBB-GUEST-ERR REQUEST …`,
//! so that kernel messages on the same console are told from it. `EBB-GUEST-OK ready` comes first.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::system::{RebootCommand, reboot};

use crate::data::{self, Pages};
use crate::terminal::Raw;
use crate::{balloon, meminfo, shell, size};

const HELP: &str = "keep SIZE | fill SIZE | drop | churn SIZE SECONDS | verify | meminfo | rebind | sync | \
                    sh COMMAND | reboot | panic | exit";

/// What a request comes to.
type Answer = Result<String, String>;

/// Memory that the guest holds.
#[derive(Default)]
struct Workload {
    kept: Option<Pages>,
    filled: Option<Pages>,
    /// Every set of pages differs from all before it.
    seed: u64,
}

/// Serves requests until `exit` or the end of the input.
pub fn serve() -> ExitCode {
    let raw = Raw::enter();
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
    drop(raw);
    ExitCode::SUCCESS
}

/// Writes one answer, on a line of its own even where the kernel's last message has no end.
fn answer(name: &str, result: &Answer) {
    let (word, text) = match result {
        Ok(text) => ("OK", text),
        Err(text) => ("ERR", text),
    };
    let line = format!("\nEBB-GUEST-{word} {name} {text}");
    let mut out = io::stdout().lock();
    // Without a console there is nobody to tell.
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
                // What was there goes first: there may be no room for both.
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
            "sh" => shell::run(argument).map_err(|error| error.to_string()),
            "reboot" => match reboot(RebootCommand::Restart) {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
            "panic" => match std::fs::write("/proc/sysrq-trigger", "c") {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
            _ => Err(format!("unknown; {HELP}")),
        }
    }

    fn fill(&mut self, argument: &str) -> Result<Pages, String> {
        let bytes = size::parse(argument).ok_or_else(|| format!("{argument:?} is no size"))?;
        self.seed += 1;
        Pages::fill(bytes, self.seed).ok_or_else(|| format!("no memory for {bytes} bytes"))
    }

    /// Whether all that is held is what was written.
    fn verify(&self) -> Answer {
        if let Some(filled) = &self.filled {
            let lost = |lost: crate::data::Lost| format!("lost page {} of fill", lost.page);
            filled.verify().map_err(lost)?;
        }
        match &self.kept {
            Some(kept) => describe(kept, "intact"),
            None => Err("nothing is kept".to_owned()),
        }
    }
}

/// Takes memory from the kernel, touches it and gives it back, again and again.
fn churn(argument: &str) -> Answer {
    let parsed = argument.split_once(' ').and_then(|(bytes, seconds)| {
        let seconds = seconds.trim().parse().ok()?;
        Some((size::parse(bytes)?, Duration::from_secs(seconds)))
    });
    let (bytes, limit) = parsed.ok_or_else(|| format!("{argument:?} is no SIZE SECONDS"))?;
    let (start, mut passes, mut pages) = (Instant::now(), 0, 0);
    while passes == 0 || start.elapsed() < limit {
        passes += 1;
        pages += data::touch(bytes, passes)
            .map_err(|lost| format!("lost page {} in pass {passes}", lost.page))?;
    }
    let ms = start.elapsed().as_millis();
    Ok(format!("pages={pages} passes={passes} ms={ms}"))
}

fn describe(pages: &Pages, word: &str) -> Answer {
    match pages.verify() {
        Ok(sum) => Ok(format!("{word}={} checksum={sum:016x}", pages.bytes())),
        Err(lost) => Err(format!("lost page {}", lost.page)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_kept_while_other_memory_comes_and_goes() {
        let mut workload = Workload::default();
        assert_eq!(workload.verify(), Err("nothing is kept".to_owned()));
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
    fn a_churn_lasts_for_its_time_and_one_pass_at_least() {
        let mut workload = Workload::default();
        let churned = workload.execute("churn", "64K 0").unwrap();
        assert!(churned.starts_with("pages=16 passes=1 ms="), "{churned}");
        for argument in ["", "64K", "64K x", "x 1"] {
            assert!(workload.execute("churn", argument).is_err(), "{argument}");
        }
    }

    #[test]
    fn requests_that_make_no_sense() {
        let mut workload = Workload::default();
        assert!(
            workload
                .execute("fill", "lots")
                .unwrap_err()
                .contains("\"lots\" is no size")
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
                .starts_with("unknown; keep SIZE")
        );
    }
}
