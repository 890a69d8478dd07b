//! Start of a process: puts its heap into an arena before `main`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use ebb_guest_agent::arena::{self, Arena, NO_FORK};
use rustix::process::{Resource, getpid, getrlimit};

use crate::heap::Heap;
use crate::{fork, hooks, stderr};

/// To be called before each allocation, because [`fork::register`] must come before jemalloc's first call.
#[inline]
pub fn before_first_allocation() {
    static CALLED: AtomicBool = AtomicBool::new(false);
    if !CALLED.load(Ordering::Relaxed) && !CALLED.swap(true, Ordering::Relaxed) {
        fork::register();
    }
}

/// The dynamic loader calls it before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = start;

/// Uses an arena, or prints one line that says why not.
extern "C" fn start() {
    before_first_allocation();
    // SAFETY: takes and returns numbers.
    let privileged = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    // A setuid program must not share memory with other programs of its user.
    if privileged {
        return;
    }
    if let Err(why) = never_forks().and_then(|yes| if yes { use_arena() } else { Ok(()) })
        && std::env::var_os("EBB_QUIET").is_none_or(|value| value != "1")
    {
        stderr::print(format_args!("normal memory: {why}"));
    }
}

/// Returns true if whoever started this process has said that it never forks, and false if that was said of an ancestor.
fn never_forks() -> Result<bool, String> {
    let Some(value) = std::env::var_os(NO_FORK) else {
        return Err(
            "a program that forks cannot have its heap in an arena; start one that never does by `ebb-guest run --no-fork`"
                .to_owned(),
        );
    };
    let process: Option<i32> = value.to_str().and_then(|value| value.parse().ok());
    let process =
        process.ok_or_else(|| format!("{NO_FORK}={} is no process id", value.display()))?;
    Ok(process == getpid().as_raw_nonzero().get())
}

fn use_arena() -> Result<(), String> {
    if getrlimit(Resource::As).current.is_some() {
        return Err(
            "the address space is limited (ulimit -v), and an arena takes as much of it as it is large".to_owned(),
        );
    }
    // SAFETY: takes and returns numbers.
    if unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) } == 1 {
        return Err(
            "huge pages are turned off for this process (PR_SET_THP_DISABLE), but device-dax has no other pages"
                .to_owned(),
        );
    }
    let arena = open_arena()?;
    let granule = arena.granule_size();
    let installed = Heap::install(arena).map_err(|error| format!("mmap: {error}"))?;
    if installed {
        hooks::install(granule).map_err(|error| format!("jemalloc's hooks: {error}"))?;
    }
    Ok(())
}

/// Opens the device in `EBB_ARENA`, or else the first that can be opened.
fn open_arena() -> Result<Arena, String> {
    let open = |path: &Path| Arena::open(path).map_err(|error| error.to_string());
    if let Some(path) = std::env::var_os("EBB_ARENA") {
        return open(Path::new(&path));
    }
    let mut first_error = None;
    for path in arena::devices() {
        match open(&path) {
            Ok(arena) => return Ok(arena),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_else(|| {
        "there is no arena; start the machine with --arena and run `ebb-guest setup`".to_owned()
    }))
}
