use rustix::process::{Signal, WaitOptions, getpid, kill_process, waitpid};

use super::*;
use crate::memory::Backing;
use crate::sys::process::{fork_for_test, fork_sharing_files};
use crate::sys::{Mapping, MappingKind};
use crate::teardown::{MAX_WORKERS, PageSize, Region, plan};

const LEN: usize = 64 << 20;
const BATCHES: usize = 16;

/// Runs `life` in a child process with a reaper of its own, and returns the status page once both are dead.
/// The child is a copy of one thread of the test program, so it must not touch what other threads may have locked.
pub(in crate::teardown) fn after(
    life: fn(&'static Reaper, &'static StatusPage),
) -> &'static StatusPage {
    let status = StatusPage::new().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let child = fork_for_test(|| {
        let reaper: &'static Reaper = Box::leak(Box::new(Reaper::new(status).unwrap()));
        life(reaper, status);
        0
    });
    drop(writer);
    waitpid(Some(child), WaitOptions::empty()).unwrap();
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
    status
}

fn no_pages() -> Arc<RunPages> {
    Arc::new(RunPages::new(0, 4096))
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

fn job(batches: Vec<Batch>, run_pages: Arc<RunPages>) -> Job {
    Job {
        queue: BatchQueue::new(batches.len(), 1),
        batches,
        max_workers: MAX_WORKERS,
        run_pages,
        ram: None,
    }
}

/// A job of [`LEN`] bytes in [`BATCHES`] batches.
fn job_of(shared: bool) -> Job {
    let mapping = touched(shared);
    let len = LEN / BATCHES;
    let batches = (0..BATCHES).map(|index| Batch {
        address: mapping.address() + index * len,
        len,
        shared,
    });
    let job = job(batches.collect(), no_pages());
    std::mem::forget(mapping);
    job
}

/// Checks that about [`LEN`] bytes were freed, by how many workers, and that no batch was refused.
fn assert_freed(status: &StatusPage, workers: usize) {
    let report = status.report().unwrap();
    assert_eq!((report.workers, report.failures), (workers, 0));
    assert_eq!(status.progress(), (LEN as u64, LEN as u64));
    assert!(report.bytes >= LEN as u64 / 10 * 9, "{report:?}");
    assert!(!report.duration.is_zero());
}

#[test]
fn the_memory_of_a_killed_process_is_freed() {
    let status = after(|reaper, status| {
        status.set_workers(3);
        reaper.set_job(job_of(false));
        // The second job replaces the first, whose memory is left to the kernel.
        reaper.set_job(job_of(false));
        status.set_workers(2);
        assert!(reaper.is_alive());
        let _ = kill_process(getpid(), Signal::KILL);
    });
    assert_freed(status, 2);
}

#[test]
fn memory_in_files_is_freed_too() {
    let status = after(|reaper, status| {
        status.set_workers(2);
        reaper.set_job(job_of(true));
    });
    assert_freed(status, 2);
}

#[test]
fn the_batches_of_a_plan_are_freed() {
    let status = after(|reaper, status| {
        let [below, above] = [(0, 16 << 20), (32 << 20, 80 << 20)]
            .map(|(start, end)| GpaRange::new(start, end).unwrap());
        let ram = GuestRam::allocate(Backing::default(), &[below, above]).unwrap();
        assert!(ram.populate_unless(|_| false).unwrap());
        let ram = Arc::new(ram);
        let regions = ram.regions().iter().map(|region| Region {
            range: region.gpa,
            page_size: PageSize::Small,
            unit: 2 << 20,
        });
        // Of four batches.
        let plan = plan(regions, Some(16 << 20));
        status.set_workers(9);
        reaper.set_job(Job::new(&plan, ram, no_pages()));
    });
    assert_freed(status, 4);
}

#[test]
fn a_batch_is_where_its_region_is_mapped() {
    let range = |start: u64, end: u64| GpaRange::new(start << 20, end << 20).unwrap();
    let layout = [range(0, 16), range(32, 80)];
    let ram = GuestRam::allocate(Backing::default(), &layout).unwrap();
    let batch = Batch::new(&ram, range(48, 64)).unwrap();
    let address = ram.regions()[1].host + (16 << 20);
    assert_eq!((batch.place(), batch.shared), ((address, 16 << 20), false));
    assert_eq!(Batch::new(&ram, range(8, 48)), None);
}

#[test]
fn run_pages_are_unmapped() {
    let status = after(|reaper, _| {
        let (registered, gone) = (touched(true), touched(true));
        let pages = Arc::new(RunPages::new(2, LEN));
        // SAFETY: both mappings stay until this process ends, and nobody needs them then.
        let [kept, dropped] = [(0, &registered), (1, &gone)]
            .map(|(index, mapping)| unsafe { pages.register(index, mapping.address()) });
        std::mem::forget(kept);
        drop(dropped);
        reaper.set_job(job(Vec::new(), pages));
        std::mem::forget((registered, gone));
    });
    let unmapped = status.report().unwrap().bytes;
    // The first mapping and not the second.
    let len = LEN as u64;
    let expected = len / 10 * 9..len / 10 * 19;
    assert!(expected.contains(&unmapped), "{unmapped}");
}

#[test]
fn a_job_that_was_taken_back_is_not_done() {
    let status = after(|reaper, _| {
        reaper.set_job(job_of(false));
        reaper.clear_job();
    });
    assert_eq!(status.progress(), (0, 0));
    assert!(!status.has_begun());
}

#[test]
fn batches_that_the_kernel_refuses_are_counted() {
    let status = after(|reaper, status| {
        let batch = |address| Batch {
            address,
            len: 4096,
            shared: false,
        };
        // Nothing is mapped at the first address, and the second is no page's.
        let batches = [4096, 4097].map(batch).to_vec();
        status.set_workers(MAX_WORKERS + 9);
        reaper.set_job(job(batches, no_pages()));
    });
    let report = status.report().unwrap();
    // No thread is started for which there is no batch.
    assert_eq!((report.failures, report.workers), (2, 2));
    assert_eq!(status.progress(), (8192, 8192));
}

/// To close them may take longer than to free the memory.
#[test]
fn descriptors_are_left_to_those_who_share_them() {
    let status = StatusPage::new().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let child = fork_for_test(|| {
        let reaper: &'static Reaper = Box::leak(Box::new(Reaper::new(status).unwrap()));
        reaper.set_job(job_of(false));
        let shared = fork_sharing_files(|_| {
            let _ = poll(&mut [PollFd::new(reaper, PollFlags::IN)], None);
            u8::from(rustix::io::write(&writer, b"x").is_err())
        });
        u8::from(shared.is_err())
    });
    drop(writer);
    waitpid(Some(child), WaitOptions::empty()).unwrap();
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(1));
    assert!(status.report().is_some());
}

#[test]
fn a_dead_reaper_is_noticed() {
    let status = after(|reaper, status| {
        let _ = rustix::process::pidfd_send_signal(reaper, Signal::KILL);
        let mut fds = [PollFd::new(reaper, PollFlags::IN)];
        let _ = poll(&mut fds, None);
        if !reaper.is_alive() {
            status.set_finished();
        }
    });
    assert!(status.is_finished());
}
