//! Landlock, the second belt: even if something else got into the jail's root, the machine would reach only what is listed
//! here (Documentation/userspace-api/landlock.rst).

use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::cgroup::Group;
use super::plan::Plan;
use crate::sys::mounts::Access;

/// The newest version of the interface that is used.
const NEWEST: ABI = ABI::V6;

/// From now on this process, and what it starts, opens the files of `plan` only, makes none but in the machine's folder,
/// connects to nothing by TCP, and sends signals to nobody outside. Returns false if the kernel knows no Landlock.
pub(super) fn restrict(plan: &Plan, group: &Group) -> Result<bool, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let file = AccessFs::ReadFile | AccessFs::IoctlDev;
    let write = file | AccessFs::WriteFile;
    let folder = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile;
    let pressure = group.path().join("memory.pressure");
    let fixed: [(&Path, BitFlags<AccessFs>); 8] = [
        (&plan.folder, folder),
        (Path::new("/proc"), read),
        (Path::new("/proc/pressure/memory"), write),
        (Path::new("/sys/fs/cgroup"), read),
        (&pressure, write),
        (Path::new("/run/ebb/peers"), write),
        (Path::new("/dev/kvm"), write),
        (Path::new("/dev/null"), write),
    ];
    let items = plan.items.iter().map(|item| {
        let access = match item.access {
            Access::Read => file,
            Access::Write => write,
        };
        (item.path.as_path(), access)
    });
    let rules = fixed.into_iter().chain(items).filter_map(|(path, access)| {
        // What is not there needs no rule.
        let file = PathFd::new(path).ok()?;
        Some(Ok::<_, RulesetError>(PathBeneath::new(file, access)))
    });
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rules(rules)?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
