//! Segments that a guest has freed or zeroed.

use std::fs;
use std::os::unix::fs::MetadataExt;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::blk::wire::MAX_DISCARD_SECTORS;

impl Rig {
    /// Has a segment freed (11) or zeroed (13). Returns the status.
    fn clear(&self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let mut raw = Vec::new();
        for (sector, sectors, flags) in segments {
            raw.extend(sector.to_le_bytes());
            raw.extend(sectors.to_le_bytes());
            raw.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&raw, GuestAddress(DATA)).unwrap();
        self.header(kind, 0);
        self.run(&[
            (HEADER, 16, 0),
            (DATA, raw.len() as u32, 0),
            (STATUS, 1, WRITE),
        ])
        .0
    }
}

const DISCARD: u32 = 11;
const ZERO: u32 = 13;

#[test]
fn what_a_guest_frees_takes_no_room_and_reads_as_zeroes() {
    for engine in ENGINES {
        let rig = Rig::with(|config| config.engine = engine);
        let blocks = || fs::metadata(rig.dir.path().join("disk")).unwrap().blocks();
        let before = blocks();
        assert_eq!(rig.clear(DISCARD, &[(8, 16, 0)]), STATUS_OK);
        assert!(blocks() < before, "{engine:?}");
        assert_eq!(rig.clear(ZERO, &[(32, 2, 1)]), STATUS_OK);
        assert_eq!(rig.clear(ZERO, &[(40, 3, 0)]), STATUS_OK);
        assert_eq!(rig.clear(DISCARD, &[(63, 0, 0)]), STATUS_OK);
        let mut expected = content();
        for range in [8..24, 32..34, 40..43] {
            expected[range.start * 512..range.end * 512].fill(0);
        }
        assert!(rig.image() == expected, "{engine:?}");
        let stats = rig.block.handle().stats();
        let cleared = (stats.discarded_bytes_total, stats.zeroed_bytes_total);
        assert_eq!(cleared, (16 * 512, 5 * 512), "{engine:?}");
    }
}

#[test]
fn segments_that_are_wrong_change_nothing() {
    let rig = Rig::new(false);
    let most = MAX_DISCARD_SECTORS;
    for (segments, status) in [
        (&[(SECTORS, 1, 0)][..], STATUS_IOERR),
        (&[(SECTORS - 1, 2, 0)], STATUS_IOERR),
        (&[(u64::MAX, 1, 0)], STATUS_IOERR),
        (&[(u64::MAX, u32::MAX, 0)], STATUS_IOERR),
        (&[(1 << 55, 1, 0)], STATUS_IOERR),
        (&[(0, most + 1, 0)], STATUS_IOERR),
        (&[(0, 1, 2)], STATUS_UNSUPP),
        (&[(0, 1, u32::MAX)], STATUS_UNSUPP),
        (&[(0, 1, 0), (1, 1, 0)], STATUS_IOERR),
        (&[], STATUS_IOERR),
    ] {
        for kind in [DISCARD, ZERO] {
            let seen = rig.clear(kind, segments);
            assert_eq!(seen, status, "{kind} {segments:?}");
        }
    }
    // Only what is zeroed may be freed if that is asked for.
    assert_eq!(rig.clear(DISCARD, &[(0, 1, 1)]), STATUS_UNSUPP);
    assert_eq!(rig.image(), content());
    rig.assert_alive();
    let rig = Rig::new(true);
    for kind in [DISCARD, ZERO] {
        assert_eq!(rig.clear(kind, &[(0, 1, 0)]), STATUS_UNSUPP, "{kind}");
    }
    assert_eq!(rig.image(), content());
}

#[test]
fn a_host_that_cannot_free_or_zero_is_asked_for_less() {
    for engine in ENGINES {
        let config = DiskConfig {
            engine,
            ..DiskConfig::default()
        };
        let mut options = fs::OpenOptions::new();
        let null = options.read(true).write(true).open("/dev/null").unwrap();
        let disk = Disk::over(null, false);
        let rig = Rig::over(tempfile::tempdir().unwrap(), disk, &config);
        assert_eq!(rig.clear(DISCARD, &[(0, 1, 0)]), STATUS_OK, "{engine:?}");
        for flags in [0, 1] {
            assert_eq!(rig.clear(ZERO, &[(0, 1, flags)]), STATUS_OK, "{engine:?}");
        }
        let stats = rig.block.handle().stats();
        assert_eq!((stats.zeroed_bytes_total, stats.errors_total), (1024, 0));
    }
}
