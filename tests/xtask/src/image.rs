//! The image of `resources/package/Containerfile`: built by podman on a Debian of our own, so that no registry is asked, and used.

use std::fs;
use std::path::Path;
use std::process::Command;

use ebb_nested_machine::error::{Context, Result};

use crate::project::root;
use crate::shell::{command, progress, quietly};

/// What the Debian is called in the store.
const BASE: &str = "localhost/ebb-base";

/// What the image must be able to do where there is no KVM.
const USE: &str = "FROM localhost/ebb\nRUN ebb --version && ebb top --help && id ebb-vm\n";

/// Builds the image from the package in `out`, on the Debian in the archive `base`.
///
/// # Errors
/// podman(1)'s, and what the image cannot do.
pub fn try_out(out: &Path, base: &Path) -> Result<()> {
    progress("building an image with the package ebb");
    let store = out.join("podman");
    let tried = build(out, base, &store);
    fs::remove_dir_all(&store).context(|| format!("remove {}", store.display()))?;
    tried
}

fn build(out: &Path, base: &Path, store: &Path) -> Result<()> {
    let mut import = podman(store, &["import"]);
    import.arg(base).arg(BASE);
    quietly(import)?;
    let with_base = format!("BASE={BASE}");
    let mut image = podman(store, &["build", "--isolation", "chroot"]);
    image.args([
        "--build-arg",
        &with_base,
        "--tag",
        "localhost/ebb",
        "--file",
    ]);
    image.arg(root().join("resources/package/Containerfile"));
    image.arg(out);
    quietly(image)?;
    let file = store.join("Use");
    fs::write(&file, USE).context(|| format!("write {}", file.display()))?;
    let mut uses = podman(store, &["build", "--isolation", "chroot", "--file"]);
    uses.arg(&file).arg(out);
    quietly(uses).map(drop)
}

/// podman, with all that it keeps in a folder of its own.
fn podman(store: &Path, words: &[&str]) -> Command {
    let mut podman = command("podman", ["--storage-driver", "vfs"]);
    podman.args(["--events-backend", "none", "--cgroup-manager", "cgroupfs"]);
    for (option, name) in [
        ("--root", "store"),
        ("--runroot", "run"),
        ("--tmpdir", "tmp"),
    ] {
        podman.arg(option).arg(store.join(name));
    }
    podman.args(words);
    podman
}
