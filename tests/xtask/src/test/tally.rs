//! Counts tests by the output of the programs that ran them.

use std::collections::{BTreeMap, BTreeSet};

/// How many tests passed, which failed, and the figures that they told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of tests that passed.
    pub passed: u64,
    /// Names of those that did not.
    pub failed: BTreeSet<String>,
    /// What lines like `FIGURE name 12` say; several of one name are added up.
    pub figures: BTreeMap<String, u64>,
}

impl Tally {
    /// Reads the output of one or more test programs that use Rust's own test harness (libtest). A program that died
    /// before its last line counts for nothing: its exit status tells.
    pub fn read(printed: &str) -> Self {
        let results = printed
            .lines()
            .filter_map(|line| line.strip_prefix("test result: "));
        let passed = results.filter_map(passed).sum();
        // What failed tests printed comes first, under the same heading; the list is indented.
        let lists = printed.split("\nfailures:\n").skip(1);
        let names = lists.flat_map(|list| list.lines().map_while(|line| line.strip_prefix("    ")));
        let mut figures = BTreeMap::new();
        for (name, value) in printed.lines().filter_map(figure) {
            *figures.entry(name.to_owned()).or_default() += value;
        }
        Self {
            passed,
            failed: names.map(str::to_owned).collect(),
            figures,
        }
    }
}

/// The name and the number in `FIGURE name 12`.
fn figure(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.strip_prefix("FIGURE ")?.split_once(' ')?;
    Some((name, value.trim_end().parse().ok()?))
}

/// The number in `ok. 3 passed; 0 failed; …`.
fn passed(result: &str) -> Option<u64> {
    let (_, counts) = result.split_once(". ")?;
    counts.split_once(" passed")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_named_after_what_they_printed() {
        let printed = "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n    no\n\nfailures:\n    a\n    m::b\n\n\
                       test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1 s\n";
        let tally = Tally::read(printed);
        assert_eq!(tally.passed, 7);
        assert_eq!(Vec::from_iter(&tally.failed), ["a", "m::b"]);
    }

    #[test]
    fn several_programs_are_added_up() {
        let program = "test a ... ok\n\ntest result: ok. 3 passed; 0 failed; 0 ignored\n\n";
        let tally = Tally::read(&program.repeat(2));
        assert_eq!((tally.passed, tally.failed.len()), (6, 0));
        assert_eq!(Tally::read("running 2 tests\nkilled"), Tally::default());
    }

    #[test]
    fn figures_are_added_up_by_name() {
        let printed = "test a ... \nFIGURE kill_points 12\nok\nFIGURE fault_points 7\r\nFIGURE kill_points 3\n\
                       FIGURE none\nFIGURE wrong x\n FIGURE indented 1\n";
        let expected = [("fault_points", 7), ("kill_points", 15)];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(Tally::read(printed).figures, BTreeMap::from(expected));
    }
}
