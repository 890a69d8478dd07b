//! Anonymous memory: of 4 KiB pages, of transparent huge pages, from the pool of huge pages; shared with a forked child.

use std::ptr::null_mut;
use std::slice;

use ebb_guest_agent::memory::{HUGE_PAGE_SIZE, PAGE_SIZE, map_anonymous};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::words::{Owner, Wrong, check_zero};
use super::{Holding, Options, Random, Stop};

/// The largest piece.
const LARGEST: usize = 64 << 20;
/// The largest piece from the pool of huge pages.
const LARGEST_OF_POOL: usize = 4 * HUGE_PAGE_SIZE;
const WORD: usize = size_of::<u64>();

/// A mapping, all of whose words are written, or are about to be.
pub struct Anonymous {
    start: *mut u64,
    bytes: usize,
    owner: Owner,
    /// It is not from the pool of huge pages, whose pages a forked child may lack.
    plain: bool,
}

/// Takes 4 KiB to 64 MiB, sees that they are zero, and writes them.
pub fn take(
    random: &mut Random,
    most: usize,
    _: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let bytes = random.size(PAGE_SIZE, most.min(LARGEST));
    let align = if random.below(4) > 0 && bytes >= HUGE_PAGE_SIZE {
        HUGE_PAGE_SIZE
    } else {
        PAGE_SIZE
    };
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let Ok(start) = map_anonymous(bytes, align, prot, MapFlags::PRIVATE) else {
        return Ok(None);
    };
    let advice = [
        None,
        Some(Advice::LinuxHugepage),
        Some(Advice::LinuxNoHugepage),
    ];
    if let Some(advice) = advice[random.below(advice.len())] {
        // A kernel may know no huge pages.
        // SAFETY: the whole of a new mapping; it changes only how the kernel backs it.
        let _ = unsafe { madvise(start, bytes, advice) };
    }
    let mapping = Anonymous {
        start: start.cast(),
        bytes,
        owner: Owner::new(),
        plain: true,
    };
    mapping.write_first("fresh anonymous memory").map(Some)
}

/// Memory that nobody has touched. `None`: the kernel has refused it.
pub fn untouched(bytes: usize) -> Option<Anonymous> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let start = map_anonymous(bytes, PAGE_SIZE, prot, MapFlags::PRIVATE).ok()?;
    Some(Anonymous {
        start: start.cast(),
        bytes,
        owner: Owner::new(),
        plain: true,
    })
}

/// Takes a few pages of the pool of huge pages (`/proc/sys/vm/nr_hugepages`).
pub fn take_from_pool(
    random: &mut Random,
    most: usize,
    _: &Options,
) -> Result<Option<Box<dyn Holding>>, Stop> {
    let bytes = random.size(HUGE_PAGE_SIZE, most.min(LARGEST_OF_POOL));
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB;
    // SAFETY: a new mapping where the kernel finds room.
    let Ok(start) = (unsafe { mmap_anonymous(null_mut(), bytes, prot, flags) }) else {
        return Ok(None);
    };
    let mapping = Anonymous {
        start: start.cast(),
        bytes,
        owner: Owner::new(),
        plain: false,
    };
    mapping.write_first("fresh huge pages").map(Some)
}

impl Anonymous {
    fn write_first(mut self, what: &'static str) -> Result<Box<dyn Holding>, Stop> {
        check_zero(what, self.words())?;
        let owner = self.owner;
        owner.fill(self.words_mut(), 0);
        Ok(Box::new(self))
    }

    /// Its words.
    pub fn words(&self) -> &[u64] {
        // SAFETY: our own mapping, as long; the only other reference would be a mutable one of ours.
        unsafe { slice::from_raw_parts(self.start, self.bytes / WORD) }
    }

    /// Its words.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: our own mapping, as long, and nobody else has a reference to it.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes / WORD) }
    }

    /// Gives some pages back to the guest's kernel, sees that they are zero, and writes them again.
    fn punch(&mut self, random: &mut Random) -> Result<(), Stop> {
        let pages = self.bytes / PAGE_SIZE;
        let first = random.below(pages);
        let count = 1 + random.below(pages - first);
        let (at, len) = (first * PAGE_SIZE, count * PAGE_SIZE);
        let start = self.start.wrapping_byte_add(at);
        // SAFETY: pages of our own mapping, to which nobody has a reference.
        unsafe { madvise(start.cast(), len, Advice::LinuxDontNeed) }
            .map_err(Stop::failed("madvise"))?;
        let (from, to) = (at / WORD, (at + len) / WORD);
        check_zero(
            "anonymous memory after MADV_DONTNEED",
            &self.words()[from..to],
        )?;
        let owner = self.owner;
        owner.fill(&mut self.words_mut()[from..to], from);
        Ok(())
    }

    /// Forks a child that checks all, writes over the second half and checks that. Meanwhile the parent writes over the first
    /// half, with what is there. So each page is copied.
    fn fork(&mut self) -> Result<(), Stop> {
        let told = Told::new()?;
        let (owner, half) = (self.owner, self.bytes / WORD / 2);
        // SAFETY: the child makes no calls but `_exit`: it neither allocates nor locks.
        match unsafe { libc::fork() } {
            -1 => Ok(()), // No memory for it.
            0 => {
                let found = owner.check("memory of a forked child", self.words(), 0);
                let found = found.and_then(|()| {
                    let (second, heir) = (&mut self.words_mut()[half..], Owner::new());
                    heir.fill(second, 0);
                    heir.check("memory written by a forked child", second, 0)
                });
                let code = i32::from(found.is_err());
                told.tell(found.err());
                // SAFETY: ends the child, without running what only the parent may.
                unsafe { libc::_exit(code) }
            }
            child => {
                owner.fill(&mut self.words_mut()[..half], 0);
                let mut status = 0;
                // SAFETY: waits for our own child; `status` is ours.
                let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
                match (ended == child, told.found()) {
                    (true, None) if status == 0 => Ok(()),
                    (true, Some(wrong)) => Err(wrong.into()),
                    _ => Err(Stop::Failed(format!("a forked child: status {status:#x}"))),
                }
            }
        }
    }
}

impl Holding for Anonymous {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn check(&mut self, random: &mut Random) -> Result<(), Stop> {
        self.owner.check("anonymous memory", self.words(), 0)?;
        match random.below(6) {
            0 if self.plain => self.punch(random)?,
            1 if self.plain && self.bytes <= 8 << 20 => {
                self.fork()?;
                self.owner
                    .check("anonymous memory after a fork", self.words(), 0)?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: our own, and nobody uses it any more. An error only leaks it.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

/// What a child has found, in a page that it shares with its parent.
struct Told(*mut Option<Wrong>);

impl Told {
    fn new() -> Result<Self, Stop> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room.
        let page = unsafe { mmap_anonymous(null_mut(), PAGE_SIZE, prot, MapFlags::SHARED) };
        let page = page.map_err(Stop::failed("mmap"))?.cast();
        // SAFETY: a new page, aligned and large enough.
        unsafe { std::ptr::write(page, None) };
        Ok(Self(page))
    }

    fn tell(&self, wrong: Option<Wrong>) {
        // SAFETY: the page is mapped as long as this is; the parent reads when the child has ended.
        unsafe { std::ptr::write_volatile(self.0, wrong) };
    }

    fn found(&self) -> Option<Wrong> {
        // SAFETY: as above; the child has written a whole value, or nothing. A `Wrong` owns nothing, and its name is part
        // of the program, which is at the same address in both.
        unsafe { std::ptr::read_volatile(self.0) }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // SAFETY: our own, and nobody uses it any more.
        let _ = unsafe { munmap(self.0.cast(), PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_tells_what_it_has_found() {
        let options = Options::parse(&[]).unwrap();
        let mut random = Random(7);
        let mut taken = take(&mut random, 64 << 10, &options).unwrap().unwrap();
        for _ in 0..64 {
            taken.check(&mut random).unwrap();
        }
        let mut mapping = Anonymous {
            start: null_mut(),
            bytes: 0,
            owner: Owner::new(),
            plain: true,
        };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let pages = map_anonymous(4 * PAGE_SIZE, PAGE_SIZE, prot, MapFlags::PRIVATE).unwrap();
        (mapping.start, mapping.bytes) = (pages.cast(), 4 * PAGE_SIZE);
        let owner = mapping.owner;
        owner.fill(mapping.words_mut(), 0);
        mapping.words_mut()[1600] ^= 1;
        let Err(Stop::Wrong(wrong)) = mapping.fork() else {
            panic!("the child found nothing");
        };
        assert_eq!((wrong.index, wrong.words), (1600, 1));
        mapping.punch(&mut random).unwrap();
    }
}
