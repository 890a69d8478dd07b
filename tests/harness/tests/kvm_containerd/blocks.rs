//! Block snapshots: disks of the guest, as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::TaskClient;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::ttrpc::Client;
use containerd_shim_protos::ttrpc::context::Context as Call;
use ebb_harness::containerd::{Containerd, IMAGE};
use ebb_harness::error::{Context, Result};
use ebb_harness::host::succeeded;
use ebb_harness::thin_pool::ThinPool;

#[test]
fn a_block_snapshot_is_a_disk_of_the_guest() -> Result<()> {
    let pool = ThinPool::create()?;
    let containerd = Containerd::start_with_blocks(&pool)?;
    let program = "grep ' / ' /proc/mounts; echo from the guest >/word; exit 7";
    let options = [
        "--snapshotter",
        "devmapper",
        "--runtime",
        "io.containerd.ebb.v2",
    ];
    let words = [&["run"], &options[..], &[IMAGE, "one", "sh", "-c", program]].concat();
    let ran = containerd.output(&words)?;
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert_eq!(ran.status.code(), Some(7), "{ran:?}");
    assert!(
        said.starts_with("/dev/vd") && said.contains(" / ext4 rw"),
        "{said}"
    );
    containerd.vanished()?;

    // What it has written is in the snapshot, which nobody uses any more.
    let snapshots = ["snapshots", "--snapshotter", "devmapper"];
    let mounts = containerd.done(&[&snapshots[..], &["mounts", "/there", "one"]].concat())?;
    let mut words = mounts.split_whitespace();
    let device = words.find(|word| word.starts_with("/dev/mapper/"));
    let device = device.context(&mounts)?;
    let place = tempfile::TempDir::with_prefix("ebb-snapshot-").context("a folder")?;
    succeeded(Command::new("mount").arg(device).arg(place.path()))?;
    let word = fs::read_to_string(place.path().join("word"));
    succeeded(Command::new("umount").arg(place.path()))?;
    assert_eq!(word.context("word")?, "from the guest\n");
    containerd.done(&["containers", "delete", "one"])?;
    let left = containerd.done(&[&snapshots[..], &["list"]].concat())?;
    assert!(!left.contains("one"), "{left}");
    Ok(())
}

/// A file with an ext4 that has a busybox.
fn image(folder: &Path) -> Result<PathBuf> {
    let (tree, file) = (folder.join("tree"), folder.join("image"));
    for name in ["bin", "dev", "proc", "sys"] {
        fs::create_dir_all(tree.join(name)).context(name)?;
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).context("busybox")?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-d"]).arg(&tree).arg(&file).arg("16M");
    succeeded(&mut command)?;
    Ok(file)
}

/// A bundle in this folder, with this program.
fn bundle(folder: &Path, program: &str) -> Result<()> {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"];
    let namespaces = namespaces.map(|kind| serde_json::json!({"type": kind}));
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "cwd": "/",
            "args": ["/bin/busybox", "sh", "-c", program],
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": namespaces},
    });
    // Where the shim writes its log: containerd has a FIFO there.
    fs::write(folder.join("log"), "").context("log")?;
    fs::write(folder.join("config.json"), config.to_string()).context("config.json")
}

/// The mount that containerd's snapshotter of image files asks for where nothing may be written.
fn read_only(image: &Path) -> Mount {
    Mount {
        type_: "ext4".to_owned(),
        source: image.display().to_string(),
        options: vec!["ro".to_owned(), "loop".to_owned()],
        ..Mount::default()
    }
}

#[test]
fn a_read_only_snapshot_is_a_disk_that_the_guest_cannot_write() -> Result<()> {
    let containerd = Containerd::start()?;
    let folder = tempfile::TempDir::with_prefix("ebb-bundle-").context("a folder")?;
    let image = image(folder.path())?;
    let before = fs::read(&image).context("the image")?;
    let program =
        "/bin/busybox grep ' / ' /proc/mounts; /bin/busybox cat /sys/block/vda/ro; echo x >/file";
    bundle(folder.path(), program)?;
    let said = folder.path().join("said");
    fs::write(&said, "").context("said")?;
    let address = succeeded(&mut containerd.start_shim(folder.path(), "one"))?;
    let client = Client::connect(&address).context("the shim")?;
    let client = TaskClient::new(client);
    let id = || "one".to_owned();
    let created = client.create(
        Call::default(),
        &CreateTaskRequest {
            id: id(),
            bundle: folder.path().display().to_string(),
            rootfs: vec![read_only(&image)],
            stdout: said.display().to_string(),
            ..CreateTaskRequest::default()
        },
    );
    created.context("create")?;
    let start = StartRequest {
        id: id(),
        ..StartRequest::default()
    };
    client.start(Call::default(), &start).context("start")?;
    let wait = WaitRequest {
        id: id(),
        ..WaitRequest::default()
    };
    let ended = client.wait(Call::default(), &wait).context("wait")?;
    let said = fs::read_to_string(&said).context("said")?;
    assert_eq!(ended.exit_status, 1, "{said}");
    assert!(said.starts_with("/dev/vda / ext4 ro"), "{said}");
    assert!(said.ends_with("\n1\n"), "{said}");
    let delete = DeleteRequest {
        id: id(),
        ..DeleteRequest::default()
    };
    client.delete(Call::default(), &delete).context("delete")?;
    let shutdown = ShutdownRequest {
        id: id(),
        ..ShutdownRequest::default()
    };
    client
        .shutdown(Call::default(), &shutdown)
        .context("shutdown")?;
    containerd.vanished()?;
    assert!(fs::read(&image).context("the image")? == before);
    Ok(())
}
