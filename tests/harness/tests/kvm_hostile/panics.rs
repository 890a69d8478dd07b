//! Devices whose thread panics while it works for the guest: the machine ends as documented, and nothing else is harmed.

use std::fs;
use std::net::Ipv4Addr;

use ebb_harness::error::{Context, Result};
use ebb_harness::figure;
use ebb_harness::network::Tap;
use ebb_payload::freestanding::map::TEST_MEMORY;
use ebb_payload::script::Scripts;
use tempfile::TempDir;

use crate::cases::disk;
use crate::machine::{End, Machine, PATIENCE};
use crate::virtio::{BALLOON, Buffer, DISK, Device, WRITE, empty, queue, table};

/// The status of a machine whose monitor has panicked.
const CRASH: i32 = 33;

/// Behind two disks and the balloon.
const NET: Device = Device(0xd000_3000);
const RANDOM: Device = Device(0xd000_4000);
const VSOCK: Device = Device(0xd000_5000);

/// MUST_TELL_HOST, statistics, reporting (virtio 1.3, 5.5.3).
const BALLOON_FEATURES: u64 = 1 | 2 | 1 << 5;

/// A thread, and what has it work: one buffer in one of so many queues of a device.
struct Case {
    thread: &'static str,
    device: Device,
    features: u64,
    queues: usize,
    index: usize,
    buffer: Buffer,
}

const fn case(thread: &'static str, device: Device, index: usize, buffer: Buffer) -> Case {
    let (features, queues) = match device.0 {
        0xd000_2000 => (BALLOON_FEATURES, 4),
        0xd000_3000 => (0, 2),
        0xd000_5000 => (0, 3),
        _ => (0, 1),
    };
    Case {
        thread,
        device,
        features,
        queues,
        index,
        buffer,
    }
}

const CASES: [Case; 6] = [
    case("ebb-blk0", DISK, 0, (TEST_MEMORY, 16, 0)),
    case("ebb-balloon", BALLOON, 0, (TEST_MEMORY, 4, 0)),
    case("ebb-report", BALLOON, 3, (TEST_MEMORY, 4096, WRITE)),
    case("ebb-net0", NET, 1, (TEST_MEMORY, 64, 0)),
    case("ebb-rng", RANDOM, 0, (TEST_MEMORY, 64, WRITE)),
    case("ebb-vsock", VSOCK, 1, (TEST_MEMORY, 44, 0)),
];

#[test]
fn a_machine_ends_when_a_thread_of_a_device_panics() -> Result<()> {
    let folder = TempDir::with_prefix("ebb-panics-").context("make a folder")?;
    let path = folder.path().join("disk");
    fs::write(&path, disk::content()).context("make a disk")?;
    let path = format!("path={},readonly=on", path.display());
    let _tap = Tap::create("ebbpanic", Ipv4Addr::new(10, 77, 12, 1), 1500)?;
    let options = [
        "--disk",
        &path,
        "--disk",
        &path,
        "--balloon",
        "statistics=1,reporting=eager",
        "--net",
        "tap=ebbpanic",
        "--rng",
        "on",
        "--vsock",
        "cid=3,path=v",
        "--transport",
        "mmio",
    ];
    for case in &CASES {
        let mut scripts = Scripts::default();
        let run = scripts.add(|s| {
            let mut queues = vec![empty(s); case.queues];
            queues[case.index] = queue(s, &table(&[case.buffer]), &[0]);
            case.device.start(s, case.features, &queues);
            case.device.notify(s, case.index as u64);
            // Nobody returns it.
            queues[case.index].returns(s, 1);
        });
        let mut machine = Machine::panicking(case.thread, &scripts, &options)?;
        let end = machine.run(run, PATIENCE)?;
        assert_eq!(end, End::Exit(CRASH), "{}", machine.explain(case.thread));
        let line = format!("the thread {} has panicked", case.thread);
        assert!(machine.log().contains(&line), "{}", machine.explain(line));
        assert!(!machine.path("api").exists(), "{}", case.thread);
    }
    assert_eq!(
        fs::read(folder.path().join("disk")).context("disk")?,
        disk::content()
    );
    figure("panics", CASES.len() as u64);
    Ok(())
}
