//! The cache against damage, other users and full disks.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::arch::registers::Entry;

const LOW_END: u64 = 4 << 20;
const KERNEL: Unpacked = Unpacked {
    entry: Entry::Pvh { rip: 0x10_1234 },
    end: 0x18_0000,
};
const PACKED: &[u8] = b"a packed kernel";

/// Size of a segment that fills no page.
const SEGMENT: usize = (200 << 10) + 100;

/// An ELF file of one segment at 1 MiB, whose second chunk is zero, and one that is not loaded.
fn elf() -> Vec<u8> {
    let mut elf = vec![0; 4096 + SEGMENT];
    elf[..4].copy_from_slice(b"\x7fELF");
    elf[32] = 64;
    (elf[54], elf[56]) = (56, 2);
    elf[64] = 1;
    for (at, word) in [(72, 4096u64), (88, 1 << 20), (96, SEGMENT as u64)] {
        elf[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    elf[120] = 4;
    let bytes = elf[4096..].iter_mut().enumerate();
    bytes.for_each(|(n, byte)| {
        *byte = if (64 << 10..128 << 10).contains(&n) {
            0
        } else {
            n as u8 | 1
        }
    });
    elf
}

struct Rig {
    folder: tempfile::TempDir,
    memory: GuestMemoryMmap,
}

impl Rig {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), LOW_END as usize)];
        Self {
            folder: tempfile::tempdir().unwrap(),
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("ebb/kernels")
    }

    fn cache(&self) -> Cache {
        Cache::open(&self.path(), PACKED).unwrap()
    }

    fn save(&self) {
        let elf = elf();
        self.cache()
            .save(PACKED, &Contents::new(&elf, KERNEL).unwrap());
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn load(&self) -> Option<Unpacked> {
        self.cache().load(&self.memory, LOW_END)
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; 3 << 20];
        self.memory
            .read_slice(&mut bytes, GuestAddress(1 << 20))
            .unwrap();
        bytes
    }
}

#[test]
fn what_was_kept_is_found_where_it_belongs() {
    let rig = Rig::new();
    assert_eq!(rig.load(), None, "nothing yet");
    rig.save();
    let file = rig.files().remove(0);
    let metadata = fs::metadata(&file).unwrap();
    assert!(metadata.len() < 140 << 10, "zeroes are left out");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(rig.load(), Some(KERNEL));
    let (content, elf) = (rig.content(), elf());
    assert!(content[..SEGMENT] == elf[4096..]);
    assert!(content[SEGMENT..].iter().all(|byte| *byte == 0));
    let other = Cache::open(&rig.path(), &b"another kernel"[..]).unwrap();
    assert_eq!(other.load(&rig.memory, LOW_END), None);
}

#[test]
fn a_damaged_file_is_removed_and_leaves_memory_as_it_was() {
    let rig = Rig::new();
    rig.save();
    let file = rig.files().remove(0);
    let good = fs::read(&file).unwrap();
    let last = good.len() - 1;
    // In each word of the head, in the first and the last chunk; and cut at different places.
    let flipped = (0..88).step_by(8).chain([100, last]).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        bytes
    });
    let cut = [0, 7, 60, 90, last].map(|len| good[..len].to_vec());
    for bytes in flipped.chain(cut) {
        fs::write(&file, &bytes).unwrap();
        assert_eq!(rig.load(), None);
        assert!(rig.content().iter().all(|byte| *byte == 0));
        assert!(rig.files().is_empty(), "it is made anew");
    }
    rig.save();
    assert_eq!(rig.load(), Some(KERNEL));
}

#[test]
fn a_kernel_that_does_not_fit_is_left_for_its_own_complaint() {
    let rig = Rig::new();
    rig.save();
    assert_eq!(rig.cache().load(&rig.memory, KERNEL.end - 1), None);
    assert_eq!(rig.files().len(), 1);
}

#[test]
fn nothing_is_taken_that_another_user_could_have_made() {
    let rig = Rig::new();
    rig.save();
    let file = rig.files().remove(0);
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    for mode in [0o620, 0o602] {
        set(&file, mode);
        assert_eq!(rig.load(), None, "{mode:o}");
    }
    set(&file, 0o600);
    assert_eq!(rig.load(), Some(KERNEL));
    for mode in [0o770, 0o707] {
        set(&rig.path(), mode);
        assert!(Cache::open(&rig.path(), PACKED).is_none(), "{mode:o}");
    }
    set(&rig.path(), 0o700);
    let elsewhere = rig.folder.path().join("kernel");
    fs::rename(&file, &elsewhere).unwrap();
    symlink(&elsewhere, &file).unwrap();
    assert_eq!(rig.load(), None, "a link");
    let link = rig.folder.path().join("link");
    symlink(rig.path(), &link).unwrap();
    assert!(Cache::open(&link, PACKED).is_none());
}

#[test]
fn the_folder_does_not_grow_and_the_oldest_goes_first() {
    let rig = Rig::new();
    let name = |n: u32| format!("{n:064x}.{VERSION}");
    let folder = Folder::open(&rig.path()).unwrap();
    let stranger = rig.path().join("notes");
    let size = 100u64 << 20;
    let store = |n| {
        let file = |file: &mut fs::File| file.set_len(size);
        folder.store(&name(n), size, file).unwrap();
    };
    fs::write(&stranger, "not ours").unwrap();
    store(0);
    // What a process that was killed has left goes, too, in its turn.
    let left = rig.path().join(format!("{}.1", name(9)));
    fs::write(&left, "half").unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH;
    fs::File::open(&left).unwrap().set_modified(old).unwrap();
    store(1);
    let first = folder.find(&name(0)).unwrap().unwrap();
    first.set_modified(old).unwrap();
    folder
        .find(&name(1))
        .unwrap()
        .unwrap()
        .set_modified(old)
        .unwrap();
    folder.touch(&first);
    store(2);
    let left: Vec<bool> = (0..3)
        .map(|n| folder.find(&name(n)).unwrap().is_some())
        .collect();
    assert_eq!(left, [true, false, true]);
    assert_eq!(rig.files().len(), 3, "and the stranger's");
    let refused = folder.store(&name(3), 257 << 20, |_| Ok(()));
    assert!(refused.is_err());
}

#[test]
fn a_disk_that_is_full_leaves_no_half_file() {
    let rig = Rig::new();
    let folder = Folder::open(&rig.path()).unwrap();
    let full = |_: &mut fs::File| Err(io::Error::from(io::ErrorKind::StorageFull));
    assert!(
        folder
            .store(&format!("{:064x}.{VERSION}", 1), 1, full)
            .is_err()
    );
    assert!(rig.files().is_empty());
    fs::write(rig.folder.path().join("file"), "").unwrap();
    assert!(Cache::open(&rig.folder.path().join("file"), PACKED).is_none());
}
