//! Paths in the repository, and the environment that test programs get.

use std::path::{Path, PathBuf};

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::machine::Options;
use ebb_nested_machine::platform::Platform;
use ebb_nested_machine::runner::Runner;

use crate::shell::{Seconds, progress};

/// The repository's root folder.
pub fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let here = here.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    here.ancestors()
        .nth(2)
        .unwrap_or(Path::new("/"))
        .to_path_buf()
}

/// A release binary of the workspace.
pub fn binary(name: &str) -> PathBuf {
    root().join("target/release").join(name)
}

/// Creates `target/NAME` and returns its path.
pub fn output_folder(name: &str) -> Result<PathBuf> {
    let path = root().join("target").join(name);
    std::fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// The environment variables of tests, demo and benchmarks; and those of this process that begin with `EBB_`, by which tests
/// take other numbers.
pub fn environment(assets: &Assets, platform: Platform, out: &Path) -> Vec<(String, String)> {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut variables = vec![
        ("EBB_BIN", path(&binary("ebb"))),
        ("EBB_DEBUG_BIN", path(&root().join("target/debug/ebb"))),
        ("EBB_CLIENTS", path(&root().join("target/clients/debug"))),
        ("EBB_GUEST_VMLINUZ", path(&assets.vmlinuz)),
        ("EBB_GUEST_VMLINUX", path(&assets.vmlinux)),
        ("EBB_GUEST_INITRAMFS", path(&assets.guest_initramfs)),
        ("EBB_POD_INITRAMFS", path(&assets.pod_initramfs)),
        ("EBB_GUEST_ROOTDISK", path(&assets.root_disk)),
        ("EBB_GUEST_SYSTEM", path(&assets.system_disk)),
        ("EBB_GUEST_SYSTEM_INITRAMFS", path(&assets.system_initramfs)),
        ("EBB_GUEST_PROGRAMS", path(&assets.program_disk)),
        ("EBB_GUEST_OTHER_VMLINUZ", path(&assets.other_vmlinuz)),
        ("EBB_GUEST_OTHER_INITRAMFS", path(&assets.other_initramfs)),
        ("EBB_GUEST_RELEASE", assets.release.clone()),
        // One word a line.
        ("EBB_QEMU", assets.qemu.join("\n")),
        ("EBB_OUT", path(out)),
        ("EBB_PLATFORM", platform.to_string()),
        ("RUST_BACKTRACE", "1".to_owned()),
        // Where the monitor keeps unpacked kernels: the root that the nested machine has is read-only.
        ("XDG_CACHE_HOME", "/tmp/ebb-test-cache".to_owned()),
    ];
    if let Ok(term) = std::env::var("TERM") {
        variables.push(("TERM", term));
    }
    let own = variables
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let own: Vec<_> = own.collect();
    let given = std::env::vars().filter(|(name, _)| name.starts_with("EBB_"));
    let given = given.filter(|(name, _)| !own.iter().any(|(known, _)| known == name));
    given.collect::<Vec<_>>().into_iter().chain(own).collect()
}

/// Starts the runner that fits the host, and prints which one.
pub fn start_runner(assets: &Assets) -> Result<Runner> {
    start_runner_with(assets, &Options::for_repository(&root()))
}

/// As [`start_runner`]; a nested machine has these options.
pub fn start_runner_with(assets: &Assets, options: &Options) -> Result<Runner> {
    if Platform::probe()? == Platform::Nested {
        progress(format_args!(
            "no stock Linux guest runs on this host: booting the nested machine \
             ({} CPUs, {} MiB, emulated by QEMU)",
            options.cpus, options.memory_mib
        ));
    }
    let runner = Runner::start(assets, options)?;
    match &runner {
        Runner::Direct => progress("guests run directly on this host"),
        Runner::Nested(machine) => {
            let time = Seconds(machine.boot_time());
            progress(format_args!(
                "nested machine up in {time} ({})",
                machine.description()
            ));
        }
    }
    Ok(runner)
}
