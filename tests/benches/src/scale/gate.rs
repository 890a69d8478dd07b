//! Closing the entry gate, by the number of vCPUs.
//!
//! The vCPUs are threads that enter and leave as vCPU threads do. Their guests sleep until they are woken, as idle
//! vCPUs in the kernel do, or compute until a signal comes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, Kick};
use ebb_vmm::kvm::{KickTable, prepare_kicks};
use ebb_vmm::reclaim::ReclaimTuning;

use super::Arguments;
use crate::BenchError;
use crate::results::{Metric, Results};
use ebb_harness::error::Context;
use ebb_harness::wait::LONG;

/// What the vCPUs do in the guest, and how many there are.
const CROWDS: [(&str, &[usize]); 2] = [
    ("sleeping", &[1, 2, 4, 8, 16, 64, 255]),
    // More than there are CPUs: how long they take to come out is the scheduler's choice.
    ("computing", &[1, 2, 4, 8, 16]),
];

/// Crowds of which the figures tell.
const FIGURES: [usize; 2] = [64, 255];

/// Closings in a round, of each kind.
const CLOSINGS: u32 = 20;

const CLOSED: Metric = ("to-closed", "us");
const RETURNED: Metric = ("to-all-back", "us");
const MISSED: Metric = ("missed", "%");

/// A vCPU.
#[derive(Default)]
struct Vcpu {
    thread: OnceLock<Thread>,
    sleeps: bool,
    kicked: AtomicBool,
    inside: AtomicBool,
    /// When it entered last, in nanoseconds.
    entered: AtomicU64,
}

impl Vcpu {
    fn run(&self, gate: &Gate, index: usize, epoch: Instant) {
        self.thread.get_or_init(thread::current);
        loop {
            self.kicked.store(false, Ordering::SeqCst);
            let Some(guard) = gate.enter(index) else {
                return;
            };
            let now = epoch.elapsed().as_nanos() as u64;
            self.entered.store(now, Ordering::SeqCst);
            self.inside.store(true, Ordering::SeqCst);
            while !self.kicked.load(Ordering::SeqCst) {
                if self.sleeps {
                    thread::park();
                } else {
                    std::hint::spin_loop();
                }
            }
            self.inside.store(false, Ordering::SeqCst);
            drop(guard);
        }
    }
}

struct Crowd {
    vcpus: Arc<[Vcpu]>,
    signals: Arc<KickTable>,
}

impl Kick for Crowd {
    fn kick(&self, index: usize) {
        let vcpu = &self.vcpus[index];
        vcpu.kicked.store(true, Ordering::SeqCst);
        match vcpu.thread.get() {
            Some(thread) if vcpu.sleeps => thread.unpark(),
            _ => self.signals.kick(index),
        }
    }
}

/// Closes the gate before crowds of vCPUs.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<(), BenchError> {
    prepare_kicks().context("sigaction")?;
    for round in 0..arguments.runs {
        for (guest, counts) in CROWDS {
            for &count in counts {
                crowd(guest, count, results);
            }
        }
        eprintln!("gate: round {} of {}", round + 1, arguments.runs);
    }
    for count in FIGURES {
        let case = format!("{count:03} sleeping");
        for (name, metric) in [
            ("gate_close_us", CLOSED),
            ("gate_return_us", RETURNED),
            ("gate_missed_percent", MISSED),
        ] {
            let median = results.median("gate", &case, metric.0);
            results.lower(&format!("{name}_{count}"), median.context("no rounds")?);
        }
    }
    let pause = ReclaimTuning::default().pause;
    results.note(format!(
        "gate: N vCPU threads, no KVM; missed: with the default pause of {pause:?}; the times: with one that is not missed"
    ));
    Ok(())
}

fn crowd(guest: &str, count: usize, results: &mut Results) {
    let vcpu = |_| Vcpu {
        sleeps: guest == "sleeping",
        ..Vcpu::default()
    };
    let vcpus: Arc<[Vcpu]> = (0..count).map(vcpu).collect();
    let signals = Arc::new(KickTable::new(count));
    let kick = Crowd {
        vcpus: Arc::clone(&vcpus),
        signals: Arc::clone(&signals),
    };
    let gate = Gate::new(count, Arc::default(), Box::new(kick));
    let (case, epoch) = (format!("{count:03} {guest}"), Instant::now());
    let case = ("gate", case.as_str());
    thread::scope(|scope| {
        for index in 0..count {
            let (gate, vcpus, signals) = (&gate, &vcpus, &signals);
            scope.spawn(move || {
                let _registration = signals.register(index);
                vcpus[index].run(gate, index, epoch);
            });
        }
        let all_in = || {
            let is_in = |vcpu: &Vcpu| {
                vcpu.inside.load(Ordering::SeqCst) && !vcpu.kicked.load(Ordering::SeqCst)
            };
            while !vcpus.iter().all(is_in) {
                thread::sleep(Duration::from_micros(100));
            }
        };
        let mut missed = 0;
        for _ in 0..CLOSINGS {
            all_in();
            missed += u32::from(gate.hold(ReclaimTuning::default().pause).is_err());
            all_in();
            let start = Instant::now();
            if let Ok(hold) = gate.hold(LONG) {
                results.add(case, CLOSED, start.elapsed().as_secs_f64() * 1e6);
                let opened = epoch.elapsed().as_nanos() as u64;
                drop(hold);
                all_in();
                let entered = vcpus.iter().map(|vcpu| vcpu.entered.load(Ordering::SeqCst));
                let last = entered.max().unwrap_or(opened);
                results.add(case, RETURNED, last.saturating_sub(opened) as f64 / 1e3);
            }
        }
        results.add(
            case,
            MISSED,
            f64::from(missed) * 100.0 / f64::from(CLOSINGS),
        );
        gate.stop();
        (0..count).for_each(|index| {
            vcpus[index].kicked.store(true, Ordering::SeqCst);
            if let Some(thread) = vcpus[index].thread.get() {
                thread.unpark();
            }
        });
    });
}
