//! Memory pressure and available memory of the host.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The pressure file of the whole host.
pub const HOST_PRESSURE: &str = "/proc/pressure/memory";

/// A trigger on a pressure file. Its descriptor polls `POLLPRI` when tasks have stalled for longer than a threshold within
/// a window, at most once per window (Documentation/accounting/psi.rst).
#[derive(Debug)]
pub struct PsiTrigger {
    file: OwnedFd,
}

impl PsiTrigger {
    /// Arms `file` for stalls of at least one task (`some`) of `stall_us` within `window_us`, both in
    /// microseconds. Without `CAP_SYS_RESOURCE` the window must be a multiple of 2 s.
    ///
    /// # Errors
    /// Those of open(2) and write(2); `EOPNOTSUPP` if PSI is turned off.
    pub fn arm(file: &Path, stall_us: u32, window_us: u32) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).open(file)?;
        file.write_all(format!("some {stall_us} {window_us}\0").as_bytes())?;
        Ok(Self { file: file.into() })
    }

    /// A trigger that fires when `file` polls `POLLPRI`.
    #[cfg(test)]
    pub(crate) const fn from_file(file: OwnedFd) -> Self {
        Self { file }
    }
}

impl AsFd for PsiTrigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The host's memory in bytes (/proc/meminfo).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemInfo {
    /// Total memory.
    pub total: u64,
    /// Memory that can be allocated without swapping.
    pub available: u64,
}

impl MemInfo {
    /// Path of the file.
    pub const PATH: &str = "/proc/meminfo";

    /// Parses the text of that file. `None` if a field is missing.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let field = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            total: field("MemTotal:")?,
            available: field("MemAvailable:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_bytes() {
        let text = "MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   24014260 kB\n";
        let want = MemInfo {
            total: 24_684_092 << 10,
            available: 24_014_260 << 10,
        };
        assert_eq!(MemInfo::parse(text), Some(want));
        assert_eq!(MemInfo::parse("MemTotal: 5 kB\n"), None);
        assert_eq!(MemInfo::parse("MemTotal: 5\nMemAvailable: 5 kB\n"), None);
        let host = MemInfo::parse(&std::fs::read_to_string(MemInfo::PATH).unwrap()).unwrap();
        assert!(host.available <= host.total && host.total > 0);
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        assert!(PsiTrigger::arm(Path::new("/proc/pressure/nothing"), 1, 1).is_err());
    }
}
