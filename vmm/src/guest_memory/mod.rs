//! The one owner of a machine's memory: RAM, arenas, the tracker of lazily freed ranges, strict mode, reported memory,
//! and the requests to the reclaimer.
//!
//! A guest-physical address comes in here from a hypercall or from a balloon queue, and goes down from here: to the
//! tracker ([`LazyMemory`]), or through [`Reclaimer`], [`Strict`] or [`ReportedMemory`] to the madvise in
//! [`GuestRam`].

mod dead;
mod ops;
mod resident;
#[cfg(test)]
pub mod tests;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::{LazyMemory, Pieces, Surveyed, Sweep};
use ebb_core::range::GpaRange;
use ebb_core::release::Release;
use ebb_hypercall_abi::arena::ArenaInfo;

use crate::arena::{Arena, Arenas, BadArena};
use crate::guest_kernel::KnownKernel;
use crate::kvm::KickTable;
use crate::memory::{Backing, GuestRam, MemoryError};
use crate::reclaim::{
    self, AutoBalloon, KnownLists, Mode, Peers, PressureSource, ReclaimThread, ReclaimTuning,
    Reclaimer, ReportedMemory,
};
use crate::strict::{self, Strict, StrictThread};

pub use crate::guest_kernel::{BadNote, KernelState, Lost, NoteSource};
pub use dead::merge;
pub use ops::{KernelEvents, LazyOps, RangeSink, States, Survey};

/// The memory of a machine cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// RAM cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An arena cannot be made.
    #[error(transparent)]
    Arena(#[from] BadArena),
}

/// An arena to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaSetup {
    /// Its name.
    pub id: String,
    /// Its addresses, above all RAM.
    pub gpa: GpaRange,
    /// Bytes of a granule.
    pub granule: u64,
}

/// Where the content of a restored machine's memory comes from. What is named nowhere is zero.
#[derive(Clone, Debug)]
pub enum Content {
    /// From files. Each holds RAM and arenas, one region after the other, or a part of that.
    Files {
        /// The files.
        files: Vec<Arc<File>>,
        /// The file that a part of them is in, by its number; a later part covers an earlier one.
        parts: Vec<(usize, GpaRange)>,
    },
    /// These parts come from a page server.
    Served(Vec<GpaRange>),
}

/// What a snapshot knows of the memory.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Its content.
    pub content: Content,
    /// What was lazily free.
    pub lazily_free: Vec<GpaRange>,
    /// The guest's kernel.
    pub kernel: KernelState,
}

/// Describes the memory of a machine.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the host puts behind the RAM.
    pub backing: Backing,
    /// Addresses of the RAM, ascending and disjoint.
    pub ram: Vec<GpaRange>,
    /// The arenas, by number.
    pub arenas: Vec<ArenaSetup>,
    /// When and how lazily freed memory is taken.
    pub tuning: ReclaimTuning,
    /// How reported free pages are released.
    pub reported: Release,
    /// Strict mode is on.
    pub strict: bool,
    /// Take what is free by the guest kernel's free lists, too.
    pub free_pages: bool,
    /// What a snapshot knows of it; `None`: all of it is zero.
    pub restored: Option<Restored>,
}

impl Setup {
    /// Addresses of RAM and arenas.
    #[must_use]
    pub fn regions(&self) -> Vec<GpaRange> {
        let arenas = self.arenas.iter().map(|arena| arena.gpa);
        self.ram.iter().copied().chain(arenas).collect()
    }

    /// First address after the memory.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.regions().last().map_or(0, |last| last.end())
    }

    /// Maps the memory. Where it comes from a page server, nobody may touch it before that has its
    /// [`GuestRam::page_faults`].
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn map(&self) -> Result<GuestRam, MemoryError> {
        let arenas: Vec<GpaRange> = self.arenas.iter().map(|arena| arena.gpa).collect();
        let mut ram = GuestRam::with_arenas(self.backing, &self.ram, &arenas)?;
        match self.restored.as_ref().map(|it| &it.content) {
            None => {}
            Some(Content::Files { files, parts }) => {
                for (file, range) in parts {
                    ram.map_file(files[*file].as_fd(), &[*range])?;
                }
            }
            Some(Content::Served(runs)) => ram.serve(runs)?,
        }
        Ok(ram)
    }
}

/// The memory of one machine, shared by its vCPUs, its devices and the operator.
///
/// It has no lock of its own. The fields are dropped in this order, so that every handle on the RAM is gone before the
/// RAM itself, which then unmaps.
pub struct GuestMemory {
    strict: Option<Arc<Strict>>,
    reported: ReportedMemory,
    kernel: Arc<KnownKernel>,
    reclaimer: Arc<Reclaimer>,
    gate: Arc<Gate>,
    lazy: Arc<LazyMemory>,
    arenas: Arenas,
    ram: Arc<GuestRam>,
}

impl GuestMemory {
    /// The memory of a machine with `vcpus` vCPUs, whose threads register with `kicks`. `ram` is mapped as `setup` says.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(
        setup: &Setup,
        ram: Arc<GuestRam>,
        vcpus: usize,
        kicks: &Arc<KickTable>,
    ) -> Result<Self, SetupError> {
        let arenas = arenas(&setup.arenas, &ram)?;
        let generation = Arc::new(VmGeneration::default());
        let kick = Box::new(Arc::clone(kicks));
        let gate = Arc::new(Gate::new(vcpus, Arc::clone(&generation), kick));
        // In strict mode pages are made one by one.
        let huge_pages = (setup.backing.thp || setup.backing.hugepages) && !setup.strict;
        let lazy = Arc::new(if huge_pages {
            LazyMemory::with_huge_pages(generation)
        } else {
            LazyMemory::new(generation)
        });
        let (frees, entries) = (Arc::clone(&lazy), Arc::clone(&gate));
        let kernel = Arc::new(if setup.strict {
            KnownKernel::off("strict mode reads no free lists")
        } else if setup.free_pages {
            KnownKernel::new()
        } else {
            KnownKernel::off("--lazy free_pages=off")
        });
        let lists = KnownLists::new(Arc::clone(&kernel), ram.clone(), setup.ram.clone());
        let reclaimer = Reclaimer::new(frees, ram.clone(), entries, setup.tuning)
            .with_free_lists(Box::new(lists));
        let strict = setup.strict.then(|| {
            let (lazy, ram) = (Arc::clone(&lazy), Arc::clone(&ram));
            Arc::new(Strict::new(lazy, ram, Arc::clone(kicks), vcpus))
        });
        Ok(Self {
            strict,
            reported: ReportedMemory::new(Arc::clone(&lazy), Arc::clone(&ram), setup.reported),
            kernel,
            reclaimer: Arc::new(reclaimer.with_arenas(Arc::clone(&arenas))),
            gate,
            lazy,
            arenas,
            ram,
        })
    }

    /// Takes up what was lazily free, and the guest's kernel. Nobody must have used this memory.
    pub fn restore(&self, restored: &Restored) {
        self.lazy.free(&restored.lazily_free);
        let mut sweep = Sweep::new(Pieces::Any, u64::MAX);
        while let Some(chunk) = self.lazy.take_chunk(&mut sweep, u64::MAX) {
            // The host has nothing there.
            chunk.discarded();
        }
        self.arenas.iter().for_each(|arena| arena.restore());
        self.kernel.restore(&*self.ram, &restored.kernel);
    }

    /// The RAM and the memory of the arenas.
    #[must_use]
    pub const fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The arenas, by number.
    #[must_use]
    pub const fn arenas(&self) -> &Arenas {
        &self.arenas
    }

    /// The tracker of lazily freed ranges.
    #[must_use]
    pub fn lazy(&self) -> &LazyMemory {
        &self.lazy
    }

    /// The gate through which the vCPUs enter the guest.
    #[must_use]
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Takes lazily freed memory.
    #[must_use]
    pub const fn reclaimer(&self) -> &Arc<Reclaimer> {
        &self.reclaimer
    }

    /// Takes what the guest reports free.
    #[must_use]
    pub const fn reported(&self) -> &ReportedMemory {
        &self.reported
    }

    /// The guest kernel whose free lists are read.
    #[must_use]
    pub const fn kernel(&self) -> &Arc<KnownKernel> {
        &self.kernel
    }

    /// Strict mode, if it is on.
    #[must_use]
    pub const fn strict(&self) -> Option<&Arc<Strict>> {
        self.strict.as_ref()
    }

    /// How much of the RAM is lazily free and still held by the host: lazy, marked free and not taken, or discarded and
    /// brought back by a huge page. Takes some milliseconds; of a large machine it is an estimate.
    #[must_use]
    pub fn lazy_resident_bytes(&self) -> u64 {
        let all = self.ram.regions().iter().map(|region| region.gpa);
        let ram: Vec<GpaRange> = all.filter(|gpa| self.ram.is_ram(*gpa)).collect();
        resident::resident_bytes(&self.lazy, &*self.ram, &ram)
    }

    /// Starts the thread that reclaims as [`ReclaimTuning::mode`] says, and that runs `balloon`; `None` for [`Mode::Off`].
    ///
    /// # Errors
    /// [`reclaim::StartError`].
    pub fn start_reclaim(
        &self,
        balloon: Option<AutoBalloon>,
    ) -> Result<Option<ReclaimThread>, reclaim::StartError> {
        let source = match self.reclaimer.tuning().mode {
            Mode::Off => return Ok(None),
            Mode::Eager if balloon.is_none() => PressureSource::watermark_only(),
            Mode::Eager | Mode::Pressure | Mode::Age(_) => {
                PressureSource::open().with_peers(Peers::join())
            }
        };
        ReclaimThread::start(Arc::clone(&self.reclaimer), source, balloon).map(Some)
    }

    /// Starts the thread that catches accesses to lazily freed memory; `None` unless strict mode is on.
    ///
    /// # Errors
    /// [`strict::StartError`].
    pub fn start_strict(&self) -> Result<Option<StrictThread>, strict::StartError> {
        let start = |strict| StrictThread::start(Arc::clone(strict), Arc::clone(&self.ram));
        self.strict.as_ref().map(start).transpose()
    }

    /// Makes `ranges` lazily free; in strict mode they are discarded at once.
    fn free(&self, ranges: &[GpaRange]) {
        match &self.strict {
            Some(strict) => strict.free(ranges),
            None => {
                self.lazy.free(ranges);
            }
        }
    }

    /// The arena whose granules `range` names.
    fn arena_of(&self, range: GpaRange) -> Option<&Arena> {
        let mut arenas = self.arenas.iter().map(|arena| &**arena);
        arenas.find(|arena| arena.may_reuse(range))
    }
}

impl LazyOps for GuestMemory {
    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.is_ram(range)
    }

    fn is_granules(&self, range: GpaRange) -> bool {
        self.arena_of(range).is_some()
    }

    fn kernel_note(&self, note: GpaRange) -> Result<(), BadNote> {
        self.note(note, NoteSource::Hypercall)
    }

    fn arenas(&self) -> u64 {
        self.arenas.len() as u64
    }

    fn arena(&self, index: u64) -> Option<ArenaInfo> {
        let place = self.arenas.get(usize::try_from(index).ok()?)?.place();
        Some(ArenaInfo {
            index,
            gpa: place.gpa.start(),
            size: place.layout.size(),
            granule: place.layout.granule(),
            first: place.layout.first(),
            table: place.layout.table(),
            ..ArenaInfo::default()
        })
    }

    fn lazy_free(&self, ranges: &[GpaRange]) {
        self.free(ranges);
    }

    fn reuse(&self, ranges: &[GpaRange]) -> bool {
        let mut ram = Vec::with_capacity(ranges.len());
        for &range in ranges {
            match self.arena_of(range) {
                Some(arena) => arena.reuse(range),
                None => ram.push(range),
            }
        }
        self.lazy.reuse(&ram).last
    }

    fn reset(&self) {
        self.lazy.reset();
        self.arenas.iter().for_each(|arena| arena.reset());
    }

    fn prefault(&self, range: GpaRange) -> bool {
        let populated = self.ram.populate(range);
        if let Err(error) = &populated {
            tracing::debug!(%error, "prefault");
        }
        populated.is_ok()
    }

    fn survey(&self, range: Option<GpaRange>) -> Survey {
        let found = range.map_or_else(Surveyed::default, |range| self.lazy.survey(range));
        let all = self.lazy.snapshot();
        Survey {
            range: States {
                lazy: found.totals.lazy + found.totals.reclaiming,
                unmapped: found.totals.unmapped,
                discarded: found.totals.discarded,
            },
            examined: range.map_or(0, |range| found.end - range.start()),
            machine: States {
                lazy: all.lazy_bytes + all.reclaiming_bytes,
                unmapped: all.unmapped_bytes,
                discarded: all.discarded_bytes,
            },
            ranges: all.ranges,
            generation: all.generation,
        }
    }
}

impl KernelEvents for GuestMemory {
    fn note(&self, note: GpaRange, source: NoteSource) -> Result<(), BadNote> {
        self.kernel.offer(&*self.ram, note, source)
    }

    fn lost(&self, why: Lost) {
        self.kernel.forget(why);
    }
}

impl RangeSink for GuestMemory {
    fn lazy_free(&self, ranges: &[GpaRange]) {
        self.free(ranges);
    }

    fn reuse(&self, ranges: &[GpaRange]) {
        self.lazy.reuse(ranges);
    }

    fn discard(&self, ranges: &[GpaRange]) {
        self.reclaimer.discard_now(ranges);
    }

    fn report(&self, ranges: &[GpaRange]) {
        self.reported.take(ranges);
    }

    fn reset(&self) {
        self.lazy.reset();
    }

    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.is_ram(range)
    }
}

fn arenas(setups: &[ArenaSetup], ram: &GuestRam) -> Result<Arenas, BadArena> {
    let arena = |(index, setup): (u32, &ArenaSetup)| {
        let ArenaSetup { id, gpa, granule } = setup.clone();
        Arena::new(index, id, gpa, granule, ram.memory()).map(Arc::new)
    };
    (0..).zip(setups).map(arena).collect()
}
