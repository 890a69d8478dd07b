//! What a story shows, and whether it is so.

use serde_json::{Value, json};

/// Something that is shown, with its numbers, and whether it is so.
#[derive(Clone, Debug)]
struct Claim {
    text: String,
    holds: bool,
}

/// All that a story shows.
#[derive(Clone, Debug, Default)]
pub struct Claims(Vec<Claim>);

impl Claims {
    /// Adds one.
    pub fn add(&mut self, holds: bool, text: String) {
        self.0.push(Claim { text, holds });
    }

    /// Whether every one holds.
    pub fn hold(&self) -> bool {
        self.0.iter().all(|claim| claim.holds)
    }

    /// For readers of files.
    pub fn json(&self) -> Value {
        let claim = |claim: &Claim| json!({ "claim": claim.text, "holds": claim.holds });
        self.0.iter().map(claim).collect()
    }

    /// For people.
    pub fn print(&self) {
        for claim in &self.0 {
            let verdict = if claim.holds { "ok" } else { "NOT" };
            println!("{verdict:<4} {}", claim.text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_does_not_hold_is_enough() {
        let mut claims = Claims::default();
        claims.add(true, "yes".to_owned());
        assert!(claims.hold());
        claims.add(false, "no".to_owned());
        assert!(!claims.hold());
        assert_eq!(claims.json()[1], json!({ "claim": "no", "holds": false }));
    }
}
