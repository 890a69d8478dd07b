//! Arenas: what a guest finds, how the monitor takes granules, and a guest that scribbles over its table.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::host::rss;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor};
use ebb_hypercall_abi::arena::{Header, Layout, MAGIC};
use ebb_hypercall_abi::granule::{State, Word};
use ebb_hypercall_abi::{Error, Operation, PAGE_SIZE};
use ebb_payload::{Program, RESULT_SIZE, Transport, page};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 2 * MIB;
const PAGES: u64 = GRANULE / PAGE_SIZE;
const SIZE: u64 = 256 * MIB;
/// Where the first arena of a small machine lies.
const ARENA: u64 = 4 << 30;
const BLOCK: u64 = page(0);
const INVALID: u64 = Error::Invalid as i64 as u64;

const fn granule(index: u64) -> u64 {
    ARENA + index * GRANULE
}

const fn word(index: u64) -> u64 {
    ARENA + PAGE_SIZE + 8 * index
}

const fn raw(state: State) -> u64 {
    Word::new(state, 0).raw()
}

/// A payload guest with one arena.
struct Guest {
    monitor: Monitor,
    serial: PathBuf,
    results: usize,
}

impl Guest {
    fn start(program: &Program) -> Result<Self> {
        let launch = Launch::new()?;
        let (kernel, serial) = (
            launch.folder().join("payload"),
            launch.folder().join("serial"),
        );
        program.write(&kernel).context("write the payload")?;
        let launch = launch
            .kernel(&kernel)
            .memory("size=64M")
            .serial(&format!("file={}", serial.display()))
            .option("--arena", &format!("size={SIZE},id=heap"));
        Ok(Self {
            monitor: launch.start()?,
            serial,
            results: program.results(),
        })
    }

    fn results(&self) -> Vec<u64> {
        ebb_payload::results(&std::fs::read(&self.serial).unwrap_or_default())
    }

    /// Waits until the guest has made `steps` steps.
    fn wait_for(&self, steps: usize) -> Result<()> {
        until("the guest's steps", LONG, || {
            let size = std::fs::metadata(&self.serial).map_or(0, |file| file.len());
            Ok((size >= (steps * RESULT_SIZE) as u64).then_some(()))
        })
    }

    fn ctl(&self, words: &[&str]) -> Result<String> {
        let output = self.monitor.ctl(words)?;
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).context("text")
    }

    fn arena(&self) -> Result<Value> {
        let status = self.ctl(&["status", "--json"])?;
        let status: Value = serde_json::from_str(&status).context("json")?;
        Ok(status["arenas"][0].clone())
    }

    /// Waits for the guest to power off; its results.
    fn finish(&mut self) -> Result<Vec<u64>> {
        assert_eq!(self.monitor.wait()?, 0, "{}", self.monitor.log());
        let results = self.results();
        assert_eq!(results.len(), self.results);
        Ok(results)
    }
}

#[test]
fn granules_go_to_the_host_and_come_back() -> Result<()> {
    const TAKEN: [u64; 4] = [3, 4, 5, 77];
    let mut program = Program::kernel();
    for index in TAKEN {
        program.fill(granule(index), PAGES, index);
    }
    let free = TAKEN
        .map(|index| program.compare_exchange(word(index), raw(State::InUse), raw(State::Lazy)));
    // The last to be taken: with it the host says that it has looked.
    program.compare_exchange(word(100), raw(State::InUse), raw(State::Lazy));
    let waiting = program.results();
    program.wait_for(word(100), raw(State::Discarded));
    let back = TAKEN.map(|index| {
        program.wait_for(word(index), raw(State::Discarded));
        program.compare_exchange(word(index), raw(State::Discarded), raw(State::InUse));
        let empty = program.count_equal(granule(index), PAGES, 0);
        program.fill(granule(index), PAGES, !index);
        (empty, program.count_filled(granule(index), PAGES, !index))
    });
    let mut guest = Guest::start(&program)?;
    guest.wait_for(waiting)?;
    let (before, arena) = (rss(guest.monitor.pid())?, guest.arena()?);
    assert_eq!(arena["lazy_bytes"], 5 * GRANULE, "{arena}");
    assert_eq!(
        (&arena["id"], &arena["gpa"]),
        (&"heap".into(), &ARENA.into())
    );
    assert!(
        guest
            .ctl(&["status"])?
            .contains("heap, 256 MiB: 10 MiB free")
    );
    let said = guest.ctl(&["reclaim", "8M"])?;
    assert!(said.contains("8 MiB returned"), "{said}");
    let fallen = before.saturating_sub(rss(guest.monitor.pid())?);
    guest.ctl(&["reclaim", "2M"])?;
    let results = guest.finish()?;
    assert_eq!(free.map(|step| results[step]), [raw(State::InUse); 4]);
    for (empty, filled) in back {
        assert_eq!((results[empty], results[filled]), (PAGES, PAGES));
    }
    assert!(
        (7 * MIB..=9 * MIB).contains(&fallen),
        "{fallen} bytes went back"
    );
    Ok(())
}

#[test]
fn the_guest_is_told_where_the_arena_is_and_what_calls_take() -> Result<()> {
    let layout = Layout::new(SIZE, GRANULE).context("a layout")?;
    let mut program = Program::kernel();
    let header: Vec<_> = (0..16).map(|n| program.load(ARENA + 8 * n)).collect();
    program.store(BLOCK, 0);
    let told = program.call(Transport::Port, Operation::ArenaInfo, BLOCK, 1);
    let info: Vec<_> = (0..8).map(|n| program.load(BLOCK + 8 * n)).collect();
    let call = |program: &mut Program, operation, gpa, pages| {
        program.call(Transport::Port, operation, gpa, pages)
    };
    // The guest's own doing: nobody else ever says that it is being discarded.
    program.store(word(9), raw(State::Reclaiming));
    let good = [
        call(&mut program, Operation::Reuse, granule(9), PAGES),
        program.load(word(9)),
        call(&mut program, Operation::Reuse, granule(1), 100 * PAGES),
    ];
    let bad = [
        call(&mut program, Operation::LazyFree, granule(9), PAGES),
        call(&mut program, Operation::Reuse, granule(0), PAGES),
        call(&mut program, Operation::Reuse, granule(127), 2 * PAGES),
        call(&mut program, Operation::Reuse, page(0), PAGES * 4096),
    ];
    let results = Guest::start(&program)?.finish()?;
    let words: Vec<u64> = header.iter().map(|step| results[*step]).collect();
    assert_eq!(words[0], MAGIC);
    let found = Header::from_words(words.try_into().ok().context("words")?);
    assert_eq!(found.check(SIZE), Ok(layout));
    assert_eq!((found.name(), found.gpa), ("heap", ARENA));
    assert_eq!(results[told], 0);
    let info: Vec<u64> = info.iter().map(|step| results[*step]).collect();
    assert_eq!(
        info,
        [0, 1, ARENA, SIZE, GRANULE, layout.first(), PAGE_SIZE, 0]
    );
    assert_eq!(good.map(|step| results[step] as u32 & !12), [0; 3]);
    assert_eq!(bad.map(|step| results[step]), [INVALID; 4]);
    Ok(())
}

#[test]
fn a_table_full_of_nonsense_harms_the_guest_alone() -> Result<()> {
    let mut program = Program::kernel();
    program.fill(granule(1), PAGES, 7);
    let last = program.write_random(word(0), SIZE / GRANULE, 4000);
    // The header, too.
    program.write_random(ARENA, 16, 1);
    // Until the host has been at it once more.
    program.store(word(100), raw(State::Lazy));
    program.wait_for(word(100), raw(State::Discarded));
    let reset = program.call(Transport::Port, Operation::Reset, 0, 1);
    let words = [1, 50, 127].map(|index| program.load(word(index)));
    let mut guest = Guest::start(&program)?;
    let mut reclaims = 0;
    guest.wait_for(1)?;
    // Until the guest has powered off, which it does after the host has been at it once more; how it ended is seen below.
    while guest.monitor.ctl(&["reclaim", "256M"])?.status.success() {
        reclaims += u32::from(guest.results().len() <= last);
        let status = guest.monitor.ctl(&["status", "--json"])?;
        let Ok(status) = serde_json::from_slice::<Value>(&status.stdout) else {
            break;
        };
        let arena = &status["arenas"][0];
        assert!(arena["lazy_bytes"].as_u64() <= Some(SIZE), "{arena}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let results = guest.finish()?;
    assert!(
        reclaims > 3,
        "the monitor was never at it while the guest scribbled: {reclaims}"
    );
    assert_eq!(results[reset], 12);
    for step in words {
        assert_eq!(
            Word::from_raw(results[step])
                .state()
                .map(|s| s as u8)
                .unwrap_or(0),
            0
        );
    }
    Ok(())
}

#[test]
fn a_stock_linux_guest_has_a_dax_device() -> Result<()> {
    let launch = Launch::new()?;
    let launch = launch
        .option("--arena", "size=512M")
        .option("--arena", "size=64M,id=second");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let reserved = guest.must("grep -c 'Soft Reserved' /proc/iomem")?;
    assert_eq!(reserved.trim_end_matches("\\n"), "2");
    let said = guest.must("ebb-guest setup --mode 0666 && ebb-guest status")?;
    for (device, name, size) in [
        ("dax0.0", "arena0", 512 * MIB),
        ("dax1.0", "second", 64 * MIB),
    ] {
        let line = format!("arena: /dev/{device} {name} size={size} granule={GRANULE}");
        assert_eq!(said.matches(&line).count(), 2, "{said}");
    }
    assert!(guest.must("ls -l /dev/dax0.0")?.starts_with("crw-rw-rw-"));
    let (status, output) = guest.shell("ebb-guest setup --mode 999 2>&1")?;
    assert!(status == "2" && output.contains("octal"), "{output}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}

#[test]
fn a_guest_without_an_arena_is_told_so() -> Result<()> {
    let mut monitor = Launch::new()?.start()?;
    let mut guest = monitor.guest()?;
    let (status, output) = guest.shell("ebb-guest setup 2>&1")?;
    assert!(
        status == "1" && output.contains("start it with --arena"),
        "{output}"
    );
    let (status, output) = guest.shell("ebb-guest stress /dev/dax0.0 1 1 1 2>&1")?;
    assert!(
        status == "1" && output.contains("there is no such device"),
        "{output}"
    );
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}

/// Four processes of four threads in a small arena, killed at random, while the host takes what it can all the time.
#[test]
fn processes_that_share_an_arena_lose_nothing() -> Result<()> {
    let launch = Launch::new()?.memory("size=512M").cpus(2);
    let mut monitor = launch.option("--arena", "size=128M").start()?;
    let mut guest = monitor.guest()?;
    guest.must("ebb-guest setup")?;
    let bench = guest.must("ebb-guest bench /dev/dax0.0")?;
    println!("{bench}");
    let number = |name: &str| -> Result<f64> {
        let mut words = bench.split([' ', '\\']);
        let value = words.find_map(|word| word.strip_prefix(name)?.parse().ok());
        value.context(format_args!("no {name} in {bench}"))
    };
    assert!(
        number("pair_vs_dontneed=")? > 1.0,
        "freeing through the arena is no gain: {bench}"
    );
    let instructions = number("pair_instructions=")?;
    assert!((2.0..120.0).contains(&instructions), "{bench}");
    let (done, api) = (AtomicBool::new(false), monitor.api());
    let said = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // It may end before it hears us.
                let _ = api.reclaim(1 << 30);
            }
        });
        let said = guest.must("ebb-guest stress /dev/dax0.0 4 4 8 2>&1");
        done.store(true, Ordering::Relaxed);
        said
    });
    let said = said.map_err(|error| monitor.explain(error))?;
    println!("{said}");
    assert!(said.contains("lost=0 corrupt=0"), "{said}");
    let status: Value =
        serde_json::from_slice(&monitor.ctl(&["status", "--json"])?.stdout).context("json")?;
    let arena = &status["arenas"][0];
    assert!(
        arena["reclaimed_bytes_total"].as_u64() > Some(4 * GRANULE),
        "{arena}"
    );
    println!("{arena}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}
