//! Requests of all kinds that `docs/openapi.json` describes, to a process that waits for its machine; `kvm_schema` makes some to a
//! machine with a guest. `EBB_SCHEMA_EXAMPLES=N` makes more of them.

use ebb_harness::error::Result;
use ebb_harness::firecracker::Firecracker;
use ebb_harness::schema::fuzz;

#[test]
fn a_process_without_a_machine() -> Result<()> {
    let vm = Firecracker::serve()?;
    let examples = std::env::var("EBB_SCHEMA_EXAMPLES").unwrap_or_else(|_| "2".to_owned());
    fuzz(&vm.path("api"), &examples, "coverage,fuzzing", &[])?;
    assert_eq!(vm.api().get("/")?["state"], "Not started");
    Ok(())
}
