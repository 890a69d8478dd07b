//! Files: their content is in the page cache, on a disk or nowhere else; links of a tmpfs, whose content is in slabs.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_guest_agent::memory::PAGE_SIZE;
use rustix::fs::{Advice, fadvise};

use super::words::{Owner, bytes, bytes_mut};
use super::{Holding, Options, Random, Stop};

/// The largest file.
const LARGEST: usize = 16 << 20;
/// Words that are read or written at a time.
const PIECE: usize = 4096;
/// Links that are made together.
const LINKS: usize = 64;
/// Words of a link's target: short enough for the kernel to keep it in a slab.
const LINK_WORDS: usize = 6;

/// A name that nothing else has.
fn new_path(random: &mut Random, options: &Options) -> Option<PathBuf> {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let folder = options.folders.get(random.below(options.folders.len()))?;
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    Some(folder.join(format!("exercise-{}-{number}", std::process::id())))
}

/// A file. It has no name any more.
struct Unnamed {
    file: File,
    words: usize,
    owner: Owner,
}

/// Writes a file of 4 KiB to 16 MiB.
pub fn take(
    random: &mut Random,
    most: usize,
    options: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let Some(path) = new_path(random, options) else {
        return Ok(None);
    };
    let words = random.size(PAGE_SIZE, most.min(LARGEST)) / size_of::<u64>();
    let mut open = OpenOptions::new();
    let file = open.read(true).write(true).create_new(true).open(&path);
    let mut file = file.map_err(Stop::failed("create a file"))?;
    fs::remove_file(&path).map_err(Stop::failed("remove a file"))?;
    let (owner, mut piece) = (Owner::new(), vec![0; PIECE]);
    for first in (0..words).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(words - first)];
        owner.fill(piece, first);
        if file.write_all(bytes(piece)).is_err() {
            return Ok(None); // No room for it.
        }
    }
    Ok(Some(Box::new(Unnamed { file, words, owner })))
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
