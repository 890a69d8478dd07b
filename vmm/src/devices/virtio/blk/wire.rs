//! Layouts of virtio 1.3, 5.2: configuration and request header.

use virtio_bindings::virtio_blk as blk;

/// Device type (virtio 1.3, 5.2.1).
pub const DEVICE_TYPE: u32 = 2;

/// Size in bytes of a sector, whatever the disk's block size (virtio 1.3, 5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Size in bytes of a request's header.
pub const HEADER_BYTES: usize = 16;

/// Size in bytes of what a request for the id gets.
pub const ID_BYTES: usize = 20;

/// `VIRTIO_BLK_S_OK`.
pub const STATUS_OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
/// `VIRTIO_BLK_S_IOERR`.
pub const STATUS_IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
/// `VIRTIO_BLK_S_UNSUPP`.
pub const STATUS_UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

/// The most sectors that one request frees.
pub const MAX_DISCARD_SECTORS: u32 = (1 << 30) / SECTOR_BYTES as u32;

/// The most sectors that one request makes zeroes: where the host's file system cannot do it, they are written.
pub const MAX_ZERO_SECTORS: u32 = (16 << 20) / SECTOR_BYTES as u32;

/// Bytes in which a disk is freed, at least: a page of the host's file systems.
const DISCARD_BYTES: u64 = 4096;

/// Size in bytes of the device's configuration that is offered.
pub const CONFIG_BYTES: usize = 60;

/// What the configuration tells.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Maximum number of data buffers in a request.
    pub seg_max: u32,
    /// Size in bytes of a block.
    pub block: u64,
    /// Number of queues.
    pub queues: u16,
    /// The guest may free and zero what it does not need.
    pub discards: bool,
}

impl Geometry {
    /// The device's configuration (virtio 1.3, 5.2.4). Fields of features that are not offered are zero.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut raw = [0; CONFIG_BYTES];
        raw[..8].copy_from_slice(&self.sectors.to_le_bytes());
        let mut word =
            |at: usize, value: u32| raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
        word(12, self.seg_max);
        word(20, self.block as u32);
        if self.discards {
            // Each request has one segment, that of the driver's one range.
            let unit = self.block.max(DISCARD_BYTES) / SECTOR_BYTES;
            word(36, MAX_DISCARD_SECTORS);
            word(40, 1);
            word(44, unit as u32);
            word(48, MAX_ZERO_SECTORS);
            word(52, 1);
            word(56, 1);
        }
        raw[34..36].copy_from_slice(&self.queues.to_le_bytes());
        raw
    }
}

/// Size in bytes of a segment that is to be freed or zeroed.
pub const SEGMENT_BYTES: usize = 16;

/// A segment that is to be freed or zeroed (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Bit 0: what it takes may be freed. The others are reserved.
    pub flags: u32,
}

impl Segment {
    /// Parses le64 sector, le32 num_sectors, le32 flags.
    #[must_use]
    pub const fn parse(raw: [u8; SEGMENT_BYTES]) -> Self {
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = raw;
        Self {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from this sector on.
    Read(u64),
    /// Write from this sector on.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// The disk's name.
    Id,
    /// Free what segments take.
    Discard,
    /// Make segments zeroes.
    WriteZeroes,
    /// A request that no offered feature allows.
    Unknown(u32),
}

impl Operation {
    /// It changes what the disk holds.
    #[must_use]
    pub const fn modifies(self) -> bool {
        matches!(self, Self::Write(_) | Self::Discard | Self::WriteZeroes)
    }

    /// Parses a request's header: le32 type, le32 reserved, le64 sector (virtio 1.3, 5.2.6).
    #[must_use]
    pub const fn parse(raw: [u8; HEADER_BYTES]) -> Self {
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            blk::VIRTIO_BLK_T_IN => Self::Read(sector),
            blk::VIRTIO_BLK_T_OUT => Self::Write(sector),
            blk::VIRTIO_BLK_T_FLUSH => Self::Flush,
            blk::VIRTIO_BLK_T_GET_ID => Self::Id,
            blk::VIRTIO_BLK_T_DISCARD => Self::Discard,
            blk::VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            other => Self::Unknown(other),
        }
    }
}

/// The byte position of `sector`, if `bytes` from there on are whole blocks of a disk with `sectors`.
#[must_use]
pub fn position(sector: u64, bytes: u64, sectors: u64, block: u64) -> Option<u64> {
    let end = sector.checked_add(bytes.div_ceil(SECTOR_BYTES))?;
    if end > sectors {
        return None;
    }
    let at = sector.checked_mul(SECTOR_BYTES)?;
    (at | bytes).is_multiple_of(block).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_on_the_disk() {
        for (sector, bytes, expected) in [
            (0, 512, Some(0)),
            (7, 512, Some(3584)),
            (8, 0, Some(4096)),
            (0, 4096, Some(0)),
            (8, 512, None),
            (0, 4608, None),
            (1, 511, None),
            (u64::MAX, 512, None),
            (u64::MAX, 0, None),
            (1 << 55, u64::MAX - 511, None),
            (1 << 55, 0, None),
        ] {
            assert_eq!(
                position(sector, bytes, 8, 512),
                expected,
                "{sector} {bytes}"
            );
        }
    }

    #[test]
    fn requests_are_whole_blocks() {
        for (sector, bytes, expected) in [
            (8, 4096, Some(4096)),
            (1, 4096, None),
            (8, 512, None),
            (u64::MAX / 512, 4096, None),
        ] {
            let at = position(sector, bytes, 1 << 40, 4096);
            assert_eq!(at, expected, "{sector} {bytes}");
        }
    }

    #[test]
    fn the_configuration_has_its_fields_where_they_belong() {
        let mut geometry = Geometry {
            sectors: 0x0102,
            seg_max: 254,
            block: 512,
            queues: 3,
            discards: true,
        };
        let raw = geometry.config();
        assert_eq!((raw[0], raw[1], raw[12], raw[21]), (2, 1, 254, 2));
        // num_queues; max_discard_sectors, _seg, alignment; max_write_zeroes_sectors, _seg, may_unmap.
        assert_eq!(raw[32..40], [0, 0, 3, 0, 0, 0, 0x20, 0]);
        assert_eq!(raw[40..48], [1, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(raw[48..], [0, 0x80, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        geometry.discards = false;
        assert!(geometry.config()[36..].iter().all(|byte| *byte == 0));
    }
}
