//! Files: their content is in the page cache, on a disk or nowhere else; links of a tmpfs, whose content is in slabs.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_guest_agent::memory::PAGE_SIZE;
use rustix::fs::{Advice, fadvise};

use super::words::{Owner, bytes, bytes_mut};
use super::{Holding, Options, Random, Stop, anonymous};

/// The largest file.
const LARGEST: usize = 16 << 20;
/// Words that are read or written at a time.
const PIECE: usize = 4096;
/// Links that are made together.
const LINKS: usize = 64;
/// Words of a link's target: short enough for the kernel to keep it in a slab.
const LINK_WORDS: usize = 6;

/// A name that nothing else has, in one of the folders.
fn new_path(random: &mut Random, options: &Options) -> Option<PathBuf> {
    let folder = options.folders.get(random.below(options.folders.len()))?;
    Some(new_path_in(folder))
}

fn new_path_in(folder: &Path) -> PathBuf {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    folder.join(format!("exercise-{}-{number}", std::process::id()))
}

/// A file. It has no name any more.
struct Unnamed {
    file: File,
    words: usize,
    owner: Owner,
}

/// Writes a file of 4 KiB to 16 MiB.
fn write(random: &mut Random, most: usize, path: &Path) -> Result<Option<Unnamed>, Stop> {
    let words = random.size(PAGE_SIZE, most.min(LARGEST)) / size_of::<u64>();
    let mut open = OpenOptions::new();
    let file = open.read(true).write(true).create_new(true).open(path);
    let mut file = file.map_err(Stop::failed("create a file"))?;
    fs::remove_file(path).map_err(Stop::failed("remove a file"))?;
    let (owner, mut piece) = (Owner::new(), vec![0; PIECE]);
    for first in (0..words).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(words - first)];
        owner.fill(piece, first);
        if file.write_all(bytes(piece)).is_err() {
            return Ok(None); // No room for it.
        }
    }
    Ok(Some(Unnamed { file, words, owner }))
}

/// Writes a file, and reads it through the page cache.
pub fn take(
    random: &mut Random,
    most: usize,
    options: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let Some(path) = new_path(random, options) else {
        return Ok(None);
    };
    let file = write(random, most, &path)?;
    Ok(file.map(|file| Box::new(file) as Box<dyn Holding>))
}

/// Writes a file into the last folder, and has the disk read it into pages that the kernel takes at that moment.
pub fn take_direct(
    random: &mut Random,
    most: usize,
    options: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let Some(folder) = options.folders.last() else {
        return Ok(None);
    };
    let Some(written) = write(random, most, &new_path_in(folder))? else {
        return Ok(None);
    };
    let mut open = OpenOptions::new();
    open.read(true).custom_flags(libc::O_DIRECT);
    // A file system may know no direct I/O.
    let reader = open.open(format!("/proc/self/fd/{}", written.file.as_raw_fd()));
    let direct = reader.map(|reader| Direct { written, reader });
    Ok(direct.ok().map(|file| Box::new(file) as Box<dyn Holding>))
}

impl Holding for Unnamed {
    fn bytes(&self) -> usize {
        self.words * size_of::<u64>()
    }

    fn check(&mut self, random: &mut Random) -> Result<(), Stop> {
        if random.below(2) == 0 {
            // On a disk it leaves the page cache, and comes back from there.
            self.file.sync_data().map_err(Stop::failed("fdatasync"))?;
            fadvise(&self.file, 0, None, Advice::DontNeed).map_err(Stop::failed("fadvise"))?;
        }
        let start = self.file.seek(SeekFrom::Start(0));
        start.map_err(Stop::failed("seek"))?;
        let mut piece = vec![0; PIECE];
        for first in (0..self.words).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(self.words - first)];
            let read = self.file.read_exact(bytes_mut(piece));
            read.map_err(Stop::failed("read a file"))?;
            self.owner.check("a file", piece, first)?;
        }
        Ok(())
    }
}

/// A file that is read past the page cache.
struct Direct {
    written: Unnamed,
    reader: File,
}

impl Holding for Direct {
    fn bytes(&self) -> usize {
        self.written.bytes()
    }

    fn check(&mut self, _: &mut Random) -> Result<(), Stop> {
        let Some(mut target) = anonymous::untouched(self.bytes()) else {
            return Ok(()); // No room for it.
        };
        let read = self.reader.read_exact_at(bytes_mut(target.words_mut()), 0);
        read.map_err(Stop::failed("read a file past the cache"))?;
        let owner = self.written.owner;
        Ok(owner.check("a file read past the cache", target.words(), 0)?)
    }
}

/// Symbolic links. Their targets are what is checked.
struct Links {
    paths: Vec<PathBuf>,
    owner: Owner,
}

/// Makes some links.
pub fn take_links(
    random: &mut Random,
    _: usize,
    options: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let mut links = Links {
        paths: Vec::new(),
        owner: Owner::new(),
    };
    for number in 0..LINKS {
        let Some(path) = new_path(random, options) else {
            return Ok(None);
        };
        if symlink(links.target(number), &path).is_err() {
            return Ok(None); // No room for it.
        }
        links.paths.push(path);
    }
    Ok(Some(Box::new(links)))
}

impl Links {
    fn words(&self, number: usize) -> [u64; LINK_WORDS] {
        let mut words = [0; LINK_WORDS];
        self.owner.fill(&mut words, number * LINK_WORDS);
        words
    }

    fn target(&self, number: usize) -> String {
        let words = self.words(number);
        words.map(|word| format!("{word:016x}")).concat()
    }
}

impl Holding for Links {
    fn bytes(&self) -> usize {
        self.paths.len() * 1024
    }

    fn check(&mut self, _: &mut Random) -> Result<(), Stop> {
        for (number, path) in self.paths.iter().enumerate() {
            let target = fs::read_link(path).map_err(Stop::failed("read a link"))?;
            let target = target.to_string_lossy();
            let word = |at: usize| {
                let digits = target.get(at * 16..at * 16 + 16)?;
                u64::from_str_radix(digits, 16).ok()
            };
            let words: Vec<u64> = (0..LINK_WORDS).map(|at| word(at).unwrap_or(0)).collect();
            self.owner.check("a link", &words, number * LINK_WORDS)?;
        }
        Ok(())
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for path in &self.paths {
            // What cannot be removed stays.
            let _ = fs::remove_file(path);
        }
    }
}
