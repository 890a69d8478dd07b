//! The guest's calls, made by real guests through real exits: tiny payloads, no kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ebb_harness::host::monitors;
use ebb_hypercall_abi::block::BATCH_MAX;
use ebb_hypercall_abi::discovery::CPUID_BASE;
use ebb_hypercall_abi::status::LAST_RANGE;
use ebb_hypercall_abi::{Attributes, Error, Features, Flags, Interface, Operation, PAGE_SIZE};
use ebb_payload::{Program, RESULT_SIZE, Register, Transport, batch, page};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Where tests put their blocks.
const BLOCK: u64 = page(0);
/// Pages that tests free.
const RANGE: u64 = page(1024);

const INVALID: u64 = Error::Invalid as i64 as u64;
const FAULT: u64 = Error::Fault as i64 as u64;
const NO_SUCH_CALL: u64 = Error::NoSuchCall as i64 as u64;
const PERMISSION: u64 = Error::Permission as i64 as u64;
const LAST: u64 = LAST_RANGE as u64;

/// A guest that runs.
struct Guest {
    folder: tempfile::TempDir,
    monitor: Child,
    results: usize,
}

impl Guest {
    fn start(program: &Program, memory: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        program.write(&path("payload")).unwrap();
        let serial = format!("file={}", path("serial").display());
        let monitor = Command::new(ebb())
            .args(["run", "--memory", memory, "--serial", &serial, "--kernel"])
            .arg(path("payload"))
            .arg("--api-socket")
            .arg(path("api"))
            .stderr(fs::File::create(path("log")).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            folder,
            monitor,
            results: program.results(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn results(&self) -> Vec<u64> {
        ebb_payload::results(&fs::read(self.path("serial")).unwrap_or_default())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits until the guest has made `steps` steps.
    fn wait_for(&mut self, steps: usize) {
        self.wait_until(|guest| {
            let size = fs::metadata(guest.path("serial")).map_or(0, |file| file.len());
            size >= (steps * RESULT_SIZE) as u64
        });
    }

    fn wait_until(&mut self, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let ended = self.monitor.try_wait().unwrap();
            assert_eq!(ended, None, "the monitor has ended: {}", self.log());
            assert!(
                start.elapsed() < LIMIT,
                "results {:x?}: not within {LIMIT:?}{}",
                self.results(),
                monitors()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn ctl(&self, words: &[&str]) -> String {
        let output = Command::new(ebb())
            .args(["ctl", "--api-socket"])
            .arg(self.path("api"))
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn lazy_memory(&self) -> Value {
        let status: Value = serde_json::from_str(&self.ctl(&["status", "--json"])).unwrap();
        status["lazy_memory"].clone()
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.monitor.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < LIMIT,
                "results {:x?}: not within {LIMIT:?}{}",
                self.results(),
                monitors()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the guest to power off; its results.
    fn finish(&mut self) -> Vec<u64> {
        let status = self.end();
        assert_eq!(status.code(), Some(0), "{}", self.log());
        let results = self.results();
        assert_eq!(results.len(), self.results);
        results
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

fn run(program: &Program) -> Vec<u64> {
    Guest::start(program, "size=64M").finish()
}

/// What a guest finds here.
fn interface() -> Interface {
    static FOUND: OnceLock<Interface> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let mut program = Program::kernel();
        for leaf in [CPUID_BASE, CPUID_BASE + 1] {
            for register in [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx] {
                program.cpuid(leaf, register);
            }
        }
        let found = run(&program);
        let leaf = |first: usize| std::array::from_fn(|n| found[first + n] as u32);
        Interface::discover(|number| match number {
            CPUID_BASE => leaf(0),
            _ => leaf(4),
        })
        .expect("the guest finds the interface")
    })
}

/// The instruction that works here, and the port.
fn transports() -> Vec<Transport> {
    let features = interface().features;
    let offers = [
        (Features::VMCALL, Transport::Vmcall),
        (Features::VMMCALL, Transport::Vmmcall),
        (Features::PORT, Transport::Port),
    ];
    offers
        .into_iter()
        .filter(|(feature, _)| features.contains(*feature))
        .map(|(_, transport)| transport)
        .collect()
}

#[test]
fn cpuid_promises_what_works() {
    let Interface {
        features,
        batch_max,
        ..
    } = interface();
    assert_eq!(batch_max, BATCH_MAX);
    for feature in [
        Features::LAZY,
        Features::BATCH,
        Features::QUERY,
        Features::PREFAULT,
    ] {
        assert!(features.contains(feature), "{features:?}");
    }
    // Stock KVM since Linux 5.14 lets hypercalls through.
    let transports = transports();
    assert_eq!(transports.len(), 2, "{features:?}");
    let mut program = Program::kernel();
    for by in transports {
        program.call(by, Operation::Features, 0, 1);
        program.call(by, Operation::ArenaInfo, 0, 1);
    }
    let bits = u64::from(features.bits());
    assert_eq!(run(&program), [bits, NO_SUCH_CALL, bits, NO_SUCH_CALL]);
}

#[test]
fn every_operation_works_by_every_transport() {
    for by in transports() {
        let mut program = Program::kernel();
        program.words(BLOCK, &batch(&[(RANGE, 4), (RANGE + 64 * PAGE_SIZE, 4)]));
        let query = page(8);
        program.words(query, &[RANGE, 80]);
        let mut expected = Vec::new();
        let mut expect = |_: usize, value: u64| expected.push(value);
        let p = &mut program;
        expect(p.fill(RANGE, 100, 7), 0);
        expect(p.call(by, Operation::LazyFree, RANGE, 10), 0);
        expect(
            p.call(by, Operation::LazyFree, RANGE + 5 * PAGE_SIZE, 10),
            0,
        );
        expect(p.call(by, Operation::Query, query, 1), 0);
        expect(p.load(query + 2 * 8), 80); // examined
        expect(p.load(query + 3 * 8), 15); // lazy
        expect(p.load(query + 6 * 8), 15); // lazy in the machine
        expect(p.load(query + 9 * 8), 1); // ranges
        expect(p.load(query + 10 * 8), 2); // generation
        expect(p.call(by, Operation::Reuse, RANGE + PAGE_SIZE, 1), 0);
        expect(p.call(by, Operation::Reuse, RANGE, 100), LAST);
        expect(p.call(by, Operation::Reuse, RANGE, 100), LAST);
        // Nobody wanted the memory meanwhile.
        expect(p.count_filled(RANGE, 100, 7), 100);
        expect(p.call(by, Operation::LazyFreeBatch, BLOCK, 1), 0);
        expect(p.load(BLOCK), 2 | 2 << 32);
        expect(p.call(by, Operation::ReuseBatch, BLOCK, 1), LAST);
        expect(p.call(by, Operation::LazyFree, RANGE, 10), 0);
        expect(p.call(by, Operation::Reset, 0, 1), LAST);
        expect(p.call(by, Operation::Query, query, 1), 0);
        expect(p.load(query + 6 * 8), 0);
        let prefault = Attributes::new(Operation::Reuse).with(Flags::PREFAULT);
        expect(p.raw_call(by, 48 * MIB, 256, prefault.encode()), LAST);
        expect(p.count_equal(48 * MIB, 256, 0), 256);
        assert_eq!(run(&program), expected, "{by:?}");
    }
}

#[test]
fn reclaimed_pages_read_zeroes_and_their_neighbours_keep_their_content() {
    let by = transports()[0];
    let mut program = Program::kernel();
    program.words(BLOCK, &[RANGE, 0]);
    program.fill(RANGE, 1024, 7);
    program.call(by, Operation::LazyFree, RANGE + 256 * PAGE_SIZE, 512);
    let freed = program.query_until(BLOCK, 8, 512);
    let reuse = program.call(by, Operation::Reuse, RANGE + 256 * PAGE_SIZE, 512);
    let zero = program.count_equal(RANGE, 1024, 0);
    let kept = program.count_filled(RANGE, 1024, 7);
    let again = program.fill(RANGE, 1024, 9);
    let written = program.count_filled(RANGE, 1024, 9);
    let mut guest = Guest::start(&program, "size=64M,thp=off");
    guest.wait_for(freed);
    guest.ctl(&["reclaim", "64M"]);
    let results = guest.finish();
    assert_eq!((results[freed], results[reuse]), (0, LAST));
    assert_eq!((results[zero], results[kept]), (512, 512));
    assert_eq!((results[again], results[written]), (0, 1024));
}

/// A machine with a hole below 4 GiB.
const WITH_HOLE: &str = "size=3136M,thp=off";
const HOLE: u64 = 3 << 30;
const END: u64 = (4 << 30) + 64 * MIB;

#[test]
fn hostile_ranges_are_refused_by_every_transport() {
    let ranges = [
        (END, 1),                               // out of range
        (1 << 51, 1),                           // no such address
        (HOLE, 1),                              // in the hole
        (0xfee0_0000, 1),                       // the local APIC
        (HOLE - PAGE_SIZE, 2),                  // straddling the end of a region
        (HOLE - PAGE_SIZE, 1 << 20),            // over the hole
        (END - PAGE_SIZE, 2),                   // straddling the end of all
        (RANGE, 0),                             // empty
        (0, u64::MAX),                          // longer than addresses are
        (RANGE, u64::MAX),                      // wraps in pages
        (RANGE, (1 << 52) - RANGE / PAGE_SIZE), // wraps in bytes
        (0u64.wrapping_sub(PAGE_SIZE), 1),      // ends at the last address
        (RANGE + 1, 1),                         // not aligned
        (RANGE + 0xfff, 1),                     // not aligned
    ];
    let mut program = Program::kernel();
    let mut expected = Vec::new();
    for by in transports() {
        for (gpa, pages) in ranges {
            for operation in [Operation::LazyFree, Operation::Reuse] {
                program.call(by, operation, gpa, pages);
                expected.push((INVALID, format!("{by:?} {operation:?} {gpa:#x} {pages:#x}")));
            }
        }
        for attributes in [0, 0x10, 0xebb0_0000, 0xebb0_0a00, 1 << 63 | 0xebb0_0200] {
            program.raw_call(by, RANGE, 1, attributes);
            expected.push((NO_SUCH_CALL, format!("{by:?} attributes {attributes:#x}")));
        }
        for attributes in [0xebb1_0200, 0xebb0_0201, 0xebbf_0300] {
            program.raw_call(by, RANGE, 1, attributes);
            expected.push((INVALID, format!("{by:?} attributes {attributes:#x}")));
        }
        for operation in [
            Operation::LazyFreeBatch,
            Operation::ReuseBatch,
            Operation::Query,
        ] {
            program.call(by, operation, END, 1);
            expected.push((FAULT, format!("{by:?} {operation:?} block outside")));
        }
        program.call(by, Operation::LazyFreeBatch, HOLE - PAGE_SIZE, 2);
        expected.push((FAULT, format!("{by:?} block over a region's end")));
    }
    // Nothing has become lazy; the ends of both regions may.
    program.call(Transport::Port, Operation::Query, BLOCK, 1);
    program.load(BLOCK + 6 * 8);
    expected.extend([(0, "query".into()), (0, "lazy pages".into())]);
    for (gpa, status) in [(HOLE - PAGE_SIZE, 0), (END - PAGE_SIZE, 0)] {
        program.call(Transport::Port, Operation::LazyFree, gpa, 1);
        expected.push((status, format!("last page before {gpa:#x}")));
    }
    let results = Guest::start(&program, WITH_HOLE).finish();
    for (result, (status, what)) in results.into_iter().zip(expected) {
        assert_eq!(result as i64, status as i64, "{what}");
    }
}

#[test]
fn a_bad_batch_reports_how_far_it_came() {
    for by in transports() {
        let mut program = Program::kernel();
        let good = (RANGE, 4);
        let over = (RANGE + 2 * PAGE_SIZE, 4);
        program.words(
            page(0),
            &batch(&[good, over, good, (RANGE + 1, 1), (page(2048), 1)]),
        );
        program.words(page(4), &batch(&[(1, 1), good]));
        program.words(page(8), &[256]);
        program.words(page(12), &[0]);
        program.words(page(16), &[1 << 31]);
        let mut expected = Vec::new();
        for (block, status, header) in [
            (page(0), INVALID, 5 | 3 << 32),
            (page(4), INVALID, 2),
            (page(8), INVALID, 256),
            (page(12), INVALID, 0),
            (page(16), INVALID, 1 << 31),
        ] {
            program.call(by, Operation::LazyFreeBatch, block, 1);
            program.load(block);
            expected.extend([status, header]);
        }
        program.call(by, Operation::LazyFreeBatch, page(0), 5);
        expected.push(INVALID);
        // Six pages in one range, once.
        program.call(by, Operation::Query, page(20), 1);
        program.load(page(20) + 6 * 8);
        program.load(page(20) + 9 * 8);
        expected.extend([0, 6, 1]);
        assert_eq!(run(&program), expected, "{by:?}");
    }
}

#[test]
fn user_mode_may_call_by_port_but_not_by_instruction() {
    let mut program = Program::user();
    let mut expected = Vec::new();
    for by in transports() {
        program.call(by, Operation::LazyFree, RANGE, 4);
        program.call(by, Operation::Reuse, RANGE, 4);
        expected.extend(match by {
            Transport::Port => [0, LAST],
            _ => [PERMISSION; 2],
        });
    }
    assert_eq!(run(&program), expected);
}

#[test]
fn other_accesses_to_the_port_are_no_calls() {
    let mut program = Program::kernel();
    program.input_byte();
    program.output(0xebb0_0200);
    program.call(Transport::Port, Operation::Query, BLOCK, 1);
    program.load(BLOCK + 6 * 8);
    assert_eq!(run(&program), [0xff, 0xebb0_0200, 0, 0]);
}

#[test]
fn a_guest_that_frees_itself_hurts_only_itself() {
    let mut program = Program::kernel();
    program.words(BLOCK, &[0, 0]);
    let free = program.call(
        transports()[0],
        Operation::LazyFree,
        0,
        64 * MIB / PAGE_SIZE,
    );
    program.query_until(BLOCK, 8, u64::MAX);
    let mut guest = Guest::start(&program, "size=64M,thp=off");
    guest.wait_for(free + 1);
    guest.ctl(&["reclaim", "64M"]);
    let status = guest.end();
    assert_eq!(status.code(), Some(33), "{}", guest.log());
}

#[test]
fn a_fragmented_storm_is_tracked() {
    const BLOCKS: u64 = 64;
    let mut program = Program::kernel();
    for block in 0..BLOCKS {
        let ranges: Vec<_> = (0..u64::from(BATCH_MAX))
            .map(|n| (page(4096 + 2 * (block * u64::from(BATCH_MAX) + n)), 1))
            .collect();
        program.words(page(4 * block), &batch(&ranges));
        program.call(
            transports()[0],
            Operation::LazyFreeBatch,
            page(4 * block),
            4,
        );
    }
    let last = page(4 * (BLOCKS - 1));
    let done = program.load(last);
    program.words(page(1000), &[page(4096), 120_000]);
    program.call(Transport::Port, Operation::Query, page(1000), 1);
    let examined = program.load(page(1000) + 2 * 8);
    let lazy = program.load(page(1000) + 3 * 8);
    let reset = program.call(Transport::Port, Operation::Reset, 0, 1);
    let mut guest = Guest::start(&program, "size=1G,thp=off");
    let results = guest.finish();
    let batches = &results[..BLOCKS as usize];
    assert!(batches.iter().all(|&status| status == 0), "{batches:x?}");
    assert_eq!(results[done], u64::from(BATCH_MAX) * (1 | 1 << 32));
    assert_eq!(results[examined], 120_000);
    assert_eq!(results[lazy], 60_000, "every other page");
    assert_eq!(results[reset], LAST);
}

#[test]
fn a_storm_of_calls_floods_no_log_and_grows_nothing() {
    const CALLS: u64 = 20_000;
    let mut program = Program::kernel();
    let invalid = [RANGE + 1, 1, Attributes::new(Operation::LazyFree).encode()];
    let unknown = [RANGE, 1, 0x10];
    let free = [RANGE, 16, Attributes::new(Operation::LazyFree).encode()];
    for by in transports() {
        program.repeated_call(by, unknown, 100);
        let warm = program.repeated_call(by, free, 100);
        assert_eq!(warm % 4, 1);
        program.repeated_call(by, unknown, CALLS);
        program.repeated_call(by, free, CALLS);
    }
    program.repeated_call(Transport::Port, invalid, CALLS);
    // The guest lingers so that the monitor can be looked at.
    program.words(BLOCK, &[RANGE, 0]);
    program.query_until(BLOCK, 8, 16);
    let steps = program.results() - 1;
    let mut guest = Guest::start(&program, "size=64M,thp=off");
    guest.wait_for(2);
    let (before, start) = (resident_anonymous(&guest), Instant::now());
    guest.wait_for(steps);
    let (after, time) = (resident_anonymous(&guest), start.elapsed());
    assert!(after <= before + MIB, "{before} bytes, then {after}");
    let lazy = guest.lazy_memory();
    let calls = transports().len() as u64;
    assert_eq!(lazy["hypercalls"]["lazy_free_total"], calls * (CALLS + 100));
    assert_eq!(lazy["ranges"], 1);
    // The guest is making queries just now, and the counters are those of a running machine.
    let count = |state: &Value, name: &str| state["hypercalls"][name].as_u64().unwrap();
    assert_eq!(count(&lazy, "failed_total"), calls * (CALLS + 100) + CALLS);
    let later = guest.lazy_memory();
    assert!(
        count(&later, "query_total") > count(&lazy, "query_total"),
        "{later}"
    );
    guest.ctl(&["reclaim", "64M"]);
    guest.finish();
    let lines = guest.log().lines().count() as u64;
    assert!(
        lines <= 10 + 2 * time.as_secs(),
        "{lines} lines in {time:?}"
    );
}

/// Memory of the monitor that is its own, in bytes; the guest touches nothing new meanwhile.
fn resident_anonymous(guest: &Guest) -> u64 {
    let path = format!("/proc/{}/status", guest.monitor.id());
    let status = fs::read_to_string(Path::new(&path)).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn calls_cost_little_more_than_an_empty_exit() {
    const CALLS: u64 = 5_000;
    let mut program = Program::kernel();
    let features = [0, 1, Attributes::new(Operation::Features).encode()];
    let reuse = [RANGE, 1, Attributes::new(Operation::Reuse).encode()];
    let mut times = vec![program.time()];
    for by in transports() {
        for arguments in [features, reuse] {
            program.repeated_call(by, arguments, CALLS);
            times.push(program.time());
        }
    }
    let results = run(&program);
    let cycles: Vec<u64> = times
        .windows(2)
        .map(|pair| (results[pair[1]] - results[pair[0]]) / CALLS)
        .collect();
    println!(
        "cycles a call: {cycles:?} (FEATURES and REUSE by {:?})",
        transports()
    );
    // FEATURES does next to nothing. A loose bound: other tests run beside this one, and the benchmark is
    // the place for a close one.
    for pair in cycles.chunks(2) {
        assert!(pair[1] < pair[0] * 4, "{cycles:?}");
    }
}
