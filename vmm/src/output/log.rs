//! Where the log goes: standard error, or a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{EventFile, Outlet};
use crate::sys;

/// Bytes of the log that may wait to be written.
const CAPACITY: usize = 256 << 10;

/// How long a line may wait where no thread writes it.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The log. It takes lines and never fails: what cannot be written is lost. Clones are the same log.
#[derive(Clone, Debug)]
pub struct Log(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: OnceLock<LogFile>,
    events: OnceLock<EventFile>,
    outlet: Mutex<Option<Arc<Outlet>>>,
}

#[derive(Debug)]
struct LogFile {
    path: Mutex<PathBuf>,
    file: File,
    /// It was not there before.
    is_new: bool,
}

impl Log {
    /// To standard error.
    #[must_use]
    pub fn to_stderr() -> Self {
        Self::new(OnceLock::new())
    }

    /// To the end of the file at `path`, which is made if there is none.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn to_file(path: &Path) -> io::Result<Self> {
        let is_new = path.symlink_metadata().is_err();
        Ok(Self::new(OnceLock::from(LogFile {
            file: open(path)?,
            path: Mutex::new(std::path::absolute(path)?),
            is_new,
        })))
    }

    /// From now on it goes to the end of the file at `path`, wherever it went before. A FIFO needs no reader.
    ///
    /// # Errors
    /// open(2)'s; then it goes where it went.
    pub fn move_to(&self, path: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
        let path = std::path::absolute(path)?;
        let Some(log) = self.0.file.get() else {
            // Only the first thread moves the log.
            let _ = self.0.file.set(LogFile {
                file,
                path: Mutex::new(path),
                is_new: false,
            });
            return Ok(());
        };
        *log.path.lock().unwrap_or_else(PoisonError::into_inner) = path;
        sys::replace_file(&log.file, file)
    }

    fn new(file: OnceLock<LogFile>) -> Self {
        Self(Arc::new(Inner {
            file,
            events: OnceLock::new(),
            outlet: Mutex::default(),
        }))
    }

    /// Events go to `events`, which starts and ends with the log.
    pub fn set_events(&self, events: EventFile) {
        // A process has one file of events.
        let _ = self.0.events.set(events);
    }

    /// From now on a thread, `ebb-log`, writes the lines, and nobody else waits for that.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(&self) -> io::Result<()> {
        if let Some(events) = self.0.events.get() {
            events.start()?;
        }
        let outlet = Outlet::start(
            "ebb-log",
            CAPACITY,
            Duration::ZERO,
            Target(Arc::clone(&self.0)),
        )?;
        *self.outlet() = Some(Arc::new(outlet));
        Ok(())
    }

    /// Waits for the thread as [`Outlet::finish`] does. From now on lines are written by those who have them.
    pub fn finish(&self) {
        let outlet = self.outlet().take();
        if let Some(outlet) = outlet {
            outlet.finish();
        }
        if let Some(events) = self.0.events.get() {
            events.finish();
        }
    }

    /// Bytes that were dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.outlet().as_ref().map_or(0, |outlet| outlet.dropped())
    }

    /// Bytes of events that were dropped so far.
    #[must_use]
    pub fn dropped_events(&self) -> u64 {
        self.0.events.get().map_or(0, EventFile::dropped)
    }

    /// The file, if there is one. It keeps its descriptor when it is opened again.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.0.file.get().map(|it| it.file.as_fd())
    }

    /// Opens the file again by its path: another program may have moved it away. Does nothing without a file.
    ///
    /// # Errors
    /// open(2)'s; then the log goes on in the file that it had.
    pub fn reopen(&self) -> io::Result<()> {
        let Some(log) = self.0.file.get() else {
            return Ok(());
        };
        let path = log.path.lock().unwrap_or_else(PoisonError::into_inner);
        sys::replace_file(&log.file, open(&path)?)
    }

    /// Removes the file if it was made for this log and nothing stands in it.
    pub fn remove_if_unused(&self) {
        let Some(LogFile { path, file, is_new }) = self.0.file.get() else {
            return;
        };
        let path = &*path.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = |it: fs::Metadata| (it.dev(), it.ino(), it.len());
        let (there, ours) = (path.symlink_metadata(), file.metadata());
        if let (true, Ok(there), Ok(ours)) = (is_new, there.map(identity), ours.map(identity))
            && there == ours
            && ours.2 == 0
        {
            let _ = fs::remove_file(path);
        }
    }

    fn outlet(&self) -> MutexGuard<'_, Option<Arc<Outlet>>> {
        let outlet = self.0.outlet.lock();
        outlet.unwrap_or_else(PoisonError::into_inner)
    }
}

/// One line is one write.
impl Write for &Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let outlet = self.outlet().clone();
        match outlet {
            Some(outlet) => outlet.put(bytes),
            None => self.0.write_soon(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Inner {
    /// Writes `bytes` unless nobody takes them within a second.
    fn write_soon(&self, bytes: &[u8]) {
        let stderr = rustix::stdio::stderr();
        let output = self.file.get().map_or(stderr, |it| it.file.as_fd());
        let mut fds = [PollFd::from_borrowed_fd(output, PollFlags::OUT)];
        if matches!(poll(&mut fds, Some(&PATIENCE)), Ok(1..)) {
            let _ = rustix::io::write(output, bytes);
        }
    }
}

/// What the thread writes to.
struct Target(Arc<Inner>);

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match self.0.file.get() {
            Some(it) => rustix::io::write(&it.file, bytes)?,
            None => rustix::io::write(rustix::stdio::stderr(), bytes)?,
        };
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(log: &Log, text: &str) {
        (&mut &*log).write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_log_goes_on_where_its_path_leads() {
        let folder = tempfile::tempdir().unwrap();
        let [path, moved] = ["log", "log.1"].map(|name| folder.path().join(name));
        fs::write(&path, "before\n").unwrap();
        let log = Log::to_file(&path).unwrap();
        say(&log, "direct\n");
        log.start().unwrap();
        say(&log, "thread\n");
        log.finish();
        fs::rename(&path, &moved).unwrap();
        log.reopen().unwrap();
        say(&log, "new\n");
        assert_eq!(
            fs::read_to_string(&moved).unwrap(),
            "before\ndirect\nthread\n"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
    }

    #[test]
    fn a_log_moves_to_files_and_fifos() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second, fifo] = ["1", "2", "fifo"].map(|name| folder.path().join(name));
        let log = Log::to_stderr();
        log.start().unwrap();
        log.move_to(&first).unwrap();
        say(&log, "one\n");
        log.finish();
        log.move_to(&second).unwrap();
        say(&log, "two\n");
        assert_eq!(fs::read_to_string(&first).unwrap(), "one\n");
        assert_eq!(fs::read_to_string(&second).unwrap(), "two\n");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
        log.move_to(&fifo).unwrap();
        say(&log, "nobody reads it\n");
        log.move_to(&folder.path().join("none/log")).unwrap_err();
    }

    #[test]
    fn only_a_file_that_was_made_for_nothing_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        Log::to_file(&path).unwrap().remove_if_unused();
        assert!(!path.exists());
        let log = Log::to_file(&path).unwrap();
        say(&log, "something\n");
        log.remove_if_unused();
        assert!(path.exists(), "something stands in it");
        fs::write(&path, "").unwrap();
        Log::to_file(&path).unwrap().remove_if_unused();
        assert!(path.exists(), "it was there before");
    }
}
