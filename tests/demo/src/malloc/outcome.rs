//! What the second story found.

use ebb_harness::size::Size;
use serde_json::{Value, json};

use crate::claims::Claims;
use crate::sampler::Sample;

/// One filling of Redis.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fill {
    /// How long it took in the guest.
    pub seconds: f64,
    /// Page faults of the server.
    pub faults: f64,
    /// Values that are not what was set.
    pub wrong: f64,
}

/// What became of one Redis. Sizes in bytes, moments in seconds since its start.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Resident memory of the monitor before anything is set.
    pub rss_idle: u64,
    /// When all is set.
    pub rss_full: u64,
    /// A second after FLUSHALL.
    pub rss_flushed: u64,
    /// At the end of the neighbour's wait.
    pub rss_pressed: u64,
    pub flushed_at: f64,
    pub wanted_at: f64,
    pub had_at: f64,
    pub again_at: f64,
    /// What the neighbour wanted, and what it got before it gave up.
    pub neighbour_wanted: u64,
    pub neighbour_got: u64,
    pub first: Fill,
    pub again: Fill,
    pub samples: Vec<Sample>,
}

impl Run {
    /// Whether the neighbour got what he wanted.
    pub fn is_served(&self) -> bool {
        self.neighbour_got >= self.neighbour_wanted
    }

    /// Seconds from the host's need to its end, or until the neighbour gave up.
    pub fn waited(&self) -> f64 {
        self.had_at - self.wanted_at
    }

    /// Of what Redis has taken up, the part that the host has not got back.
    pub fn left(&self) -> f64 {
        self.rss_pressed.saturating_sub(self.rss_idle) as f64
            / self.rss_full.saturating_sub(self.rss_idle).max(1) as f64
    }

    fn served(&self) -> String {
        let (got, seconds) = (Size(self.neighbour_got), self.waited());
        let wanted = Size(self.neighbour_wanted);
        if self.is_served() {
            format!("{got} after {seconds:.1} s")
        } else {
            format!("{got} of {wanted} after {seconds:.0} s")
        }
    }

    fn json(&self) -> Value {
        let fill = |fill: &Fill| json!({ "seconds": fill.seconds, "faults": fill.faults, "wrong": fill.wrong });
        json!({
            "host_rss": {
                "idle": self.rss_idle,
                "full": self.rss_full,
                "flushed": self.rss_flushed,
                "pressed": self.rss_pressed,
            },
            "left": self.left(),
            "neighbour_wanted_bytes": self.neighbour_wanted,
            "neighbour_got_bytes": self.neighbour_got,
            "neighbour_waited_s": self.waited(),
            "first_fill": fill(&self.first),
            "second_fill": fill(&self.again),
        })
    }
}

/// A number of a run, for people.
type Column = fn(&Run) -> String;

/// Both, and what they show.
pub struct Outcome {
    pub arena: Run,
    pub plain: Run,
    pub claims: Claims,
}

impl Outcome {
    /// Compares them.
    pub fn new(arena: Run, plain: Run) -> Self {
        let mut claims = Claims::default();
        let wrong: f64 = [&arena, &plain]
            .map(|run| run.first.wrong + run.again.wrong)
            .iter()
            .sum();
        claims.add(
            wrong == 0.0,
            format!("every value was what had been set ({wrong} wrong)"),
        );
        let taken = 100.0 * (1.0 - arena.left());
        let text = format!(
            "of what Redis had taken up, the host got {taken:.0} % back while Redis ran on"
        );
        claims.add(taken >= 85.0, text);
        let text = format!(
            "the neighbour got {}; with a plain Redis {}",
            arena.served(),
            plain.served()
        );
        let sooner = !plain.is_served() || arena.waited() < plain.waited();
        claims.add(arena.is_served() && sooner, text);
        let text = format!(
            "filling again: {} page faults in the guest; {} in a plain Redis",
            arena.again.faults, plain.again.faults
        );
        claims.add(arena.again.faults * 10.0 < plain.again.faults, text);
        Self {
            arena,
            plain,
            claims,
        }
    }

    /// For people.
    pub fn print(&self) {
        println!("\n{:<44} {:>12} {:>12}", "", "arena", "plain");
        let rows: [(&str, Column); 8] = [
            ("host RSS when Redis starts", |run| {
                Size(run.rss_idle).to_string()
            }),
            ("… when Redis is full", |run| {
                Size(run.rss_full).to_string()
            }),
            ("… a second after FLUSHALL", |run| {
                Size(run.rss_flushed).to_string()
            }),
            ("… at the end of the neighbour's wait", |run| {
                Size(run.rss_pressed).to_string()
            }),
            ("the neighbour has what it wants after", |run| {
                if run.is_served() {
                    format!("{:.1} s", run.waited())
                } else {
                    "never".to_owned()
                }
            }),
            ("first fill", |run| format!("{:.1} s", run.first.seconds)),
            ("second fill", |run| format!("{:.1} s", run.again.seconds)),
            ("page faults in it", |run| run.again.faults.to_string()),
        ];
        for (what, of) in rows {
            println!("{what:<44} {:>12} {:>12}", of(&self.arena), of(&self.plain));
        }
        println!();
        self.claims.print();
    }

    /// For readers of files.
    pub fn json(&self) -> Value {
        json!({ "arena": self.arena.json(), "plain": self.plain.json(), "claims": self.claims.json() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rss_pressed: u64, had_at: f64, faults: f64) -> Run {
        Run {
            rss_full: 100,
            rss_pressed,
            had_at,
            again: Fill {
                faults,
                ..Fill::default()
            },
            ..Run::default()
        }
    }

    #[test]
    fn every_claim_can_fail() {
        let plain = || run(50, 9.0, 1000.0);
        assert!(Outcome::new(run(10, 1.0, 10.0), plain()).claims.hold());
        let mut wrong = run(10, 1.0, 10.0);
        wrong.again.wrong = 1.0;
        let mut late = run(10, 1.0, 10.0);
        late.neighbour_wanted = 1;
        for bad in [
            late,
            run(20, 1.0, 10.0),
            run(10, 10.0, 10.0),
            run(10, 1.0, 900.0),
            wrong,
        ] {
            assert!(!Outcome::new(bad.clone(), plain()).claims.hold(), "{bad:?}");
        }
    }
}
