//! A container's cgroup in the guest (version 2).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ebb_pod::error::{Context, Error, Result};
use oci_spec::runtime::LinuxResources;

/// How long killed processes may need to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often that is tried.
const PAUSE: Duration = Duration::from_millis(2);

/// Makes the cgroup of a container, with these limits.
pub fn make(id: &str, resources: Option<&LinuxResources>) -> Result<PathBuf> {
    let path = Path::new("/sys/fs/cgroup").join(id);
    fs::create_dir(&path).context(path.display())?;
    if let Some(resources) = resources {
        limit(&path, resources)?;
    }
    Ok(path)
}

/// Sets limits: those that are given.
pub fn limit(path: &Path, resources: &LinuxResources) -> Result<()> {
    let memory = resources.memory().as_ref();
    if let Some(limit) = memory.and_then(oci_spec::runtime::LinuxMemory::limit) {
        set(path, "memory.max", &or_max(limit))?;
    }
    let low = memory.and_then(oci_spec::runtime::LinuxMemory::reservation);
    if let Some(low) = low.filter(|low| *low != 0) {
        set(path, "memory.low", &or_max(low))?;
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()) {
        set(path, "pids.max", &or_max(limit))?;
    }
    if let Some(cpu) = resources.cpu() {
        let period = cpu.period().unwrap_or(100_000);
        if let Some(quota) = cpu.quota() {
            set(path, "cpu.max", &format!("{} {period}", or_max(quota)))?;
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            set(path, "cpu.weight", &weight(shares).to_string())?;
        }
    }
    for (name, value) in resources.unified().iter().flatten() {
        if name.contains('/') {
            return Err(Error::new(format!(
                "unified {name}: not a file of a cgroup"
            )));
        }
        set(path, name, value)?;
    }
    Ok(())
}

/// The weight of version 2 for shares of version 1: 1 to 10000 for 2 to 262144, as runc has it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// No limit is not a positive number.
fn or_max(limit: i64) -> String {
    if limit > 0 {
        limit.to_string()
    } else {
        "max".to_owned()
    }
}

fn set(path: &Path, name: &str, value: &str) -> Result<()> {
    let path = path.join(name);
    fs::write(&path, value).context(format_args!("{} = {value}", path.display()))
}

/// The numbers of its processes.
pub fn processes(path: &Path) -> Result<Vec<u32>> {
    let path = path.join("cgroup.procs");
    let text = fs::read_to_string(&path).context(path.display())?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Kills all that is in it.
pub fn kill(path: &Path) -> Result<()> {
    set(path, "cgroup.kill", "1")
}

/// Lets none of its processes run, or lets them go on.
pub fn freeze(path: &Path, frozen: bool) -> Result<()> {
    set(path, "cgroup.freeze", if frozen { "1" } else { "0" })
}

/// Removes it when its last process, which has been killed, is gone.
pub fn remove_when_empty(path: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(PAUSE);
            }
            done => return done.context(path.display()),
        }
    }
}

/// A number that one of its files has, alone or behind a word.
pub fn value(path: &Path, file: &str, word: Option<&str>) -> u64 {
    let text = fs::read_to_string(path.join(file)).unwrap_or_default();
    let found = match word {
        None => text.trim().parse().ok(),
        Some(word) => text
            .lines()
            .find_map(|line| line.strip_prefix(word)?.trim().parse().ok()),
    };
    found.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_a_weight() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn limits_are_written_where_the_cgroup_has_them_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let resources = |text: &str| serde_json::from_str::<LinuxResources>(text).unwrap();
        let all = r#"{"memory": {"limit": 4096, "reservation": -1}, "cpu": {"shares": 2}, "unified": {"memory.oom.group": "1"}}"#;
        limit(folder.path(), &resources(all)).unwrap();
        let read = |name| fs::read_to_string(folder.path().join(name)).unwrap();
        let found = ["memory.max", "memory.low", "cpu.weight", "memory.oom.group"].map(read);
        assert_eq!(found, ["4096", "max", "1", "1"]);
        let error = limit(folder.path(), &resources(r#"{"unified": {"../x": "1"}}"#)).unwrap_err();
        assert!(error.to_string().contains("../x"), "{error}");
    }
}
