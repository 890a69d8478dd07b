//! QEMU's ways.

use ebb_harness::Guest;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use serde_json::json;

use super::{INFLATED, TAKEN, Way};
use crate::qemu::{Machine, Qemu};

const RAM: u64 = 1 << 30;
/// Of a machine with virtio-mem: what that device has to begin with.
const PLUGGED: u64 = 640 * MIB;

/// What QEMU does when it is asked.
enum Ask {
    Balloon,
    Unplug,
    /// Nothing: the guest reports by itself.
    Wait,
}

struct Scene {
    name: &'static str,
    ask: Ask,
    guest: Guest,
    qemu: Qemu,
    cgroup: Cgroup,
}

fn start(
    name: &'static str,
    ask: Ask,
    memory: &str,
    more: &[&str],
    cgroup: Cgroup,
) -> Result<Scene> {
    let machine = Machine {
        memory,
        cpus: 1,
        cmdline: "ebb.mode=run",
        more,
    };
    let mut qemu = Qemu::start(&machine, &cgroup)?;
    let guest = qemu.guest()?;
    Ok(Scene {
        name,
        ask,
        guest,
        qemu,
        cgroup,
    })
}

/// The balloon, page by page.
pub fn balloon(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    let more = ["-device", "virtio-balloon-pci"];
    let scene = start("qemu-balloon", Ask::Balloon, "1024M", &more, cgroup)?;
    Ok(Box::new(scene))
}

/// Free page reporting.
pub fn reports(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    let more = ["-device", "virtio-balloon-pci,free-page-reporting=on"];
    let scene = start("qemu-reports", Ask::Wait, "1024M", &more, cgroup)?;
    Ok(Box::new(scene))
}

/// Memory that is unplugged in blocks.
pub fn virtio_mem(cgroup: Cgroup) -> Result<Box<dyn Way>> {
    let device = format!(
        "virtio-mem-pci,id=vm0,memdev=vmem,requested-size={}M",
        PLUGGED / MIB
    );
    let more = [
        "-object",
        "memory-backend-ram,id=vmem,size=1G",
        "-device",
        &device,
    ];
    let mut scene = start(
        "qemu-virtio-mem",
        Ask::Unplug,
        "512M,maxmem=4G",
        &more,
        cgroup,
    )?;
    // What can be moved lies there, so that it can be unplugged.
    scene.guest.must(
        "echo online_movable >/sys/devices/system/memory/auto_online_blocks && insmod /modules/virtio_mem.ko",
    )?;
    scene.plugged(PLUGGED)?;
    Ok(Box::new(scene))
}

impl Scene {
    /// Waits until virtio-mem has this size.
    fn plugged(&mut self, bytes: u64) -> Result<()> {
        let property = json!({ "path": "/machine/peripheral/vm0", "property": "size" });
        until("virtio-mem", LONG, || {
            let size = self.qemu.ask("qom-get", &property)?;
            Ok((size.as_u64() == Some(bytes)).then_some(()))
        })
    }

    fn request(&mut self, bytes: u64) -> Result<()> {
        let request = json!({ "path": "/machine/peripheral/vm0", "property": "requested-size", "value": bytes });
        self.qemu.ask("qom-set", &request).map(drop)
    }

    fn set_balloon(&mut self, bytes: u64) -> Result<()> {
        // QEMU wants to know what is left to the guest.
        self.qemu
            .ask("balloon", &json!({ "value": RAM - bytes }))
            .map(drop)
    }
}

impl Way for Scene {
    fn name(&self) -> &'static str {
        self.name
    }

    fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    fn ask(&mut self) -> Result<()> {
        match self.ask {
            Ask::Balloon => self.set_balloon(INFLATED),
            Ask::Unplug => self.request(PLUGGED - TAKEN),
            Ask::Wait => Ok(()),
        }
    }

    fn undo(&mut self) -> Result<()> {
        match self.ask {
            Ask::Balloon => {
                self.set_balloon(0)?;
                until("the empty balloon", LONG, || {
                    let size = self.qemu.ask("query-balloon", &json!({}))?;
                    Ok((size["actual"].as_u64() == Some(RAM)).then_some(()))
                })
            }
            Ask::Unplug => {
                self.request(PLUGGED)?;
                self.plugged(PLUGGED)
            }
            Ask::Wait => Ok(()),
        }
    }
}
