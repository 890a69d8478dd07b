//! Reads and writes the blocks of calls in guest memory. What the guest has written there is loaded once, so that it cannot
//! change after it was checked.

use std::mem::{offset_of, size_of};

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::Error;
use ebb_hypercall_abi::arena::ArenaInfo;
use ebb_hypercall_abi::block::{BatchHeader, Descriptor, Query, batch_capacity};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::decode::range;
use crate::guest_memory::Survey;

const WORD: usize = size_of::<u64>();

fn fault<E>(_: E) -> Error {
    Error::Fault
}

/// Reads the descriptors of the batch in `block`.
pub(super) fn read_batch(
    memory: &GuestMemoryMmap,
    block: GpaRange,
) -> Result<Vec<Descriptor>, Error> {
    const HEADER: usize = size_of::<BatchHeader>();
    const SIZE: usize = size_of::<Descriptor>();
    let mut header = [0; HEADER];
    let start = GuestAddress(block.start());
    memory.read_slice(&mut header, start).map_err(fault)?;
    let header = BatchHeader::from_bytes(header);
    let capacity = batch_capacity(block.len() / PAGE_SIZE);
    if header.count == 0 || header.count > capacity || header.reserved != 0 {
        return Err(Error::Invalid);
    }
    let mut bytes = vec![0; header.count as usize * SIZE];
    let first = GuestAddress(block.start() + HEADER as u64);
    memory.read_slice(&mut bytes, first).map_err(fault)?;
    let (descriptors, _) = bytes.as_chunks::<SIZE>();
    Ok(descriptors
        .iter()
        .map(|bytes| Descriptor::from_bytes(*bytes))
        .collect())
}

/// Writes to the block how many descriptors were carried out.
pub(super) fn write_done(
    memory: &GuestMemoryMmap,
    block: GpaRange,
    done: usize,
) -> Result<(), Error> {
    let at = GuestAddress(block.start() + offset_of!(BatchHeader, done) as u64);
    let done = u32::try_from(done).map_err(fault)?;
    memory.write_slice(&done.to_le_bytes(), at).map_err(fault)
}

/// Reads the query in `block`: the address and number of pages as the guest gave them, and the range, if it asks about one.
pub(super) fn read_query(
    memory: &GuestMemoryMmap,
    block: GpaRange,
) -> Result<(Query, Option<GpaRange>), Error> {
    let mut bytes = [0; 2 * WORD];
    memory
        .read_slice(&mut bytes, GuestAddress(block.start()))
        .map_err(fault)?;
    // A query begins with the fields of a descriptor.
    let Descriptor { gpa, pages } = Descriptor::from_bytes(bytes);
    let query = Query {
        gpa,
        pages,
        ..Query::default()
    };
    match pages {
        0 => Ok((query, None)),
        _ => Ok((query, Some(range(gpa, pages)?))),
    }
}

/// Reads the number of the arena that `block` asks about.
pub(super) fn read_arena_index(memory: &GuestMemoryMmap, block: GpaRange) -> Result<u64, Error> {
    let mut bytes = [0; WORD];
    let at = GuestAddress(block.start());
    memory.read_slice(&mut bytes, at).map_err(fault)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes the description of an arena; only the number of arenas if there is no such arena.
pub(super) fn write_arena(
    memory: &GuestMemoryMmap,
    block: GpaRange,
    info: ArenaInfo,
) -> Result<(), Error> {
    let words = info.to_words().map(u64::to_le_bytes);
    let answer = &words.as_flattened()[WORD..];
    let len = if info.size == 0 { WORD } else { answer.len() };
    let at = GuestAddress(block.start() + WORD as u64);
    memory.write_slice(&answer[..len], at).map_err(fault)
}

/// Writes the answer to `query` behind the fields that the guest has written.
pub(super) fn write_query(
    memory: &GuestMemoryMmap,
    block: GpaRange,
    query: Query,
    survey: &Survey,
) -> Result<(), Error> {
    let pages = |bytes: u64| bytes / PAGE_SIZE;
    let answer = Query {
        examined: pages(survey.examined),
        lazy: pages(survey.range.lazy),
        unmapped: pages(survey.range.unmapped),
        discarded: pages(survey.range.discarded),
        machine_lazy: pages(survey.machine.lazy),
        machine_unmapped: pages(survey.machine.unmapped),
        machine_discarded: pages(survey.machine.discarded),
        ranges: survey.ranges,
        generation: survey.generation,
        ..query
    };
    let words = answer.to_words().map(u64::to_le_bytes);
    let asked = offset_of!(Query, examined);
    let bytes = words.as_flattened();
    let at = GuestAddress(block.start() + asked as u64);
    memory.write_slice(&bytes[asked..], at).map_err(fault)
}
