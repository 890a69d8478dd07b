//! Namespaces of a process's own, and giving up privileges for good. For processes with one thread.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, LinkNameSpaceType, Uid, UnshareFlags,
    clear_ambient_capability_set, move_into_link_name_space, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    unshare_unsafe,
};

/// Has the next process that this one starts be process 1 of a namespace of its own.
///
/// # Errors
/// unshare(2)'s.
pub fn give_children_own_pids() -> io::Result<()> {
    unshare(UnshareFlags::NEWPID)
}

/// Gives this process mounts, network interfaces, System V objects and a host name of its own. The mounts are those that it
/// had; what others mount from now on it does not see, and the other way round. There is no interface but one that is down.
///
/// # Errors
/// unshare(2)'s and mount(2)'s.
pub fn leave_host() -> io::Result<()> {
    let spaces = [
        UnshareFlags::NEWNS,
        UnshareFlags::NEWNET,
        UnshareFlags::NEWIPC,
        UnshareFlags::NEWUTS,
    ];
    unshare(UnshareFlags::from_iter(spaces))?;
    super::mounts::make_private()
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: descriptors stay shared with nobody, as they are: no flag is about them.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

/// Runs `action` within the network namespace at `path`, such as /run/netns/NAME.
///
/// # Errors
/// open(2)'s and setns(2)'s.
pub fn within_network<T>(path: &Path, action: impl FnOnce() -> T) -> io::Result<T> {
    let [own, other] = [Path::new("/proc/self/ns/net"), path].map(File::open);
    let (own, other) = (own?, other?);
    let enter =
        |space: &File| move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network));
    enter(&other)?;
    let result = action();
    enter(&own)?;
    Ok(result)
}

/// Becomes a user without any capability, now and for ever: programs that it starts get none either.
///
/// # Errors
/// Those of the system calls; then some privileges may be gone.
pub fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    gain_nothing()?;
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    keep(CapabilitySet::empty())?;
    // Else the files in /proc/self would be root's (proc_pid(5)).
    Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Keeps, of root's privileges, only those for ending processes of other users and removing their files, now and for ever.
///
/// # Errors
/// As for [`become_user`].
pub fn keep_for_cleaning_up() -> io::Result<()> {
    gain_nothing()?;
    keep(CapabilitySet::KILL | CapabilitySet::DAC_OVERRIDE)
}

/// Programs that this process starts have no privileges that it has not.
fn gain_nothing() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The kernel has no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn keep(kept: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}
