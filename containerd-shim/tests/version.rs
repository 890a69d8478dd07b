//! What `containerd-shim-ebb-v2` says of itself.

use std::process::Command;

#[test]
fn it_says_its_name_and_version() {
    for flag in ["-v", "--version"] {
        let output = Command::new(env!("CARGO_BIN_EXE_containerd-shim-ebb-v2"))
            .arg(flag)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(said, format!("containerd-shim-ebb-v2 {version}\n"));
        assert!(output.status.success());
    }
}
