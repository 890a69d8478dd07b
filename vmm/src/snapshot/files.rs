//! Files that appear under their names whole, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file of a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

impl FileError {
    /// Something is wrong with the file at `path`.
    #[must_use]
    pub fn new(path: &Path, what: impl ToString) -> Self {
        Self {
            path: path.to_owned(),
            what: what.to_string(),
        }
    }
}

/// A file under another name beside the one that it is to have. Removed when it is dropped before it has that.
struct Temporary<'a> {
    path: &'a Path,
    other: PathBuf,
    file: File,
    named: bool,
}

impl<'a> Temporary<'a> {
    fn create(path: &'a Path) -> Result<Self, FileError> {
        let mut other = path.as_os_str().to_owned();
        other.push(format!(".tmp{}", std::process::id()));
        let other = PathBuf::from(other);
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&other);
        let file = file.map_err(|error| FileError::new(path, explain(&error)))?;
        Ok(Self {
            path,
            other,
            file,
            named: false,
        })
    }

    fn name(&mut self) -> Result<(), FileError> {
        fs::rename(&self.other, self.path)
            .map_err(|error| FileError::new(self.path, explain(&error)))?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.named {
            let _ = fs::remove_file(&self.other);
        }
    }
}

/// What to say of an error of a file that is written.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("{error}; make room, or name a file on another disk")
        }
        io::ErrorKind::Interrupted => "the machine is ending".to_owned(),
        _ => format!("{error}; name a file in a folder that you may write"),
    }
}

/// Creates both files of a snapshot, `memory` first. `write_memory` writes the first and returns the content of the second.
/// Both are on the disk before they get their names; if anything fails, there is neither.
///
/// # Errors
/// [`FileError`].
pub fn create(
    memory: &Path,
    state: &Path,
    write_memory: impl FnOnce(&File) -> io::Result<Vec<u8>>,
) -> Result<(), FileError> {
    if memory == state {
        return Err(FileError::new(state, "give the two files different names"));
    }
    let mut of_memory = Temporary::create(memory)?;
    let mut of_state = Temporary::create(state)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| FileError::new(&path, explain(&error))
    };
    let content = write_memory(&of_memory.file).map_err(failed(memory))?;
    of_memory.file.sync_all().map_err(failed(memory))?;
    io::Write::write_all(&mut of_state.file, &content).map_err(failed(state))?;
    of_state.file.sync_all().map_err(failed(state))?;
    of_memory.name()?;
    if let Err(error) = of_state.name() {
        let _ = fs::remove_file(memory);
        return Err(error);
    }
    for path in [memory, state] {
        let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
        let folder = File::open(folder.unwrap_or(Path::new(".")));
        folder.and_then(|it| it.sync_all()).map_err(failed(path))?;
    }
    Ok(())
}

/// Opens a file of a snapshot for reading.
///
/// # Errors
/// [`FileError`].
pub fn open(path: &Path) -> Result<File, FileError> {
    let file = File::open(path).map_err(|error| FileError::new(path, error))?;
    let metadata = file
        .metadata()
        .map_err(|error| FileError::new(path, error))?;
    if metadata.is_file() {
        return Ok(file);
    }
    Err(FileError::new(
        path,
        "is no regular file; name a file of a snapshot",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_appear_or_neither() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let names = || {
            let mut names: Vec<_> = fs::read_dir(folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = create(&path("m"), &path("s"), |_| Err(full())).unwrap_err();
        assert!(error.to_string().contains("/m: "), "{error}");
        assert!(error.to_string().contains("make room"), "{error}");
        assert!(names().is_empty());
        create(&path("m"), &path("s"), |mut file| {
            io::Write::write_all(&mut file, b"pages")?;
            Ok(b"state".to_vec())
        })
        .unwrap();
        assert_eq!(names(), ["m", "s"]);
        // What is there already stays when the next one fails, and is replaced when it does not.
        create(&path("m"), &path("s"), |_| Err(full())).unwrap_err();
        assert_eq!(fs::read(path("m")).unwrap(), b"pages");
        create(&path("m"), &path("s"), |_| Ok(b"later".to_vec())).unwrap();
        assert_eq!(fs::read(path("s")).unwrap(), b"later");
        fs::create_dir(path("d")).unwrap();
        create(&path("n"), &path("d"), |_| Ok(Vec::new())).unwrap_err();
        create(&path("n"), &path("n"), |_| Ok(Vec::new())).unwrap_err();
        create(&path("x/m"), &path("s"), |_| Ok(Vec::new())).unwrap_err();
        assert_eq!(names(), ["d", "m", "s"]);
    }
}
