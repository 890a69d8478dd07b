//! What root may ask of the guest's kernel that moves or frees memory: compaction, dropping caches, another size of the pool
//! of huge pages, blocks of memory off line and on line again.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Random, Stop};

const VM: &str = "/proc/sys/vm";
const BLOCKS: &str = "/sys/devices/system/memory";
/// The largest pool of huge pages.
const POOL: usize = 8;
/// How long the kernel may try to take a block off line.
const OFF_LINE_LIMIT: Duration = Duration::from_secs(5);

/// How often each request was granted.
#[derive(Debug, Default)]
pub struct Requests {
    compactions: u64,
    drops: u64,
    pools: u64,
    offline: u64,
    /// Blocks that the kernel was told to leave on line because it tried for too long.
    stopped: u64,
    refused: u64,
}

impl Requests {
    /// Makes one of them.
    pub fn make_one(&mut self, random: &mut Random) -> Result<(), Stop> {
        let (counter, name, value) = match random.below(4) {
            0 => (&mut self.compactions, "compact_memory", "1".to_owned()),
            1 => (
                &mut self.drops,
                "drop_caches",
                (1 + random.below(3)).to_string(),
            ),
            2 => (
                &mut self.pools,
                "nr_hugepages",
                random.below(POOL + 1).to_string(),
            ),
            _ => return self.move_block(random),
        };
        match fs::write(format!("{VM}/{name}"), value) {
            Ok(()) => *counter += 1,
            Err(_) => self.refused += 1,
        }
        Ok(())
    }

    /// Takes a block of memory off line, and on line again. It must come back: else there would soon be none.
    fn move_block(&mut self, random: &mut Random) -> Result<(), Stop> {
        let blocks = blocks();
        let Some(state) = blocks.get(random.below(blocks.len())) else {
            self.refused += 1;
            return Ok(());
        };
        if !self.take_off_line(state) {
            self.refused += 1; // Something in it cannot be moved.
            return Ok(());
        }
        self.offline += 1;
        let online = fs::write(state, "online_movable").or_else(|_| fs::write(state, "online"));
        online.map_err(Stop::failed("take a block of memory on line"))
    }

    /// Takes a block off line; whether it is. The kernel tries to move its pages until it has succeeded or the writer gets a
    /// signal (Linux `offline_pages` in `mm/memory_hotplug.c`), which may be never while memory is short. So a process of its
    /// own writes.
    fn take_off_line(&mut self, state: &Path) -> bool {
        let script = format!("echo offline > {}", state.display());
        let mut shell = Command::new("/bin/sh");
        let shell = shell.args(["-c", &script]).stderr(Stdio::null());
        let Ok(mut shell) = shell.spawn() else {
            return false;
        };
        let start = Instant::now();
        while matches!(shell.try_wait(), Ok(None)) {
            if start.elapsed() > OFF_LINE_LIMIT {
                self.stopped += u64::from(shell.kill().is_ok());
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = shell.wait();
        fs::read_to_string(state).is_ok_and(|state| state.trim() == "offline")
    }
}

/// The files of the states of all blocks that may be taken off line.
fn blocks() -> Vec<PathBuf> {
    let entries = fs::read_dir(BLOCKS).into_iter().flatten().flatten();
    let removable = entries.filter(|entry| {
        let text = fs::read_to_string(entry.path().join("removable"));
        text.is_ok_and(|text| text.trim() == "1")
    });
    let mut states: Vec<PathBuf> = removable.map(|entry| entry.path().join("state")).collect();
    states.sort();
    states
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            compactions,
            drops,
            pools,
            offline,
            stopped,
            refused,
        } = self;
        write!(
            f,
            "compactions={compactions} drops={drops} pools={pools} offline={offline} stopped={stopped} kernel_refused={refused}"
        )
    }
}
