//! What runs in the reaper.
//!
//! The reaper shares heap, locks and thread-local storage with threads that may have died at any instruction. So **nothing
//! here allocates, takes a lock, formats text or can panic**: there are only system calls and atomics. All signals are
//! blocked in the reaper.

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::thread::futex;

use super::{Batch, Job, StatusPage};
use crate::sys::mapping::drop_advice;
use crate::sys::nodes::{self, Node, nodes_at};
use crate::sys::process::{TaskKind, clone_task, exit_now};
use crate::sys::seccomp::Role;
use crate::sys::{Mapping, MappingKind};
use crate::teardown::MAX_WORKERS;
use crate::teardown::queue::bind_to_one_of;
use crate::workers;

const REAPER_NAME: &CStr = c"ebb-reaper";
const WORKER_NAME: &CStr = c"ebb-free";

/// Everything that the reaper looks at. It is in the shared memory and never freed.
#[derive(Debug)]
pub(super) struct State {
    pub status: &'static StatusPage,
    /// A pidfd of the monitor; readable once it is dead.
    pub monitor: OwnedFd,
    /// Null, or a box that the monitor owns while it lives.
    pub job: AtomicPtr<Job>,
    /// Those that workers are bound to.
    nodes: &'static [Node],
    /// Workers that have begun, the reaper among them.
    begun: AtomicUsize,
    /// Worker threads that were started; each has a stack of its own.
    started: AtomicUsize,
    /// Worker threads that have not finished.
    busy: AtomicU32,
    stacks: Stacks,
}

/// Stacks for the reaper and its worker threads.
#[derive(Debug)]
pub(super) struct Stacks {
    start: usize,
}

impl Stacks {
    const OF_REAPER: usize = 64 << 10;
    const OF_WORKER: usize = 32 << 10;
    const LEN: usize = Self::OF_REAPER + MAX_WORKERS * Self::OF_WORKER;

    /// Maps them, for ever. Pages that are not used take no memory.
    pub fn new() -> io::Result<Self> {
        let mapping = Mapping::new(Self::LEN, 0, MappingKind::Small)?;
        // A kernel without huge pages refuses this, and does not need it.
        let _ = mapping.set_transparent_huge_pages(false);
        let start = mapping.address();
        std::mem::forget(mapping);
        Ok(Self { start })
    }

    /// The end of the reaper's stack, where it begins to grow down.
    pub const fn reaper(&self) -> usize {
        self.start + Self::OF_REAPER
    }

    /// The end of a worker's stack; `None` for an `index` from [`MAX_WORKERS`] on.
    const fn worker(&self, index: usize) -> Option<usize> {
        if index >= MAX_WORKERS {
            return None;
        }
        Some(self.reaper() + (index + 1) * Self::OF_WORKER)
    }
}

/// Runs in the reaper: waits until the monitor is dead, and does the job.
pub(super) extern "C" fn reaper_main(state: *mut c_void) -> c_int {
    // SAFETY: the argument is a `State` that lives for ever, see `clone_task`.
    let state = unsafe { &*state.cast_const().cast::<State>() };
    let _ = rustix::thread::set_name(REAPER_NAME);
    if Role::Reaper.try_enter().is_ok() && state.wait_for_monitor() {
        state.run();
    }
    exit_now(0)
}

/// Runs in a worker thread: frees batches until none is left or fewer workers are wanted.
extern "C" fn worker_main(state: *mut c_void) -> c_int {
    // SAFETY: as in `reaper_main`.
    let state = unsafe { &*state.cast_const().cast::<State>() };
    let _ = rustix::thread::set_name(WORKER_NAME);
    workers::lower_priority();
    if let Some(job) = state.job()
        && state.work(job, || !state.retire(job))
    {
        state.busy.fetch_sub(1, Ordering::AcqRel);
    }
    if state.busy.load(Ordering::Acquire) == 0 {
        let _ = futex::wake(&state.busy, futex::Flags::PRIVATE, 1);
    }
    0
}

impl State {
    pub fn new(status: &'static StatusPage, monitor: OwnedFd, stacks: Stacks) -> Self {
        Self {
            status,
            monitor,
            job: AtomicPtr::default(),
            nodes: nodes::all(),
            begun: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            busy: AtomicU32::new(0),
            stacks,
        }
    }

    /// Sleeps until the monitor is dead; false if that cannot be known.
    fn wait_for_monitor(&self) -> bool {
        let mut fds = [PollFd::new(&self.monitor, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(0) | Err(Errno::INTR | Errno::NOMEM) => {}
                Ok(_) => return true,
                // poll(2) documents no other error for one valid descriptor.
                Err(_) => return false,
            }
        }
    }

    /// Does the job. The monitor is dead. It leaves the descriptors, which the two share, to the guardian: to close them
    /// takes long by itself, and the kernel waits for an RCU grace period or two then.
    fn run(&self) {
        let Some(job) = self.job() else {
            return;
        };
        self.status.set_begin();
        // A thread of the kernel's that works for KVM may wait for a page, and would keep the machine in KVM.
        if let Some(ram) = &job.ram {
            ram.stop_serving();
        }
        // Otherwise the machine would stay in KVM, and each batch would first be taken out of its page tables.
        // SAFETY: the monitor, which registered the pages, is dead.
        unsafe { job.run_pages.unmap_all() };
        let place = |index| job.batches.get(index).map_or((0, 0), Batch::place);
        job.queue.locate(place, |pages| nodes_at(self.nodes, pages));
        // Before each batch, because more workers may be wanted by then.
        self.work(job, || {
            self.start_workers(job);
            true
        });
        self.wait_for_workers();
        self.status.set_end();
    }

    /// The work of the calling thread, see `BatchQueue::work`.
    fn work(&self, job: &Job, may_continue: impl Fn() -> bool) -> bool {
        let worker = self.begun.fetch_add(1, Ordering::Relaxed);
        bind_to_one_of(self.nodes, worker);
        let free = |batch: &Batch| self.free(batch);
        job.queue.work(&job.batches, worker, may_continue, free)
    }

    fn job(&self) -> Option<&Job> {
        // SAFETY: null, or a box that the monitor owned and, being dead, will not drop.
        unsafe { self.job.load(Ordering::Acquire).as_ref() }
    }

    /// How many worker threads there shall be beside the reaper, which is a worker, too.
    fn wanted_threads(&self, job: &Job) -> usize {
        self.status.workers().min(job.max_workers).saturating_sub(1)
    }

    /// Starts the worker threads that are missing, as long as there is a batch for each of them and one for the caller.
    fn start_workers(&self, job: &Job) {
        let wanted = self.wanted_threads(job);
        let mut busy = self.busy.load(Ordering::Acquire) as usize;
        for _ in 1..job.queue.left() {
            if busy >= wanted || !self.start_worker() {
                break;
            }
            busy += 1;
        }
        self.status.note_workers(busy + 1);
    }

    /// Starts a worker thread. Returns false if there can be no more; those that are there do the work then.
    fn start_worker(&self) -> bool {
        // A stack is used once, because its thread may not have left it when `busy` says that it has finished.
        let index = self.started.fetch_add(1, Ordering::Relaxed);
        let Some(stack) = self.stacks.worker(index) else {
            return false;
        };
        self.busy.fetch_add(1, Ordering::Relaxed);
        let state = ptr::from_ref(self);
        // SAFETY: `Reaper::new` has leaked the state. The stack is for this thread alone. What `worker_main` may do is said
        // at the head of this file.
        let started = unsafe { clone_task(TaskKind::Thread, stack, worker_main, &*state) };
        if started.is_err() {
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
        started.is_ok()
    }

    /// Returns true if there are more worker threads than wanted, so that the calling one must end. It counts as
    /// finished then.
    fn retire(&self, job: &Job) -> bool {
        let wanted = u32::try_from(self.wanted_threads(job)).unwrap_or(u32::MAX);
        let fewer = |busy: u32| busy.checked_sub(1).filter(|_| busy > wanted);
        let busy = &self.busy;
        busy.fetch_update(Ordering::AcqRel, Ordering::Relaxed, fewer)
            .is_ok()
    }

    /// Frees `batch`, which only the calling thread has taken from the queue.
    fn free(&self, batch: &Batch) {
        let start = ptr::with_exposed_provenance_mut(batch.address);
        // SAFETY: the batch is mapped, see `Job`; the monitor is dead, so nobody uses it. The advice unmaps nothing.
        let freed = unsafe { rustix::mm::madvise(start, batch.len, drop_advice(batch.shared)) };
        self.status.add_batch(batch.len as u64, freed.is_ok());
    }

    fn wait_for_workers(&self) {
        loop {
            let busy = self.busy.load(Ordering::Acquire);
            if busy == 0 {
                return;
            }
            let _ = futex::wait(&self.busy, futex::Flags::PRIVATE, busy, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustix::process::{WaitOptions, getpriority_process, waitpid};
    use rustix::thread::{CpuSet, sched_getaffinity};

    use super::*;
    use crate::kvm::RunPages;
    use crate::sys;
    use crate::sys::process::fork_for_test;
    use crate::teardown::queue::BatchQueue;

    fn state(busy: u32) -> State {
        let status = Box::leak(Box::<StatusPage>::default());
        let state = State::new(status, sys::own_process().unwrap(), Stacks { start: 0 });
        state.busy.store(busy, Ordering::Relaxed);
        state
    }

    fn job(max_workers: usize) -> Job {
        Job {
            batches: Vec::new(),
            queue: BatchQueue::new(0, 1),
            max_workers,
            run_pages: Arc::new(RunPages::new(0, 4096)),
            ram: None,
        }
    }

    #[test]
    fn threads_retire_while_there_are_more_than_wanted() {
        let (state, job) = (state(4), job(5));
        let retired = |workers| {
            state.status.set_workers(workers);
            let retired = [(); 4].map(|()| state.retire(&job));
            retired.into_iter().filter(|retired| *retired).count()
        };
        assert_eq!(retired(9), 0, "as many as the job can use");
        assert_eq!(retired(3), 2);
        assert_eq!(retired(1), 2, "the reaper alone");
        assert_eq!(state.busy.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_reaper_is_one_of_the_workers() {
        let state = state(0);
        for (workers, max, wanted) in [(1, 64, 0), (2, 64, 1), (99, 99, MAX_WORKERS - 1), (5, 1, 0)]
        {
            state.status.set_workers(workers);
            assert_eq!(state.wanted_threads(&job(max)), wanted);
        }
    }

    #[test]
    fn each_stack_is_used_once_and_lies_in_the_mapping() {
        let stacks = Stacks { start: 1 << 20 };
        let ends: Vec<_> = (0..).map_while(|index| stacks.worker(index)).collect();
        assert_eq!(ends.len(), MAX_WORKERS);
        assert_eq!(ends[0], stacks.reaper() + Stacks::OF_WORKER);
        assert!(
            ends.windows(2)
                .all(|two| two[1] - two[0] == Stacks::OF_WORKER)
        );
        assert_eq!(ends.last(), Some(&((1 << 20) + Stacks::LEN)));
    }

    #[test]
    fn each_worker_is_bound_to_the_next_node() {
        let child = fork_for_test(|| {
            let (mut state, mut job) = (state(9), job(9));
            let allowed = sched_getaffinity(None).unwrap();
            let allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
            let node = |cpu| {
                let mut cpus = CpuSet::new();
                cpus.set(cpu);
                Node::made_up(cpus)
            };
            let nodes: Vec<_> = allowed.map(node).collect();
            state.nodes = Box::leak(nodes.into_boxed_slice());
            state.job = AtomicPtr::new(&raw mut job);
            let bound = || {
                worker_main((&raw mut state).cast());
                sched_getaffinity(None).unwrap()
            };
            let seen: Vec<_> = std::iter::repeat_with(bound).take(5).collect();
            // All on the first one where there is but one.
            let expected = state.nodes.iter().cycle().map(Node::cpus);
            u8::from(!seen.iter().zip(expected).all(|(seen, node)| seen == node))
        });
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }

    #[test]
    fn a_worker_thread_is_less_important_and_says_that_it_has_finished() {
        let child = fork_for_test(|| {
            let (mut state, mut job) = (state(1), job(2));
            state.status.set_workers(2);
            state.job = AtomicPtr::new(&raw mut job);
            let before = getpriority_process(None).unwrap();
            worker_main((&raw mut state).cast());
            let after = getpriority_process(None).unwrap();
            let expected = (before + workers::NICE_INCREMENT).min(19);
            let busy = state.busy.load(Ordering::Relaxed);
            u8::from((after, busy) != (expected, 0))
        });
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }
}
