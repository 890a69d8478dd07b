//! The systems: the same Debian in QEMU and in Ebb.

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::free_pages::await_free_lists;
use ebb_harness::programs::{self, Disks};
use ebb_harness::size::MIB;
use ebb_harness::{Guest, Images, Launch, Monitor};
use tempfile::TempDir;

use super::RAM;
use crate::qemu::{self, Qemu};

/// vCPUs.
const CPUS: u32 = 2;

/// Who gives memory back, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    Nothing,
    QemuReporting,
    EbbReporting,
    EbbFreeLists,
    EbbAuto,
}

/// All of them.
pub const SYSTEMS: [System; 5] = [
    System::Nothing,
    System::QemuReporting,
    System::EbbReporting,
    System::EbbFreeLists,
    System::EbbAuto,
];

impl System {
    /// Its name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::QemuReporting => "qemu-reporting",
            Self::EbbReporting => "ebb-reporting",
            Self::EbbFreeLists => "ebb-free-lists",
            Self::EbbAuto => "ebb-auto-balloon",
        }
    }

    /// Ebb's options. QEMU's reports make memory free after 2 s: so does age here.
    const fn options(self) -> &'static [(&'static str, &'static str)] {
        const FREE_LISTS: (&str, &str) = ("--lazy", "mode=age,age=2,pause=20000,share=50");
        match self {
            Self::Nothing | Self::QemuReporting => &[("--lazy", "mode=off,free_pages=off")],
            Self::EbbReporting => &[
                ("--lazy", "free_pages=off"),
                ("--balloon", "size=0,reporting=eager"),
            ],
            Self::EbbFreeLists => &[FREE_LISTS],
            Self::EbbAuto => &[FREE_LISTS, ("--balloon", "auto=on")],
        }
    }
}

enum Engine {
    Qemu(Qemu),
    Ebb(Box<Monitor>),
}

/// A running machine.
pub struct Machine {
    /// Its guest.
    pub guest: Guest,
    engine: Engine,
    // Gone last.
    _folder: TempDir,
}

impl Machine {
    /// Boots a system, with `scan` bytes to read on its last disk.
    pub fn start(system: System, scan: u64, cgroup: &Cgroup) -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-footprint-").context("make a temporary folder")?;
        let disks = Disks::make(&Images::from_environment()?, folder.path(), scan)?;
        let (engine, mut guest) = if system == System::QemuReporting {
            start_qemu(&disks, cgroup)?
        } else {
            start_ebb(system, &disks, cgroup)?
        };
        programs::unpack(&mut guest)?;
        if let (Engine::Ebb(monitor), System::EbbFreeLists | System::EbbAuto) = (&engine, system) {
            await_free_lists(monitor)?;
        }
        Ok(Self {
            guest,
            engine,
            _folder: folder,
        })
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        match &self.engine {
            Engine::Qemu(qemu) => qemu.pid(),
            Engine::Ebb(monitor) => monitor.pid(),
        }
    }

    /// For people: what the monitor has done so far.
    pub fn state(&self) -> Result<String> {
        let Engine::Ebb(monitor) = &self.engine else {
            return Ok(String::new());
        };
        let api = monitor.api();
        let lazy = api.lazy()?;
        let free = lazy.part("free_pages");
        let mut text = format!(
            "free lists: {} MiB taken, {} pauses missed",
            free["taken_bytes_total"] / MIB,
            free["missed_total"]
        );
        if let Ok(balloon) = api.get("/balloon") {
            text = format!("{text}; balloon {balloon}");
        }
        Ok(text)
    }

    /// Does a step, and explains what goes wrong.
    pub fn step(&mut self, words: &str) -> Result<()> {
        let command = format!("bash {}/footprint.sh {words}", programs::FOLDER);
        let done = self.guest.must(&command).map(drop);
        done.map_err(|error| match &self.engine {
            Engine::Qemu(_) => error,
            Engine::Ebb(monitor) => monitor.explain(error),
        })
    }

    /// Powers the guest off.
    pub fn end(mut self) -> Result<()> {
        self.guest.send("exit")?;
        match self.engine {
            Engine::Qemu(_) => Ok(()),
            Engine::Ebb(ref mut monitor) => match monitor.wait()? {
                0 => Ok(()),
                code => Err(Error::new(format!("ebb ends with {code}"))),
            },
        }
    }
}

fn start_ebb(system: System, disks: &Disks, cgroup: &Cgroup) -> Result<(Engine, Guest)> {
    let memory = format!("size={}M", RAM / MIB);
    let launch = Launch::new()?.within(cgroup).memory(&memory).cpus(CPUS);
    let options = system.options().iter();
    let launch = options.fold(disks.attach(launch), |launch, (name, value)| {
        launch.option(name, value)
    });
    let mut monitor = launch.start()?;
    let guest = monitor.guest()?;
    Ok((Engine::Ebb(Box::new(monitor)), guest))
}

fn start_qemu(disks: &Disks, cgroup: &Cgroup) -> Result<(Engine, Guest)> {
    let mut more = vec![
        "-device".to_owned(),
        "virtio-balloon-pci,free-page-reporting=on".to_owned(),
    ];
    for (index, (path, readonly)) in disks.all.iter().enumerate() {
        let (path, readonly) = (path.display(), if *readonly { "on" } else { "off" });
        more.push("-drive".to_owned());
        more.push(format!(
            "file={path},if=none,id=disk{index},format=raw,readonly={readonly},cache=writeback"
        ));
        more.push("-device".to_owned());
        more.push(format!("virtio-blk-pci,drive=disk{index}"));
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let cmdline = format!("ebb.mode={} {}", programs::MODE, programs::CMDLINE);
    let machine = qemu::Machine {
        memory: &format!("{}M", RAM / MIB),
        cpus: CPUS,
        cmdline: &cmdline,
        more: &more,
    };
    let mut qemu = Qemu::start(&machine, cgroup)?;
    let guest = qemu.guest()?;
    Ok((Engine::Qemu(qemu), guest))
}
