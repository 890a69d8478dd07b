//! What the third story found.

use ebb_harness::size::Size;
use serde_json::{Value, json};

use crate::claims::Claims;
use crate::picture::{self, Mark, Picture};
use crate::sampler::Sample;

/// What was found. Sizes in bytes.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub kernel: String,
    pub guest_memory: u64,
    /// What the guest's job has used and freed.
    pub freed: u64,
    /// Resident memory of the monitor: when the job has used its memory, when that is free, when the neighbour has what it
    /// wants, when the operator has taken the rest, and when the guest has used it again.
    pub rss: [u64; 5],
    /// Memory that the guest has handed over, in whatever way.
    pub handed_over: u64,
    pub neighbour_wanted: u64,
    pub neighbour_got: u64,
    /// Free memory that Ebb has taken: for the neighbour, and in all.
    pub taken_for_neighbour: u64,
    pub taken: u64,
    /// What is free in whole blocks, and held by the host, after everything was taken.
    pub left: u64,
    /// Pauses in which it was taken, and those that a vCPU missed.
    pub pauses: u64,
    pub missed: u64,
    /// The guest's data is what it was.
    pub intact: bool,
    pub marks: Vec<Mark>,
    pub samples: Vec<Sample>,
}

/// What was found, and what it shows.
pub struct Outcome {
    found: Found,
    pub claims: Claims,
}

/// Memory of a job that the guest's kernel need not have in whole blocks at once, as a part of it.
const SCATTERED: u64 = 8;

impl Outcome {
    pub fn new(found: Found) -> Self {
        let mut claims = Claims::default();
        let [used, freed, served, taken, _] = found.rss;
        let text = format!(
            "the guest says nothing: {} handed over, and the host cannot tell: RSS {} before, {} after",
            Size(found.handed_over),
            Size(used),
            Size(freed)
        );
        claims.add(found.handed_over == 0 && used <= freed + freed / 16, text);
        let text = format!(
            "the neighbour wanted {} and got {}",
            Size(found.neighbour_wanted),
            Size(found.neighbour_got)
        );
        claims.add(found.neighbour_got >= found.neighbour_wanted, text);
        let fell = freed.saturating_sub(served);
        let text = format!(
            "of what is free in the guest Ebb took {} for that; RSS fell by {}",
            Size(found.taken_for_neighbour),
            Size(fell)
        );
        let enough = found.taken_for_neighbour >= found.freed / 4;
        claims.add(enough && fell >= found.taken_for_neighbour / 10 * 9, text);
        let text = format!(
            "asked for all, it has taken {} of {}; {} are left in whole blocks; RSS is {}",
            Size(found.taken),
            Size(found.freed),
            Size(found.left),
            Size(taken)
        );
        let whole = found.freed - found.freed / SCATTERED;
        claims.add(
            found.taken >= whole && found.left <= found.freed / SCATTERED,
            text,
        );
        let text = "the guest's data is intact, and it could use all its memory again";
        claims.add(found.intact, text.to_owned());
        Self { found, claims }
    }

    /// The table and the claims, for people.
    pub fn print(&self) {
        let titles = [
            "a job in the guest has used memory",
            "the job has freed it",
            "a neighbour has what it wants",
            "the host has taken all that is free",
            "the guest has used it again",
        ];
        println!("\n{:<42} {:>10}", "", "host RSS");
        for (title, rss) in titles.iter().zip(self.found.rss) {
            println!("{title:<42} {:>10}", Size(rss));
        }
        println!();
        self.claims.print();
    }

    /// Memory over time, as SVG.
    pub fn draw(&self) -> String {
        let found = &self.found;
        let subtitle = format!(
            "Linux {} with {}, no balloon, no agent",
            found.kernel,
            Size(found.guest_memory)
        );
        picture::draw(&Picture {
            title: "A guest frees memory and says nothing",
            subtitle: &subtitle,
            keys: [
                "host memory that Ebb and its guest take up (RSS)",
                "what a neighbour on the host has got",
            ],
            guest_memory: found.guest_memory,
            marks: &found.marks,
            samples: &found.samples,
        })
    }

    /// For readers of files.
    pub fn json(&self) -> Value {
        let found = &self.found;
        let [used, freed, served, taken, again] = found.rss;
        json!({
            "guest_kernel": found.kernel,
            "guest_memory_bytes": found.guest_memory,
            "freed_bytes": found.freed,
            "host_rss": { "used": used, "freed": freed, "served": served, "taken": taken, "again": again },
            "handed_over_bytes": found.handed_over,
            "neighbour_wanted_bytes": found.neighbour_wanted,
            "neighbour_got_bytes": found.neighbour_got,
            "taken_for_neighbour_bytes": found.taken_for_neighbour,
            "taken_bytes": found.taken,
            "left_bytes": found.left,
            "pauses": found.pauses,
            "missed_pauses": found.missed,
            "guest_data_intact": found.intact,
            "claims": self.claims.json(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Found {
        Found {
            freed: 600,
            rss: [900, 900, 600, 310, 900],
            neighbour_wanted: 700,
            neighbour_got: 700,
            taken_for_neighbour: 300,
            taken: 590,
            intact: true,
            ..Found::default()
        }
    }

    #[test]
    fn every_claim_can_fail() {
        assert!(Outcome::new(good()).claims.hold());
        let bad: [fn(&mut Found); 8] = [
            |found| found.handed_over = 1,
            |found| found.rss[0] = 1000,
            |found| found.neighbour_got = 699,
            |found| found.taken_for_neighbour = 100,
            |found| found.rss[2] = 700,
            |found| found.taken = 500,
            |found| found.left = 100,
            |found| found.intact = false,
        ];
        for spoil in bad {
            let mut found = good();
            spoil(&mut found);
            assert!(!Outcome::new(found.clone()).claims.hold(), "{found:?}");
        }
    }

    #[test]
    fn the_picture_has_both_lines() {
        let sample = |at| Sample {
            at,
            rss: 1,
            other: 1,
        };
        let svg = Outcome::new(Found {
            samples: vec![sample(0.0), sample(1.0)],
            ..good()
        })
        .draw();
        assert_eq!(svg.matches("<polyline").count(), 2);
    }
}
