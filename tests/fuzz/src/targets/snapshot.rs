//! The state file of a snapshot.

use ebb_core::range::GpaRange;
use ebb_vmm::snapshot::{MemoryMap, State};

/// More parts than this are never mapped from files: 4096 of the snapshot's own, 6000 of those below it, of which one may lie in
/// both parts of the RAM.
const MAX_PARTS: usize = 4096 + 6000 + 1;

pub fn run(input: &[u8]) {
    let _ = State::decode(input);
    // Behind the checksums, which no noise passes.
    let Ok(map) = serde_json::from_slice::<MemoryMap>(input) else {
        return;
    };
    let ram = [(0, 3 << 30), (4 << 30, 70 << 30)];
    let ram = ram.map(|(start, end)| GpaRange::new(start, end).expect("a range"));
    let parts = map.parts(&ram);
    assert!(!map.is_sound() || parts.len() <= MAX_PARTS);
    for (_, run) in parts {
        assert!(
            ram.iter().any(|it| it.intersection(run) == Some(run)),
            "{run:?}"
        );
    }
}
