//! Several reclaim threads on one host whose memory is a number in a file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::GpaRange;
use ebb_core::release::{Release, ReleasePages, Released};

use crate::reclaim::{Peers, PressureSource, ReclaimThread, ReclaimTuning, Reclaimer};

const MIB: u64 = 1 << 20;
const MONITORS: u64 = 8;
/// Lazily freed memory of each.
const LAZY: u64 = 512 * MIB;
/// Memory of the host: the low watermark is 512 MiB.
const HOST: u64 = 10 << 30;

/// A host: a file like /proc/meminfo.
struct Host {
    meminfo: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    available: u64,
    taken: u64,
    /// Bytes marked free: a monitor does that first when memory may soon be short.
    prepared: u64,
}

impl Host {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        let kib = [HOST, state.available].map(|bytes| bytes >> 10);
        // One write of one length: a reader sees the old text or the new one.
        let text = format!(
            "MemTotal: {:>12} kB\nMemAvailable: {:>12} kB\n",
            kib[0], kib[1]
        );
        self.meminfo.write_all_at(text.as_bytes(), 0).unwrap();
        self.changed.notify_all();
    }

    fn wait(&self, until: impl Fn(&State) -> bool) {
        let state = self.state.lock().unwrap();
        drop(
            self.changed
                .wait_while(state, |state| !until(state))
                .unwrap(),
        );
    }
}

impl ReleasePages for Host {
    fn can_mark_free(&self) -> bool {
        true
    }

    fn max_batch(&self) -> usize {
        1
    }

    fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        let bytes: Vec<u64> = ranges.iter().map(|range| range.len()).collect();
        let sum: u64 = bytes.iter().sum();
        self.change(|state| match how {
            Release::Discard => {
                state.available += sum;
                state.taken += sum;
            }
            Release::MarkFree => state.prepared += sum,
        });
        Released {
            bytes,
            calls: 1,
            ..Released::default()
        }
    }
}

fn monitor(host: &Arc<Host>, source: PressureSource) -> ReclaimThread {
    let generation = Arc::new(VmGeneration::default());
    let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
    let lazy = Arc::new(LazyMemory::new(generation));
    lazy.free(&[GpaRange::new(0, LAZY).unwrap()]);
    let pages = Arc::clone(host) as Arc<dyn ReleasePages>;
    let reclaimer = Reclaimer::new(lazy, pages, gate, ReclaimTuning::default());
    ReclaimThread::start(Arc::new(reclaimer), source, None).unwrap()
}

#[test]
fn the_monitors_of_a_host_take_what_it_needs_together() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("meminfo");
    let host = Arc::new(Host {
        meminfo: File::create(&path).unwrap(),
        state: Mutex::default(),
        changed: Condvar::new(),
    });
    // Nearly short: each prepares 64 MiB, and all have told what they have before anything is needed.
    host.change(|state| state.available = 700 * MIB);
    let peers = folder.path().join("peers");
    let source = || PressureSource::watching(&path).with_peers(Peers::at(&peers).unwrap());
    let threads: Vec<_> = (0..MONITORS).map(|_| monitor(&host, source())).collect();
    host.wait(|state| state.prepared >= MONITORS * 64 * MIB);
    assert_eq!(host.state.lock().unwrap().taken, 0);
    host.change(|state| state.available = 0);
    host.wait(|state| state.available >= HOST / 20);
    drop(threads);
    let taken = host.state.lock().unwrap().taken;
    println!("{} MiB taken, {} needed", taken / MIB, HOST / 20 / MIB);
    assert!(taken * 10 <= HOST / 20 * 13, "{taken}");
}
