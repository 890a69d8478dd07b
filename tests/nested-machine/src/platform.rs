//! Where tests that need KVM run.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::error::{Error, Result};

/// Where a stock Linux guest can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// On this host.
    Direct,
    /// In the nested machine only.
    Nested,
}

impl Platform {
    /// Looks at the host. `EBB_PLATFORM=direct` or `nested` overrides what is found.
    ///
    /// A usable /dev/kvm is not enough: some hosts offer a software KVM that a stock kernel does
    /// not survive, and those show neither svm nor vmx.
    ///
    /// # Errors
    /// When the variable has another value.
    pub fn probe() -> Result<Self> {
        match std::env::var("EBB_PLATFORM").as_deref() {
            Ok("direct") => return Ok(Self::Direct),
            Ok("nested") => return Ok(Self::Nested),
            Err(_) | Ok("") => {}
            Ok(other) => {
                let text = format!("EBB_PLATFORM={other}: use \"direct\" or \"nested\"");
                return Err(Error::new(text));
            }
        }
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let direct = has_virtualization(&cpuinfo) && opens(Path::new("/dev/kvm"));
        Ok(if direct { Self::Direct } else { Self::Nested })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Nested => "nested",
        })
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| {
        line.split_whitespace()
            .any(|word| word == "svm" || word == "vmx")
    })
}

fn opens(path: &Path) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_whole_word_among_the_flags() {
        assert!(has_virtualization("processor : 0\nflags : fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: svm npt\n"));
        assert!(!has_virtualization(
            "flags : fpu svm_lock vmxx\nvmx flags : vnmi\n"
        ));
        assert!(!has_virtualization(""));
    }
}
