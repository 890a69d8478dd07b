//! Paths of the kernel, its modules and the images that tests boot. `cargo xtask setup` makes them.

use std::path::{Path, PathBuf};

use ebb_pod_image::modules::{self, Module};

use crate::error::Result;

/// Paths of everything that tests boot.
#[derive(Clone, Debug)]
pub struct Assets {
    /// The kernel as the distribution ships it, a bzImage.
    pub vmlinuz: PathBuf,
    /// The ELF kernel inside the bzImage.
    pub vmlinux: PathBuf,
    /// The kernel's configuration.
    pub config: PathBuf,
    /// QEMU's command line up to the options for its data folders.
    pub qemu: Vec<String>,
    /// The kernel's release, as in `uname -r`.
    pub release: String,
    /// The folder with modules.dep.
    pub modules: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// An ext4 image with a small Debian.
    pub root_disk: PathBuf,
    /// An ext4 image of a complete Debian, with `ebb-guest` installed.
    pub system_disk: PathBuf,
    /// The initramfs of that Debian.
    pub system_initramfs: PathBuf,
    /// An ext4 image of a Debian with systemd and programs, see resources/programs.txt.
    pub program_disk: PathBuf,
    /// The static agent of the nested machine.
    pub nested_agent: PathBuf,
    /// The static `ebb-guest`.
    pub ebb_guest_agent: PathBuf,
    /// The static agent of pods' guests.
    pub pod_agent: PathBuf,
    /// The initramfs of pods' guests.
    pub pod_initramfs: PathBuf,
    /// The guest's initramfs.
    pub guest_initramfs: PathBuf,
    /// A kernel of another version, a bzImage.
    pub other_vmlinuz: PathBuf,
    /// The guest's initramfs for that kernel.
    pub other_initramfs: PathBuf,
}

/// Folder where `cargo xtask setup` unpacks a QEMU that is newer than the distribution's.
pub fn emulator_folder(cache: &Path) -> PathBuf {
    cache.join("emulator")
}

/// The first words of QEMU's command line, if it was unpacked in `folder` with its libraries and dynamic loader.
pub fn emulator(folder: &Path) -> Vec<String> {
    let below = |path: &str| folder.join(path).to_string_lossy().into_owned();
    vec![
        below("usr/lib64/ld-linux-x86-64.so.2"),
        "--library-path".into(),
        below("usr/lib/x86_64-linux-gnu"),
        below("usr/bin/qemu-system-x86_64"),
        "-L".into(),
        below("usr/share/qemu"),
        "-L".into(),
        below("usr/share/seabios"),
    ]
}

fn qemu(cache: &Path) -> Vec<String> {
    let folder = emulator_folder(cache);
    if folder.exists() {
        emulator(&folder)
    } else {
        vec!["qemu-system-x86_64".into()]
    }
}

impl Assets {
    /// The paths in the repository `root` for this kernel release.
    pub fn locate(root: &Path, release: &str) -> Self {
        let kernel = root.join(".cache/kernel").join(release);
        let agents = root.join("target/static/x86_64-unknown-linux-gnu/release");
        Self {
            vmlinuz: kernel.join(format!("boot/vmlinuz-{release}")),
            vmlinux: kernel.join("vmlinux"),
            config: kernel.join(format!("boot/config-{release}")),
            qemu: qemu(&root.join(".cache")),
            release: release.to_owned(),
            modules: kernel.join("lib/modules").join(release),
            busybox: "/bin/busybox".into(),
            root_disk: root.join(".cache/rootdisk.ext4"),
            system_disk: root.join(".cache/system.ext4"),
            system_initramfs: root.join(".cache/system.initramfs"),
            program_disk: root.join(".cache/programs/disk.ext4"),
            nested_agent: agents.join("nested-agent"),
            ebb_guest_agent: agents.join("ebb-guest"),
            pod_agent: agents.join("ebb-pod-agent"),
            pod_initramfs: root.join("target/guest/pod.cpio"),
            guest_initramfs: root.join("target/guest/initramfs.cpio"),
            other_vmlinuz: root.join(".cache/other-kernel/vmlinuz"),
            other_initramfs: root.join("target/guest/other.cpio"),
        }
    }

    /// The modules `names` and their dependencies, in load order.
    ///
    /// # Errors
    /// If a module is unknown, or a file cannot be read or unpacked.
    pub fn load_modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        modules::load(&self.modules, names)
    }
}
