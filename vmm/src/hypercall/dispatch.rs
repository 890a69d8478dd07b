//! Carries out calls.

use std::sync::Arc;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::arena::ArenaInfo;
use ebb_hypercall_abi::block::BATCH_MAX;
use ebb_hypercall_abi::call::PREFAULT_MAX_PAGES;
use ebb_hypercall_abi::discovery::{PORT, VERSION};
use ebb_hypercall_abi::{Error, Features, Interface, Success, status};
use vm_memory::GuestMemoryMmap;

use super::blocks::{
    read_arena_index, read_batch, read_query, write_arena, write_done, write_query,
};
use super::decode::{Arguments, Request, decode, range};
use super::stats::{Counters, HypercallStats};
use crate::faults::GuestFaults;
use crate::guest_memory::LazyOps;

/// The interface that a machine offers its guest. `instruction` is the feature bit of the hypercall instruction that KVM
/// passes to the monitor, if there is one. `more` is what this machine has beyond what all have.
#[must_use]
pub fn offer(instruction: Option<Features>, more: Features) -> Interface {
    let always = [
        Features::PORT,
        Features::LAZY,
        Features::BATCH,
        Features::PREFAULT,
        Features::QUERY,
    ];
    let features = always
        .into_iter()
        .chain(instruction)
        .fold(more, Features::union);
    Interface {
        version: VERSION,
        features,
        port: PORT,
        batch_max: BATCH_MAX,
    }
}

/// Carries out the calls of one machine's guest, on the vCPU thread that makes them.
pub struct Hypercalls {
    interface: Interface,
    memory: Arc<GuestMemoryMmap>,
    ops: Arc<dyn LazyOps>,
    counters: Counters,
    faults: GuestFaults,
}

impl Hypercalls {
    /// Carries out calls by `ops`. Their blocks are in `memory`.
    #[must_use]
    pub fn new(interface: Interface, memory: Arc<GuestMemoryMmap>, ops: Arc<dyn LazyOps>) -> Self {
        Self {
            interface,
            memory,
            ops,
            counters: Counters::default(),
            faults: GuestFaults::new("hypercall"),
        }
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> HypercallStats {
        self.counters.snapshot()
    }

    /// Carries out one call and returns its status, for the guest.
    #[must_use]
    pub fn call(&self, arguments: Arguments) -> i64 {
        let result = decode(arguments).and_then(|request| {
            self.counters.calls(request.operation()).increment();
            self.execute(request)
        });
        if let Err(error) = result {
            self.counters.failed_total.increment();
            self.faults
                .report(format_args!("{arguments:x?} is answered with {error:?}"));
        }
        status::encode(result)
    }

    fn execute(&self, request: Request) -> Result<Success, Error> {
        match request {
            Request::Features => Ok(Success::Value(self.interface.features.bits())),
            Request::LazyFree(range) => Ok(self.free(&[self.ram(range)?])),
            Request::Reuse { range, prefault } => {
                Ok(self.reuse(&[self.reusable(range)?], prefault))
            }
            Request::LazyFreeBatch(block) => {
                self.batch(block, Self::ram, |ranges| self.free(ranges))
            }
            Request::ReuseBatch { block, prefault } => {
                let apply = |ranges: &[GpaRange]| self.reuse(ranges, prefault);
                self.batch(block, Self::reusable, apply)
            }
            Request::Query(block) => self.query(block),
            Request::Reset => {
                self.ops.reset();
                Ok(Success::LastRange)
            }
            Request::ArenaInfo(block) => self.arena_info(block),
            Request::KernelNote(range) => self.kernel_note(range),
        }
    }

    fn ram(&self, range: GpaRange) -> Result<GpaRange, Error> {
        self.ops
            .is_ram(range)
            .then_some(range)
            .ok_or(Error::Invalid)
    }

    /// Checks that `range` may be reused: it is RAM, or granules of an arena.
    fn reusable(&self, range: GpaRange) -> Result<GpaRange, Error> {
        let granules = self.ops.is_granules(range);
        granules
            .then_some(range)
            .map_or_else(|| self.ram(range), Ok)
    }

    fn block(&self, block: GpaRange) -> Result<GpaRange, Error> {
        self.ops.is_ram(block).then_some(block).ok_or(Error::Fault)
    }

    fn free(&self, ranges: &[GpaRange]) -> Success {
        self.ops.lazy_free(ranges);
        Success::Done
    }

    fn reuse(&self, ranges: &[GpaRange], prefault: bool) -> Success {
        let last = self.ops.reuse(ranges);
        if prefault {
            // Not before the reuse: what is lazy may be discarded at any time.
            self.prefault(ranges);
        }
        if last {
            Success::LastRange
        } else {
            Success::Done
        }
    }

    /// Populates the first [`PREFAULT_MAX_PAGES`] of `ranges`.
    fn prefault(&self, ranges: &[GpaRange]) {
        let mut room = PREFAULT_MAX_PAGES * PAGE_SIZE;
        for range in ranges {
            let bytes = range.len().min(room);
            let Some(part) = GpaRange::new(range.start(), range.start() + bytes) else {
                return;
            };
            room -= bytes;
            if self.ops.prefault(part) {
                self.counters.prefaulted_bytes_total.add(bytes);
            } else {
                self.counters.prefault_failures_total.increment();
            }
        }
    }

    /// Applies `apply` to the ranges of the batch in `block`, up to the first one that fails `check`.
    fn batch(
        &self,
        block: GpaRange,
        check: fn(&Self, GpaRange) -> Result<GpaRange, Error>,
        apply: impl FnOnce(&[GpaRange]) -> Success,
    ) -> Result<Success, Error> {
        let block = self.block(block)?;
        let descriptors = read_batch(&self.memory, block)?;
        let good: Vec<GpaRange> = descriptors
            .iter()
            .map_while(|descriptor| check(self, range(descriptor.gpa, descriptor.pages).ok()?).ok())
            .collect();
        let success = if good.is_empty() {
            Success::Done
        } else {
            apply(&good)
        };
        write_done(&self.memory, block, good.len())?;
        if good.len() < descriptors.len() {
            return Err(Error::Invalid);
        }
        Ok(success)
    }

    fn arena_info(&self, block: GpaRange) -> Result<Success, Error> {
        let count = self.ops.arenas();
        if count == 0 {
            return Err(Error::NoSuchCall);
        }
        let block = self.block(block)?;
        let index = read_arena_index(&self.memory, block)?;
        let known = self.ops.arena(index);
        let info = ArenaInfo {
            count,
            ..known.unwrap_or_default()
        };
        write_arena(&self.memory, block, info)?;
        known.map(|_| Success::Done).ok_or(Error::Invalid)
    }

    fn kernel_note(&self, range: GpaRange) -> Result<Success, Error> {
        if !self.interface.features.contains(Features::KERNEL_NOTE) {
            return Err(Error::NoSuchCall);
        }
        let told = self.ops.kernel_note(self.ram(range)?);
        told.map(|()| Success::Done).map_err(|why| {
            self.faults.report(format_args!(
                "the guest's vmcoreinfo note is not used: {why}"
            ));
            Error::Invalid
        })
    }

    fn query(&self, block: GpaRange) -> Result<Success, Error> {
        let block = self.block(block)?;
        let (query, range) = read_query(&self.memory, block)?;
        let range = range.map(|range| self.ram(range)).transpose()?;
        let survey = self.ops.survey(range);
        write_query(&self.memory, block, query, &survey)?;
        Ok(Success::Done)
    }
}
