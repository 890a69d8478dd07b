//! Every fault point in the code has a model that catches it. (A name that only a model knows fails that model:
//! nothing goes wrong that it could catch.)

use std::fs;
use std::path::Path;

/// The text of all Rust files below `folder`.
fn text(folder: &Path) -> String {
    let entries = fs::read_dir(folder).unwrap();
    let texts = entries.map(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text(&path)
        } else {
            fs::read_to_string(&path).unwrap()
        }
    });
    texts.collect()
}

#[test]
fn every_fault_point_has_a_model() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let (code, models) = (text(&tests.join("../../../vmm/core/src")), text(&tests));
    let points = code.lines().filter(|line| !line.trim().starts_with("//"));
    let names: Vec<_> = points
        .filter_map(|line| line.split("fault_point!(\"").nth(1)?.split('"').next())
        .collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        assert!(
            models.contains(&format!("\"{name}\"")),
            "no model for {name:?}"
        );
    }
}
