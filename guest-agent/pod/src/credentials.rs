//! What a container's process may do: limits, user, capabilities (OCI runtime specification, config.md, "Process" and
//! "Linux Process").

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::fchown;

use ebb_pod::error::{Context, Result};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use oci_spec::runtime::{Capabilities, PosixRlimitType, Process, User};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, configure_capability_in_ambient_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs,
};

/// Where users are listed.
const USERS: &str = "/etc/passwd";

/// The most of that list that is read, in bytes.
const LONGEST_LIST: u64 = 1 << 20;

/// Sets its limits, and the mask of modes of the files that it makes.
pub fn limit(process: &Process) -> Result<()> {
    if let Some(mask) = process.user().umask() {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    for limit in process.rlimits().as_deref().unwrap_or_default() {
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let new = Rlimit {
            current: value(limit.soft()),
            maximum: value(limit.hard()),
        };
        setrlimit(resource(limit.typ()), new).context(format_args!("{:?}", limit.typ()))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Gives its standard streams to its user, who may then open them by `/dev/stdout` and the like.
pub fn own(streams: [&File; 3], user: &User) -> Result<()> {
    for stream in streams {
        fchown(stream, Some(user.uid()), None).context("give a stream to the user")?;
    }
    Ok(())
}

/// The home of a user by the container's list, or the root.
pub fn home(user: &User) -> String {
    let list = File::open(USERS).map(|file| BufReader::new(file.take(LONGEST_LIST)));
    let found = list.ok().and_then(|list| home_in(list, user.uid()));
    found.unwrap_or_else(|| "/".to_owned())
}

/// The home of this user in a list of the form of passwd(5).
fn home_in(list: impl BufRead, uid: u32) -> Option<String> {
    let mut homes = list
        .lines()
        .map_while(std::io::Result::ok)
        .filter_map(|line| {
            let mut words = line.split(':').skip(2);
            let number: u32 = words.next()?.parse().ok()?;
            let home = words.nth(2).filter(|home| !home.is_empty())?;
            (number == uid).then(|| home.to_owned())
        });
    homes.next()
}

/// Becomes its user, with the capabilities that it has so far.
pub fn become_user(process: &Process) -> Result<()> {
    bound(process)?;
    set_keep_capabilities(true).context("keep capabilities")?;
    let user = process.user();
    let groups = user.additional_gids().as_deref().unwrap_or_default();
    let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).context("setgroups")?;
    setgid(Gid::from_raw(user.gid())).context("setgid")?;
    setuid(Uid::from_raw(user.uid())).context("setuid")
}

/// Takes what is not in its bounding set out of that of this process.
fn bound(process: &Process) -> Result<()> {
    let Some(capabilities) = process.capabilities() else {
        return Ok(());
    };
    let kept = set(capabilities.bounding().as_ref());
    for capability in CapabilitySet::all().iter() {
        let exists = rustix::thread::capability_is_in_bounding_set(capability).unwrap_or(false);
        if exists && !kept.contains(capability) {
            rustix::thread::remove_capability_from_bounding_set(capability)
                .context(format_args!("{capability:?}"))?;
        }
    }
    Ok(())
}

/// Gives up all capabilities but those that it is to have.
pub fn drop_capabilities(process: &Process) -> Result<()> {
    if let Some(capabilities) = process.capabilities() {
        let sets = CapabilitySets {
            effective: set(capabilities.effective().as_ref()),
            permitted: set(capabilities.permitted().as_ref()),
            inheritable: set(capabilities.inheritable().as_ref()),
        };
        set_capabilities(None, sets).context("capabilities")?;
        for capability in set(capabilities.ambient().as_ref()).iter() {
            configure_capability_in_ambient_set(capability, true).context("capabilities")?;
        }
    }
    if process.no_new_privileges().unwrap_or(false) {
        set_no_new_privs(true).context("no new privileges")?;
    }
    Ok(())
}

/// The kernel's names for them are these without a prefix.
fn set(capabilities: Option<&Capabilities>) -> CapabilitySet {
    let names = capabilities.into_iter().flatten();
    names
        .filter_map(|capability| CapabilitySet::from_name(&capability.to_string()))
        .fold(CapabilitySet::empty(), CapabilitySet::union)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_that_of_the_users_number() {
        let list = "root:x:0:0:root:/root:/bin/sh\nbroken\n+::::::\nweb:x:33:33:www:/var/www:/bin/sh\nnone:x:7:7:::\n";
        let home = |uid| home_in(list.as_bytes(), uid);
        assert_eq!(home(0).as_deref(), Some("/root"));
        assert_eq!(home(33).as_deref(), Some("/var/www"));
        assert_eq!((home(7), home(1)), (None, None));
    }
}
