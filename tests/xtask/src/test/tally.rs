//! Counts tests by the output of the programs that ran them.

use std::collections::BTreeMap;

/// Most lines that are kept of what a failed test printed.
const LINES: usize = 20;

/// How many tests passed, which failed, and the figures that they told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of tests that passed.
    pub passed: u64,
    /// Those that did not, by name, with the last lines that each printed.
    pub failed: BTreeMap<String, String>,
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
            failed: names
                .map(|name| (name.to_owned(), last_lines(printed, name)))
                .collect(),
            figures,
        }
    }
}

/// The last lines that a failed test printed, up to its stack.
fn last_lines(printed: &str, test: &str) -> String {
    let heading = format!("---- {test} stdout ----");
    let lines = printed.lines().map(str::trim_end);
    let section = lines.skip_while(|line| *line != heading).skip(1);
    let section = section.take_while(|line| !line.starts_with("---- ") && *line != "failures:");
    let lines: Vec<&str> = section
        .take_while(|line| *line != "stack backtrace:")
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
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
        let printed = "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\r\n    no\n\nit says why\nstack backtrace:\n   0: x\n\n\
                       ---- m::b stdout ----\n\n\nfailures:\n    a\n    m::b\n\n\
                       test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1 s\n";
        let tally = Tally::read(printed);
        assert_eq!(tally.passed, 7);
        let failed = [("a", "    no\nit says why"), ("m::b", "")];
        let failed = failed.map(|(name, printed)| (name.to_owned(), printed.to_owned()));
        assert_eq!(tally.failed, BTreeMap::from(failed));
    }

    #[test]
    fn the_end_of_what_a_failed_test_printed_is_kept() {
        let lines: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let printed = format!("\nfailures:\n\n---- a stdout ----\n{lines}\nfailures:\n    a\n");
        let kept = &Tally::read(&printed).failed["a"];
        assert_eq!(kept.lines().count(), LINES);
        assert!(kept.ends_with("\nline 99"), "{kept}");
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
