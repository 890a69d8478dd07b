//! Other people's tests of other people's program, with its heap in an arena, while the monitor takes all that is free.
//!
//! `EBB_SUITES="test_bytes test_dict"` runs these modules of Python's tests instead of a few that take minutes
//! (`cargo xtask exec -- env EBB_SUITES=… BINARY`).

use std::time::Duration;

use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};

/// Modules of Python's own tests, all or those whose names contain a word.
const MODULES: &str = "test_threading:ThreadTests test_dict test_deque test_memoryio";
/// How long the tests may take, each time.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// None fails on the arena that passes without it.
#[test]
fn pythons_own_tests_pass_as_they_do_without_an_arena() -> Result<()> {
    let modules = std::env::var("EBB_SUITES").unwrap_or_else(|_| MODULES.to_owned());
    let mut debian = Debian::start(1)?;
    let python = "env PYTHONMALLOC=malloc python3 /tmp/suites.py";
    let plain = debian.run_within(&format!("{python} /tmp/plain {modules}"), LIMIT)?;
    println!("without an arena: {plain}");
    let (arena, asked) = debian.under_reclaim(|debian| {
        let run = format!("/tmp/ebb-guest run --no-fork -- {python} /tmp/arena {modules}");
        debian.run_within(&run, LIMIT)
    })?;
    println!("on an arena: {arena}; {asked} reclaims");
    let count = |debian: &mut Debian, what: &str| -> Result<usize> {
        let said = debian.run(&format!("sh -c '{what} | wc -l'"))?;
        said.parse().ok().context(said)
    };
    let (passed, all) = (
        count(&mut debian, "grep ^ok /tmp/plain")?,
        count(&mut debian, "cat /tmp/plain")?,
    );
    assert_eq!(
        count(&mut debian, "cat /tmp/arena")?,
        all,
        "tests are missing"
    );
    assert!(
        passed * 10 > all * 8,
        "{passed} of {all} pass without an arena"
    );
    println!("{passed} of {all} tests pass without an arena");
    let worse = "grep ^failed /tmp/arena | grep -vxFf /tmp/plain || true";
    let worse = debian.run(&format!("sh -c '{worse}'"))?;
    if !worse.is_empty() {
        println!("{}", debian.run("tail -c 20000 /tmp/arena.log")?);
    }
    assert_eq!(worse, "", "these pass without an arena");
    assert!(asked > 3, "{asked}");
    debian.end()
}
