//! Releases pages with as few system calls as the kernel allows.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ebb_core::release::{Release, Released};

use crate::sys::mapping::MAX_PARTS;
use crate::sys::pagemap::PageMap;
use crate::sys::{self, Mapping};

/// How often a call is made at most as long as the kernel answers `EAGAIN`.
const MAX_ATTEMPTS: u32 = 8;

/// A part of one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Index of the range that it is a part of.
    pub range: usize,
    /// Index of the mapping.
    pub mapping: usize,
    /// First byte in the mapping.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// The system calls for one kind of release. Tests put a fake kernel in the place of [`HostKernel`].
pub(super) trait Kernel {
    /// Releases one extent (madvise(2)).
    fn release(&self, extent: Extent) -> io::Result<()>;

    /// Releases extents of one mapping, at most [`MAX_PARTS`], in one call (process_madvise(2)). Returns how many bytes were
    /// released, in order. `None`: the kernel does not support that.
    fn release_many(&self, extents: &[Extent]) -> Option<io::Result<usize>>;

    /// From now on [`Kernel::release_many`] is not supported.
    fn give_up_many(&self);
}

/// The descriptors by which the kernel knows this process: one for process_madvise(2), as long as the kernel accepts it,
/// and one for its page tables.
#[derive(Debug, Default)]
pub(super) struct OwnProcess {
    page_map: OnceLock<Option<PageMap>>,
    descriptor: OnceLock<Option<OwnedFd>>,
    given_up: AtomicBool,
}

impl OwnProcess {
    /// `None` if it cannot be read.
    pub fn page_map(&self) -> Option<&PageMap> {
        let map = self.page_map.get_or_init(|| PageMap::open().ok());
        map.as_ref()
    }

    /// `None` if the kernel is known to refuse releases by it.
    pub fn get(&self) -> Option<BorrowedFd<'_>> {
        if self.given_up.load(Ordering::Relaxed) {
            return None;
        }
        let descriptor = self.descriptor.get_or_init(|| sys::own_process().ok());
        descriptor.as_ref().map(AsFd::as_fd)
    }
}

/// The kernel of this host.
pub(super) struct HostKernel<'a> {
    pub mappings: &'a [Mapping],
    pub process: &'a OwnProcess,
    pub how: Release,
}

impl Kernel for HostKernel<'_> {
    fn release(&self, extent: Extent) -> io::Result<()> {
        self.mappings[extent.mapping].release(extent.offset, extent.len, self.how)
    }

    fn release_many(&self, extents: &[Extent]) -> Option<io::Result<usize>> {
        let process = self.process.get()?;
        let mapping = &self.mappings[extents.first()?.mapping];
        let parts: Vec<_> = extents.iter().map(|e| (e.offset, e.len)).collect();
        Some(mapping.release_parts(process, &parts, self.how))
    }

    fn give_up_many(&self) {
        self.process.given_up.store(true, Ordering::Relaxed);
    }
}

/// Releases `extents` of `ranges` ranges: neighbours of one mapping in one call where the kernel supports that. An extent
/// that the kernel refuses counts as one failure and does not keep the others from being released.
pub(super) fn release(kernel: &impl Kernel, extents: &[Extent], ranges: usize) -> Released {
    let mut released = Released {
        bytes: vec![0; ranges],
        ..Released::default()
    };
    let mut left = extents;
    while let Some(first) = left.first() {
        let same = left.iter().take_while(|e| e.mapping == first.mapping);
        let run = &left[..same.take(MAX_PARTS).count()];
        left = &left[release_some(kernel, run, &mut released)..];
    }
    released
}

/// Releases at least the first extent of `run`, which is not empty, or counts its failure. Returns how many extents it has
/// dealt with.
fn release_some(kernel: &impl Kernel, run: &[Extent], released: &mut Released) -> usize {
    let mut refused = false;
    if run.len() > 1
        && let Some(result) = kernel.release_many(run)
    {
        released.calls += 1;
        match result {
            Ok(bytes) => {
                let done = whole_extents(run, bytes);
                for extent in &run[..done] {
                    released.bytes[extent.range] += extent.len as u64;
                }
                if done > 0 {
                    return done;
                }
            }
            Err(error) => refused = !is_busy(&error),
        }
    }
    let first = run[0];
    released.calls += 1;
    match retry_while_busy(|| kernel.release(first)) {
        Ok(()) => {
            released.bytes[first.range] += first.len as u64;
            // The extent is fine alone and was refused with others: this kernel takes no vectors from this process.
            if refused {
                kernel.give_up_many();
            }
        }
        Err(error) => {
            released.failures += 1;
            released.error = released.error.or(error.raw_os_error());
        }
    }
    1
}

/// Number of extents that lie wholly in the first `bytes` bytes of all.
fn whole_extents(extents: &[Extent], bytes: usize) -> usize {
    let ends = extents.iter().scan(0usize, |end, extent| {
        *end = end.saturating_add(extent.len);
        Some(*end)
    });
    ends.take_while(|&end| end <= bytes).count()
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAGAIN)
}

/// Makes `call` again as long as the kernel answers `EAGAIN`, [`MAX_ATTEMPTS`] times in all.
pub(super) fn retry_while_busy(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 1..MAX_ATTEMPTS {
        match call() {
            Err(error) if is_busy(&error) => std::thread::yield_now(),
            result => return result,
        }
    }
    call()
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    use super::*;

    /// Gives the scripted answers, error numbers or bytes, and 0 or everything after that.
    #[derive(Default)]
    struct FakeKernel {
        one: RefCell<VecDeque<i32>>,
        /// `None`: the kernel takes no vectors.
        many: Option<RefCell<VecDeque<Result<usize, i32>>>>,
        given_up: Cell<bool>,
        /// Offsets of each call.
        calls: RefCell<Vec<Vec<usize>>>,
    }

    impl FakeKernel {
        fn new(one: &[i32]) -> Self {
            Self {
                one: RefCell::new(one.iter().copied().collect()),
                ..Self::default()
            }
        }

        fn vectored(one: &[i32], many: &[Result<usize, i32>]) -> Self {
            Self {
                many: Some(RefCell::new(many.iter().copied().collect())),
                ..Self::new(one)
            }
        }

        /// What a release of extents of a page each, all of one mapping, did.
        fn release(&self, extents: usize) -> Released {
            let extents: Vec<_> = (0..extents).map(|index| extent(index, 0)).collect();
            release(self, &extents, extents.len())
        }
    }

    impl Kernel for FakeKernel {
        fn release(&self, extent: Extent) -> io::Result<()> {
            self.calls.borrow_mut().push(vec![extent.offset]);
            match self.one.borrow_mut().pop_front() {
                None | Some(0) => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            }
        }

        fn release_many(&self, extents: &[Extent]) -> Option<io::Result<usize>> {
            let many = self.many.as_ref().filter(|_| !self.given_up.get())?;
            let offsets = extents.iter().map(|extent| extent.offset).collect();
            self.calls.borrow_mut().push(offsets);
            let all = extents.iter().map(|extent| extent.len).sum();
            let answer = many.borrow_mut().pop_front().unwrap_or(Ok(all));
            Some(answer.map_err(io::Error::from_raw_os_error))
        }

        fn give_up_many(&self) {
            self.given_up.set(true);
        }
    }

    const PAGE: usize = 4096;

    fn extent(range: usize, mapping: usize) -> Extent {
        Extent {
            range,
            mapping,
            offset: range * PAGE,
            len: PAGE,
        }
    }

    #[test]
    fn a_busy_kernel_is_asked_again_and_not_for_ever() {
        let busy = libc::EAGAIN;
        let kernel = FakeKernel::new(&[busy; 3]);
        let released = kernel.release(1);
        assert_eq!((released.bytes, released.failures), (vec![4096], 0));
        assert_eq!(kernel.calls.take().len(), 4);

        let kernel = FakeKernel::new(&[busy; 100]);
        let released = kernel.release(1);
        assert_eq!((released.bytes, released.failures), (vec![0], 1));
        assert_eq!(released.error, Some(busy));
        assert_eq!(kernel.calls.take().len(), 8);
    }

    #[test]
    fn other_errors_are_final_and_the_first_one_is_told() {
        let kernel = FakeKernel::new(&[libc::EINVAL, libc::ENOMEM]);
        let released = kernel.release(3);
        assert_eq!(released.bytes, [0, 0, 4096]);
        assert_eq!((released.calls, released.failures), (3, 2));
        assert_eq!(released.error, Some(libc::EINVAL));
        assert_eq!(kernel.calls.take(), [[0], [PAGE], [2 * PAGE]]);
    }

    #[test]
    fn many_extents_go_in_one_call_for_each_mapping() {
        let kernel = FakeKernel::vectored(&[], &[]);
        let mut extents: Vec<_> = (0..MAX_PARTS + 2).map(|index| extent(index, 0)).collect();
        extents.push(extent(3, 1));
        let released = release(&kernel, &extents, extents.len());
        assert_eq!((released.calls, released.failures), (3, 0));
        let sizes: Vec<_> = kernel.calls.take().iter().map(Vec::len).collect();
        assert_eq!(sizes, [MAX_PARTS, 2, 1]);
        assert_eq!(
            released.bytes[3],
            2 * 4096,
            "two extents of one range add up"
        );
    }

    #[test]
    fn after_a_part_of_a_vector_the_rest_is_asked_for() {
        // One extent and a half; the next call ends at the same one, which fails alone, too.
        let kernel = FakeKernel::vectored(&[libc::EINVAL], &[Ok(PAGE * 3 / 2), Ok(0)]);
        let released = kernel.release(4);
        assert_eq!(released.bytes, [4096, 0, 4096, 4096]);
        assert_eq!((released.calls, released.failures), (4, 1));
        let all = [0, PAGE, 2 * PAGE, 3 * PAGE];
        let calls = [&all[..], &all[1..], &all[1..2], &all[2..]];
        assert_eq!(kernel.calls.take(), calls);
        assert!(!kernel.given_up.get());
    }

    #[test]
    fn a_kernel_that_refuses_vectors_is_not_asked_again() {
        let kernel = FakeKernel::vectored(&[], &[Err(libc::EINVAL)]);
        let released = kernel.release(3);
        assert_eq!(released.bytes, [4096; 3]);
        assert_eq!((released.calls, released.failures), (4, 0));
        assert!(kernel.given_up.get());
    }

    #[test]
    fn a_busy_kernel_or_a_bad_extent_does_not_end_vectors() {
        for (one, many) in [(0, libc::EAGAIN), (libc::EINVAL, libc::EINVAL)] {
            let kernel = FakeKernel::vectored(&[one], &[Err(many)]);
            let released = kernel.release(3);
            assert_eq!(released.bytes[1..], [4096; 2]);
            assert_eq!(released.calls, 3);
            assert!(!kernel.given_up.get(), "{one} {many}");
        }
    }

    #[test]
    fn a_single_extent_needs_no_vector() {
        let kernel = FakeKernel::vectored(&[], &[Err(libc::EINVAL)]);
        let released = kernel.release(1);
        assert_eq!((released.bytes, released.calls), (vec![4096], 1));
    }

    #[test]
    fn progress_is_counted_in_whole_extents() {
        let extents: Vec<_> = (0..3).map(|index| extent(index, 0)).collect();
        for (bytes, want) in [
            (0, 0),
            (PAGE - 1, 0),
            (PAGE, 1),
            (3 * PAGE - 1, 2),
            (3 * PAGE, 3),
            (99 * PAGE, 3),
        ] {
            assert_eq!(whole_extents(&extents, bytes), want, "{bytes}");
        }
    }
}
