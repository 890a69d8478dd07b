//! Checks what KVM offers, and that it can run a kernel.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use kvm_bindings as bindings;
use kvm_ioctls::Kvm;

use super::guest::{GuestError, KernelMode, probe_kernel_mode};
use super::{Check, Status};

/// Path of KVM's device.
const DEVICE: &str = "/dev/kvm";
/// The only version of KVM's interface that ever existed.
const API_VERSION: i32 = 12;
/// Instructions that take more nanoseconds than this are emulated one by one.
const SLOW_NS: f64 = 100.0;

/// Capabilities without which no machine can be built.
const REQUIRED: &[(u32, &str)] = &[
    (bindings::KVM_CAP_IRQCHIP, "irqchip"),
    (bindings::KVM_CAP_IOEVENTFD, "ioeventfd"),
    (bindings::KVM_CAP_IRQFD, "irqfd"),
    (bindings::KVM_CAP_USER_MEMORY, "user memory"),
    (bindings::KVM_CAP_SET_TSS_ADDR, "TSS address"),
    (bindings::KVM_CAP_EXT_CPUID, "CPUID"),
    (bindings::KVM_CAP_IMMEDIATE_EXIT, "immediate exit"),
];

/// Capabilities that improve a machine.
const OPTIONAL: &[(u32, &str)] = &[
    (bindings::KVM_CAP_EXIT_HYPERCALL, "hypercall exits"),
    (bindings::KVM_CAP_SYNC_REGS, "register synchronization"),
    (bindings::KVM_CAP_BINARY_STATS_FD, "statistics"),
    (
        bindings::KVM_CAP_X86_USER_SPACE_MSR,
        "exits at writes of MSRs",
    ),
    (bindings::KVM_CAP_X86_MSR_FILTER, "filter of MSRs"),
];

/// All checks of this file. Those that use KVM are made only if it can be opened.
pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![device(Path::new(DEVICE))];
    if checks[0].status == Status::Ok {
        match Kvm::new() {
            Ok(kvm) => {
                checks.push(api_version(kvm.get_api_version()));
                checks.push(required(&kvm));
                checks.push(optional(&kvm));
                checks.push(kernel_mode(probe_kernel_mode()));
            }
            Err(error) => checks.push(Check::fail(
                "KVM device",
                format!("{DEVICE} cannot be opened: {error}"),
                "see the host's kernel log: dmesg",
            )),
        }
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    checks.push(hardware(&cpuinfo));
    checks
}

fn device(path: &Path) -> Check {
    let name = "KVM device";
    let shown = path.display();
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(name, format!("{shown} may be used")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::fail(
            name,
            format!("there is no {shown}"),
            "sudo modprobe kvm-intel (or kvm-amd); in a virtual machine, have nested \
             virtualization turned on; in a container, pass the device in",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::fail(
            name,
            format!("{shown} is there, but you may not use it"),
            "sudo usermod -aG kvm \"$USER\", then log in again",
        ),
        Err(error) => Check::fail(
            name,
            format!("{shown} cannot be opened: {error}"),
            "sudo modprobe kvm-intel (or kvm-amd), and look at dmesg",
        ),
    }
}

fn api_version(version: i32) -> Check {
    let name = "KVM interface";
    if version == API_VERSION {
        return Check::ok(name, format!("version {version}"));
    }
    Check::fail(
        name,
        format!("version {version}, but only {API_VERSION} is known"),
        "use a Linux kernel's own KVM",
    )
}

/// The names of the capabilities that KVM has, and of those that it lacks.
fn sift(kvm: &Kvm, wanted: &[(u32, &'static str)]) -> (String, String) {
    let (there, missing): (Vec<_>, Vec<_>) = wanted
        .iter()
        .partition(|(number, _)| kvm.check_extension_raw((*number).into()) > 0);
    let names = |list: Vec<(u32, &'static str)>| {
        let names: Vec<_> = list.into_iter().map(|(_, name)| name).collect();
        names.join(", ")
    };
    (names(there), names(missing))
}

fn required(kvm: &Kvm) -> Check {
    let name = "KVM capabilities";
    let (there, missing) = sift(kvm, REQUIRED);
    if missing.is_empty() {
        let vcpus = kvm.get_max_vcpus();
        return Check::ok(name, format!("{there}; at most {vcpus} vCPUs"));
    }
    Check::fail(
        name,
        format!("missing: {missing}"),
        "use a newer host kernel with a full KVM (CONFIG_KVM_INTEL or CONFIG_KVM_AMD)",
    )
}

fn optional(kvm: &Kvm) -> Check {
    let name = "more KVM capabilities";
    let (there, missing) = sift(kvm, OPTIONAL);
    if missing.is_empty() {
        return Check::ok(name, there);
    }
    Check::warn(
        name,
        format!("missing: {missing}"),
        "use a newer host kernel; guests run without them",
    )
}

fn kernel_mode(probe: Result<KernelMode, GuestError>) -> Check {
    let name = "kernel-mode code";
    let nested = "this KVM is a software one; use a host with hardware virtualization, or the nested \
                  machine: cargo xtask demo";
    let mode = match probe {
        Ok(mode) => mode,
        Err(error) => {
            return Check::fail(name, format!("a tiny guest did not run: {error}"), nested);
        }
    };
    let mut troubles = Vec::new();
    if mode.ns_per_instruction > SLOW_NS {
        let speed = mode.ns_per_instruction;
        troubles.push(format!(
            "every instruction of a guest's kernel is emulated and takes {speed:.0} ns"
        ));
    }
    if !mode.unsupported.is_empty() {
        let instructions = mode.unsupported.join(", ");
        troubles.push(format!("there it does not know {instructions}"));
    }
    if troubles.is_empty() {
        let speed = mode.ns_per_instruction;
        return Check::ok(
            name,
            format!("runs at speed: {speed:.1} ns per instruction"),
        );
    }
    let detail = format!(
        "{}: stock Linux guests cannot run here",
        troubles.join("; ")
    );
    Check::fail(name, detail, nested)
}

fn hardware(cpuinfo: &str) -> Check {
    let name = "hardware virtualization";
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let found = ["svm", "vmx"]
        .into_iter()
        .find(|wanted| flags.split_whitespace().any(|flag| flag == *wanted));
    match found {
        Some(flag) => Check::ok(name, format!("the processor has {flag}")),
        None => Check::warn(
            name,
            "the processor shows neither svm nor vmx",
            "turn it on in the firmware; in a virtual machine, have nested virtualization turned on",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_none() {
        let folder = tempfile::TempDir::new().unwrap();
        let check = device(&folder.path().join("kvm"));
        assert!(check.status == Status::Fail && check.detail.contains("there is no"));
        let check = device(folder.path());
        assert!(check.status == Status::Fail && check.detail.contains("cannot be opened"));
    }

    #[test]
    fn flags_of_the_processor() {
        let flags = |flags: &str| hardware(&format!("processor : 0\nflags\t: fpu {flags} lm\n"));
        assert_eq!(flags("svm").status, Status::Ok);
        assert_eq!(flags("vmx").status, Status::Ok);
        assert_eq!(flags("svm_lock").status, Status::Warn);
    }

    #[test]
    fn slow_or_incomplete_kernel_mode_is_refused() {
        let judge = |ns_per_instruction, unsupported| {
            let mode = KernelMode {
                ns_per_instruction,
                unsupported,
            };
            kernel_mode(Ok(mode))
        };
        assert_eq!(judge(0.3, vec![]).status, Status::Ok);
        assert!(judge(550.0, vec![]).detail.contains("takes 550 ns"));
        let check = judge(0.3, vec!["cmpxchg16b"]);
        assert!(check.status == Status::Fail && check.detail.contains("cmpxchg16b"));
        assert_eq!(kernel_mode(Err(GuestError::TimedOut)).status, Status::Fail);
    }

    #[test]
    fn versions() {
        assert_eq!(api_version(12).status, Status::Ok);
        assert_eq!(api_version(11).status, Status::Fail);
    }
}
