//! Runs a command line of the guest's shell.

use std::io;
use std::process::{Command, Stdio};

/// Longest output that is reported, in characters.
const LONGEST: usize = 4000;

/// Runs `line`; its status, and the end of its output with control characters escaped.
pub fn run(line: &str) -> io::Result<String> {
    let mut command = Command::new("/bin/sh");
    // Both streams into one, in the order in which they were written.
    command
        .args(["-c", &format!("exec 2>&1; {line}")])
        .stdin(Stdio::null());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let text: String = text.trim_end().escape_debug().collect();
    let skipped = text.chars().count().saturating_sub(LONGEST);
    let text: String = text.chars().skip(skipped).collect();
    let status = output
        .status
        .code()
        .map_or_else(|| "signal".to_owned(), |code| code.to_string());
    Ok(format!("status={status} output={text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_output_on_one_line() {
        assert_eq!(
            run("echo a; echo b >&2; exit 3").unwrap(),
            "status=3 output=a\\nb"
        );
        assert_eq!(run("kill -9 $$").unwrap(), "status=signal output=");
    }

    #[test]
    fn the_end_of_long_output_is_kept() {
        let line = run("i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done").unwrap();
        assert!(
            line.ends_with("\\n1999") && line.len() < LONGEST + 30,
            "{line}"
        );
    }
}
