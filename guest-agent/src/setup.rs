//! `ebb-guest setup`: creates the devices of the arenas and sets their permissions.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::{self, Arena};

/// The kernel modules that create dax devices for Soft Reserved memory.
const MODULES: [&str; 2] = ["device_dax", "dax_hmem"];
const DEVICES: &str = "/sys/bus/dax/devices";
const DRIVERS: &str = "/sys/bus/dax/drivers";
/// The driver that creates `/dev/daxN.M`.
const DRIVER: &str = "device_dax";
const DEFAULT_MODE: u32 = 0o600;
/// How long the kernel may take to create a device.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let (optional, words) = match words {
        ["--optional", rest @ ..] => (true, rest),
        _ => (false, words),
    };
    let mode = match words {
        [] => Some(DEFAULT_MODE),
        ["--mode", text] => parse_mode(text),
        _ => None,
    };
    let Some(mode) = mode else {
        eprintln!(
            "usage: ebb-guest setup [--optional] [--mode MODE], with an octal MODE of at most 0777"
        );
        return ExitCode::from(2);
    };
    if optional && !has_arena() {
        println!("this machine has no arena");
        return ExitCode::SUCCESS;
    }
    match devices().and_then(|paths| paths.iter().try_for_each(|path| set_up(path, mode))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest setup: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Parses octal permission bits.
pub fn parse_mode(text: &str) -> Option<u32> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o777)
}

fn has_arena() -> bool {
    let map = fs::read_to_string("/proc/iomem").unwrap_or_default();
    map.contains("Soft Reserved")
}

/// Loads the modules and waits for the devices.
fn devices() -> Result<Vec<PathBuf>, String> {
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
    poll(|| Some(arena::devices()).filter(|paths| !paths.is_empty())).ok_or_else(|| {
        "the kernel has created no dax device for the Soft Reserved memory; load the module dax_hmem"
            .to_owned()
    })
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
fn set_up(path: &Path, mode: u32) -> Result<(), String> {
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
