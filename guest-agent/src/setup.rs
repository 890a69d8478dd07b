//! `ebb-guest setup`: creates the devices of the arenas and sets their permissions.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::{self, Arena};

use crate::arena_info;

/// The kernel modules that create dax devices for Soft Reserved memory.
const MODULES: [&str; 2] = ["device_dax", "dax_hmem"];
const DEVICES: &str = "/sys/bus/dax/devices";
const DRIVERS: &str = "/sys/bus/dax/drivers";
/// The driver that creates `/dev/daxN.M`.
const DRIVER: &str = "device_dax";
/// How long the kernel may take to create a device.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);
/// The group that may use the devices, if there is one of this name; otherwise only root may.
pub const DEFAULT_GROUP: &str = "ebb";

const USAGE: &str = "\
usage: ebb-guest setup [--optional] [--mode MODE] [--group GROUP], with an octal MODE of at most 0777 (default 0660) and the
name or number of a group (default ebb, or root if there is no such group)";

/// Who may use the devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Name or number of the group. `None`: [`DEFAULT_GROUP`].
    pub group: Option<String>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            mode: 0o660,
            group: None,
        }
    }
}

impl Access {
    /// Sets what the option `name` names. Returns `None` if there is no such option, or for a bad value.
    pub fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "--mode" => self.mode = parse_mode(value)?,
            "--group" => self.group = Some(value.to_owned()),
            _ => return None,
        }
        Some(())
    }

    /// The number of the group in the Debian at `root`.
    pub fn group_id(&self, root: &Path) -> Result<u32, String> {
        let Some(name) = &self.group else {
            return Ok(find_group(root, DEFAULT_GROUP).unwrap_or(0));
        };
        name.parse()
            .ok()
            .or_else(|| find_group(root, name))
            .ok_or_else(|| {
                format!("there is no group {name}; create it by `groupadd --system {name}`")
            })
    }
}

/// Looks up the number of a group in /etc/group.
pub fn find_group(root: &Path, name: &str) -> Option<u32> {
    let groups = fs::read_to_string(root.join("etc/group")).ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let (optional, words) = match words {
        ["--optional", rest @ ..] => (true, rest),
        _ => (false, words),
    };
    let mut access = Access::default();
    let (pairs, rest) = words.as_chunks::<2>();
    let parsed = pairs
        .iter()
        .try_for_each(|[name, value]| access.set(name, value));
    if parsed.is_none() || !rest.is_empty() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match set_up_all(optional, &access) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest setup: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Parses octal permission bits.
fn parse_mode(text: &str) -> Option<u32> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o777)
}

/// Sets up the device of each arena, and no other.
fn set_up_all(optional: bool, access: &Access) -> Result<(), String> {
    let group = access.group_id(Path::new("/"))?;
    let addresses = arena_info::addresses()?;
    if addresses.is_empty() && optional {
        println!("this machine has no arena");
        return Ok(());
    }
    if addresses.is_empty() {
        return Err("this machine has no arena; start it with --arena size=…".to_owned());
    }
    if !Path::new(DRIVERS).join(DRIVER).exists() {
        let loaded = Command::new("modprobe").arg("-a").args(MODULES).status();
        if !loaded.is_ok_and(|status| status.success()) {
            let modules = MODULES.join(" ");
            return Err(format!(
                "modprobe -a {modules} failed; run this as root, with the kernel's modules installed"
            ));
        }
    }
    addresses.into_iter().try_for_each(|address| {
        let path = poll(|| device_at(Path::new(DEVICES), address)).ok_or_else(|| {
            format!(
                "the kernel has created no dax device for the arena at {address:#x}; load the module dax_hmem, and boot \
                 without pci=off"
            )
        })?;
        set_up(&path, access.mode, group)
    })
}

/// The device whose memory begins at `address`, of those in a folder as the kernel's.
fn device_at(devices: &Path, address: u64) -> Option<PathBuf> {
    let start = |device: &Path| {
        let text = fs::read_to_string(device.join("resource")).ok()?;
        u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    };
    let mut found = fs::read_dir(devices).ok()?.flatten();
    let device = found.find(|device| start(&device.path()) == Some(address))?;
    Some(Path::new("/dev").join(device.file_name()))
}

/// Calls `look` until it returns something, for at most [`DEVICE_TIMEOUT`].
fn poll<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let found = look();
        if found.is_some() || start.elapsed() > DEVICE_TIMEOUT {
            return found;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn current_driver(name: &str) -> Option<String> {
    let link = fs::read_link(Path::new(DEVICES).join(name).join("driver")).ok()?;
    link.file_name()?.to_str().map(str::to_owned)
}

fn write_to_driver(driver: &str, file: &str, name: &str) -> Result<(), String> {
    let path = Path::new(DRIVERS).join(driver).join(file);
    fs::write(&path, name).map_err(|error| {
        format!(
            "writing {name} to {}: {error}; run this as root",
            path.display()
        )
    })
}

/// Binds a device to the driver, sets its permissions and prints what it holds.
fn set_up(path: &Path, mode: u32, group: u32) -> Result<(), String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let driver = current_driver(&name);
    if driver.as_deref() != Some(DRIVER) {
        // The driver kmem turns the memory into RAM, which cannot always be undone later.
        if let Some(other) = driver {
            write_to_driver(&other, "unbind", &name)?;
        }
        write_to_driver(DRIVER, "new_id", &name)?;
    }
    poll(|| path.exists().then_some(())).ok_or_else(|| {
        format!(
            "{} does not appear; is devtmpfs mounted on /dev?",
            path.display()
        )
    })?;
    chown(path, None, Some(group)).map_err(|error| format!("chown {}: {error}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| format!("chmod {}: {error}", path.display()))?;
    let arena = Arena::open(path).map_err(|error| error.to_string())?;
    println!("{}", describe(path, &arena));
    Ok(())
}

/// One line about an arena.
fn describe(path: &Path, arena: &Arena) -> String {
    let counts = arena.counts();
    format!(
        "arena: {} {} size={} granule={} granules={} owned={} lazy={} discarded={}",
        path.display(),
        arena.name(),
        arena.size(),
        arena.granule_size(),
        counts.granules,
        counts.owned,
        counts.lazy,
        counts.discarded,
    )
}

/// Prints one line for each arena: its description, or why it cannot be opened.
pub fn report() {
    for path in arena::devices() {
        match Arena::open(&path) {
            Ok(arena) => println!("{}", describe(&path, &arena)),
            Err(error) => println!("arena: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_device_of_the_arena_is_found() {
        let devices = tempfile::tempdir().unwrap();
        for (name, start) in [
            ("dax0.0", "0x100000000\n"),
            ("dax1.0", "0x2000000000\n"),
            ("dax2.0", "none"),
        ] {
            let folder = devices.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("resource"), start).unwrap();
        }
        let at = |address| device_at(devices.path(), address);
        assert_eq!(at(0x20_0000_0000), Some("/dev/dax1.0".into()));
        assert_eq!(at(4 << 30), Some("/dev/dax0.0".into()));
        assert_eq!(at(0x1_0020_0000), None, "in the middle of another device");
    }

    #[test]
    fn a_group_is_a_name_or_a_number() {
        let root = tempfile::tempdir().unwrap();
        let access = |group: &str| Access {
            mode: 0o660,
            group: Some(group.to_owned()),
        };
        assert_eq!(Access::default().group_id(root.path()), Ok(0));
        fs::create_dir(root.path().join("etc")).unwrap();
        let groups = "root:x:0:\nebbs:x:5:\nebb:x:998:\nusers:x:100:one,two\n";
        fs::write(root.path().join("etc/group"), groups).unwrap();
        assert_eq!(Access::default().group_id(root.path()), Ok(998));
        assert_eq!(access("users").group_id(root.path()), Ok(100));
        assert_eq!(access("7").group_id(root.path()), Ok(7));
        let error = access("nobody").group_id(root.path()).unwrap_err();
        assert!(error.contains("groupadd --system nobody"), "{error}");
    }

    #[test]
    fn options_are_checked() {
        let mut access = Access::default();
        assert_eq!(access.set("--mode", "0666"), Some(()));
        assert_eq!(access.set("--group", "users"), Some(()));
        assert_eq!(
            (access.mode, access.group.as_deref()),
            (0o666, Some("users"))
        );
        for (name, value) in [("--mode", "9"), ("--mode", "1777"), ("--owner", "root")] {
            assert_eq!(access.set(name, value), None, "{name} {value}");
        }
    }
}
