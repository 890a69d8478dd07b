use std::fs;
use std::os::unix::fs::MetadataExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const DEPTH: u16 = 8;

fn both() -> [Transfers; 2] {
    let threads = Transfers::threads(DEPTH, "test", Role::Block).unwrap();
    [Transfers::ring(DEPTH).unwrap(), threads]
}

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

fn image(dir: &tempfile::TempDir) -> Arc<File> {
    let path = dir.path().join("image");
    let content: Vec<u8> = (0..64 * 512).map(|at| (at / 512) as u8 + 1).collect();
    fs::write(&path, content).unwrap();
    let file = File::options().read(true).write(true).open(path);
    Arc::new(file.unwrap())
}

fn job(token: u32, file: &Arc<File>, action: Action, at: u64) -> Job {
    Job {
        token,
        file: Arc::clone(file),
        action,
        at,
        pieces: Pieces::default(),
    }
}

/// Does jobs, and returns their results by token.
fn all(transfers: &mut Transfers, jobs: Vec<Job>) -> Vec<io::Result<usize>> {
    let count = jobs.len();
    for job in jobs {
        assert!(transfers.start(job).is_ok());
    }
    assert!(transfers.submit());
    assert_eq!(transfers.in_flight(), count);
    let mut done: Vec<_> = std::iter::from_fn(|| transfers.wait())
        .map(|(job, result)| (job.token, result))
        .collect();
    assert_eq!((done.len(), transfers.in_flight()), (count, 0));
    done.sort_by_key(|(token, _)| *token);
    done.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn several_jobs_at_once_move_what_they_name() {
    for mut transfers in both() {
        let (dir, memory) = (tempfile::tempdir().unwrap(), memory());
        let file = image(&dir);
        let mut jobs = Vec::new();
        for n in 0..u64::from(DEPTH) {
            let mut read = job(n as u32, &file, Action::Read, n * 1024);
            read.pieces.begin(&memory);
            read.pieces.push(n << 12, 512).unwrap();
            read.pieces.push((n << 12) + 2048, 512).unwrap();
            assert_eq!(read.pieces.bytes(), 1024);
            jobs.push(read);
        }
        for result in all(&mut transfers, jobs) {
            assert_eq!(result.unwrap(), 1024, "{:?}", transfers.kind());
        }
        for n in 0..u64::from(DEPTH) {
            for (offset, sector) in [(511, 2 * n), (2048, 2 * n + 1)] {
                let byte: u8 = memory.read_obj(GuestAddress((n << 12) + offset)).unwrap();
                assert_eq!(u64::from(byte), sector + 1);
            }
        }
        let mut write = job(0, &file, Action::Write, 512);
        write.pieces.begin(&memory);
        write.pieces.push(7 << 12, 512).unwrap();
        let mut zeroes = job(1, &file, Action::Write, 1024);
        zeroes.pieces.become_zeroes(8192);
        let sync = job(2, &file, Action::Sync, 0);
        let moved = all(&mut transfers, vec![write, zeroes, sync]);
        let moved: Vec<usize> = moved.into_iter().map(Result::unwrap).collect();
        assert_eq!(moved, [512, 8192, 0]);
        let content = fs::read(dir.path().join("image")).unwrap();
        assert_eq!((content[511], content[512], content[1023]), (1, 15, 15));
        assert!(content[1024..9216].iter().all(|byte| *byte == 0));
        assert_eq!(content[9216], 19);
    }
}

#[test]
fn errors_come_back_and_there_are_only_so_many_jobs() {
    for mut transfers in both() {
        let memory = memory();
        let (reader, _writer) = io::pipe().unwrap();
        let pipe = Arc::new(File::from(std::os::fd::OwnedFd::from(reader)));
        let result = all(&mut transfers, vec![job(0, &pipe, Action::Sync, 0)]);
        let error = result[0].as_ref().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let dir = tempfile::tempdir().unwrap();
        let file = image(&dir);
        let kind = transfers.kind();
        for n in 0..u32::from(DEPTH) {
            let mut read = job(n, &file, Action::Read, 1 << 20);
            read.pieces.begin(&memory);
            read.pieces.push(0, 512).unwrap();
            assert!(transfers.start(read).is_ok(), "{kind:?}");
        }
        let refused = transfers.start(job(9, &file, Action::Sync, 0));
        assert_eq!(refused.err().map(|job| job.token), Some(9), "{kind:?}");
        transfers.submit();
        while let Some((_, result)) = transfers.wait() {
            assert_eq!(result.unwrap(), 0, "behind the end");
        }
    }
}

#[test]
fn what_is_freed_reads_as_zeroes_and_takes_no_room() {
    for mut transfers in both() {
        let dir = tempfile::tempdir().unwrap();
        let file = image(&dir);
        assert!(can_punch(&file, 64 * 512));
        let before = file.metadata().unwrap();
        let punch = job(0, &file, Action::Punch(16384), 4096);
        all(&mut transfers, vec![punch]).remove(0).unwrap();
        let after = file.metadata().unwrap();
        assert_eq!(before.len(), after.len());
        assert!(after.blocks() < before.blocks());
        let content = fs::read(dir.path().join("image")).unwrap();
        assert!(content[4096..20480].iter().all(|byte| *byte == 0));
        assert_eq!((content[4095], content[20480]), (8, 41));
    }
}

#[test]
fn pieces_are_memory_and_nothing_else() {
    let memory = memory();
    let mut pieces = Pieces::default();
    assert_eq!(pieces.push(0, 1), Err(Outside));
    pieces.begin(&memory);
    assert_eq!(pieces.push(1 << 20, 1), Err(Outside));
    assert_eq!(pieces.push((1 << 20) - 1, 2), Err(Outside));
    pieces.begin(&memory);
    pieces.push(4096, 512).unwrap();
    assert!(pieces.is_aligned(4096, 512) && !pieces.is_aligned(4096, 1024));
    pieces.push(512, 4096).unwrap();
    assert!(pieces.is_aligned(512, 512) && !pieces.is_aligned(1024, 512));
    // Zeroes are not read over.
    pieces.become_zeroes(usize::MAX);
    assert_eq!(pieces.bytes(), 16 << 20);
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir);
    assert_eq!(pieces.read(&file, 0, 0).unwrap(), 0);
}
