//! `ebb-guest run`: runs a program with its heap in an arena; `ebb-guest recover`: frees what dead programs have left.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ebb_guest_agent::arena::Arena;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open, setsid};

use crate::setup;

/// The library's file name.
const LIBRARY: &str = "libebb_malloc.so";
/// Where it is looked for, behind the folder of this program.
const FOLDERS: [&str; 3] = ["/usr/lib/ebb", "/usr/local/lib/ebb", "/usr/local/lib"];
/// What the dynamic loader loads first.
const PRELOAD: &str = "LD_PRELOAD";

/// Runs a program in place of this one.
pub fn main(words: &[&str]) -> ExitCode {
    let (library, program) = match words {
        ["--library", library, "--", program @ ..] => (Some(PathBuf::from(library)), program),
        ["--", program @ ..] => (None, program),
        _ => (None, &[][..]),
    };
    let [name, arguments @ ..] = program else {
        eprintln!("run takes [--library FILE] -- PROGRAM [ARGUMENT…]");
        return ExitCode::from(2);
    };
    let candidates = library.map_or_else(candidates, |library| vec![library]);
    let Some(library) = candidates.iter().find(|path| path.is_file()) else {
        let places: Vec<_> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        eprintln!(
            "ebb-guest run: no {}; name the library by --library FILE",
            places.join(", no ")
        );
        return ExitCode::FAILURE;
    };
    watch();
    let error = Command::new(name)
        .args(arguments)
        .env(PRELOAD, preload(library))
        .exec();
    eprintln!("ebb-guest run: {name}: {error}");
    ExitCode::from(127)
}

/// The library, where it is looked for.
pub fn library() -> Option<PathBuf> {
    candidates().into_iter().find(|path| path.is_file())
}

fn candidates() -> Vec<PathBuf> {
    let own = std::env::current_exe().ok();
    let folder = own.as_deref().and_then(Path::parent);
    folder
        .into_iter()
        .chain(FOLDERS.iter().map(Path::new))
        .map(|folder| folder.join(LIBRARY))
        .collect()
}

/// Ours before whatever is to be loaded anyway.
fn preload(library: &Path) -> OsString {
    let mut value = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os(PRELOAD).filter(|others| !others.is_empty()) {
        value.push(":");
        value.push(others);
    }
    value
}

/// Leaves a process behind that frees what the program owns when it has ended, however it has: nobody else does before
/// another program needs it. Without it, `ebb-guest recover` does.
fn watch() {
    let Ok(program) = pidfd_open(getpid(), PidfdFlags::empty()) else {
        return;
    };
    // SAFETY: this process has one thread.
    if unsafe { libc::fork() } != 0 {
        return;
    }
    let _ = setsid(); // It fails only for whoever leads a group, which a child does not.
    for stream in 0..3 {
        // The program's output must end with the program.
        // SAFETY: nothing here uses the standard streams from now on.
        unsafe { libc::close(stream) };
    }
    let mut ended = [PollFd::new(&program, PollFlags::IN)];
    while poll(&mut ended, None).is_err() {}
    let _ = recover_all();
    std::process::exit(0);
}

/// Frees what dead processes own in all arenas.
fn recover_all() -> Result<(), String> {
    for name in setup::names() {
        let path = Path::new("/dev").join(name);
        let arena = Arena::open(&path).map_err(|error| error.to_string())?;
        let recovered = arena.recover();
        recovered.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Runs `ebb-guest recover`.
pub fn recover() -> ExitCode {
    match recover_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ebb-guest recover: {message}");
            ExitCode::FAILURE
        }
    }
}
