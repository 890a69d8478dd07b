//! How a process gets its heap: once, before `main`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ebb_guest_agent::arena::{Arena, OpenError};

use crate::heap::Heap;
use crate::say::say;
use crate::{fork, hooks};

/// Where the kernel lists the devices.
const DEVICES: &str = "/sys/bus/dax/devices";

static CALLED: AtomicBool = AtomicBool::new(false);

/// Before jemalloc is called for the first time: see [`fork::register`].
#[inline]
pub fn first_call() {
    if !CALLED.load(Ordering::Relaxed) && !CALLED.swap(true, Ordering::Relaxed) {
        fork::register();
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    start();
}

/// Puts the heap into an arena, if there is one. The dynamic loader calls it before `main`; later calls do nothing.
///
/// Says in one line on standard error why there is no arena. Programs with more rights than their user (setuid) get none,
/// and say nothing.
pub fn start() {
    static STARTED: AtomicBool = AtomicBool::new(false);
    first_call();
    // SAFETY: asks for a number.
    let privileged = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    if STARTED.swap(true, Ordering::Relaxed) || privileged {
        return;
    }
    let fork = std::env::var_os("EBB_FORK");
    let result = match fork.as_deref().map(|value| value.as_encoded_bytes()) {
        Some(b"off") => return,
        None | Some(b"copy" | b"") => use_arena(),
        Some(_) => Err("EBB_FORK is neither copy nor off".to_owned()),
    };
    if let Err(why) = result
        && std::env::var_os("EBB_QUIET").is_none_or(|value| value != "1")
    {
        say(format_args!("normal memory: {why}"));
    }
}

fn use_arena() -> Result<(), String> {
    // SAFETY: asks for a flag.
    if unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) } == 1 {
        return Err(
            "huge pages are turned off for this process (PR_SET_THP_DISABLE), and device-dax has no others"
                .to_owned(),
        );
    }
    let arena = find()?;
    let granule = arena.granule_size();
    let installed = Heap::install(arena).map_err(|error| format!("mmap: {error}"))?;
    if installed {
        hooks::install(granule).map_err(|error| format!("jemalloc's hooks: {error}"))?;
    }
    Ok(())
}

/// The device that `EBB_ARENA` names, or the first that is an arena.
fn find() -> Result<Arena, String> {
    if let Some(path) = std::env::var_os("EBB_ARENA") {
        return Arena::open(Path::new(&path)).map_err(|error| error.to_string());
    }
    let entries = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect();
    paths.sort();
    let mut first_error: Option<OpenError> = None;
    for path in paths {
        match Arena::open(&path) {
            Ok(arena) => return Ok(arena),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.map_or_else(
        || "there is no arena; start the machine with --arena and run `ebb-guest setup`".to_owned(),
        |error| error.to_string(),
    ))
}
