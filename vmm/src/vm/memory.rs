//! From the configuration to the description of a machine's memory.

use std::time::Duration;

use ebb_core::release::Release;

use crate::arch::layout;
use crate::config::{LazyConfig, LazyMode, MachineConfig};
use crate::guest_memory::{ArenaSetup, Setup};
use crate::memory::Backing;
use crate::reclaim::{Mode, ReclaimTuning};

/// Describes the memory of the machine that `config` describes.
pub fn setup(config: &MachineConfig) -> Setup {
    let memory = &config.memory;
    let ram = layout::ram(memory.size);
    let sizes: Vec<u64> = config.arenas.iter().map(|arena| arena.size).collect();
    let places = layout::arenas(&ram, &sizes);
    let arenas = config.arenas.iter().zip(places);
    let arenas = arenas.map(|(arena, gpa)| ArenaSetup {
        id: arena.id.clone(),
        gpa,
        granule: arena.granule,
    });
    let balloon = config.balloon.as_ref();
    let reporting = balloon.and_then(|balloon| balloon.free_page_reporting);
    Setup {
        backing: Backing {
            thp: memory.thp,
            hugepages: memory.hugepages,
            shared: memory.shared,
        },
        arenas: arenas.collect(),
        ram,
        tuning: tuning(config.lazy),
        reported: reporting.unwrap_or(Release::MarkFree),
        strict: config.lazy.strict,
        free_pages: config.lazy.free_pages,
        restored: None,
    }
}

fn tuning(config: LazyConfig) -> ReclaimTuning {
    ReclaimTuning {
        mode: match config.mode {
            LazyMode::Pressure => Mode::Pressure,
            LazyMode::Eager => Mode::Eager,
            LazyMode::Age => Mode::Age(Duration::from_secs(config.age_s.into())),
            LazyMode::Off => Mode::Off,
        },
        pause: Duration::from_micros(config.pause_us.into()),
        slice: config.slice as usize,
        share: config.share,
    }
}
