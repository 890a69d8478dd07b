//! Programs of a Debian guest with their heap in an arena, while the monitor takes all that is free, all the time.

use ebb_harness::Monitor;
use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::rss;
use ebb_harness::wait::{LONG, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn arena(monitor: &Monitor) -> Result<Value> {
    let output = monitor.ctl(&["status", "--json"])?;
    let status: Value = serde_json::from_slice(&output.stdout).context("json")?;
    Ok(status["arenas"][0].clone())
}

/// What is hard for a heap in an arena (`ebb-cases`); with `no fork` where the case forks.
const CASES: [(&str, &str); 11] = [
    ("forks", ", no fork"),
    ("stdio", ", no fork"),
    ("signal-stacks", ", no fork"),
    ("protect", ", no fork"),
    ("vfork", ", no fork"),
    ("without-main", ", no fork"),
    ("ring", ", no fork"),
    ("lock-all", ", no fork"),
    ("dont-need", ""),
    ("children", ""),
    ("chroot", ", no fork"),
];

#[test]
fn programs_keep_their_heaps_while_the_host_takes_what_is_free() -> Result<()> {
    let mut debian = Debian::start(2)?;
    let perl = r#"perl -e 'my @a = map { "x" x 1000 . $_ } 1..5000; for my $n (1..3) { $a[$_] .= "p" for 0..4999 } print scalar(grep { $a[$_] ne ("x" x 1000 . ($_ + 1) . "ppp") } 0..4999), " wrong"'"#;
    let ((blocks, perl, redis), asked) = debian.under_reclaim(|debian| {
        Ok((
            debian.run_on_arena("/tmp/ebb-blocks 2 300")?,
            debian.run_on_arena(perl)?,
            debian.run("bash /tmp/redis.sh 20000")?,
        ))
    })?;
    println!("{asked} requests");
    assert_eq!(blocks, "blocks: 300 rounds of 2 threads");
    assert_eq!(perl, "0 wrong");
    assert_eq!(redis, "wrong: heap 0 saved 0 refilled 0");
    assert!(asked > 3, "{asked}");
    let state = arena(&debian.monitor)?;
    let reclaimed = state["reclaimed_bytes_total"]
        .as_u64()
        .context("a counter")?;
    assert!(reclaimed >= 64 * MIB, "{state}");
    debian.end()
}

#[test]
fn programs_do_what_is_hard_for_a_heap_in_an_arena() -> Result<()> {
    let mut debian = Debian::start(2)?;
    debian.under_reclaim(|debian| {
        for (case, fork) in CASES {
            let said = debian.run_on_arena(&format!("/tmp/ebb-cases {case}"))?;
            assert!(said.contains(&format!("{case}: right{fork}")), "{said}");
            let words = said.matches("ebb-malloc: ").count();
            assert_eq!(words, usize::from(!fork.is_empty()), "{said}");
        }
        // A filter of system calls that ends whoever calls ioperm, inherited and of the program's own.
        let said = debian.run_on_arena("/tmp/ebb-cases filtered")?;
        assert!(said.contains("forks: right, no fork"), "{said}");
        // A program that may fork has normal memory.
        let said = debian.run("/tmp/ebb-guest run -- /tmp/ebb-cases forks stdio")?;
        assert!(said.starts_with("ebb-guest run: normal memory: "), "{said}");
        assert!(said.ends_with("forks: right\\nstdio: right"), "{said}");
        Ok(())
    })?;
    debian.end()
}

/// Words say that the monitor is taking each granule, for ever: a process that only waited would never end.
#[test]
fn whoever_meets_a_granule_that_is_being_taken_calls_the_monitor() -> Result<()> {
    let mut debian = Debian::start(1)?;
    let script = r#"import mmap, struct
with open("/dev/dax0.0", "r+b") as device, mmap.mmap(device.fileno(), 8 << 30) as arena:
    granules, first, table = struct.unpack_from("<QQQ", arena, 32)
    for index in range(first, granules):
        struct.pack_into("<Q", arena, table + 8 * index, 2)"#;
    let path = Debian::path("/tmp/taking.py");
    debian.guest.must(&format!(
        "printf '%b' '{}' >{path}",
        script.replace('\n', "\\n")
    ))?;
    debian.run("python3 /tmp/taking.py")?;
    let said = debian.run("/tmp/ebb-guest bench /dev/dax0.0 pairs 0.1")?;
    assert!(said.starts_with("bench: pairs="), "{said}");
    let state = arena(&debian.monitor)?;
    assert_eq!(state["reuse_calls_total"], 1, "{state}");
    debian.end()
}

#[test]
fn the_host_gets_a_programs_memory_when_it_frees_it_and_when_it_ends() -> Result<()> {
    let mut debian = Debian::start(2)?;
    let (pid, api) = (debian.monitor.pid(), debian.monitor.api());
    let root = Debian::path("");
    let script = r#"my $x = "x" x (200 << 20); my $y = "y" x (150 << 20); undef $x; open(F, ">/tmp/freed"); close F; sleep 1 while !-e "/tmp/go"; print length $y"#;
    let guest = &mut debian.guest;
    guest.must(&format!(
        "(chroot {root} /tmp/ebb-guest run --no-fork -- perl -e '{script}' >{root}/tmp/said 2>&1) &"
    ))?;
    until("the program frees", LONG, || {
        let (status, _) = guest.shell(&format!("test -e {root}/tmp/freed"))?;
        Ok((status == "0").then_some(()))
    })?;
    let full = rss(pid)?;
    api.reclaim(8 << 30)?;
    let freed = rss(pid)?;
    assert!(full - freed > 150 * MIB, "{full} bytes, then {freed}");
    // As a supervisor does, to all that belongs to the program: who frees what it leaves lives on.
    guest.must(
        "for c in /proc/[0-9]*/cmdline; do if grep -q '^/tmp/ebb-guest' $c; then c=${c#/proc/}; kill ${c%/cmdline}; fi; done",
    )?;
    guest.must(&format!("touch {root}/tmp/go"))?;
    // What the program had in use is free when it has ended.
    until("the rest", LONG, || {
        api.reclaim(8 << 30)?;
        Ok((freed.saturating_sub(rss(pid)?) > 100 * MIB).then_some(()))
    })?;
    assert_eq!(guest.must(&format!("cat {root}/tmp/said"))?, "157286400");
    debian.end()
}
