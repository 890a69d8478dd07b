//! Programs of a Debian guest with their heap in an arena, while the monitor takes all that is free, all the time.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ebb_tests::error::{Context, Error, Result};
use ebb_tests::host::rss;
use ebb_tests::wait::{LONG, until};
use ebb_tests::{Guest, Launch, Monitor};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Where the guest finds the library, the programs and a Debian.
const ROOT: &str = "/debian";

/// Packs what the guest needs beside Debian, to be read from a disk.
fn pack(monitor: &Path, archive: &Path) -> Result<()> {
    let folder = monitor.parent().context("a folder of binaries")?;
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(archive).arg("-C").arg(folder);
    tar.args(["libebb_malloc.so", "ebb-blocks"]);
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let status = tar
        .arg("-C")
        .arg(programs)
        .args(["redis.sh", "forks.py"])
        .status();
    let packed = status.context("run tar")?.success();
    packed
        .then_some(())
        .ok_or_else(|| Error::new("tar failed".to_owned()))
}

/// A machine with an arena, and a Debian in it.
fn start() -> Result<(Monitor, Guest)> {
    let launch = Launch::new()?;
    let (images, archive) = (launch.images(), launch.folder().join("programs"));
    pack(&images.ebb, &archive)?;
    let disk = images.root_disk.clone();
    let launch = launch.memory("size=768M").cpus(2);
    let launch = launch.disk(&disk, true).disk(&archive, true);
    let mut monitor = launch.option("--arena", "size=8G").start()?;
    let mut guest = monitor.guest()?;
    guest.must("ebb-guest setup --mode 0666")?;
    guest.must(&format!(
        "mkdir -p {ROOT} && mount -t ext4 -o ro /dev/vda {ROOT} && mount -t tmpfs tmpfs {ROOT}/tmp"
    ))?;
    for folder in ["dev", "proc", "sys"] {
        guest.must(&format!("mount -o bind /{folder} {ROOT}/{folder}"))?;
    }
    guest.must(&format!(
        "tar -xf /dev/vdb -C {ROOT}/tmp && cp /bin/ebb-guest {ROOT}/tmp"
    ))?;
    Ok((monitor, guest))
}

/// Runs a program of Debian's with its heap in the arena; what it printed.
fn run(guest: &mut Guest, program: &str) -> Result<String> {
    in_debian(guest, &format!("/tmp/ebb-guest run -- {program}"))
}

/// Runs a program of Debian's; what it printed.
fn in_debian(guest: &mut Guest, program: &str) -> Result<String> {
    let output = guest.must(&format!("chroot {ROOT} {program} 2>&1"))?;
    Ok(output.trim_end_matches("\\n").to_owned())
}

fn arena(monitor: &Monitor) -> Result<Value> {
    let output = monitor.ctl(&["status", "--json"])?;
    let status: Value = serde_json::from_slice(&output.stdout).context("json")?;
    Ok(status["arenas"][0].clone())
}

/// Does `work` while the monitor is asked for all that is free; how often it was.
fn under_reclaim<T>(monitor: &Monitor, work: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let (done, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // It may end before it hears us.
                if monitor.ctl(&["reclaim", "8G"]).is_ok() {
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let result = work().map_err(|error| monitor.explain(error));
        done.store(true, Ordering::Relaxed);
        Ok((result?, asked.load(Ordering::Relaxed)))
    })
}

#[test]
fn programs_keep_their_heaps_while_the_host_takes_what_is_free() -> Result<()> {
    let (mut monitor, mut guest) = start()?;
    let perl = r#"perl -e 'my @a = map { "x" x 1000 . $_ } 1..5000; for my $n (1..3) { my $pid = fork() // die "fork: $!"; if (!$pid) { $a[$_] = "child" x 300 for 0..4999; exit 0 } $a[$_] .= "p" for 0..4999; waitpid $pid, 0; die if $?; } print scalar(grep { $a[$_] ne ("x" x 1000 . ($_ + 1) . "ppp") } 0..4999), " wrong"'"#;
    let shell = "bash -c 'x=$(echo hi | tr a-z A-Z); for i in 1 2 3; do (x=$x$i; echo $x); done; echo end | cat'";
    let ((blocks, perl, shell), asked) = under_reclaim(&monitor, || {
        Ok((
            run(&mut guest, "/tmp/ebb-blocks 2 300 4")?,
            run(&mut guest, perl)?,
            run(&mut guest, shell)?,
        ))
    })?;
    println!("{blocks}; {asked} requests");
    assert!(
        blocks.starts_with("blocks: ") && blocks.ends_with("4 children"),
        "{blocks}"
    );
    assert_eq!(
        (perl.as_str(), shell.as_str()),
        ("0 wrong", "HI1\\nHI2\\nHI3\\nend")
    );
    assert!(asked > 3, "{asked}");
    let state = arena(&monitor)?;
    let reclaimed = state["reclaimed_bytes_total"]
        .as_u64()
        .context("a counter")?;
    assert!(reclaimed >= 64 * MIB, "{state}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}

#[test]
fn redis_and_python_fork_while_the_host_takes_what_is_free() -> Result<()> {
    let (mut monitor, mut guest) = start()?;
    let ((redis, python), asked) = under_reclaim(&monitor, || {
        Ok((
            in_debian(&mut guest, "bash /tmp/redis.sh 20000")?,
            run(&mut guest, "python3 /tmp/forks.py")?,
        ))
    })?;
    assert_eq!(redis, "wrong: heap 0 saved 0 refilled 0");
    assert_eq!(python, "forks: all right");
    assert!(asked > 3, "{asked}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}

#[test]
fn the_host_gets_a_programs_memory_when_it_frees_it_and_when_it_ends() -> Result<()> {
    let (mut monitor, mut guest) = start()?;
    let pid = monitor.pid();
    let script = r#"my $x = "x" x (200 << 20); my $y = "y" x (150 << 20); undef $x; open(F, ">/tmp/freed"); close F; sleep 1 while !-e "/tmp/go"; print length $y"#;
    guest.must(&format!(
        "(chroot {ROOT} /tmp/ebb-guest run -- perl -e '{script}' >{ROOT}/tmp/said 2>&1) &"
    ))?;
    until("the program frees", LONG, || {
        let (status, _) = guest.shell(&format!("test -e {ROOT}/tmp/freed"))?;
        Ok((status == "0").then_some(()))
    })?;
    let full = rss(pid)?;
    monitor.ctl(&["reclaim", "8G"])?;
    let freed = rss(pid)?;
    assert!(full - freed > 150 * MIB, "{full} bytes, then {freed}");
    guest.must(&format!("touch {ROOT}/tmp/go"))?;
    // What the program had in use is free when it has ended.
    until("the rest", LONG, || {
        monitor.ctl(&["reclaim", "8G"])?;
        Ok((freed.saturating_sub(rss(pid)?) > 100 * MIB).then_some(()))
    })?;
    assert_eq!(guest.must(&format!("cat {ROOT}/tmp/said"))?, "157286400");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0);
    Ok(())
}
