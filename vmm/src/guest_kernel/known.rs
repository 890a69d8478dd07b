//! Which guest kernel is read, or why none is.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebb_core::range::GpaRange;
use serde::{Deserialize, Serialize};

use super::{BadNote, GuestKernel, ReadGuest};

/// Who told where the note is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoteSource {
    /// The guest kernel's driver `qemu_fw_cfg`.
    FwCfg,
    /// A call of the guest.
    Hypercall,
}

/// Why an accepted note does not count any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// A driver has reset a virtio device that was in use.
    #[error("a virtio device was reset")]
    DeviceReset,
    /// A vCPU has set up its entry into a kernel, or has shut down its clock: a new kernel starts.
    #[error("a vCPU has left the kernel or entered a new one")]
    KernelLeft,
    /// The release string in memory is another one.
    #[error("another kernel is in memory")]
    OtherKernel,
    /// The kernel fills free pages with a pattern and checks it (`page_poison`), so a free page may not read zero.
    #[error("the guest kernel poisons free pages")]
    Poisoned,
}

/// At most this many changes are logged.
const LINES: u32 = 64;

/// Why a kernel is not read that could be replaced unseen.
const NO_CLOCK: &str = "the kernel does not use kvmclock, so its end would not be seen (kexec)";

/// Whether the free lists of the guest's kernel are read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreePagesState {
    /// The release of the guest kernel that is read; `null`: none is.
    pub kernel: Option<String>,
    /// Who told where its note is.
    pub note_from: Option<NoteSource>,
    /// Why no kernel is read.
    pub why_not: Option<String>,
}

/// What a snapshot keeps of the guest's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelState {
    /// The vCPUs whose kvmclock is on.
    clocks: Vec<usize>,
    /// Start and end of the note that counts, and who told.
    note: Option<(u64, u64, NoteSource)>,
}

struct State {
    /// Notes are taken. Otherwise `why_not` says for good why not.
    enabled: bool,
    kernel: Option<(Arc<GuestKernel>, NoteSource)>,
    /// Where its note is.
    note: Option<GpaRange>,
    why_not: String,
    /// The vCPUs whose kvmclock is on.
    clocks: BTreeSet<usize>,
    /// How often a kernel may have ended.
    ends: u64,
    /// Lines that may still be logged: a guest can come and go as often as it likes.
    lines: u32,
}

impl State {
    fn may_log(&mut self) -> bool {
        let may = self.lines > 0;
        self.lines = self.lines.saturating_sub(1);
        may
    }
}

/// The guest kernel that is read. vCPU threads offer notes and report what makes them stale; the reclaimer reads.
///
/// A vCPU thread reports before its vCPU enters the guest again. So whoever has closed the gate, and looks then, sees every
/// report that matters.
pub struct KnownKernel {
    state: Mutex<State>,
}

impl KnownKernel {
    /// Waits for a note.
    #[must_use]
    pub fn new() -> Self {
        Self::with(true, "the guest has not told where its vmcoreinfo note is")
    }

    /// Takes no note, because of `why_not`.
    #[must_use]
    pub fn off(why_not: &str) -> Self {
        Self::with(false, why_not)
    }

    fn with(enabled: bool, why_not: &str) -> Self {
        let state = State {
            enabled,
            kernel: None,
            note: None,
            why_not: why_not.into(),
            clocks: BTreeSet::new(),
            ends: 0,
            lines: LINES,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// Returns true unless notes are refused for good.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.state().enabled
    }

    /// Takes no note from now on, because of `why_not`.
    pub fn turn_off(&self, why_not: &str) {
        let mut state = self.state();
        state.enabled = false;
        state.kernel = None;
        state.why_not = why_not.into();
    }

    /// The guest has a note at `note`. It counts if it passes all checks.
    ///
    /// # Errors
    /// [`BadNote`]: then no note counts.
    pub fn offer(
        &self,
        memory: &dyn ReadGuest,
        note: GpaRange,
        source: NoteSource,
    ) -> Result<(), BadNote> {
        let ends = {
            let state = self.state();
            if !state.enabled {
                return Err(BadNote(state.why_not.clone()));
            }
            state.ends
        };
        let accepted = GuestKernel::accept(memory, note);
        let mut state = self.state();
        let accepted = match accepted {
            Ok(_) if state.clocks.is_empty() => Err(BadNote(NO_CLOCK.into())),
            Ok(_) if state.ends != ends => Err(BadNote("the kernel ended meanwhile".into())),
            accepted => accepted,
        };
        match accepted {
            Ok(kernel) => {
                if state.may_log() {
                    event!("free_lists", read = true, release = kernel.release());
                    tracing::info!(release = kernel.release(), ?source, "free lists are read");
                }
                state.kernel = Some((Arc::new(kernel), source));
                state.note = Some(note);
                state.why_not.clear();
                Ok(())
            }
            Err(error) => {
                state.kernel = None;
                state.why_not = format!("the note is not accepted: {error}");
                Err(error)
            }
        }
    }

    /// The vCPU `index` has switched its kvmclock on or off. A kernel that uses it switches it off before another one starts,
    /// so its end is seen; a note of any other kernel is refused.
    pub fn clock_set(&self, index: usize, on: bool) {
        let mut state = self.state();
        if on {
            state.clocks.insert(index);
        } else {
            state.clocks.remove(&index);
        }
    }

    /// The note that was accepted, or that is being looked at, does not count any more.
    pub fn forget(&self, why: Lost) {
        let mut state = self.state();
        state.ends += 1;
        if state.kernel.take().is_some() {
            if state.may_log() {
                event!("free_lists", read = false, %why);
                tracing::info!(%why, "free lists are not read any more");
            }
            state.why_not = why.to_string();
        }
    }

    /// What a snapshot keeps of it.
    #[must_use]
    pub fn save(&self) -> KernelState {
        let state = self.state();
        let counts = state.kernel.as_ref().zip(state.note);
        KernelState {
            clocks: state.clocks.iter().copied().collect(),
            note: counts.map(|((_, source), note)| (note.start(), note.end(), *source)),
        }
    }

    /// Takes up what a snapshot has kept, and reads the note again: it counts if it passes all checks.
    pub fn restore(&self, memory: &dyn ReadGuest, saved: &KernelState) {
        for &index in &saved.clocks {
            self.clock_set(index, true);
        }
        if let Some((start, end, source)) = saved.note
            && let Some(note) = GpaRange::new(start, end)
            && let Err(error) = self.offer(memory, note, source)
        {
            tracing::info!(%error, "the saved note is not accepted");
        }
    }

    /// The kernel to read. It may be used until the caller opens the gate.
    #[must_use]
    pub fn current(&self) -> Option<Arc<GuestKernel>> {
        let state = self.state();
        state.kernel.as_ref().map(|(kernel, _)| Arc::clone(kernel))
    }

    /// Which kernel is read, or why none is.
    #[must_use]
    pub fn status(&self) -> FreePagesState {
        let state = self.state();
        let read = state.kernel.as_ref();
        FreePagesState {
            kernel: read.map(|(kernel, _)| kernel.release().to_owned()),
            note_from: read.map(|(_, source)| *source),
            why_not: read.is_none().then(|| state.why_not.clone()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for KnownKernel {
    fn default() -> Self {
        Self::new()
    }
}
