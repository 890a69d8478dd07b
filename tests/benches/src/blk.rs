//! `ebb-bench blk`: fio on a disk of a stock guest: Ebb's and QEMU's virtio-blk, both with io_uring and through the host's cache.

use std::any::Any;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::libraries::copy_with_libraries;
use ebb_harness::size::MIB;
use ebb_harness::{Guest, Launch};
use tempfile::TempDir;

use super::BenchError;
use super::qemu::{Machine, Qemu};
use super::results::{Metric, Results};
use super::stream::{EBB, EBB_ON_MMIO, Ebb};

/// Bytes of each disk.
const SIZE: u64 = 256 * MIB;
/// MiB of each guest.
const MEMORY: &str = "512";
/// What a transfer is worth.
const SPEED: Metric = ("throughput", "KiB/s");

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each machine
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds of each job
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Only jobs whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

/// A job of fio's.
struct Job {
    /// Its figure is `NAME_vs_qemu`.
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
}

const fn job(name: &'static str, rw: &'static str, block: &'static str, depth: u32) -> Job {
    Job {
        name,
        rw,
        block,
        depth,
    }
}

const JOBS: [Job; 6] = [
    job("rand_read_1", "randread", "4k", 1),
    job("rand_read_32", "randread", "4k", 32),
    job("rand_write_1", "randwrite", "4k", 1),
    job("rand_write_32", "randwrite", "4k", 32),
    job("seq_read", "read", "128k", 8),
    job("seq_write", "write", "128k", 8),
];

/// A guest with fio, and its disk as `/dev/vda`.
struct System {
    name: &'static str,
    guest: Guest,
    /// The monitor.
    _machine: Box<dyn Any>,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, or fio fails, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let folder = TempDir::with_prefix("ebb-blk-").context("make a temporary folder")?;
    let programs = programs(folder.path())?;
    let disk = |name: &str| -> Result<PathBuf> {
        let path = folder.path().join(name);
        let made = File::create(&path).and_then(|file| file.set_len(SIZE));
        made.context(path.display()).map(|()| path)
    };
    let mut systems = [
        ebb(&EBB, &disk("ebb")?, &programs)?,
        ebb(&EBB_ON_MMIO, &disk("ebb-mmio")?, &programs)?,
        qemu(&disk("qemu")?, &programs)?,
    ];
    for system in &mut systems {
        let fill =
            "mkdir /fio && tar -xf /dev/vdb -C / && dd if=/dev/zero of=/dev/vda bs=1M conv=fsync";
        // It is full when nothing more fits.
        system
            .guest
            .must(&format!("{fill} 2>/dev/null; fio --version"))?;
    }
    let jobs = || JOBS.iter().filter(|job| job.name.contains(&arguments.only));
    let mut results = Results::default();
    for run in 1..=arguments.runs {
        for job in jobs() {
            for system in &mut systems {
                let speed = job.run(&mut system.guest, arguments.seconds)?;
                results.add((system.name, job.name), SPEED, speed);
            }
            systems.rotate_left(1);
        }
        eprintln!("blk: run {run} of {}", arguments.runs);
    }
    results.note(
        "fio 3.33 with libaio and direct=1 in a guest of 1 vCPU; the image is a file in tmpfs, io_uring, through the \
         host's cache; QEMU with an I/O thread, on PCI",
    );
    for (ebb, suffix) in [(EBB.name, ""), (EBB_ON_MMIO.name, "_on_mmio")] {
        for job in jobs() {
            let of = |system| [system, job.name, SPEED.0];
            let figure = format!("{}_vs_qemu{suffix}", job.name);
            results.divide_rates(&figure, of(ebb), of("qemu"));
        }
        for kind in ["rand", "seq"] {
            let names = JOBS.iter().filter(|job| job.name.starts_with(kind));
            let names: Vec<String> = names
                .map(|job| format!("{}_vs_qemu{suffix}", job.name))
                .collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            results.smallest(&format!("{kind}_vs_qemu{suffix}"), &names);
        }
    }
    results.report("blk").publish()
}

impl Job {
    /// KiB a second.
    fn run(&self, guest: &mut Guest, seconds: u32) -> Result<f64> {
        let Self {
            name,
            rw,
            block,
            depth,
        } = self;
        let said = guest.must(&format!(
            "fio --name={name} --filename=/dev/vda --direct=1 --ioengine=libaio --thread --rw={rw} --bs={block} \
             --iodepth={depth} --time_based --runtime={seconds} --minimal --terse-version=3"
        ))?;
        speed(&said).context(format_args!("fio says {said:?}"))
    }
}

/// KiB a second that fio has read and written, from its terse output of version 3: HOWTO, "Terse output".
fn speed(said: &str) -> Option<f64> {
    let line = said.split("\\n").find(|line| line.starts_with("3;"))?;
    let fields: Vec<&str> = line.split(';').collect();
    let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
    let (error, speed) = (number(4)?, number(6)? + number(47)?);
    (error == 0.0 && speed > 0.0).then_some(speed)
}

/// A tar archive of fio and its libraries, which a guest without a Debian unpacks.
fn programs(folder: &Path) -> Result<PathBuf> {
    let (root, archive) = (folder.join("root"), folder.join("programs.tar"));
    copy_with_libraries(Path::new("/usr/bin/fio"), Path::new("/bin/fio"), &root)?;
    let mut tar = Command::new("tar");
    let tar = tar.arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".");
    let status = tar.status().context("tar")?;
    fs::remove_dir_all(&root).context(root.display())?;
    if status.success() {
        return Ok(archive);
    }
    Err(Error::new(format!("tar ends with {status}")))
}

fn ebb(kind: &Ebb, disk: &Path, programs: &Path) -> Result<System> {
    let launch = Launch::new()?.memory(&format!("size={MEMORY}M"));
    let launch = launch.option("--transport", kind.transport);
    let disk = format!("path={},engine=io_uring", disk.display());
    let launch = launch.option("--disk", &disk).disk(programs, true);
    let mut monitor = launch.start()?;
    let guest = monitor.guest()?;
    Ok(System {
        name: kind.name,
        guest,
        _machine: Box::new(monitor),
    })
}

fn qemu(disk: &Path, programs: &Path) -> Result<System> {
    let drive = |id, path: &Path, more| {
        format!(
            "if=none,id={id},file={},format=raw,aio=io_uring,cache=writeback{more}",
            path.display()
        )
    };
    let (disk, programs) = (
        drive("disk", disk, ""),
        drive("programs", programs, ",readonly=on"),
    );
    let machine = Machine {
        memory: MEMORY,
        cpus: 1,
        cmdline: "ebb.mode=run",
        more: &[
            "-object",
            "iothread,id=io",
            "-drive",
            &disk,
            "-device",
            "virtio-blk-pci,drive=disk,iothread=io",
            "-drive",
            &programs,
            "-device",
            "virtio-blk-pci,drive=programs",
        ],
    };
    let cgroup = Cgroup::counting("qemu-blk")?;
    let mut qemu = Qemu::start(&machine, &cgroup)?;
    let guest = qemu.guest()?;
    Ok(System {
        name: "qemu",
        guest,
        _machine: Box::new((qemu, cgroup)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_is_what_was_read_and_written_without_an_error() {
        let line = |error: u32, read: u32, written: u32| {
            let rest = vec!["0"; 40].join(";");
            format!("3;fio-3.33;seq;0;{error};9;{read};{rest};{written};0;0")
        };
        assert_eq!(speed(&line(0, 1000, 0)), Some(1000.0));
        let after_a_warning = format!("fio: note\\n{}", line(0, 0, 70));
        assert_eq!(speed(&after_a_warning), Some(70.0));
        assert_eq!(speed(&line(5, 1000, 0)), None);
        assert_eq!(speed(&line(0, 0, 0)), None);
        assert_eq!(speed("fio: command not found"), None);
    }
}
