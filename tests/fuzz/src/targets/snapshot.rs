//! The state file of a snapshot.

use ebb_core::range::GpaRange;
use ebb_vmm::snapshot::{MemoryMap, State};

/// More mappings than this are never made of one file.
const MAX_RUNS: usize = 4096;

pub fn run(input: &[u8]) {
    let _ = State::decode(input);
    // Behind the checksums, which no noise passes.
    let Ok(map) = serde_json::from_slice::<MemoryMap>(input) else {
        return;
    };
    let ram = [(0, 3 << 30), (4 << 30, 70 << 30)];
    let ram = ram.map(|(start, end)| GpaRange::new(start, end).expect("a range"));
    let runs = map.runs(&ram);
    assert!(runs.len() <= MAX_RUNS);
    for run in runs {
        assert!(
            ram.iter().any(|it| it.intersection(run) == Some(run)),
            "{run:?}"
        );
    }
}
