//! Every crate that Ebb is built from has a licence and a source that `deny.toml` allows.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use spdx::{Expression, LicenseItem};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap()
}

/// The list of words under `table.key` in `deny.toml`.
fn allowed(table: &str, key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let deny: toml::Table = toml::from_str(&text).unwrap();
    let words = deny[table][key].as_array().unwrap().iter();
    words
        .map(|word| word.as_str().unwrap().to_owned())
        .collect()
}

/// The packages in Cargo.lock, the workspace's own included, as `cargo metadata` describes them.
fn packages() -> Vec<Value> {
    packages_of("")
}

/// As [`packages`], of the workspace in this folder. Cargo downloads the crates that no build has needed yet.
fn packages_of(folder: &str) -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root().join(folder))
        .args(["metadata", "--locked", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {errors}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// True if a choice that the expression leaves needs no other licence than these.
fn is_allowed(licence: &str, allowed: &[String]) -> bool {
    let expression = Expression::parse_mode(licence, spdx::ParseMode::LAX);
    expression.is_ok_and(|expression| {
        expression.evaluate(|needed| match &needed.license {
            LicenseItem::Spdx { id, .. } => allowed.iter().any(|name| name == id.name),
            LicenseItem::Other { .. } => false,
        })
    })
}

#[test]
fn every_licence_is_allowed() {
    let allowed = allowed("licenses", "allow");
    let packages = packages();
    assert!(packages.len() > 100, "cargo metadata lists them all");
    let refused: Vec<String> = packages
        .iter()
        .filter(|package| !is_allowed(package["license"].as_str().unwrap_or(""), &allowed))
        .map(|package| format!("{} has licence {}", package["name"], package["license"]))
        .collect();
    assert_eq!(refused, [""; 0], "deny.toml allows {allowed:?}");
}

#[test]
fn every_crate_comes_from_the_registry_or_this_repository() {
    let allowed = allowed("sources", "allow-registry");
    let refused: Vec<String> = packages()
        .iter()
        .filter_map(|package| Some((package["name"].to_string(), package["source"].as_str()?)))
        .filter(|(_, source)| {
            !allowed
                .iter()
                .any(|url| *source == format!("registry+{url}"))
        })
        .map(|(name, source)| format!("{name} comes from {source}"))
        .collect();
    assert_eq!(refused, [""; 0], "deny.toml allows {allowed:?}");
}

#[test]
fn a_licence_must_leave_an_allowed_choice() {
    let allowed = ["MIT".to_owned(), "Zlib".to_owned()];
    for good in [
        "MIT",
        "GPL-3.0-only OR MIT",
        "Zlib AND MIT",
        "MIT/Apache-2.0",
    ] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["", "GPL-3.0-only", "MIT AND Apache-2.0", "Proprietary"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}

/// Bugs that others' monitors had through these crates, and the first versions without them: CVE-2020-27173, RUSTSEC-2020-0157
/// and 2023-0056, RUSTSEC-2024-0002, RUSTSEC-2024-0428.
#[test]
fn crates_of_monitors_are_past_their_known_bugs() {
    let fixed = [
        ("vm-superio", [0, 1, 1]),
        ("vm-memory", [0, 12, 2]),
        ("vmm-sys-util", [0, 12, 0]),
        ("kvm-ioctls", [0, 19, 1]),
    ];
    let packages = packages();
    for (name, first) in fixed {
        let used: Vec<&Value> = packages
            .iter()
            .filter(|package| package["name"] == name)
            .collect();
        assert!(!used.is_empty(), "{name} is not used any more");
        for package in used {
            let version = package["version"].as_str().unwrap();
            let numbers: Vec<u32> = version
                .split('.')
                .filter_map(|part| part.parse().ok())
                .collect();
            assert!(numbers[..] >= first[..], "{name} {version} has a known bug");
        }
    }
}

/// `cargo xtask fuzz` builds with `--locked` a workspace that no other command looks at. If this fails, run
/// `cargo metadata` in that folder.
#[test]
fn the_fuzzers_lock_file_has_all_that_is_built() {
    assert!(!packages_of("tests/fuzz/libfuzzer").is_empty());
}
