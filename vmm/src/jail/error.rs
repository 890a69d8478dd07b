//! Errors of a jail.

use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::sys::tap::TapError;

/// A machine cannot be locked in. The message is one line that names the value and the remedy.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message says what its variant means")]
pub enum JailError {
    #[error(
        "a jail needs root, for namespaces and a cgroup: run `sudo ebb jail`, or `ebb run` in a container"
    )]
    NotRoot,
    #[error(
        "--{option} 0 is root's: name an unprivileged one, for instance of a user made by `useradd --system`"
    )]
    Root { option: &'static str },
    #[error(
        "--{option} {0} means nobody to the kernel: name another one",
        u32::MAX
    )]
    Nobody { option: &'static str },
    #[error(
        "--metrics-listen: a jail has a network of its own; ask for GET /metrics on the API's socket"
    )]
    Listen,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    #[error(
        "--netns {path}: {source}; name one such as /run/netns/NAME, made by `ip netns add NAME`"
    )]
    Network { path: PathBuf, source: io::Error },
    #[error(
        "no cgroups of version 2 are mounted: boot the host with systemd.unified_cgroup_hierarchy=1"
    )]
    NoCgroups,
    #[error(
        "--cgroup {key}=: no controller `{controller}` of version 2 in {place}: boot the host with \
             systemd.unified_cgroup_hierarchy=1, or leave the limit out"
    )]
    NoController {
        key: &'static str,
        controller: &'static str,
        place: PathBuf,
    },
    #[error(
        "--cgroup parent={0}: write a path below the root of all cgroups, such as ebb, without . and .."
    )]
    Parent(PathBuf),
    #[error(
        "--cgroup: {path} cannot be written: {source}; choose another parent=, one without processes of its own"
    )]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("{path} has processes: end them, or choose another --id or parent=")]
    BusyCgroup { path: PathBuf },
    #[error(
        "{path} is the folder of a machine that runs or is being ended: stop it, or choose another --id"
    )]
    InUse { path: PathBuf },
    #[error(
        "{path} belongs to user {owner}, not to --uid: remove it, or choose another --folder or --id"
    )]
    Taken { path: PathBuf, owner: u32 },
    #[error("--folder {path}: {source}; name a folder in one that is there")]
    Folder { path: PathBuf, source: io::Error },
    #[error("{option} {path} is outside of the machine's folder {folder}: name a file in it")]
    Outside {
        option: &'static str,
        path: PathBuf,
        folder: PathBuf,
    },
    #[error("{option} {path} is in a place that a jail has its own of: name a file elsewhere")]
    Hidden { option: &'static str, path: PathBuf },
    #[error(
        "{option} {path} has a symbolic link on its way, which a jail does not follow: name the file itself (`realpath`)"
    )]
    Link { option: &'static str, path: PathBuf },
    #[error("{option} {path}: {source}; check the path")]
    File {
        option: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{option} {path} is a folder: name a file")]
    NotAFile { option: &'static str, path: PathBuf },
    #[error(
        "{option} {path}: user {uid} with group {gid} may not {what} it: change its owner or mode{hint}"
    )]
    Denied {
        option: &'static str,
        path: PathBuf,
        uid: u32,
        gid: u32,
        what: &'static str,
        hint: &'static str,
    },
    #[error(
        "the jail cannot be made: {what} failed: {source}; `ebb doctor` says what this host can do"
    )]
    Step {
        what: &'static str,
        source: io::Error,
    },
}

impl JailError {
    /// That a step failed.
    pub(super) fn step(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Step { what, source }
    }
}
