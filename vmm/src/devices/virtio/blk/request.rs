//! What a request comes to: parsed and checked, before anything is done.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::Disk;
use super::wire::{
    HEADER_BYTES, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS, Operation, SECTOR_BYTES, SEGMENT_BYTES,
    STATUS_IOERR, STATUS_UNSUPP, Segment, position,
};
use crate::devices::virtio::queue::{Chain, Cursor, ReadError};
use crate::sys::transfer::Action;

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("request header: {0}")]
    Header(ReadError),
    #[error("request type {0} was not offered")]
    Unknown(u32),
    #[error("{0:?} was not offered")]
    NotOffered(Operation),
    #[error(
        "{bytes} bytes at sector {sector}: no whole blocks of {block} bytes of a disk of {sectors} sectors"
    )]
    Bounds {
        sector: u64,
        bytes: u64,
        sectors: u64,
        block: u64,
    },
    #[error("write to a read-only disk: {0:?}")]
    ReadOnly(Operation),
    #[error("{operation:?}: {error}")]
    Data {
        operation: Operation,
        error: ReadError,
    },
    #[error("{operation:?} of {bytes} bytes of segments: one segment is {SEGMENT_BYTES}")]
    Segments { operation: Operation, bytes: u64 },
    #[error("{operation:?} of {sectors} sectors: at most {most}")]
    TooMuch {
        operation: Operation,
        sectors: u32,
        most: u32,
    },
    #[error("{operation:?} with flags {flags:#x}")]
    Flags { operation: Operation, flags: u32 },
    #[error("the host failed: {operation:?}: {error}")]
    Host {
        operation: Operation,
        error: io::Error,
    },
    #[error("a request without room for its status")]
    NoStatus,
    #[error("stopped in the middle of a request")]
    Stopped,
}

impl RequestError {
    pub const fn status(&self) -> u8 {
        match self {
            Self::Unknown(_) | Self::NotOffered(_) | Self::Flags { .. } => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// A request that was checked, and how far it is.
pub(super) struct Request {
    pub disk: Arc<Disk>,
    pub operation: Operation,
    /// What its next job does.
    pub action: Action,
    /// Where in the file it begins.
    pub at: u64,
    /// Bytes that it moves or makes zeroes.
    pub bytes: u64,
    /// The first so many of them are done.
    pub done: u64,
    /// It had a job.
    pub started: bool,
}

impl Request {
    /// Parses and checks the request in `chain`, which is for `disk`. `discards`: the device offers that.
    pub fn parse(
        disk: &Arc<Disk>,
        discards: bool,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, RequestError> {
        let mut answer = chain.writable(memory);
        answer.split_tail(1).ok_or(RequestError::NoStatus)?;
        let mut request = chain.readable(memory);
        let mut header = [0; HEADER_BYTES];
        request
            .read_exact(&mut header)
            .map_err(RequestError::Header)?;
        let operation = Operation::parse(header);
        let clears = matches!(operation, Operation::Discard | Operation::WriteZeroes);
        if clears && !discards {
            return Err(RequestError::NotOffered(operation));
        }
        if operation.modifies() && disk.is_readonly() {
            return Err(RequestError::ReadOnly(operation));
        }
        let (action, at, bytes) = match operation {
            Operation::Read(sector) => {
                let bytes = answer.remaining();
                (Action::Read, find(disk, sector, bytes)?, bytes)
            }
            Operation::Write(sector) => {
                let bytes = request.remaining();
                (Action::Write, find(disk, sector, bytes)?, bytes)
            }
            Operation::Flush | Operation::Id => (Action::Sync, 0, 0),
            Operation::Discard | Operation::WriteZeroes => clearing(disk, operation, &mut request)?,
            Operation::Unknown(number) => return Err(RequestError::Unknown(number)),
        };
        Ok(Self {
            disk: Arc::clone(disk),
            operation,
            action,
            at,
            bytes,
            done: 0,
            started: false,
        })
    }

    /// The part of the request's data that is still to be moved.
    pub fn data<'a>(&self, chain: &'a Chain, memory: &'a GuestMemoryMmap) -> Cursor<'a> {
        let mut data = match self.action {
            Action::Read => chain.writable(memory),
            _ => chain.readable(memory),
        };
        let before = if self.action == Action::Read {
            // The status is behind it.
            let _ = data.split_tail(1);
            0
        } else {
            HEADER_BYTES as u64
        };
        data.skip(before + self.done);
        data
    }

    /// Another way to do what the host's file system cannot do in the last one; `None` if there is none.
    pub const fn degrade(&mut self) -> bool {
        let next = match (self.operation, self.action) {
            (Operation::WriteZeroes, Action::Punch(bytes)) => Action::Zero(bytes),
            (Operation::WriteZeroes, Action::Zero(_)) => Action::Write,
            _ => return false,
        };
        self.action = next;
        true
    }

    /// It writes zeroes, for want of a better way.
    pub fn writes_zeroes(&self) -> bool {
        self.operation == Operation::WriteZeroes && self.action == Action::Write
    }

    /// What failed.
    pub const fn failed(&self, error: io::Error) -> RequestError {
        RequestError::Host {
            operation: self.operation,
            error,
        }
    }

    /// Its data is not where it should be.
    pub const fn misplaced(&self, error: ReadError) -> RequestError {
        RequestError::Data {
            operation: self.operation,
            error,
        }
    }
}

fn find(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, RequestError> {
    let (sectors, block) = (disk.sectors(), disk.block());
    position(sector, bytes, sectors, block).ok_or(RequestError::Bounds {
        sector,
        bytes,
        sectors,
        block,
    })
}

/// What a request to free or zero one segment comes to (virtio 1.3, 5.2.6.2).
fn clearing(
    disk: &Disk,
    operation: Operation,
    request: &mut Cursor<'_>,
) -> Result<(Action, u64, u64), RequestError> {
    let mut raw = [0; SEGMENT_BYTES];
    let bytes = request.remaining();
    if bytes != raw.len() as u64 {
        return Err(RequestError::Segments { operation, bytes });
    }
    request
        .read_exact(&mut raw)
        .map_err(|error| RequestError::Data { operation, error })?;
    let Segment {
        sector,
        sectors,
        flags,
    } = Segment::parse(raw);
    let (most, known) = match operation {
        Operation::Discard => (MAX_DISCARD_SECTORS, 0),
        _ => (MAX_ZERO_SECTORS, 1),
    };
    if flags & !known != 0 {
        return Err(RequestError::Flags { operation, flags });
    }
    if sectors > most {
        return Err(RequestError::TooMuch {
            operation,
            sectors,
            most,
        });
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    let at = find(disk, sector, bytes)?;
    let action = if operation == Operation::Discard || flags == 1 {
        Action::Punch(bytes)
    } else {
        Action::Zero(bytes)
    };
    Ok((action, at, bytes))
}
