//! The target that `EBB_FUZZ_TARGET` names, under libFuzzer.
#![no_main]

use std::sync::OnceLock;

use ebb_fuzz::{TARGETS, Target};

fn target() -> &'static Target {
    static CHOSEN: OnceLock<&Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var("EBB_FUZZ_TARGET").unwrap_or_default();
        let chosen = TARGETS.iter().find(|target| target.name == name);
        chosen.unwrap_or_else(|| panic!("EBB_FUZZ_TARGET={name} is no target"))
    })
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| (target().run)(input));
