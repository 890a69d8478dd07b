//! A program with all that it needs to start, for places where nothing else is: a container, a guest without a Debian.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::{Context, Error, Result};

/// Copies the file `program`, as `at`, and the loader and libraries that it asks for, at their own paths, below the folder
/// `root`.
///
/// # Errors
/// There is no ldd(1), it knows nothing of the program, or a copy fails.
pub fn copy_with_libraries(program: &Path, at: &Path, root: &Path) -> Result<()> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || said.contains("not found") {
        return Err(Error::new(format!("ldd {}: {said}", program.display())));
    }
    copy(program, at, root)?;
    libraries(&said).try_for_each(|path| copy(path, path, root))
}

/// The paths in what ldd says: `NAME => PATH (ADDRESS)` or, of the loader, `PATH (ADDRESS)`.
fn libraries(said: &str) -> impl Iterator<Item = &Path> {
    let words = said
        .lines()
        .filter_map(|line| line.rsplit_once(" (")?.0.split(' ').next_back());
    let words = words.map(str::trim).filter(|word| word.starts_with('/'));
    words.map(Path::new)
}

fn copy(from: &Path, at: &Path, root: &Path) -> Result<()> {
    let to = root.join(at.strip_prefix("/").unwrap_or(at));
    let folder = to.parent().context(to.display())?;
    fs::create_dir_all(folder).context(folder.display())?;
    fs::copy(from, &to).context(from.display()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_libraries_have_paths_and_the_kernels_page_has_none() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f05)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f06)\n";
        let found: Vec<&Path> = libraries(said).collect();
        let wanted = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(found, wanted.map(Path::new));
    }
}
