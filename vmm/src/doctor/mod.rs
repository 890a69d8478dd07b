//! Examines the host: what works, what is missing, and how to get it.

mod guest;
mod host;
mod jail;
mod kvm;
mod syscalls;

use serde::Serialize;

pub use guest::{GuestError, KernelMode, probe_kernel_mode};

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Ebb runs, but slower or with fewer features.
    Warn,
    /// Guests cannot run.
    Fail,
}

/// One thing that was examined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was examined.
    pub name: &'static str,
    /// The result.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Warn,
            detail: detail.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, detail, remedy)
        }
    }
}

/// The results of all checks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// A summary in one sentence.
    pub verdict: String,
    /// Distribution kernels run as guests on this host.
    pub can_run_linux_guests: bool,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        let count = |status| checks.iter().filter(|check| check.status == status).count();
        let (failures, warnings) = (count(Status::Fail), count(Status::Warn));
        let verdict = match (failures, warnings) {
            (0, 0) => "Stock Linux guests run here, with everything that Ebb can use.".to_owned(),
            (0, 1) => "Stock Linux guests run here; one thing could be better.".to_owned(),
            (0, _) => format!("Stock Linux guests run here; {warnings} things could be better."),
            _ => "Stock Linux guests cannot run here; use the nested machine, which needs no KVM: \
                  cargo xtask demo"
                .to_owned(),
        };
        Self {
            verdict,
            can_run_linux_guests: failures == 0,
            checks,
        }
    }
}

/// Examines this host; takes less than ten seconds, also where KVM hangs.
#[must_use]
pub fn examine() -> Report {
    let mut checks = kvm::checks();
    checks.extend(host::checks());
    checks.extend(jail::checks());
    Report::new(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_decides() {
        let (ok, warn) = (Check::ok("a", "fine"), Check::warn("b", "slow", "hurry"));
        let fail = Check::fail("c", "broken", "mend it");
        assert!(Report::new(vec![ok.clone()]).can_run_linux_guests);
        let report = Report::new(vec![ok, warn.clone()]);
        assert!(report.can_run_linux_guests && report.verdict.contains("one thing"));
        let report = Report::new(vec![warn, fail]);
        assert!(!report.can_run_linux_guests && report.verdict.contains("cannot run here"));
    }

    #[test]
    fn this_host_can_be_examined() {
        let report = examine();
        assert!(!report.checks.is_empty());
        for check in &report.checks {
            let remedied = check.status == Status::Ok || check.remedy.is_some();
            assert!(remedied && !check.detail.contains('\n'), "{check:?}");
        }
    }
}
