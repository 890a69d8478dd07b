//! Ebb's ways.

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::free_pages::read_free_lists;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until, until_often};
use ebb_harness::{Guest, Launch, Monitor};

use super::{INFLATED, TAKEN, Way};

/// Where the memory comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The guest has freed it lazily before, through its balloon.
    Lazy,
    /// The free lists.
    FreeLists,
    /// The guest hands it over when it is asked, and then it is taken.
    Balloon,
    /// The guest reports by itself.
    Reports,
}

struct Scene {
    source: Source,
    guest: Guest,
    monitor: Monitor,
    cgroup: Cgroup,
}

fn start(source: Source, cgroup: Cgroup) -> Result<Box<dyn Way>> {
    let launch = Launch::new()?.within(&cgroup).memory("size=1G").cpus(1);
    let launch = match source {
        // Emulated processors take milliseconds to come out.
        Source::FreeLists => launch.option("--lazy", "pause=20000,share=50"),
        Source::Lazy | Source::Balloon => launch
            .option("--balloon", "size=0")
            .option("--lazy", "free_pages=off"),
        Source::Reports => launch.option("--balloon", "size=0,reporting=eager"),
    };
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    if source == Source::FreeLists {
        read_free_lists(&monitor, &mut guest)?;
    }
    Ok(Box::new(Scene {
        source,
        guest,
        monitor,
        cgroup,
    }))
}

/// An order for what was freed lazily before.
pub fn lazy(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    start(Source::Lazy, cgroup)
}

/// An order for what the free lists hold.
pub fn free_lists(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    start(Source::FreeLists, cgroup)
}

/// The balloon, and then an order.
pub fn balloon(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    start(Source::Balloon, cgroup)
}

/// Free page reporting.
pub fn reports(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    start(Source::Reports, cgroup)
}

impl Scene {
    fn inflate(&self) -> Result<()> {
        let api = self.monitor.api();
        api.set_balloon(INFLATED)?;
        until_often("the balloon", LONG, || {
            Ok((api.balloon()?.actual_mib == INFLATED / MIB).then_some(()))
        })
    }

    fn order(&self) -> Result<()> {
        let asked = match self.source {
            // Free lists are looked through for what is resident.
            Source::FreeLists | Source::Reports => TAKEN,
            Source::Lazy | Source::Balloon => INFLATED,
        };
        let done = self.monitor.api().reclaim(asked)?;
        let all = (done.reclaimed_bytes >= TAKEN).then_some(());
        all.context(format_args!("an order of {asked} bytes: {done:?}"))
    }
}

impl Way for Scene {
    fn name(&self) -> &'static str {
        match self.source {
            Source::Lazy => "ebb-lazy",
            Source::FreeLists => "ebb-free-lists",
            Source::Balloon => "ebb-balloon",
            Source::Reports => "ebb-reports",
        }
    }

    fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    fn prepare(&mut self) -> Result<()> {
        if self.source == Source::Lazy {
            self.inflate()?;
        }
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        match self.source {
            Source::Lazy | Source::FreeLists => self.order(),
            Source::Balloon => {
                self.inflate()?;
                self.order()
            }
            Source::Reports => Ok(()),
        }
    }

    fn undo(&mut self) -> Result<()> {
        if matches!(self.source, Source::Lazy | Source::Balloon) {
            let api = self.monitor.api();
            api.set_balloon(0)?;
            until("the empty balloon", LONG, || {
                Ok((api.balloon()?.actual_mib == 0).then_some(()))
            })?;
        }
        Ok(())
    }
}
