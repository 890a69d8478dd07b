//! Tells the story: when, who, what; one or two lines a step.

use std::fmt::Display;
use std::io::Write;
use std::time::Instant;

/// Prints lines in columns, with the time since the start.
pub struct Narrator {
    start: Instant,
}

impl Narrator {
    /// The story starts now.
    pub fn begin() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    /// The moment that times are counted from.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// A step: who does what.
    pub fn say(&self, who: &str, what: impl Display) {
        let seconds = self.start.elapsed().as_secs_f32();
        print(format_args!("{seconds:>6.1} s  {who:<6} {what}"));
    }

    /// What else is to be said about the step.
    pub fn more(&self, what: impl Display) {
        print(format_args!("{:>8}  {:<6} {what}", "", ""));
    }
}

fn print(line: impl Display) {
    let mut out = std::io::stdout().lock();
    // The story goes on where nobody listens.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
