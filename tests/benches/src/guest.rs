//! The systems under test, and the guest that they all boot.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{BenchError, path};

/// A guest: the same for every system.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Size of its memory in MiB.
    pub memory_mib: u32,
    /// What its init does, see `resources/guest-init.sh`.
    pub mode: &'static str,
}

/// A monitor and how it boots the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// Ebb, through the ELF inside the bzImage.
    Ebb,
    /// Ebb, with the bzImage as it is.
    EbbImage,
    /// Ebb, with the unpacked kernel.
    EbbElf,
    /// QEMU's default machine, as small as its options make it.
    QemuPc,
    /// QEMU's machine without legacy devices.
    QemuMicrovm,
}

/// What all systems boot, from xtask.
pub struct Files {
    /// The monitor.
    pub ebb: PathBuf,
    /// The packed kernel.
    pub vmlinuz: PathBuf,
    /// The same, unpacked.
    pub vmlinux: PathBuf,
    initramfs: PathBuf,
}

impl Files {
    /// As xtask hands them over.
    ///
    /// # Errors
    /// One is missing.
    pub fn from_environment() -> Result<Self, BenchError> {
        Ok(Self {
            ebb: path("EBB_BIN")?,
            vmlinuz: path("EBB_GUEST_VMLINUZ")?,
            vmlinux: path("EBB_GUEST_VMLINUX")?,
            initramfs: path("EBB_GUEST_INITRAMFS")?,
        })
    }

    /// The command that boots `guest` on `system`.
    #[must_use]
    pub fn command(&self, system: System, guest: Guest) -> Command {
        let cmdline = format!("console=ttyS0 quiet ebb.mode={}", guest.mode);
        match system {
            System::Ebb => self.ebb(&self.vmlinuz, guest, &cmdline),
            System::EbbImage => {
                let mut command = self.ebb(&self.vmlinuz, guest, &cmdline);
                command.args(["--kernel-entry", "image"]);
                command
            }
            System::EbbElf => self.ebb(&self.vmlinux, guest, &cmdline),
            System::QemuPc => self.qemu("pc", guest, &cmdline),
            System::QemuMicrovm => self.qemu("microvm", guest, &cmdline),
        }
    }

    fn ebb(&self, kernel: &Path, guest: Guest, cmdline: &str) -> Command {
        let mut command = Command::new(&self.ebb);
        command
            .arg("run")
            .arg("--kernel")
            .arg(kernel)
            .arg("--initramfs")
            .arg(&self.initramfs)
            .args(["--cmdline", cmdline])
            .args(["--memory", &format!("size={}M", guest.memory_mib)]);
        command
    }

    fn qemu(&self, machine: &str, guest: Guest, cmdline: &str) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", machine, "-accel", "kvm", "-cpu", "host"])
            .args(["-m", &guest.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(&self.vmlinuz)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", cmdline]);
        command
    }
}

impl System {
    /// Name of the system.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebb | Self::EbbImage | Self::EbbElf => "ebb",
            Self::QemuPc => "qemu-pc",
            Self::QemuMicrovm => "qemu-microvm",
        }
    }

    /// How it boots the kernel.
    #[must_use]
    pub const fn case(self) -> &'static str {
        match self {
            Self::EbbImage => "image",
            Self::EbbElf => "elf",
            _ => "bzimage",
        }
    }
}
