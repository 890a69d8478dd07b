//! `ebb-bench`: benchmarks against other monitors; started by `cargo xtask bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ebb_benches::{
    api, arena, blk, boot, dashboard, filters, footprint, free_pages, inflate, integrity, lazy,
    malloc, net, pods, reclaim, reporting, scale, snapshot, stream, teardown, vsock,
};

/// Benchmarks against other monitors. Start them with `cargo xtask bench`.
#[derive(Parser)]
#[command(name = "ebb-bench")]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// How long the API takes for an answer, what slow clients do to a machine, and starts in Firecracker mode
    Api(api::Arguments),
    /// What an arena costs the monitor: memory when nobody touches it, and looks through its table
    Arena(arena::Arguments),
    /// fio on a guest's disk, beside QEMU's virtio-blk
    Blk(blk::Arguments),
    /// Boot of the same guest, from the start of the process to its end, and memory overhead
    Boot(boot::Arguments),
    /// The dashboard for Grafana, asked of Prometheus while a guest lives, and drawn
    Dashboard(dashboard::Arguments),
    /// What the filter of system calls costs a vCPU at each exit
    Filters(filters::Arguments),
    /// What a guest with bursts of work costs the host in GiB·min, and its work in time: QEMU's reporting and Ebb's ways
    Footprint(footprint::Arguments),
    /// What it costs that the host may take what the guest's free lists hold, and how much it gets
    FreePages(free_pages::Arguments),
    /// How long the host takes to have memory that a guest has freed: QEMU's ways and Ebb's
    Inflate(inflate::Arguments),
    /// Guests verify their memory while it is reclaimed without a break: 10 million operations by default
    Integrity(integrity::Arguments),
    /// What LAZY_FREE and REUSE cost: flushes, interrupts, and time compared with an empty exit
    Lazy(lazy::Arguments),
    /// What a heap in an arena costs, compared with the same jemalloc on normal memory and with Debian's Redis
    Malloc(malloc::Arguments),
    /// TCP between host and guest, and how long a byte takes there and back, beside QEMU's virtio-net
    Net(stream::Arguments),
    /// Pods of containerd that burst in turn under one memory limit: Ebb's guests, runc's containers, plain guests
    Pods(pods::Arguments),
    /// What reclaim costs: interrupts, pauses, throughput compared with plain madvise, work of a busy guest
    Reclaim(reclaim::Arguments),
    /// What free page reporting costs a guest that takes and frees memory, and what it gives the host
    Reporting(reporting::Arguments),
    /// What grows with the size of guests, with their number, and with their vCPUs
    Scale(scale::Arguments),
    /// How large a snapshot is and how long it takes with most memory free and with none, and how soon a restored guest runs
    Snapshot(snapshot::Arguments),
    /// How fast memory is free again after a stop and after SIGKILL, by the number of workers, compared with QEMU
    Teardown(teardown::Arguments),
    /// Streams between host and guest, and how long a byte takes there and back, beside QEMU's vhost-vsock
    Vsock(stream::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().bench {
        Bench::Api(arguments) => api::run(&arguments),
        Bench::Arena(arguments) => arena::run(&arguments),
        Bench::Blk(arguments) => blk::run(&arguments),
        Bench::Boot(arguments) => boot::run(&arguments),
        Bench::Dashboard(arguments) => dashboard::run(&arguments),
        Bench::Filters(arguments) => filters::run(&arguments),
        Bench::Footprint(arguments) => footprint::run(&arguments),
        Bench::FreePages(arguments) => free_pages::run(&arguments),
        Bench::Inflate(arguments) => inflate::run(&arguments),
        Bench::Integrity(arguments) => integrity::run(&arguments),
        Bench::Lazy(arguments) => lazy::run(&arguments),
        Bench::Malloc(arguments) => malloc::run(&arguments),
        Bench::Net(arguments) => net::run(&arguments),
        Bench::Pods(arguments) => pods::run(&arguments),
        Bench::Reclaim(arguments) => reclaim::run(&arguments),
        Bench::Reporting(arguments) => reporting::run(&arguments),
        Bench::Scale(arguments) => scale::run(&arguments),
        Bench::Snapshot(arguments) => snapshot::run(&arguments),
        Bench::Teardown(arguments) => teardown::run(&arguments),
        Bench::Vsock(arguments) => vsock::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
