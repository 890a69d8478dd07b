//! A container's process, from its first instruction in the container's namespaces to the program that it becomes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_pod::error::{Context, Error, Result};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::Process;

use crate::request::{Place, Request};
use crate::{credentials, mounts};

/// Where a program without a slash in its name is looked for, if the container says nothing else.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The namespaces that the process enters by itself: the cgroup is to be the root of its own, and the agent's files are
/// needed until then.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS.union(CloneFlags::CLONE_NEWCGROUP);

/// Becomes the program that the file `request` describes. Returns only if that failed, and has said so.
pub fn run(request: &str) -> Result<u8> {
    // It closes when the program starts.
    let report = std::io::stdout().as_fd().try_clone_to_owned();
    let mut report = File::from(report.context("the report")?);
    // The line with this process' number comes first.
    let mut go = [0];
    std::io::stdin().read_exact(&mut go).context("no start")?;
    let error = match prepare(request) {
        Ok(mut command) => Error::new(command.exec().to_string()),
        Err(error) => error,
    };
    std::io::Write::write_all(&mut report, format!("error {error}\n").as_bytes())
        .context("the report")?;
    Ok(255)
}

fn prepare(request: &str) -> Result<Command> {
    let wanted = Request::read(Path::new(request))?;
    let killed = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(killed).context("prctl")?;
    let procs = wanted.cgroup.join("cgroup.procs");
    fs::write(&procs, "0").context(procs.display())?;
    rustix::process::setsid().context("setsid")?;
    // A terminal that a session's leader opens becomes its controlling one.
    let [input, output, errors] = wanted.streams;
    let (input, output, errors) = (
        agents(input, true)?,
        agents(output, false)?,
        agents(errors, false)?,
    );
    match &wanted.place {
        Place::New { root, container } => {
            unshare(NAMESPACES).context("unshare")?;
            mounts::enter(root, container)?;
        }
        Place::Beside(pid) => {
            // By the agent's /proc: numbers of processes mean something else in this namespace.
            for name in ["cgroup", "mnt"] {
                let path = format!("/proc/{pid}/ns/{name}");
                let namespace = File::open(&path).context(&path)?;
                setns(&namespace, CloneFlags::empty()).context(path)?;
            }
        }
    }
    let mut command = program(&wanted.process)?;
    command.stdin(input).stdout(output).stderr(errors);
    Ok(command)
}

/// A descriptor of the agent, which is process 1, opened again.
fn agents(number: i32, for_reading: bool) -> Result<File> {
    let path = format!("/proc/1/fd/{number}");
    let mut options = File::options();
    options.read(for_reading).write(!for_reading);
    options.open(&path).context(path)
}

/// The program, after everything that it starts with: limits, user, capabilities, folder, environment.
fn program(process: &Process) -> Result<Command> {
    credentials::limit(process)?;
    let folder = process.cwd();
    let environment = process.env().as_deref().unwrap_or_default();
    let environment: Vec<(&str, &str)> = environment
        .iter()
        .filter_map(|line| line.split_once('='))
        .collect();
    let words = process.args().as_deref().unwrap_or_default();
    let (name, arguments) = words
        .split_first()
        .context("the process has no arguments")?;
    credentials::become_user(process)?;
    std::env::set_current_dir(folder).context(format_args!("cwd {}", folder.display()))?;
    let path = environment.iter().find(|(name, _)| *name == "PATH");
    let file = find(name, path.map_or(PATH, |(_, path)| path))?;
    credentials::drop_capabilities(process)?;
    let mut command = Command::new(file);
    command.arg0(name).args(arguments).env_clear();
    command.envs(environment);
    Ok(command)
}

/// The program's file.
fn find(name: &str, path: &str) -> Result<PathBuf> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    let found = std::env::split_paths(OsStr::new(path))
        .map(|folder| folder.join(name))
        .find(|file| is_program(file));
    found.context(format_args!(
        "exec: {name:?}: executable file not found in $PATH"
    ))
}

fn is_program(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
