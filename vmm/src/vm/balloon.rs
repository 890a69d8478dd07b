//! Wiring of the balloon that runs itself: its device and the guest's memory, for the reclaim thread.

use std::sync::Arc;

use crate::devices::virtio::balloon::BalloonHandle;
use crate::guest_memory::GuestMemory;
use crate::reclaim::{BalloonDevice, BalloonFigures, GuestFigures};

/// The machine's balloon, and its memory.
pub struct MachineBalloon {
    /// The balloon.
    pub handle: BalloonHandle,
    /// The memory.
    pub memory: Arc<GuestMemory>,
}

impl BalloonDevice for MachineBalloon {
    fn figures(&self) -> BalloonFigures {
        let status = self.handle.status();
        let guest = self.handle.latest().and_then(|(statistics, age)| {
            let free = statistics.free_memory?;
            Some(GuestFigures {
                age,
                free,
                // Linux before 4.6 does not send it, and has at least this.
                available: statistics.available_memory.unwrap_or(free),
                major_faults: statistics.major_faults.unwrap_or(0),
                oom_kills: statistics.oom_kill.unwrap_or(0),
            })
        });
        BalloonFigures {
            bound: status.lazy,
            floor: status.floor_bytes,
            target: status.target_bytes,
            actual: status.actual_bytes,
            guest,
            ..BalloonFigures::default()
        }
    }

    fn lazy_resident(&self) -> u64 {
        self.memory.lazy_resident_bytes()
    }

    fn set_target(&self, bytes: u64) {
        if let Err(error) = self.handle.set_auto_target(bytes) {
            tracing::warn!(%error, "balloon");
        }
    }
}
