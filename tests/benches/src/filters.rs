//! What the filter of system calls costs a vCPU at each exit: calls of KVM_RUN that return at once, with and without it.

use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Error, Result};
use ebb_vmm::kvm::Hypervisor;
use ebb_vmm::sys::seccomp::{Mode, Role, start};
use kvm_ioctls::VcpuFd;

use crate::BenchError;

/// Arguments of `filters`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Rounds of each kind, in turn
    #[arg(long, default_value_t = 31)]
    rounds: usize,
    /// Calls in a round
    #[arg(long, default_value_t = 10_000)]
    calls: u32,
}

/// Runs the benchmark and prints the times of a call.
///
/// # Errors
/// There is no KVM, or no filter.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let host = Hypervisor::open().context("KVM")?;
    let machine = host.create_machine().context("KVM")?;
    let mut vcpu = machine.create_vcpu(0).context("KVM")?;
    vcpu.set_kvm_immediate_exit(1);
    start(Mode::On, None).context("seccomp")?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..arguments.rounds {
        for (filtered, times) in times.iter_mut().enumerate() {
            times.push(round(&mut vcpu, filtered == 1, arguments.calls)?);
        }
    }
    let [off, on] = times.map(|mut times| {
        times.sort();
        let nanos = |time: Duration| time.as_nanos() / u128::from(arguments.calls);
        [times[0], times[times.len() / 2]].map(nanos)
    });
    println!("KVM_RUN that returns at once   fastest round   median");
    println!(
        "--seccomp off                  {:>10} ns {:>6} ns",
        off[0], off[1]
    );
    println!(
        "--seccomp on                   {:>10} ns {:>6} ns",
        on[0], on[1]
    );
    Ok(())
}

/// Calls in a thread of its own, which has a vCPU's filter if it is `filtered`.
fn round(vcpu: &mut VcpuFd, filtered: bool, calls: u32) -> Result<Duration> {
    let calls = || {
        if filtered {
            Role::Vcpu.enter();
        }
        let start = Instant::now();
        for _ in 0..calls {
            // It fails with EINTR: that is what was asked for.
            if vcpu.run().is_ok() {
                return Err(Error::new("KVM has entered the guest"));
            }
        }
        Ok(start.elapsed())
    };
    thread::scope(|scope| scope.spawn(calls).join())
        .unwrap_or_else(|_| Err(Error::new("the thread has panicked")))
}
