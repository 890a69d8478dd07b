//! Makes snapshots of a paused machine, on a thread of their own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use std::{error, io};

use super::LaunchError;
use super::attach::SavedDevice;
use super::instance::Instance;
use super::pause::Pausing;
use crate::config::MachineConfig;
use crate::control::SnapshotKind;
use crate::devices::virtio::blk::DiskHandle;
use crate::guest_memory::{GuestMemory, merge};
use crate::kvm::Chips;
use crate::snapshot::{self, Difference, DiskFile, Host, MAX_LAYERS, MemoryMap, SnapshotId, State};
use crate::sys::panic_point;
use crate::sys::random::random_block;
use crate::sys::seccomp::Role;

/// A snapshot that somebody asks for, and who wants to know what came of it.
struct Request {
    kind: SnapshotKind,
    memory: PathBuf,
    state: PathBuf,
    answer: Sender<Result<(), String>>,
}

/// The parts of a machine that a snapshot is made of.
pub struct Saver {
    /// Keeps the machine paused.
    pub pausing: Arc<Pausing>,
    /// Interrupt controllers, timer and clock.
    pub chips: Chips,
    /// The devices, by name.
    pub devices: Vec<SavedDevice>,
    /// The disks, in the order of the command line.
    pub disks: Vec<DiskHandle>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The model-specific registers to save.
    pub msrs: Vec<u32>,
    /// What it was built from, and whether it ends.
    pub instance: Arc<Instance>,
    /// What it was restored from.
    pub base: Option<Base>,
}

/// The snapshot that a machine was restored from.
pub struct Base {
    /// What is in its memory files.
    pub memory: MemoryMap,
    /// These files, which are mapped.
    pub files: Vec<Arc<File>>,
}

/// The thread that makes snapshots, one after the other.
pub struct Snapshots {
    requests: Mutex<Option<Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Snapshots {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`LaunchError::System`].
    pub fn start(saver: Saver) -> Result<Self, LaunchError> {
        let (requests, todo) = mpsc::channel::<Request>();
        let run = move || {
            Role::Snapshot.enter();
            for request in todo {
                panic_point();
                let done = saver.create(request.kind, &request.memory, &request.state);
                // Nobody may be there any more who wants to know.
                let _ = request.answer.send(done);
            }
        };
        let thread = thread::Builder::new().name("ebb-snapshot".to_owned());
        let thread = thread
            .spawn(run)
            .map_err(LaunchError::system("snapshot thread"))?;
        Ok(Self {
            requests: Mutex::new(Some(requests)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Makes a snapshot, and returns when its files have their names.
    ///
    /// # Errors
    /// Why there is none. Nothing of it is left then.
    pub fn create(
        &self,
        kind: SnapshotKind,
        memory: PathBuf,
        state: PathBuf,
    ) -> Result<(), String> {
        let (answer, answered) = mpsc::channel();
        let request = Request {
            kind,
            memory,
            state,
            answer,
        };
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = requests.as_ref().map(|requests| requests.send(request));
        drop(requests);
        match sent.map(|_| answered.recv()) {
            Some(Ok(done)) => done,
            _ => Err("the machine is ending".to_owned()),
        }
    }

    /// Ends the thread. A snapshot that is being made is given up, as the machine ends.
    pub fn stop(&self) {
        let take = |thread: &Mutex<Option<JoinHandle<()>>>| {
            thread.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        drop(
            self.requests
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        if let Some(thread) = take(&self.thread) {
            // It has reported a panic itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.stop();
    }
}

fn text(error: impl error::Error) -> String {
    let mut text = error.to_string();
    if let Some(source) = error.source() {
        text.push_str(&format!(": {source}"));
    }
    text
}

impl Saver {
    fn create(&self, kind: SnapshotKind, memory: &Path, state: &Path) -> Result<(), String> {
        let paused = self.pausing.while_paused(|| self.save(kind, memory, state));
        paused.unwrap_or_else(|| Err("the machine runs; pause it first".to_owned()))
    }

    fn save(&self, kind: SnapshotKind, memory: &Path, state: &Path) -> Result<(), String> {
        let start = Instant::now();
        let config = &self.instance.config;
        refuse(config)?;
        for path in [memory, state] {
            refuse_outside(path, &config.allow_paths)?;
        }
        self.refuse_exchanged()?;
        let base = match kind {
            SnapshotKind::Full => None,
            SnapshotKind::Difference => Some(self.base(&[memory, state])?),
        };
        let id = snapshot_id().map_err(text)?;
        let written = snapshot::create(memory, state, |file| {
            let lazily_free = self.memory.lazily_free();
            let mut dead = self.memory.free_in_lists();
            dead.extend(&lazily_free);
            dead.extend(self.memory.free_in_arenas());
            merge(&mut dead);
            let is_ending = || self.instance.exit.reason().is_some();
            let ram = self.memory.ram();
            let map = match base {
                None => snapshot::write(file, ram, &dead, id, is_ending),
                Some(base) => {
                    let difference = Difference::new(&base.memory, &base.files);
                    difference.write(file, ram, &dead, id, is_ending)
                }
            }?;
            let written = map.written;
            let lazily_free = lazily_free
                .iter()
                .map(|it| (it.start(), it.len()))
                .collect();
            let state = self.state(map, lazily_free).map_err(io::Error::other)?;
            let state = state.encode().map_err(io::Error::other)?;
            tracing::info!(written, ms = start.elapsed().as_millis(), "snapshot");
            Ok(state)
        });
        written.map_err(text)
    }

    /// What a difference that is written to `paths` is one from.
    fn base(&self, paths: &[&Path]) -> Result<&Base, String> {
        let Some(base) = &self.base else {
            return Err(
                "this machine was not restored from memory files, so there is nothing to tell a difference from; save all of it, or restore it first"
                    .to_owned(),
            );
        };
        if base.files.len() > MAX_LAYERS {
            return Err(format!(
                "this machine was restored from {} memory files, and a difference may have no more below it; save all of it",
                base.files.len()
            ));
        }
        for file in &base.files {
            let file = file.metadata().map_err(text)?;
            if file.nlink() == 0 {
                return Err(
                    "a memory file that this machine was restored from is deleted or replaced, and a difference needs it; save all of it"
                        .to_owned(),
                );
            }
            for path in paths {
                let is_it = |it: fs::Metadata| (it.dev(), it.ino()) == (file.dev(), file.ino());
                if path.symlink_metadata().is_ok_and(is_it) {
                    return Err(format!(
                        "{}: this machine was restored from it, and a difference needs it; name another file",
                        path.display()
                    ));
                }
            }
        }
        Ok(base)
    }

    /// The options say where the disks are, and those would name another file.
    fn refuse_exchanged(&self) -> Result<(), String> {
        let disks = self.disks.iter().zip(&self.instance.config.disks);
        for (index, (disk, config)) in disks.enumerate() {
            let (is, was) = (disk.path(), &config.path);
            if is != *was {
                let (name, is, was) = (config.name(index), is.display(), was.display());
                return Err(format!(
                    "{name} is on {is} now, and a machine is saved only with the disks that it was started with; \
                     give it {was} again"
                ));
            }
        }
        Ok(())
    }

    fn state(&self, memory: MemoryMap, lazily_free: Vec<(u64, u64)>) -> Result<State, String> {
        let config = &self.instance.config;
        let save = |(name, device): &SavedDevice| {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            Ok((name.clone(), device.save()?))
        };
        let disk = |path: &PathBuf| {
            DiskFile::at(path).map_err(|error| format!("disk {}: {error}", path.display()))
        };
        let msrs = self.msrs.clone();
        let vcpus = self.pausing.switch().at_rest(move |vcpu| vcpu.save(&msrs));
        let vcpus = vcpus.map_err(text)?.into_iter().collect::<Result<_, _>>();
        Ok(State {
            host: Host::now(),
            words: config.words.clone(),
            disks: config
                .disks
                .iter()
                .map(|it| disk(&it.path))
                .collect::<Result<_, _>>()?,
            vcpus: vcpus.map_err(text)?,
            chips: self.chips.save().map_err(text)?,
            devices: self
                .devices
                .iter()
                .map(save)
                .collect::<Result<_, String>>()?,
            memory,
            lazily_free,
            kernel: self.memory.kernel().save(),
        })
    }
}

/// What cannot be saved, or not be restored.
fn refuse(config: &MachineConfig) -> Result<(), String> {
    let is = [
        (config.lazy.strict, "strict mode (--lazy strict=on)"),
        (
            config.memory.hugepages,
            "hugetlb pages (--memory hugepages=on)",
        ),
        (config.memory.shared, "shared memory (--memory shared=on)"),
        (
            config.nested,
            "virtual machines of its own (--cpus nested=on)",
        ),
        (config.words.is_empty(), "a jail (ebb jail)"),
    ];
    match is.into_iter().find(|(is, _)| *is) {
        Some((_, what)) => Err(format!(
            "a machine with {what} cannot be saved; start it without"
        )),
        None => Ok(()),
    }
}

/// A client of the API may write only what lies in one of `folders` itself, which have real paths. A link of that name is
/// replaced, not followed.
fn refuse_outside(path: &Path, folders: &[PathBuf]) -> Result<(), String> {
    let folder = path.file_name().and(path.parent());
    let is_allowed = |it: &Path| {
        let mut allowed = folders.iter().map(PathBuf::as_path);
        allowed.any(|allowed| allowed == it || allowed == Path::new("/"))
    };
    if folder.is_some_and(is_allowed) {
        return Ok(());
    }
    Err(format!(
        "{}: may not be written: start the machine with --allow-paths and the folder that it is in, and give the folder's real path",
        path.display()
    ))
}

fn snapshot_id() -> io::Result<SnapshotId> {
    let block = random_block()?;
    Ok(std::array::from_fn(|at| block[at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_names_files_in_allowed_folders_only() {
        let folders = ["/srv/a", "/srv/b"].map(PathBuf::from);
        for (path, is_allowed) in [
            ("/srv/a/state", true),
            ("/srv/b/./state", true),
            ("/srv/state", false),
            ("/srv/a", false),
            ("/srv/a/..", false),
            ("/srv/a/../state", false),
            ("/srv/a/c/../../state", false),
            ("/srv/a/c/state", false),
            ("/srv/ab/state", false),
            ("srv/a/state", false),
            ("state", false),
            ("", false),
        ] {
            let refused = refuse_outside(Path::new(path), &folders);
            assert_eq!(refused.is_ok(), is_allowed, "{path}: {refused:?}");
        }
        let everywhere = ["/".into()];
        refuse_outside(Path::new("/srv/a/state"), &everywhere).unwrap();
        refuse_outside(Path::new("/srv/a/.."), &everywhere).unwrap_err();
        let refused = refuse_outside(Path::new("/srv/a/state"), &[]).unwrap_err();
        assert!(refused.starts_with("/srv/a/state: ") && refused.contains("--allow-paths"));
    }
}
