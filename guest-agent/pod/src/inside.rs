//! A container's process, from its first instruction in the container's namespaces to the program that it becomes.

use std::env::set_current_dir;
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
use oci_spec::runtime::{Process, Spec};

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
    if let Some(value) = wanted.process.oom_score_adj() {
        let path = "/proc/self/oom_score_adj";
        fs::write(path, value.to_string()).context(format_args!("{path} = {value}"))?;
    }
    rustix::process::setsid().context("setsid")?;
    // A terminal that a session's leader opens becomes its controlling one.
    let [input, output, errors] = wanted.streams;
    let (input, output, errors) = (
        agents(input, true)?,
        agents(output, false)?,
        agents(errors, false)?,
    );
    match &wanted.place {
        Place::New {
            root,
            copies,
            container,
            ..
        } => {
            unshare(NAMESPACES).context("unshare")?;
            set_parameters(&container.spec)?;
            let terminal = wanted.process.terminal().unwrap_or(false);
            // Its path: what another mount namespace has open cannot be bound here.
            let terminal = terminal.then(|| fs::read_link(agents_path(wanted.streams[0])));
            let terminal = terminal.transpose().context("the terminal")?;
            mounts::enter(root, copies, container, terminal.as_deref())?;
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
    credentials::own([&input, &output, &errors], wanted.process.user())?;
    let mut command = program(&wanted.process)?;
    command.stdin(input).stdout(output).stderr(errors);
    Ok(command)
}

/// Sets the kernel's parameters that the container wants: those of its namespaces, and of the network, which is the guest's.
fn set_parameters(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref();
    let wanted = linux.and_then(|linux| linux.sysctl().as_ref());
    for (name, value) in wanted.into_iter().flatten() {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&path, value).context(format_args!("sysctl {name} = {value}"))?;
    }
    Ok(())
}

/// The path of a descriptor of the agent's.
fn agents_path(number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/1/fd/{number}"))
}

/// A descriptor of the agent, which is process 1, opened again.
fn agents(number: i32, for_reading: bool) -> Result<File> {
    let path = agents_path(number);
    let mut options = File::options();
    options.read(for_reading).write(!for_reading);
    options.open(&path).context(path.display())
}

/// The program, after everything that it starts with: limits, user, capabilities, folder, environment.
fn program(process: &Process) -> Result<Command> {
    credentials::limit(process)?;
    let environment = process.env().as_deref().unwrap_or_default();
    let environment: Vec<(&str, &str)> = environment
        .iter()
        .filter_map(|line| line.split_once('='))
        .collect();
    let words = process.args().as_deref().unwrap_or_default();
    let (name, arguments) = words
        .split_first()
        .context("the process has no arguments")?;
    // As runc does: the root tries first, then the user.
    let entered = set_current_dir(process.cwd());
    credentials::become_user(process)?;
    let folder = process.cwd().display();
    entered
        .or_else(|_| set_current_dir(process.cwd()))
        .context(format_args!("cwd {folder}"))?;
    let value = |wanted| environment.iter().find(|(name, _)| *name == wanted);
    let file = find(name, value("PATH").map_or(PATH, |(_, path)| path))?;
    let mut command = Command::new(file);
    command.arg0(name).args(arguments).env_clear();
    if value("HOME").is_none() {
        command.env("HOME", credentials::home(process.user()));
    }
    command.envs(environment);
    credentials::drop_capabilities(process)?;
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
