//! `ebb-guest run --no-fork`: runs a program with its heap in an arena. `ebb-guest recover`: releases granules of dead programs.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ebb_guest_agent::arena::{self, Arena, NO_FORK};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open, setsid};

const LIBRARY: &str = "libebb_malloc.so";
/// Where the library is looked for if it is not in the folder of this program.
const LIBRARY_FOLDERS: [&str; 3] = ["/usr/lib/ebb", "/usr/local/lib/ebb", "/usr/local/lib"];
/// Environment variable: libraries that the dynamic loader loads first.
const PRELOAD: &str = "LD_PRELOAD";

/// Replaces this process by a program.
pub fn main(words: &[&str]) -> ExitCode {
    let (no_fork, words) = match words {
        ["--no-fork", rest @ ..] => (true, rest),
        _ => (false, words),
    };
    let (library, program) = match words {
        ["--library", library, "--", program @ ..] => (Some(PathBuf::from(library)), program),
        ["--", program @ ..] => (None, program),
        _ => (None, &[][..]),
    };
    let [name, arguments @ ..] = program else {
        eprintln!("usage: ebb-guest run [--no-fork] [--library FILE] -- PROGRAM [ARGUMENT…]");
        return ExitCode::from(2);
    };
    let mut command = Command::new(name);
    command.args(arguments);
    if !no_fork {
        eprintln!(
            "ebb-guest run: normal memory: a program that forks cannot have its heap in an arena; say --no-fork if {name} never does"
        );
        return exec(&mut command);
    }
    let candidates = library.map_or_else(library_candidates, |library| vec![library]);
    let Some(library) = candidates.iter().find(|path| path.is_file()) else {
        let places: Vec<_> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        eprintln!(
            "ebb-guest run: there is no {}; pass the library's path by --library FILE",
            places.join(", no ")
        );
        return ExitCode::FAILURE;
    };
    start_recovery_process();
    command.env(PRELOAD, preload(library));
    exec(command.env(NO_FORK, std::process::id().to_string()))
}

/// Replaces this process, or says why not.
fn exec(command: &mut Command) -> ExitCode {
    let error = command.exec();
    eprintln!(
        "ebb-guest run: {}: {error}",
        command.get_program().display()
    );
    ExitCode::from(127)
}

/// The installed library.
pub fn library() -> Option<PathBuf> {
    library_candidates().into_iter().find(|path| path.is_file())
}

fn library_candidates() -> Vec<PathBuf> {
    let own = std::env::current_exe().ok();
    let folder = own.as_deref().and_then(Path::parent);
    folder
        .into_iter()
        .chain(LIBRARY_FOLDERS.iter().map(Path::new))
        .map(|folder| folder.join(LIBRARY))
        .collect()
}

/// The value of LD_PRELOAD: our library, then those that are set already.
fn preload(library: &Path) -> OsString {
    let mut value = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os(PRELOAD).filter(|others| !others.is_empty()) {
        value.push(":");
        value.push(others);
    }
    value
}

/// Forks a process that waits for the end of this one and then releases its granules. Otherwise they would stay in use until
/// another program needs them, or until `ebb-guest recover`.
fn start_recovery_process() {
    let Ok(program) = pidfd_open(getpid(), PidfdFlags::empty()) else {
        return;
    };
    // SAFETY: this process has one thread.
    if unsafe { libc::fork() } != 0 {
        return;
    }
    // Those who end the program end it, too, such as systemd, which then waits for it.
    // SAFETY: ignores a signal.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
    let _ = setsid(); // Fails only for the leader of a process group, which a child is not.
    for stream in 0..3 {
        // Readers of the program's output wait until every process has closed it.
        // SAFETY: nothing here uses the standard streams from now on.
        unsafe { libc::close(stream) };
    }
    let mut ended = [PollFd::new(&program, PollFlags::IN)];
    while poll(&mut ended, None).is_err() {}
    let _ = recover_all();
    std::process::exit(0);
}

/// Releases the granules of dead processes in all arenas.
fn recover_all() -> Result<(), String> {
    for path in arena::devices() {
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
