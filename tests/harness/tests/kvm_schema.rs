//! Requests of all kinds that `docs/openapi.json` describes, to a machine with a guest; `schema` makes more to a process that waits
//! for its machine.

use ebb_harness::Launch;
use ebb_harness::error::Result;
use ebb_harness::schema::fuzz;
use rustix::process::Signal;
use serde_json::json;

/// A guest that runs, is paused, gets a balloon and is reclaimed from as a program likes that knows only the document.
#[test]
fn a_machine_with_a_guest() -> Result<()> {
    let mut monitor = Launch::new()?.option("--balloon", "size=0").start()?;
    let mut guest = monitor.guest()?;
    // These end the machine, or write files with names of schemathesis' choice.
    let not = [
        "--exclude-path",
        "/actions",
        "--exclude-path",
        "/snapshot/create",
    ];
    fuzz(&monitor.socket(), "1", "fuzzing", &not)?;
    let api = monitor.api();
    api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    guest.must("true")?;
    monitor.signal(Signal::TERM)?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
