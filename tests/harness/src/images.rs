//! What is booted, and where results go: the environment that `cargo xtask` makes.

use std::path::PathBuf;

use crate::error::{Context, Result};

/// Paths of the monitor, kernels and file systems.
#[derive(Clone, Debug)]
pub struct Images {
    /// The monitor.
    pub ebb: PathBuf,
    /// The kernel as its distribution ships it, a bzImage.
    pub vmlinuz: PathBuf,
    /// The ELF that was inside it.
    pub vmlinux: PathBuf,
    /// The guests' initramfs, see resources/guest-init.sh.
    pub initramfs: PathBuf,
    /// The initramfs of guests that run the containers of a pod.
    pub pod_initramfs: PathBuf,
    /// An ext4 image with a small Debian.
    pub root_disk: PathBuf,
    /// An ext4 image of a Debian that boots by itself, see resources/systemdisk.txt.
    pub system_disk: PathBuf,
    /// That Debian's own initramfs.
    pub system_initramfs: PathBuf,
    /// An ext4 image of a Debian with systemd and programs, see resources/programs.txt.
    pub program_disk: PathBuf,
    /// A kernel of another version, a bzImage.
    pub other_vmlinuz: PathBuf,
    /// The guests' initramfs for that kernel.
    pub other_initramfs: PathBuf,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// `direct` or `nested`.
    pub platform: String,
}

impl Images {
    /// The monitor in a debug build, which can panic on purpose.
    ///
    /// # Errors
    /// When the environment does not name it.
    pub fn debug_ebb() -> Result<PathBuf> {
        let path = std::env::var_os("EBB_DEBUG_BIN").context("EBB_DEBUG_BIN is not set");
        path.map(PathBuf::from)
    }

    /// Reads the environment.
    ///
    /// # Errors
    /// When a variable is not set.
    pub fn from_environment() -> Result<Self> {
        let text = |name: &str| {
            std::env::var(name).context(format!(
                "{name} is not set; `cargo xtask test`, `demo` and `exec` set it"
            ))
        };
        let path = |name: &str| text(name).map(PathBuf::from);
        Ok(Self {
            ebb: path("EBB_BIN")?,
            vmlinuz: path("EBB_GUEST_VMLINUZ")?,
            vmlinux: path("EBB_GUEST_VMLINUX")?,
            initramfs: path("EBB_GUEST_INITRAMFS")?,
            pod_initramfs: path("EBB_POD_INITRAMFS")?,
            root_disk: path("EBB_GUEST_ROOTDISK")?,
            system_disk: path("EBB_GUEST_SYSTEM")?,
            system_initramfs: path("EBB_GUEST_SYSTEM_INITRAMFS")?,
            program_disk: path("EBB_GUEST_PROGRAMS")?,
            other_vmlinuz: path("EBB_GUEST_OTHER_VMLINUZ")?,
            other_initramfs: path("EBB_GUEST_OTHER_INITRAMFS")?,
            release: text("EBB_GUEST_RELEASE")?,
            platform: text("EBB_PLATFORM")?,
        })
    }
}
