//! From a snapshot to a machine that is paused where the snapshot was made.

use std::fs::File;
use std::sync::{Arc, PoisonError};

use ebb_core::range::{GpaRange, PAGE_SIZE};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::LaunchError;
use super::attach::SavedDevice;
use super::snapshot::Base;
use crate::arch::layout;
use crate::guest_memory::{Content, GuestMemory, Restored, Setup};
use crate::irq::Interrupt;
use crate::kvm::{self, Hypervisor};
use crate::memory::GuestRam;
use crate::snapshot::{PageServer, State, check_cpu};
use crate::sys::random::random_block;

/// Where the memory of a snapshot comes from.
pub enum MemorySource {
    /// From its memory files, which belong to the state: those below, the full one first, and its own.
    Files(Vec<Arc<File>>),
    /// From a page server, which has what is in the one memory file.
    Server(Arc<PageServer>),
}

/// A snapshot to start from.
pub struct Restoration {
    /// Its state.
    pub state: State,
    /// Where its memory comes from.
    pub memory: MemorySource,
    /// Run the guest at once.
    pub resume: bool,
}

impl Restoration {
    /// Checks that this host and a machine with so many vCPUs and memory at `regions` can take it up, and describes its memory.
    ///
    /// # Errors
    /// [`LaunchError::Snapshot`].
    pub fn memory(
        &self,
        host: &Hypervisor,
        vcpus: u32,
        regions: &[GpaRange],
    ) -> Result<Restored, LaunchError> {
        let refuse = |why: String| Err(LaunchError::Snapshot(why));
        let State { memory, .. } = &self.state;
        let due = regions.iter().map(|it| it.len()).sum::<u64>() + PAGE_SIZE;
        if memory.len != due || self.state.vcpus.len() != vcpus as usize {
            return refuse(
                "the snapshot is of a machine with other memory or vCPUs than its options say"
                    .into(),
            );
        }
        let here = host.cpuid().as_slice();
        for vcpu in &self.state.vcpus {
            if let Err(error) = check_cpu(&vcpu.cpuid, here) {
                return refuse(format!("the snapshot {error}"));
            }
        }
        let content = match &self.memory {
            MemorySource::Files(files) => Content::Files {
                files: files.clone(),
                parts: memory.parts(regions),
            },
            MemorySource::Server(_) => Content::Served(memory.served(regions)),
        };
        Ok(Restored {
            content,
            lazily_free: self.state.lazily_free(),
            kernel: self.state.kernel.clone(),
        })
    }

    /// What later differences are told from.
    pub(super) fn base(&self) -> Option<Base> {
        match &self.memory {
            MemorySource::Files(files) => Some(Base {
                memory: self.state.memory.clone(),
                files: files.clone(),
            }),
            MemorySource::Server(_) => None,
        }
    }

    /// Gives the page server, if there is one, what it needs to serve `ram`, as `setup` says, and returns it.
    ///
    /// # Errors
    /// [`LaunchError::Snapshot`], [`LaunchError::System`].
    pub(super) fn hand_over(
        &self,
        setup: &Setup,
        ram: &GuestRam,
    ) -> Result<Option<&Arc<PageServer>>, LaunchError> {
        let content = setup.restored.as_ref().map(|it| &it.content);
        let (MemorySource::Server(server), Some(Content::Served(runs)), Some(faults)) =
            (&self.memory, content, ram.page_faults())
        else {
            return Ok(None);
        };
        let refused = |error| {
            let path = server.path().display();
            LaunchError::Snapshot(format!("{path}: the page server takes nothing: {error}"))
        };
        server
            .hand_over(faults, &ram.served(runs))
            .map_err(refused)?;
        Ok(Some(server))
    }

    /// Gives chips, vCPUs and devices of a new machine the saved state, and tells the guest. Their clocks go on as if they had
    /// run until now.
    ///
    /// # Errors
    /// [`LaunchError::Kvm`], [`LaunchError::Snapshot`].
    pub fn apply(
        &self,
        host: &Hypervisor,
        machine: &kvm::Machine,
        memory: &GuestMemoryMmap,
        devices: &[SavedDevice],
    ) -> Result<Vec<VcpuFd>, LaunchError> {
        let elapsed = self.state.host.elapsed_ns();
        machine.chips().restore(&self.state.chips, elapsed)?;
        let mut vcpus = Vec::new();
        for (index, state) in (0..).zip(&self.state.vcpus) {
            let mut fd = machine.create_vcpu(index)?;
            state.restore(&mut fd, host, elapsed)?;
            vcpus.push(fd);
        }
        let names = |list: &mut dyn Iterator<Item = &String>| {
            list.map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        let was = names(&mut self.state.devices.iter().map(|(name, _)| name));
        let is = names(&mut devices.iter().map(|(name, _)| name));
        if was != is {
            let why = format!("the snapshot has the devices {was}, but this machine has {is}");
            return Err(LaunchError::Snapshot(why));
        }
        for ((name, state), (_, device)) in self.state.devices.iter().zip(devices) {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let restored = device.restore(state);
            let failed =
                |why| LaunchError::Snapshot(format!("the snapshot's device {name}: {why}"));
            restored.map_err(failed)?;
        }
        let event = machine.interrupt(layout::EVENT_GSI)?;
        new_generation(memory, Some(&event))?;
        Ok(vcpus)
    }
}

/// Takes up what the memory knows beside its content.
pub fn memory(memory: &GuestMemory, restored: Option<&Restored>) {
    if let Some(restored) = restored {
        memory.restore(restored);
    }
}

/// Gives the guest a new generation id. A kernel that knows the one before hears of it by `event` and mixes it into its random
/// numbers, so that no two machines from one snapshot have the same.
///
/// # Errors
/// [`LaunchError::System`].
pub fn new_generation(
    memory: &GuestMemoryMmap,
    event: Option<&dyn Interrupt>,
) -> Result<(), LaunchError> {
    let block = random_block().map_err(LaunchError::system("getrandom"))?;
    let at = GuestAddress(layout::VM_GENERATION);
    let written = memory.write_slice(&block[..16], at);
    written.map_err(|error| LaunchError::Snapshot(format!("the generation id: {error}")))?;
    let told = event.map_or(Ok(()), Interrupt::trigger);
    told.map_err(LaunchError::system("eventfd"))
}
