//! Files that are made once, and again when what they are made from has changed.

use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Result};

/// Has `make` make the file `made` by way of a folder, whose path it gets, unless the file is there and was made from the
/// same `stamp`. Returns true if it was made.
///
/// The stamp is kept beside the file. The folder is removed, also after a failure.
pub fn ensure(made: &Path, stamp: &[u8], make: impl FnOnce(&Path) -> Result<()>) -> Result<bool> {
    let stamp_file = made.with_extension("stamp");
    if made.exists() && fs::read(&stamp_file).is_ok_and(|old| old == stamp) {
        return Ok(false);
    }
    let tree = made.with_extension("tree");
    let result = make(&tree);
    let _ = fs::remove_dir_all(&tree); // A failed build leaves half a tree.
    result?;
    fs::write(&stamp_file, stamp).context(|| format!("write {}", stamp_file.display()))?;
    Ok(true)
}
