//! Layouts of virtio 1.3, 5.10: the header of a packet, and what it may say.
//!
//! The crate `virtio-vsock` has these, too, but takes a packet only if its payload is one descriptor, in one region of memory.

/// Device type (virtio 1.3, 5.10.1).
pub const DEVICE_TYPE: u32 = 19;

/// Size in bytes of a packet's header (virtio 1.3, 5.10.6).
pub const HEADER_BYTES: usize = 44;

/// The host's CID.
pub const HOST_CID: u64 = 2;

/// The largest payload in bytes. Linux sends no larger one (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: u32 = 64 << 10;

/// The type of a stream's packets (virtio 1.3, 5.10.6).
pub const STREAM: u16 = 1;

/// The event that all connections are gone (virtio 1.3, 5.10.6.7; `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
pub const TRANSPORT_RESET: u32 = 0;

/// What the sender of a `SHUTDOWN` will not do any more.
pub mod shutdown {
    /// Receive.
    pub const RECEIVE: u32 = 1;
    /// Send.
    pub const SEND: u32 = 2;
    /// Either.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// It is not, or not any more.
    Reset = 3,
    /// The sender will send or receive no more.
    Shutdown = 4,
    /// Bytes.
    Data = 5,
    /// Nothing but the credit that each header has.
    CreditUpdate = 6,
    /// The sender wants to know the credit.
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    /// The operation of this number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|op| *op as u16 == number)
    }
}

/// The header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's CID.
    pub src_cid: u64,
    /// The receiver's CID.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// [`STREAM`], or what is not offered.
    pub kind: u16,
    /// Number of an [`Op`].
    pub op: u16,
    /// Of a `SHUTDOWN`: [`shutdown`].
    pub flags: u32,
    /// Bytes that the sender has room for.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn read(raw: &[u8; HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [0; HEADER_BYTES];
        raw[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        raw[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        raw[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        raw[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        raw[24..28].copy_from_slice(&self.len.to_le_bytes());
        raw[28..30].copy_from_slice(&self.kind.to_le_bytes());
        raw[30..32].copy_from_slice(&self.op.to_le_bytes());
        raw[32..36].copy_from_slice(&self.flags.to_le_bytes());
        raw[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        raw[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets of virtio 1.3, 5.10.6; numbers of include/uapi/linux/virtio_vsock.h.
    #[test]
    fn a_header_has_its_fields_where_they_belong() {
        let raw: [u8; HEADER_BYTES] = std::array::from_fn(|at| at as u8 + 1);
        let header = Header::read(&raw);
        let expected = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        assert_eq!(header, expected);
        assert_eq!(header.bytes(), raw);
        assert_eq!(Op::from_number(5), Some(Op::Data));
        assert_eq!((Op::from_number(0), Op::from_number(8)), (None, None));
    }
}
