//! Runs shell commands in the guest.

use std::io;
use std::process::{Command, Stdio};

/// Characters of the reported output; more are cut off at its start.
const MAX_OUTPUT: usize = 4000;

/// Runs `line`. Returns its exit status and the end of its output, with control characters escaped.
pub fn run(line: &str) -> io::Result<String> {
    let mut command = Command::new("/bin/sh");
    // One stream for both, to keep the order of the output.
    command
        .args(["-c", &format!("exec 2>&1; {line}")])
        .stdin(Stdio::null());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let text: String = text.trim_end().escape_debug().collect();
    let skipped = text.chars().count().saturating_sub(MAX_OUTPUT);
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
    fn status_and_output_are_on_one_line() {
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
            line.ends_with("\\n1999") && line.len() < MAX_OUTPUT + 30,
            "{line}"
        );
    }
}
