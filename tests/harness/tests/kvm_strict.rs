//! Strict mode: guests that touch what they have freed lazily are caught in the act, the others are left in peace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_harness::Launch;
use ebb_harness::error::Result;
use ebb_harness::host::monitors;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_hypercall_abi::{Operation, PAGE_SIZE};
use ebb_payload::{Program, Transport, page, use_after_free};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
/// Pages that tests free.
const RANGE: u64 = page(1024);
/// Where tests put their blocks.
const BLOCK: u64 = page(0);
/// What guests have, and the same in files.
const MEMORY: &str = "size=64M";
const FILES: &str = "size=64M,shared=on";
/// No count is ever so big.
const NEVER: u64 = u64::MAX;

/// A monitor in strict mode with a payload for a guest.
struct Guest {
    folder: tempfile::TempDir,
    monitor: Child,
}

impl Guest {
    fn start(
        write: impl FnOnce(&std::path::Path) -> std::io::Result<()>,
        vcpus: u32,
        memory: &str,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("payload")).unwrap();
        let monitor = command(&folder, vcpus, memory)
            .stderr(fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Self { folder, monitor }
    }

    /// Runs `program`, which ends with waiting for ever, until it waits.
    fn run(program: Program) -> Self {
        Self::run_in(MEMORY, program)
    }

    fn run_in(memory: &str, mut program: Program) -> Self {
        let steps = program.results();
        program.query_until(BLOCK, 8, NEVER);
        let mut guest = Self::start(|path| program.write(path), 1, memory);
        let start = Instant::now();
        while guest.results().len() < steps {
            let ended = guest.monitor.try_wait().unwrap();
            assert_eq!(ended, None, "the monitor has ended: {}", guest.log());
            assert!(
                start.elapsed() < LIMIT,
                "{}: not within {LIMIT:?}{}",
                guest.log(),
                monitors()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        guest
    }

    fn results(&self) -> Vec<u64> {
        ebb_payload::results(&fs::read(self.folder.path().join("serial")).unwrap_or_default())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// The log's lines about strict mode.
    fn reports(&self) -> Vec<String> {
        let log = self.log();
        let lines = log.lines().filter_map(|line| line.split_once("strict: "));
        lines.map(|(_, report)| report.to_owned()).collect()
    }

    fn strict(&self) -> Value {
        let output = Command::new(ebb())
            .arg("ctl")
            .arg("--api-socket")
            .arg(self.folder.path().join("api"))
            .args(["status", "--json"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        status["lazy_memory"]["strict"].clone()
    }

    /// Violations by vCPUs, and by threads of the monitor.
    fn violations(&self) -> [u64; 2] {
        let strict = self.strict();
        ["vcpu_violations_total", "device_violations_total"]
            .map(|name| strict[name].as_u64().unwrap())
    }

    fn finish(mut self) -> Self {
        let start = Instant::now();
        loop {
            if let Some(status) = self.monitor.try_wait().unwrap() {
                assert_eq!(status.code(), Some(0), "{}", self.log());
                return self;
            }
            assert!(
                start.elapsed() < LIMIT,
                "{}: not within {LIMIT:?}{}",
                self.log(),
                monitors()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

fn ebb() -> PathBuf {
    std::env::var_os("EBB_BIN")
        .map(PathBuf::from)
        .expect("EBB_BIN names the monitor; run this through `cargo xtask test`")
}

fn arguments(folder: &tempfile::TempDir, vcpus: u32, memory: &str) -> Vec<String> {
    let path = |name| folder.path().join(name).display().to_string();
    let words = [
        "run",
        "--memory",
        memory,
        "--lazy",
        "strict=on",
        "--cpus",
        &format!("boot={vcpus}"),
        "--serial",
        &format!("file={}", path("serial")),
        "--kernel",
        &path("payload"),
        "--api-socket",
        &path("api"),
    ];
    words.map(str::to_owned).to_vec()
}

fn command(folder: &tempfile::TempDir, vcpus: u32, memory: &str) -> Command {
    let mut command = Command::new(ebb());
    let arguments = arguments(folder, vcpus, memory);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What this thread starts from now on runs on one processor. A fault wakes the watcher and then the vCPU: on an
/// emulated machine that is 0.3 ms on one processor, and many times that from one processor to another.
fn stay_on_one_processor() {
    let allowed = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu));
    let mut one = CpuSet::new();
    one.set(first.unwrap());
    sched_setaffinity(None, &one).unwrap();
}

#[test]
fn each_vcpu_is_caught_at_its_instruction_and_goes_on_with_zeroes() {
    let guest = Guest::start(use_after_free::write, 2, MEMORY).finish();
    assert_eq!(guest.results(), [0, 0], "the discarded pages read zeroes");
    let mut reports = guest.reports();
    reports.sort();
    let expected = |vcpu: usize, verb, rip: u64| {
        let page = use_after_free::PAGES[vcpu];
        format!(
            "vCPU {vcpu} at RIP {rip:#x} {verb} page {page:#x}, \
             which is lazily free: no REUSE since its LAZY_FREE"
        )
    };
    let mut wanted: Vec<_> = [0, 1]
        .into_iter()
        .flat_map(|vcpu| {
            [
                expected(vcpu, "reads", use_after_free::load_site()),
                expected(vcpu, "writes to", use_after_free::store_site()),
            ]
        })
        .collect();
    wanted.sort();
    assert_eq!(reports, wanted, "{}", guest.log());
}

#[test]
fn a_guest_that_obeys_is_not_reported() {
    let mut program = Program::kernel();
    for round in 1..4 {
        program.fill(RANGE, 512, round);
        program.call(Transport::Port, Operation::LazyFree, RANGE, 512);
        program.call(Transport::Port, Operation::Reuse, RANGE, 256);
        program.fill(RANGE, 256, round);
        program.call(Transport::Port, Operation::Reuse, RANGE, 512);
        program.count_equal(RANGE, 512, 0);
    }
    program.call(Transport::Port, Operation::LazyFree, RANGE, 512);
    program.call(Transport::Port, Operation::Reset, 0, 1);
    program.fill(RANGE, 512, 1);
    let guest = Guest::run(program);
    assert_eq!(guest.results()[5], 256, "what was freed and reused is zero");
    assert_eq!(guest.violations(), [0, 0]);
    assert_eq!(guest.reports(), [""; 0]);
    assert!(guest.strict()["faults_total"].as_u64() >= Some(512));
}

#[test]
fn a_storm_is_counted_by_the_page_and_floods_no_log() {
    const PAGES: u64 = 2000;
    stay_on_one_processor();
    let mut program = Program::kernel();
    program.fill(RANGE, PAGES, 1);
    program.call(Transport::Port, Operation::LazyFree, RANGE, PAGES);
    let zero = program.count_equal(RANGE, PAGES, 0);
    program.fill(RANGE, PAGES, 2);
    let kept = program.count_filled(RANGE, PAGES, 2);
    let start = Instant::now();
    let guest = Guest::run(program);
    let seconds = start.elapsed().as_secs();
    let results = guest.results();
    assert_eq!((results[zero], results[kept]), (PAGES, PAGES));
    assert_eq!(guest.violations(), [PAGES, 0], "each page once");
    let lines = guest.reports().len() as u64;
    assert!(
        (8..=10 + seconds).contains(&lines),
        "{lines} in {seconds} s"
    );
}

#[test]
fn a_page_that_is_freed_again_is_caught_again() {
    for memory in [MEMORY, FILES] {
        let mut program = Program::kernel();
        for _ in 0..3 {
            program.call(Transport::Port, Operation::LazyFree, RANGE, 1);
            program.load(RANGE);
            program.store(RANGE, 9);
        }
        let guest = Guest::run_in(memory, program);
        let loaded: Vec<_> = guest.results().into_iter().skip(1).step_by(3).collect();
        assert_eq!(loaded, [0; 3], "{memory}");
        assert_eq!(guest.violations(), [3, 0], "{memory}");
    }
}

#[test]
fn the_monitor_that_touches_freed_memory_for_the_guest_is_named() {
    let mut program = Program::kernel();
    let block = page(8);
    program.words(block, &[RANGE, 1]);
    program.call(Transport::Port, Operation::LazyFree, block, 1);
    let query = program.call(Transport::Port, Operation::Query, block, 1);
    let guest = Guest::run(program);
    assert_eq!(
        guest.results()[query],
        0,
        "a block of zeroes is a query of nothing"
    );
    assert_eq!(guest.violations(), [0, 1]);
    let report = format!("device: the thread ebb-vcpu0 reads page {block:#x}");
    assert!(guest.reports()[0].starts_with(&report), "{}", guest.log());
}

/// The stock driver keeps its promise, so strict mode is silent; and the guest, with its interrupts and its sleep, runs.
#[test]
fn a_stock_guest_with_a_balloon_is_not_reported() -> Result<()> {
    const BALLOON: u64 = 8 * MIB;
    stay_on_one_processor();
    let launch = Launch::new()?
        .memory("size=192M")
        .option("--balloon", "size=0,free_page_reporting=on")
        .option("--lazy", "strict=on");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let checksum = guest.checksum("keep 8M")?;
    for _ in 0..2 {
        api.set_balloon(BALLOON)?;
        until("the balloon is full", LONG, || {
            Ok((api.lazy()?["discarded_bytes"] == BALLOON).then_some(()))
        })?;
        api.set_balloon(0)?;
        until("the balloon is empty", LONG, || {
            Ok((api.lazy()?["discarded_bytes"] == 0).then_some(()))
        })?;
    }
    guest.ask("fill 8M")?;
    guest.ask("drop")?;
    assert_eq!(guest.checksum("verify")?, checksum);
    let strict = api.lazy()?.part("strict");
    assert!(strict["faults_total"] > BALLOON / PAGE_SIZE, "{strict:?}");
    assert_eq!(strict["vcpu_violations_total"], 0, "{}", monitor.log());
    assert_eq!(strict["device_violations_total"], 0, "{}", monitor.log());
    println!("{} faults in {:?}", strict["faults_total"], monitor.age());
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Without the right to watch the kernel's faults there is no strict mode, and the launch says what to do.
#[test]
fn a_host_that_does_not_permit_it_is_told_about() {
    const DEVICE: &str = "/dev/userfaultfd";
    let folder = tempfile::tempdir().unwrap();
    Program::kernel()
        .write(&folder.path().join("payload"))
        .unwrap();
    let mode = fs::metadata(DEVICE).map(|device| device.permissions());
    if mode.is_ok() {
        fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let output = Command::new("setpriv")
        .args([
            "--bounding-set",
            "-sys_ptrace,-dac_override,-dac_read_search",
        ])
        .arg(ebb())
        .args(arguments(&folder, 1, MEMORY))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if let Ok(mode) = mode {
        fs::set_permissions(DEVICE, mode).unwrap();
    }
    assert_eq!(output.status.code(), Some(35), "{output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    for word in [
        "--lazy strict=on",
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd=1",
    ] {
        assert!(stderr.contains(word), "{stderr}");
    }
}
