//! `ebb-guest setup`: makes the devices of the arenas usable.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::Arena;

/// The kernel modules that make devices of soft-reserved memory.
const MODULES: [&str; 2] = ["device_dax", "dax_hmem"];
/// Where the kernel keeps the devices.
const DEVICES: &str = "/sys/bus/dax/devices";
/// Where the drivers are.
const DRIVERS: &str = "/sys/bus/dax/drivers";
/// The driver that makes `/dev/daxN.M`.
const DRIVER: &str = "device_dax";
/// Who may use the devices, unless told otherwise: root alone.
const MODE: u32 = 0o600;
/// How long the kernel may take to make a device.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let (optional, words) = match words {
        ["--optional", rest @ ..] => (true, rest),
        _ => (false, words),
    };
    let mode = match words {
        [] => Some(MODE),
        ["--mode", text] => parse_mode(text),
        _ => None,
    };
    let Some(mode) = mode else {
        eprintln!(
            "setup takes --optional, and --mode and an octal number, for instance 0666, or nothing"
        );
        return ExitCode::from(2);
    };
    if optional && !has_arena() {
        println!("this machine has no arena");
        return ExitCode::SUCCESS;
    }
    match devices().and_then(|names| names.iter().try_for_each(|name| set_up(name, mode))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest setup: {message}");
            ExitCode::FAILURE
        }
    }
}

/// A device's mode: an octal number of permissions.
pub fn parse_mode(text: &str) -> Option<u32> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o777)
}

/// Whether the memory map names one.
fn has_arena() -> bool {
    let map = fs::read_to_string("/proc/iomem").unwrap_or_default();
    map.contains("Soft Reserved")
}

/// The devices that there are, by name.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Loads the modules and waits for the devices.
fn devices() -> Result<Vec<String>, String> {
    if !has_arena() {
        return Err(
            "this machine has no arena; start it with --arena size=…, and without pci=off"
                .to_owned(),
        );
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
    wait(|| Some(names()).filter(|names| !names.is_empty())).ok_or_else(|| {
        "the kernel makes no device of the soft-reserved memory; is dax_hmem loaded?".to_owned()
    })
}

fn wait<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let found = look();
        if found.is_some() || start.elapsed() > PATIENCE {
            return found;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn driver(name: &str) -> Option<String> {
    let link = fs::read_link(Path::new(DEVICES).join(name).join("driver")).ok()?;
    link.file_name()?.to_str().map(str::to_owned)
}

fn tell(driver: &str, file: &str, name: &str) -> Result<(), String> {
    let path = Path::new(DRIVERS).join(driver).join(file);
    fs::write(&path, name).map_err(|error| {
        format!(
            "writing {name} to {}: {error}; run this as root",
            path.display()
        )
    })
}

/// Binds a device to its driver, sets who may use it, and looks what is in it.
fn set_up(name: &str, mode: u32) -> Result<(), String> {
    match driver(name).as_deref() {
        Some(DRIVER) => {}
        other => {
            // kmem makes RAM of it: then it is no heap of ours, and cannot always be taken away again.
            if let Some(other) = other {
                tell(other, "unbind", name)?;
            }
            tell(DRIVER, "new_id", name)?;
        }
    }
    let path = PathBuf::from("/dev").join(name);
    let there = wait(|| path.exists().then_some(()));
    there.ok_or_else(|| {
        format!(
            "{} does not appear; is devtmpfs mounted on /dev?",
            path.display()
        )
    })?;
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(&path, permissions)
        .map_err(|error| format!("chmod {}: {error}", path.display()))?;
    let arena = Arena::open(&path).map_err(|error| error.to_string())?;
    println!("{}", describe(&path, &arena));
    Ok(())
}

/// An arena in a line.
pub fn describe(path: &Path, arena: &Arena) -> String {
    let census = arena.census();
    format!(
        "arena: {} {} size={} granule={} granules={} owned={} lazy={} discarded={}",
        path.display(),
        arena.name(),
        arena.size(),
        arena.granule_size(),
        census.granules,
        census.owned,
        census.lazy,
        census.discarded,
    )
}

/// The arenas that this user can see, a line each; what is wrong with the others.
pub fn report() {
    for name in names() {
        let path = PathBuf::from("/dev").join(name);
        match Arena::open(&path) {
            Ok(arena) => println!("{}", describe(&path, &arena)),
            Err(error) => println!("arena: {error}"),
        }
    }
}
