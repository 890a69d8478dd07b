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

/// The device's configuration up to `blk_size` (virtio 1.3, 5.2.4). Fields of features that are not offered are zero.
#[must_use]
pub fn config(sectors: u64, seg_max: u32) -> [u8; 24] {
    let mut raw = [0; 24];
    raw[..8].copy_from_slice(&sectors.to_le_bytes());
    raw[12..16].copy_from_slice(&seg_max.to_le_bytes());
    raw[20..].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
    raw
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
    /// A request that no offered feature allows.
    Unknown(u32),
}

impl Operation {
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
            other => Self::Unknown(other),
        }
    }
}

/// The byte position of `sector`, if `bytes` from there on are whole sectors of a disk with `sectors`.
#[must_use]
pub fn position(sector: u64, bytes: u64, sectors: u64) -> Option<u64> {
    let end = sector.checked_add(bytes / SECTOR_BYTES)?;
    if !bytes.is_multiple_of(SECTOR_BYTES) || end > sectors {
        return None;
    }
    sector.checked_mul(SECTOR_BYTES)
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
        ] {
            assert_eq!(position(sector, bytes, 8), expected, "{sector} {bytes}");
        }
    }

    #[test]
    fn the_configuration_has_its_fields_where_they_belong() {
        let raw = config(0x0102, 254);
        assert_eq!((raw[0], raw[1], raw[12], raw[21]), (2, 1, 254, 2));
    }
}
