//! Programs as they are, with their heap in an arena: a file stands for the device, and a thread for the monitor.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ebb_guest_agent::arena::{Arena, GranuleCounts};
use ebb_hypercall_abi::arena::{Header, Layout};
use ebb_hypercall_abi::granule::Word;
use rustix::mm::{MapFlags, ProtFlags, mmap};

const GRANULE: u64 = 2 << 20;
const MIB: u64 = 1 << 20;

/// An arena in a file.
struct Device(tempfile::NamedTempFile, Layout);

impl Device {
    fn new(size: u64) -> Self {
        // Where it is memory.
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let layout = Layout::new(size, GRANULE).unwrap();
        file.as_file().set_len(size).unwrap();
        let header = Header::new(layout, 0, 4 << 30, "test").to_words();
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        Self(file, layout)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Its granules when all processes have ended and their slots were tidied up.
    fn counts(&self) -> GranuleCounts {
        let arena = Arena::open(self.path()).unwrap();
        arena.recover().unwrap();
        arena.counts()
    }

    /// Takes whatever is free, as the monitor does, and leaves zeroes; how many granules.
    fn reclaim(&self, done: &AtomicBool) -> u64 {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.path())
            .unwrap();
        let (prot, len) = (ProtFlags::READ | ProtFlags::WRITE, self.1.size() as usize);
        // SAFETY: a new mapping where the kernel finds room; it stays until the process ends.
        let base: *mut u8 =
            unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0).unwrap() }
                .cast();
        let mut taken = 0;
        while !done.load(Ordering::Relaxed) {
            for index in self.1.first()..self.1.granules() {
                let word = self.1.table() + index * 8;
                // SAFETY: inside the mapping and aligned; all sides use atomics.
                let word = unsafe { AtomicU64::from_ptr(base.add(word as usize).cast()) };
                let old = word.load(Ordering::Acquire);
                let Some(mine) = Word::from_raw(old).take() else {
                    continue;
                };
                let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
                if word
                    .compare_exchange(old, mine.raw(), success, failure)
                    .is_ok()
                {
                    // SAFETY: a granule that is ours while it is being discarded.
                    unsafe {
                        base.add((index * GRANULE) as usize)
                            .write_bytes(0, GRANULE as usize)
                    };
                    word.store(mine.finish(true).unwrap().raw(), Ordering::Release);
                    taken += 1;
                }
            }
            thread::yield_now();
        }
        taken
    }

    /// Runs a program that never forks while whatever it frees is taken; what it printed, and how many granules were taken.
    fn run(&self, words: &[&str]) -> (Output, u64) {
        let (done, mut program) = (AtomicBool::new(false), never_forks(words));
        thread::scope(|scope| {
            let monitor = scope.spawn(|| self.reclaim(&done));
            let output = program.env("EBB_ARENA", self.path()).output();
            done.store(true, Ordering::Relaxed);
            (output.unwrap(), monitor.join().unwrap())
        })
    }
}

/// The folder of the release binaries.
fn products() -> PathBuf {
    let monitor = std::env::var_os("EBB_BIN").expect("run this through `cargo xtask test`");
    Path::new(&monitor).parent().unwrap().to_owned()
}

/// A program with the library, of which nobody has said that it never forks.
fn preloaded(words: &[&str]) -> Command {
    let library = products().join("libebb_malloc.so");
    assert!(library.exists(), "{}", library.display());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("LD_PRELOAD", library);
    command.env_remove("EBB_ARENA");
    command
}

/// A program with the library that says that it never forks, as `ebb-guest run --no-fork` starts it.
fn never_forks(words: &[&str]) -> Command {
    let shell = ["sh", "-c", r#"EBB_QUIET= EBB_NO_FORK=$$ exec "$@""#, "sh"];
    let mut command = preloaded(&[&shell[..], words].concat());
    // For the shell itself.
    command.env("EBB_QUIET", "1");
    command
}

/// A release binary of ours.
fn our(name: &str) -> String {
    products().join(name).to_str().unwrap().to_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Asserts that a program succeeded without a word of ours; what it printed.
fn passed(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stderr), "");
    text(&output.stdout)
}

/// jemalloc's arena 0 holds normal memory from before the heap was installed. A thread on it would fault for each block.
#[test]
fn every_thread_reuses_what_it_freed_without_a_fault() {
    let device = Device::new(1024 * MIB);
    let mut program = never_forks(&[&our("ebb-churn"), "3", "2"]);
    let program = program.env("EBB_ARENA", device.path());
    let said = passed(&program.output().unwrap());
    let mut words = said.split_whitespace();
    let faults = words.find_map(|word| word.strip_prefix("faults="));
    let faults: u64 = faults.unwrap().parse().unwrap();
    // Each page faults once, however long it runs: about 22,000 in all. With one thread on arena 0 it is 45,000 in 2 s.
    assert!(faults < 30_000, "{said}");
    // Nor would a program fault much whose heap is not in the arena.
    let counts = device.counts();
    assert!(counts.lazy > 10, "{counts:?}");
}

/// What a thread keeps for later would keep most granules in use, as Redis does after FLUSHALL.
#[test]
fn a_heap_that_is_emptied_in_no_order_is_free_before_the_program_does_anything_else() {
    let device = Device::new(1024 * MIB);
    let script = r#"use List::Util "shuffle"; my @order = shuffle(0..39999); my @a = map { "$_" } @order;
        $a[$_] = "x" x (5000 + $_ % 7) for 0..39999; undef $a[$_] for @order; $| = 1; print "freed\n"; <STDIN>"#;
    let mut command = never_forks(&["perl", "-e", script]);
    let command = command.env("EBB_ARENA", device.path());
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = pipes.spawn().unwrap();
    let mut line = [0; 6];
    let output = program.stdout.as_mut().unwrap();
    output.read_exact(&mut line).unwrap();
    let counts = Arena::open(device.path()).unwrap().counts();
    drop(program.stdin.take());
    assert!(program.wait().unwrap().success());
    assert!(counts.owned > 90, "{counts:?}");
    assert!(counts.lazy >= counts.owned / 10 * 9, "{counts:?}");
}

#[test]
fn threads_keep_their_blocks_while_what_is_free_is_taken() {
    let device = Device::new(1024 * MIB);
    let (output, taken) = device.run(&[&our("ebb-blocks"), "3", "1500"]);
    assert_eq!(passed(&output), "blocks: 1500 rounds of 3 threads\n");
    assert!(taken > 20, "{taken} granules were taken");
    let counts = device.counts();
    assert_eq!(
        (counts.owned, counts.in_use),
        (0, counts.granules - counts.lazy - counts.discarded)
    );
}

#[test]
fn a_full_arena_is_said_once_and_the_program_goes_on() {
    let device = Device::new(16 * MIB);
    let (output, _) = device.run(&[&our("ebb-blocks"), "2", "500"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        text(&output.stderr),
        "ebb-malloc: the arena is full: this program goes on with normal memory\n"
    );
}

/// What is hard for a heap of shared memory, and for one that other programs find in their own way.
const CASES: [&str; 6] = [
    "forks",
    "stdio",
    "signal-stacks",
    "protect",
    "vfork",
    "without-main",
];

#[test]
fn a_program_that_may_fork_has_normal_memory_and_does_all_it_does_without_us() {
    let device = Device::new(64 * MIB);
    for case in CASES.iter().chain(&["dont-need"]) {
        let mut program = preloaded(&[&our("ebb-cases"), case]);
        let output = program.env("EBB_ARENA", device.path()).output().unwrap();
        assert_eq!(
            text(&output.stdout),
            format!("{case}: right\n"),
            "{output:?}"
        );
        let said = text(&output.stderr);
        assert!(
            said.starts_with("ebb-malloc: normal memory: a program that forks")
                && said.lines().count() == 1,
            "{said}"
        );
    }
    assert_eq!(device.counts().owned, 0);
}

/// Each of these would be wrong, or never end, if a fork copied the heap while other threads run.
#[test]
fn a_program_that_never_forks_does_all_else_that_it_does_without_us() {
    let device = Device::new(512 * MIB);
    for case in CASES {
        let (output, _) = device.run(&[&our("ebb-cases"), case]);
        let right = format!("{case}: right, no fork\n");
        assert_eq!(text(&output.stdout), right, "{output:?}");
        let said =
            "ebb-malloc: this program was started with --no-fork, but forks: start it without\n";
        assert_eq!(text(&output.stderr), said);
    }
    // Programs that it starts may fork: they have ordinary heaps, and nothing is said of them.
    let (output, _) = device.run(&[&our("ebb-cases"), "dont-need", "children"]);
    assert_eq!(passed(&output), "dont-need: right\nchildren: right\n");
}

#[test]
fn without_an_arena_programs_run_on_normal_memory_and_say_so() {
    let blocks = &our("ebb-blocks");
    let run = |command: &mut Command, name: &str, value: &str| {
        let output = command.env(name, value).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.lines().count() <= 1, "{said}");
        said
    };
    let declared = |name, value: &str| run(&mut never_forks(&[blocks, "1", "100"]), name, value);
    let other = |name, value: &str| run(&mut preloaded(&[blocks, "1", "100"]), name, value);
    let said = declared("EBB_ARENA", "/dev/dax7.0");
    assert!(
        said.starts_with("ebb-malloc: normal memory: /dev/dax7.0: there is no such device"),
        "{said}"
    );
    let empty = tempfile::NamedTempFile::new().unwrap();
    empty.as_file().set_len(64 * MIB).unwrap();
    let said = declared("EBB_ARENA", empty.path().to_str().unwrap());
    assert!(said.contains("normal memory"), "{said}");
    let said = other("EBB_NO_FORK", "yes");
    assert!(said.contains("EBB_NO_FORK=yes is no process id"), "{said}");
    assert_eq!(other("EBB_NO_FORK", "1"), "", "said of another process");
    assert_eq!(other("EBB_QUIET", "1"), "");
}

/// The limit would have to hold the arena beside all that the program needs.
#[test]
fn a_limited_address_space_gets_no_arena() {
    let device = Device::new(256 * MIB);
    let mut program = never_forks(&[&our("ebb-blocks"), "1", "100"]);
    let limit = libc::rlimit {
        rlim_cur: 4 << 30,
        rlim_max: 4 << 30,
    };
    // SAFETY: a system call.
    unsafe {
        program.pre_exec(move || {
            libc::setrlimit(libc::RLIMIT_AS, &raw const limit);
            Ok(())
        })
    };
    let output = program.env("EBB_ARENA", device.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stderr);
    assert!(
        said.starts_with("ebb-malloc: normal memory: the address space is limited"),
        "{said}"
    );
    assert_eq!(device.counts().lazy, 0);
}

#[test]
fn a_program_that_is_killed_loses_no_granule() {
    let device = Device::new(512 * MIB);
    for _ in 0..5 {
        let mut program = never_forks(&[&our("ebb-blocks"), "3", &usize::MAX.to_string()]);
        let command = program.env("EBB_ARENA", device.path());
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(std::time::Duration::from_millis(150));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(device.counts().owned, 0);
    let (output, _) = device.run(&[&our("ebb-blocks"), "2", "500"]);
    passed(&output);
}

/// It must not have its parent's heap.
#[test]
fn a_child_of_a_bare_clone_faults_and_its_parent_goes_on() {
    let device = Device::new(256 * MIB);
    let script = r#"my $x = "y" x 5000; my $pid = syscall(56, 17, 0, 0, 0, 0);
        if ($pid == 0) { $x = "child" x 1000; exit 0 }
        waitpid $pid, 0; print $? & 127, " ", $x eq "y" x 5000 ? "mine" : "lost", "\n""#;
    let (output, _) = device.run(&["perl", "-e", script]);
    assert_eq!(passed(&output), "11 mine\n");
}
