//! Which guest kernel is read, or why none is.

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
    /// It was found in the guest's RAM.
    Search,
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

struct State {
    kernel: Option<(Arc<GuestKernel>, NoteSource)>,
    why_not: String,
}

/// The guest kernel that is read. vCPU threads offer notes and report what makes them stale; the reclaimer reads.
///
/// A vCPU thread reports before its vCPU enters the guest again. So whoever has closed the gate, and looks then, sees every
/// report that matters.
pub struct KnownKernel {
    /// `None`: free lists are not read in this machine, and `why_not` says so for good.
    enabled: bool,
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
            kernel: None,
            why_not: why_not.into(),
        };
        Self {
            enabled,
            state: Mutex::new(state),
        }
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
        if !self.enabled {
            return Err(BadNote(self.state().why_not.clone()));
        }
        let accepted = GuestKernel::accept(memory, note);
        let mut state = self.state();
        match accepted {
            Ok(kernel) => {
                tracing::info!(release = kernel.release(), ?source, "free lists are read");
                state.kernel = Some((Arc::new(kernel), source));
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

    /// The note that was accepted, if there is one, does not count any more.
    pub fn forget(&self, why: Lost) {
        let mut state = self.state();
        if state.kernel.take().is_some() {
            tracing::info!(%why, "free lists are not read any more");
            state.why_not = why.to_string();
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
