//! An heir: a process that shares this one's memory and open files, sleeps, and frees the memory with
//! several threads once this process is dead, however it died.
//!
//! The kernel frees the memory of a process on one CPU, and tells its parent of the end only afterwards. An
//! address space that somebody still has is not freed at all: so with an heir the end is visible at once,
//! and what the kernel would do alone is done by `Estate::settle`, in parallel. The heir is made by
//! clone(2) with `CLONE_VM | CLONE_FILES` and without `CLONE_THREAD`: SIGKILL for this process does not
//! concern it, while the OOM killer ends all who share an address space.
//!
//! **What runs in the heir** shares heap, locks and thread-local storage with threads that may have died at
//! any instruction. So it allocates nothing, takes no lock, formats nothing and cannot panic: raw system
//! calls and atomics only. All signals are blocked in it.

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use rustix::time::{ClockId, clock_gettime};

use super::Pins;
use super::mapping::drop_advice;

/// Most threads of an heir.
pub const MAX_WORKERS: usize = 64;

/// How much less important than this process the heir's further threads are: the first one is not less.
pub const NICENESS: i32 = 5;

const HEIR_STACK: usize = 64 << 10;
const WORKER_STACK: usize = 32 << 10;
const STACKS: usize = HEIR_STACK + MAX_WORKERS * WORKER_STACK;

const HEIR_NAME: &CStr = c"ebb-heir";
const WORKER_NAME: &CStr = c"ebb-free";

/// What a process, its heir and its guardian tell each other: a page that stays shared across fork(2).
#[derive(Debug, Default)]
pub struct Board {
    /// 1 once the process has stopped everything by itself: then its end needs no comment.
    pub clean: AtomicU32,
    /// Identity of a socket in the file system that is to be removed: device.
    pub socket_device: AtomicU64,
    /// The same: inode; 0: there is none.
    pub socket_inode: AtomicU64,
    /// Bytes that the heir has to free.
    pub total: AtomicU64,
    /// Bytes that it is through with.
    pub done: AtomicU64,
    /// Batches that the kernel would not free; they go with the address space.
    pub failures: AtomicU64,
    /// Threads that there are to be from now on; 0: as many as the legacy says. May be changed while memory is freed.
    pub wanted: AtomicU64,
    /// Most threads that took part at a time, the heir among them; 0: nothing was to be freed.
    pub workers: AtomicU64,
    /// Resident bytes before, and after.
    pub resident: [AtomicU64; 2],
    /// Nanoseconds of `CLOCK_MONOTONIC` when freeing began, and when it ended; 0: it has not.
    pub times: [AtomicU64; 2],
}

impl Board {
    /// A board that is shared with all processes made from now on. It lives as long as they do.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new() -> io::Result<&'static Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel picks an unused place. It is never unmapped, zeroed, aligned
        // to a page, and as large as a board; all fields are atomics, for which all zeroes are a value.
        let board = unsafe {
            let page = rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                size_of::<Self>(),
                prot,
                MapFlags::SHARED,
            )?;
            &*page.cast::<Self>()
        };
        Ok(board)
    }
}

/// A part of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its first byte, at a page.
    pub address: usize,
    /// Bytes; whole pages.
    pub len: usize,
    /// Files are behind it, see [`super::Mapping::shared`].
    pub shared: bool,
}

/// What an heir has to free.
#[derive(Debug)]
pub struct Legacy {
    /// In the order in which they are drawn.
    pub parts: Vec<Part>,
    /// Threads that free memory; at most [`MAX_WORKERS`].
    pub workers: usize,
    /// What is to be unmapped first of all.
    pub pins: Arc<Pins>,
}

/// An heir as this process sees it.
#[derive(Debug)]
pub struct Heir {
    process: OwnedFd,
    estate: &'static Estate,
}

/// What the heir looks at.
#[derive(Debug)]
struct Estate {
    board: &'static Board,
    /// This process; readable when it has died.
    parent: OwnedFd,
    /// Stays open to the heir's end; -1: nothing.
    keep: AtomicI32,
    /// Null, or a box that belongs to this process while it lives.
    legacy: AtomicPtr<Legacy>,
    next: AtomicUsize,
    /// Further threads that have been started: each has a stack of its own.
    started: AtomicUsize,
    /// Further threads that have not finished.
    busy: AtomicU32,
    stacks: usize,
}

impl Heir {
    /// Makes an heir. There is nothing to free yet.
    ///
    /// # Errors
    /// The error of the system call; `ENOSYS` and `EPERM` where pidfds are not to be had.
    pub fn new(board: &'static Board) -> io::Result<Self> {
        let parent = pidfd_open(getpid(), PidfdFlags::empty())?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel picks an unused place.
        let stacks = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), STACKS, prot, flags)? };
        // Asked for once here, so that its first use, which looks around, is not in the heir.
        let _ = clock_gettime(ClockId::Monotonic);
        let estate: &'static Estate = Box::leak(Box::new(Estate {
            board,
            parent,
            keep: AtomicI32::new(-1),
            legacy: AtomicPtr::default(),
            next: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            busy: AtomicU32::new(0),
            stacks: stacks.expose_provenance(),
        }));
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
        let pid = spawn(estate, HEIR_STACK, flags, live)?;
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::Other)?;
        Ok(Self {
            process: pidfd_open(pid, PidfdFlags::empty())?,
            estate,
        })
    }

    /// Leaves `fd` open to the heir's end; everything else that is open is closed before memory is freed.
    pub fn keep(&self, fd: BorrowedFd<'static>) {
        self.estate.keep.store(fd.as_raw_fd(), Ordering::Release);
    }

    /// What is to be freed when this process is dead, instead of what it was before. The parts may only be
    /// memory that nobody but this process and its heir uses.
    pub fn entrust(&self, legacy: Legacy) {
        let bytes = legacy.parts.iter().map(|part| part.len as u64).sum();
        self.estate.board.total.store(bytes, Ordering::Relaxed);
        let legacy = Box::into_raw(Box::new(legacy));
        self.replace(legacy);
    }

    /// Nothing is to be freed any more: the memory is unmapped by this process.
    pub fn disinherit(&self) {
        self.estate.board.total.store(0, Ordering::Relaxed);
        self.replace(ptr::null_mut());
    }

    fn replace(&self, legacy: *mut Legacy) {
        let old = self.estate.legacy.swap(legacy, Ordering::AcqRel);
        if !old.is_null() {
            // SAFETY: the box came from `entrust`. The heir looks at it only when this process is dead, and
            // then nobody is here to drop it.
            drop(unsafe { Box::from_raw(old) });
        }
    }

    /// Whether the heir lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        let now = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }
}

impl AsFd for Heir {
    /// Its pidfd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// Starts a task that runs `run` on its own stack, of which `top` is the end, with all signals blocked.
fn spawn(
    estate: &'static Estate,
    top: usize,
    flags: c_int,
    run: extern "C" fn(*mut c_void) -> c_int,
) -> io::Result<c_int> {
    let stack = ptr::with_exposed_provenance_mut(estate.stacks + top);
    let estate = ptr::from_ref(estate).cast_mut().cast();
    // SAFETY: the stack is mapped, large enough, and used by this task alone. `run` and what it calls keep
    // to the rules at the head of this file. The signal sets are initialized by the calls that fill them.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut old = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        let pid = libc::clone(run, stack, flags, estate);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, ptr::null_mut());
        if pid < 0 { Err(error) } else { Ok(pid) }
    }
}

/// The heir's life.
extern "C" fn live(estate: *mut c_void) -> c_int {
    // SAFETY: `spawn` was given a leaked estate.
    let estate = unsafe { &*estate.cast_const().cast::<Estate>() };
    let _ = rustix::thread::set_name(HEIR_NAME);
    let mut fds = [PollFd::new(&estate.parent, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(0) | Err(Errno::INTR | Errno::NOMEM) => {}
            Ok(_) => break estate.settle(),
            // Nothing else is documented for one valid descriptor.
            Err(_) => break,
        }
    }
    // SAFETY: it ends this process, its threads included, and runs nothing of the dead one.
    unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    0
}

/// A further thread's life.
extern "C" fn help(estate: *mut c_void) -> c_int {
    // SAFETY: as in `live`.
    let estate = unsafe { &*estate.cast_const().cast::<Estate>() };
    let _ = rustix::thread::set_name(WORKER_NAME);
    let _ = rustix::process::nice(NICENESS);
    let Some(legacy) = estate.legacy() else {
        return 0; // There was one when this thread was started.
    };
    let left = loop {
        if let Some(left) = estate.leave(legacy) {
            break left;
        }
        if !estate.free_next(legacy) {
            break estate.busy.fetch_sub(1, Ordering::AcqRel) - 1;
        }
    };
    if left == 0 {
        let _ = rustix::thread::futex::wake(&estate.busy, rustix::thread::futex::Flags::PRIVATE, 1);
    }
    0
}

impl Estate {
    /// Frees everything. The parent is dead.
    fn settle(&self) {
        let board = self.board;
        // Pipes first: somebody may be reading them to their end.
        close(0, 2);
        let Some(legacy) = self.legacy() else {
            return;
        };
        board.resident[0].store(resident(), Ordering::Relaxed);
        board.times[0].store(now(), Ordering::Release);
        // Or a virtual machine would outlive its descriptors, and each call below would ask it to drop its entries first.
        legacy.pins.unmap();
        self.start_helpers(legacy);
        // The last reference to a virtual machine may be among these, and triggers of memory pressure, for which the
        // kernel waits for 10 ms: that takes long, beside the others.
        let keep = self.keep.load(Ordering::Acquire).max(2).unsigned_abs();
        close(3, keep.saturating_sub(1));
        close(keep + 1, u32::MAX);
        while self.free_next(legacy) {
            self.start_helpers(legacy);
        }
        loop {
            let busy = self.busy.load(Ordering::Acquire);
            if busy == 0 {
                break;
            }
            let private = rustix::thread::futex::Flags::PRIVATE;
            let _ = rustix::thread::futex::wait(&self.busy, private, busy, None);
        }
        board.resident[1].store(resident(), Ordering::Relaxed);
        board.times[1].store(now(), Ordering::Release);
    }

    fn legacy(&self) -> Option<&Legacy> {
        // SAFETY: null or a box that its owner, who is dead, has not dropped.
        unsafe { self.legacy.load(Ordering::Acquire).as_ref() }
    }

    /// How many further threads there are to be. The heir itself closes descriptors first, which is waiting more than work:
    /// so as many others as there are to be workers, but for one.
    fn helpers(&self, legacy: &Legacy) -> usize {
        let wanted = usize::try_from(self.board.wanted.load(Ordering::Relaxed)).unwrap_or(0);
        let workers = if wanted > 0 { wanted } else { legacy.workers };
        match workers.min(MAX_WORKERS) {
            1 => 0,
            workers => workers,
        }
    }

    /// Starts the further threads that are missing.
    fn start_helpers(&self, legacy: &Legacy) {
        let wanted = self.helpers(legacy);
        let mut busy = self.busy.load(Ordering::Acquire) as usize;
        while busy < wanted && self.start_helper() {
            busy += 1;
        }
        let workers = busy.max(1) as u64;
        self.board.workers.fetch_max(workers, Ordering::Relaxed);
    }

    /// Starts a further thread; whether it could be. If not, those who are there do the work.
    fn start_helper(&self) -> bool {
        let index = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        if index > MAX_WORKERS {
            // The stack of one that has finished may not be free yet.
            return false;
        }
        self.busy.fetch_add(1, Ordering::Relaxed);
        let top = HEIR_STACK + index * WORKER_STACK;
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD;
        // SAFETY: as in `spawn`; signals are blocked here already, and the mask is inherited.
        let pid = unsafe {
            let stack = ptr::with_exposed_provenance_mut(self.stacks + top);
            let estate = ptr::from_ref(self).cast_mut().cast();
            libc::clone(help, stack, flags, estate)
        };
        if pid < 0 {
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
        pid >= 0
    }

    /// One of the further threads goes, if there are more than there are to be: how many are left.
    fn leave(&self, legacy: &Legacy) -> Option<u32> {
        let wanted = u32::try_from(self.helpers(legacy)).unwrap_or(u32::MAX);
        let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
        let fewer = |busy: u32| busy.checked_sub(1).filter(|_| busy > wanted);
        let before = self.busy.fetch_update(success, failure, fewer).ok()?;
        Some(before - 1)
    }

    /// Frees the next part, which belongs to whoever has drawn its index; whether there was one.
    fn free_next(&self, legacy: &Legacy) -> bool {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let Some(part) = legacy.parts.get(index) else {
            return false;
        };
        let start = ptr::with_exposed_provenance_mut(part.address);
        // SAFETY: who entrusted the part has said that nobody else uses it; the advice unmaps nothing.
        let freed = unsafe { rustix::mm::madvise(start, part.len, drop_advice(part.shared)) };
        if freed.is_err() {
            self.board.failures.fetch_add(1, Ordering::Relaxed);
        }
        self.board
            .done
            .fetch_add(part.len as u64, Ordering::Relaxed);
        true
    }
}

/// Closes the descriptors from `first` to `last`.
fn close(first: u32, last: u32) {
    // SAFETY: only the heir is left to use them, and it uses none of these. Nothing else is touched but errno,
    // which nobody reads any more.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Resident bytes of the address space, 0 when the kernel does not tell. Allocates nothing.
fn resident() -> u64 {
    use rustix::fs::{Mode, OFlags, open};
    let mut text = [0u8; 128];
    let read = open(c"/proc/self/statm", OFlags::RDONLY, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut text));
    let digits = text.iter().take(read.unwrap_or(0));
    let second = digits.skip_while(|byte| **byte != b' ').skip(1);
    let digits = second.take_while(|byte| byte.is_ascii_digit());
    let pages = digits.fold(0u64, |pages, digit| {
        pages.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'))
    });
    pages.wrapping_mul(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Mapping, MappingKind, process};

    const LEN: usize = 64 << 20;

    /// Runs `life` in a child process with an heir of its own, and gives back the board once both are dead.
    /// The child is a copy of one thread of a test program: it must not touch what others may have locked.
    fn after(life: fn(Heir)) -> &'static Board {
        let board = Board::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let child = process::fork_unchecked(|| {
            let heir = Heir::new(board).unwrap();
            let writer: &'static OwnedFd = Box::leak(Box::new(writer.try_clone().unwrap()));
            heir.keep(writer.as_fd());
            life(heir);
            0
        });
        drop(writer);
        let child = child.unwrap();
        rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()).unwrap();
        // Held open by the heir to its end.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
        board
    }

    fn no_pins() -> Arc<Pins> {
        Arc::new(Pins::new(0, 4096))
    }

    fn touched(shared: bool) -> Mapping {
        let mapping = if shared {
            Mapping::shared(LEN, 0, MappingKind::Small, LEN as u64 / 4)
        } else {
            Mapping::new(LEN, 0, MappingKind::Small)
        };
        let mapping = mapping.unwrap();
        mapping.set_transparent_huge_pages(false).unwrap();
        mapping.populate().unwrap();
        mapping
    }

    fn entrusted(heir: &Heir, workers: usize) {
        entrusted_of(heir, workers, false);
    }

    fn entrusted_of(heir: &Heir, workers: usize, shared: bool) {
        let mapping = touched(shared);
        let len = LEN / 16;
        let parts = (0..16).map(|index| Part {
            address: mapping.address() + index * len,
            len,
            shared,
        });
        heir.entrust(Legacy {
            parts: parts.collect(),
            workers,
            pins: no_pins(),
        });
        std::mem::forget(mapping);
    }

    #[test]
    fn an_heir_frees_what_a_killed_process_leaves() {
        let board = after(|heir| {
            entrusted(&heir, 3);
            // The second legacy replaces the first, whose memory is left to the kernel.
            entrusted(&heir, 2);
            assert!(heir.is_alive());
            let _ = rustix::process::kill_process(getpid(), rustix::process::Signal::KILL);
        });
        let get = |value: &AtomicU64| value.load(Ordering::Acquire);
        assert_eq!(get(&board.done), LEN as u64);
        assert_eq!((get(&board.workers), get(&board.failures)), (2, 0));
        let (before, after) = (get(&board.resident[0]), get(&board.resident[1]));
        assert!(before >= after + LEN as u64 / 10 * 9, "{before} {after}");
        assert!(get(&board.times[1]) > get(&board.times[0]));
    }

    #[test]
    fn what_keeps_files_open_is_unmapped_first() {
        let board = after(|heir| {
            let (pinned, gone) = (touched(true), touched(true));
            let pins = Arc::new(Pins::new(2, LEN));
            // SAFETY: both stay until this process ends, and nobody needs them then.
            let [held, dropped] =
                [(0, &pinned), (1, &gone)].map(|(at, it)| unsafe { pins.hold(at, it.address()) });
            std::mem::forget(held);
            drop(dropped);
            heir.entrust(Legacy {
                parts: Vec::new(),
                workers: 1,
                pins,
            });
            std::mem::forget((pinned, gone));
        });
        let get = |value: &AtomicU64| value.load(Ordering::Acquire);
        let unmapped = get(&board.resident[0]).saturating_sub(get(&board.resident[1]));
        // The second is none of the heir's any more.
        let len = LEN as u64;
        assert!(
            (len / 10 * 9..len / 10 * 19).contains(&unmapped),
            "{unmapped}"
        );
    }

    #[test]
    fn files_are_freed_too() {
        let board = after(|heir| entrusted_of(&heir, 2, true));
        let get = |value: &AtomicU64| value.load(Ordering::Acquire);
        assert_eq!((get(&board.done), get(&board.failures)), (LEN as u64, 0));
        let (before, after) = (get(&board.resident[0]), get(&board.resident[1]));
        assert!(before >= after + LEN as u64 / 10 * 9, "{before} {after}");
    }

    #[test]
    fn fewer_or_more_threads_may_be_wanted_later() {
        let board = after(|heir| {
            entrusted(&heir, 5);
            heir.estate.board.wanted.store(2, Ordering::Relaxed);
        });
        let workers = |board: &Board| board.workers.load(Ordering::Acquire);
        assert_eq!(workers(board), 2, "before it has begun");
        let board = after(|heir| {
            entrusted(&heir, 1);
            heir.estate.board.wanted.store(3, Ordering::Relaxed);
        });
        assert_eq!(workers(board), 3);
        assert_eq!(board.done.load(Ordering::Acquire), LEN as u64);
    }

    #[test]
    fn threads_come_and_go_while_there_is_work() {
        let estate = |workers| Estate {
            board: Board::new().unwrap(),
            parent: pidfd_open(getpid(), PidfdFlags::empty()).unwrap(),
            keep: AtomicI32::new(-1),
            legacy: AtomicPtr::default(),
            next: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            busy: AtomicU32::new(workers),
            stacks: 0,
        };
        let legacy = Legacy {
            parts: Vec::new(),
            workers: 4,
            pins: no_pins(),
        };
        let estate = estate(4);
        assert_eq!(estate.leave(&legacy), None, "as many as there are to be");
        estate.board.wanted.store(2, Ordering::Relaxed);
        assert_eq!(
            [(); 3].map(|()| estate.leave(&legacy)),
            [Some(3), Some(2), None]
        );
        estate.board.wanted.store(1, Ordering::Relaxed);
        let last = [(); 3].map(|()| estate.leave(&legacy));
        assert_eq!(last, [Some(1), Some(0), None], "the heir alone");
        estate.board.wanted.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(estate.helpers(&legacy), MAX_WORKERS);
    }

    #[test]
    fn an_heir_without_a_legacy_just_ends() {
        let board = after(|heir| {
            entrusted(&heir, 1);
            heir.disinherit();
        });
        assert_eq!(board.done.load(Ordering::Relaxed), 0);
        assert_eq!(board.times[0].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn parts_that_the_kernel_will_not_free_are_counted() {
        let board = after(|heir| {
            let part = |address| Part {
                address,
                len: 4096,
                shared: false,
            };
            heir.entrust(Legacy {
                parts: [4096, 4097].map(part).to_vec(),
                workers: MAX_WORKERS + 9,
                pins: no_pins(),
            });
        });
        assert_eq!(board.failures.load(Ordering::Relaxed), 2);
        assert_eq!(board.done.load(Ordering::Relaxed), 8192);
        assert_eq!(board.workers.load(Ordering::Relaxed), MAX_WORKERS as u64);
    }
}
