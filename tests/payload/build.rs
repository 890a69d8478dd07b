//! Builds `ebb-payload-guest` as a flat image, without the standard library: first its dependency `ebb-hypercall-abi`, then
//! the guest.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let out = PathBuf::from(variable("OUT_DIR"));
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = here.join("../payload-guest");
    let abi = here.join("../../hypercall-abi/src");
    for path in [guest.join("src"), guest.join("image.ld"), abi.clone()] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let library = out.join("libebb_hypercall_abi.rlib");
    let mut build = rustc(&abi.join("lib.rs"), "ebb_hypercall_abi", &library);
    build.args(["--crate-type", "rlib", "--cfg", "feature=\"stubs\""]);
    run(build);

    let mut build = rustc(
        &guest.join("src/lib.rs"),
        "ebb_payload_guest",
        &out.join("guest.bin"),
    );
    let script = format!("link-arg=-Wl,-T,{}", guest.join("image.ld").display());
    build
        .args(["--crate-type", "bin", "--cfg", "ebb_guest", "--extern"])
        .arg(format!("ebb_hypercall_abi={}", library.display()))
        .args(["-C", "link-arg=-nostartfiles", "-C", "link-arg=-nostdlib"])
        .args(["-C", "link-arg=-static", "-C", "link-arg=-no-pie"])
        .args(["-C", "link-arg=-Wl,--oformat=binary,--build-id=none"])
        .args(["-C", &script]);
    run(build);
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

/// A call of the compiler, for code that runs at its linked address and never unwinds.
fn rustc(source: &Path, name: &str, output: &Path) -> Command {
    let mut command = Command::new(variable("RUSTC"));
    command
        .arg(source)
        .args(["--crate-name", name, "--edition", "2024", "-o"])
        .arg(output)
        .args([
            "-C",
            "panic=abort",
            "-C",
            "opt-level=2",
            "-C",
            "debuginfo=0",
        ])
        .args(["-C", "relocation-model=static", "-C", "overflow-checks=off"])
        .args([
            "--cap-lints",
            "allow",
            "--target",
            "x86_64-unknown-linux-gnu",
        ]);
    command
}

fn run(mut command: Command) {
    let status = command.status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{command:?}: {status:?}"
    );
}
