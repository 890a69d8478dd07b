//! The names in the API's answers, which clients depend on. A name that changes here breaks them.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use crate::config::DiskEngine;
use crate::control::{
    ArenaState, AutoBalloonState, BalloonDoing, BalloonState, BalloonStatistics, DevicesState,
    DriveState, InstanceInfo, LazyMemoryState, METRICS, Prefault, ReclaimOutcome, ReportingMode,
    TeardownState,
};

/// Every field that `/lazy-memory` answers with when strict mode is on.
const LAZY_MEMORY: &str = "
    chunks discard_calls_total discard_failures_total discarded_bytes
    eager_bytes_total eager_calls_total freed_bytes_total generation
    held_slices_total interruptions_total invalidate_calls_total invalidate_failures_total
    kept_bytes_total lazy_bytes lazy_resident_bytes limit_events_total open_slices_total
    passing_slices_total pressure_events_total quiescent_generation ranges
    reclaimed_bytes_total reclaiming_bytes refilled_bytes_total reused_bytes_total
    reused_discarded_bytes_total reused_unmapped_bytes_total reuse_waits_total
    slice_ranges_total tracker_bytes unmapped_bytes unmapped_bytes_total
    free_pages.candidates_total free_pages.failures_total free_pages.kernel
    free_pages.missed_total free_pages.note_from free_pages.passing_total free_pages.pauses_total
    free_pages.resident_bytes free_pages.stale_total free_pages.taken_bytes_total
    free_pages.why_not
    gate.closings_total gate.kicks_total gate.longest_pause_us gate.longest_return_us
    gate.missed_total gate.pauses gate.pause_us_total gate.returns gate.waits_total
    hypercalls.arena_info_total hypercalls.failed_total hypercalls.features_total
    hypercalls.kernel_note_total hypercalls.lazy_free_batch_total hypercalls.lazy_free_total
    hypercalls.prefaulted_bytes_total hypercalls.prefault_failures_total
    hypercalls.query_total hypercalls.reset_total hypercalls.reuse_batch_total
    hypercalls.reuse_total
    reporting.bytes_total reporting.calls_total reporting.discarded_bytes_total
    reporting.failures_total reporting.marked_bytes_total reporting.messages_total
    reporting.mode reporting.poisoned_bytes_total reporting.ranges_total
    strict.device_violations_total strict.discard_failures_total strict.faults_total
    strict.vcpu_violations_total";

const ARENA: &str = "
    discarded_bytes gpa granule_bytes id lazy_bytes reclaimed_bytes_total reuse_calls_total
    reused_bytes_total reuse_waits_total scans_total scan_us size_bytes";

const DISK: &str = "
    discarded_bytes_total errors_total flushes_total id read_bytes_total reads_total
    throttled_total writes_total written_bytes_total zeroed_bytes_total";

const NET: &str = "
    id rx_bytes_total rx_dropped_total rx_packets_total throttled_total tx_bytes_total
    tx_dropped_total tx_packets_total";

const VSOCK: &str = "
    closed_total errors_total guest_connections_total host_connections_total refused_total
    rx_bytes_total rx_packets_total tx_bytes_total tx_packets_total";

const RNG: &str = "errors_total random_bytes_total requests_total throttled_total";

const BALLOON: &str = "
    actual_mib amount_mib deflate_on_oom free_page_reporting lazy stats_polling_interval_s";

const DRIVE: &str = "drive_id engine is_read_only path_on_host size_bytes";

/// What a balloon that runs itself answers with, too.
const AUTO: &str = "
    auto.deflations_total auto.doing auto.fault_backoffs_total auto.floor_mib auto.inflations_total
    auto.oom_backoffs_total auto.reserve_backoffs_total auto.reserve_mib auto.stuck_total
    auto.taken_back_total";

const STATISTICS: &str = "
    actual_mib actual_pages alloc_stall async_reclaim async_scan available_memory direct_reclaim
    direct_scan disk_caches free_memory hugetlb_allocations hugetlb_failures major_faults
    minor_faults oom_kill swap_in swap_out target_mib target_pages total_memory";

/// The paths of all values in `answer`; those of nested objects with dots.
fn names(answer: &impl Serialize) -> BTreeSet<String> {
    fn collect(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        let Value::Object(fields) = value else {
            into.insert(path.to_owned());
            return;
        };
        for (name, value) in fields {
            let dot = if path.is_empty() { "" } else { "." };
            collect(value, &format!("{path}{dot}{name}"), into);
        }
    }
    let mut found = BTreeSet::new();
    collect(&serde_json::to_value(answer).unwrap(), "", &mut found);
    found
}

fn expect(answer: &impl Serialize, expected: &str) {
    let expected: BTreeSet<_> = expected.split_whitespace().map(str::to_owned).collect();
    assert_eq!(names(answer), expected);
}

#[test]
fn the_names_of_lazy_memory() {
    let mut state = LazyMemoryState {
        strict: Some(Default::default()),
        ..LazyMemoryState::default()
    };
    expect(&state, LAZY_MEMORY);
    let value = serde_json::to_value(&state).unwrap();
    assert_eq!(value["gate"]["pauses"].as_array().unwrap().len(), 20);
    // Without strict mode there is no such object, not a null.
    state.strict = None;
    let all = LAZY_MEMORY.split_whitespace();
    let rest: Vec<_> = all.filter(|name| !name.starts_with("strict.")).collect();
    expect(&state, &rest.join(" "));
}

#[test]
fn every_metric_is_described() {
    let described = |request: &str| {
        let metrics = METRICS.iter().filter(move |metrics| metrics.0 == request);
        let named = metrics.flat_map(|(_, object, metrics)| {
            let dot = if object.is_empty() { "" } else { "." };
            metrics
                .iter()
                .map(move |metric| format!("{object}{dot}{}", metric.name))
        });
        named.collect::<Vec<_>>().join(" ")
    };
    let without = |names: &str, others: &[&str]| {
        let names = names
            .split_whitespace()
            .filter(|name| !others.contains(name));
        names.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let lazy = without(
        LAZY_MEMORY,
        &[
            "reporting.mode",
            "free_pages.kernel",
            "free_pages.note_from",
            "free_pages.why_not",
        ],
    );
    assert_eq!(without(&described("/lazy-memory"), &[]), lazy);
    let arena = without(ARENA, &["gpa", "granule_bytes", "id", "size_bytes"]);
    assert_eq!(without(&described("/arenas"), &[]), arena);
    let auto = without(AUTO, &["auto.doing", "auto.floor_mib", "auto.reserve_mib"]);
    assert_eq!(without(&described("/balloon"), &[]), auto);
}

#[test]
fn the_names_of_everything_else() {
    expect(&ArenaState::default(), ARENA);
    let devices = DevicesState {
        disks: vec![Default::default()],
        nets: vec![Default::default()],
        vsock: Some(Default::default()),
        rng: Some(Default::default()),
    };
    expect(&devices.disks[0], DISK);
    expect(&devices.nets[0], NET);
    expect(&devices.vsock, VSOCK);
    expect(&devices.rng, RNG);
    expect(&BalloonState::default(), BALLOON);
    let balloon = BalloonState {
        auto: Some(AutoBalloonState::default()),
        ..BalloonState::default()
    };
    expect(&balloon, &format!("{BALLOON} {AUTO}"));
    let doing = [BalloonDoing::Idle, BalloonDoing::NoStatistics];
    let doing = doing.map(|doing| serde_json::to_value(doing).unwrap());
    assert_eq!(doing, ["idle", "no_statistics"]);
    let modes = [
        ReportingMode::Off,
        ReportingMode::Eager,
        ReportingMode::Lazy,
    ];
    let modes = modes.map(|mode| serde_json::to_value(mode).unwrap());
    assert_eq!(modes, ["off", "eager", "lazy"]);
    let mut all = BalloonStatistics::default();
    for field in [
        &mut all.guest.swap_in,
        &mut all.guest.swap_out,
        &mut all.guest.major_faults,
        &mut all.guest.minor_faults,
        &mut all.guest.free_memory,
        &mut all.guest.total_memory,
        &mut all.guest.available_memory,
        &mut all.guest.disk_caches,
        &mut all.guest.hugetlb_allocations,
        &mut all.guest.hugetlb_failures,
        &mut all.guest.oom_kill,
        &mut all.guest.alloc_stall,
        &mut all.guest.async_scan,
        &mut all.guest.direct_scan,
        &mut all.guest.async_reclaim,
        &mut all.guest.direct_reclaim,
    ] {
        *field = Some(1);
    }
    expect(&all, STATISTICS);
    let none = BalloonStatistics::default();
    expect(&none, "actual_mib actual_pages target_mib target_pages");
    expect(
        &InstanceInfo {
            prefault: Some(Prefault::default()),
            ..InstanceInfo::default()
        },
        "app_name id output.console_dropped_bytes_total output.json_dropped_bytes_total
        output.log_dropped_bytes_total pid
        prefault.populated_bytes prefault.total_bytes state uptime_ms vmm_version",
    );
    expect(
        &ReclaimOutcome::default(),
        "cut_short duration_us reclaimed_bytes",
    );
    expect(&TeardownState::default(), "batch_bytes guardian workers");
}

#[test]
fn the_names_of_drives() {
    expect(
        &DriveState {
            drive_id: String::new(),
            path_on_host: "/".into(),
            is_read_only: false,
            size_bytes: 0,
            engine: DiskEngine::IoUring,
        },
        DRIVE,
    );
}
