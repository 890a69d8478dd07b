//! The host kernel's interfaces that Ebb needs and no crate offers safely. Nothing here knows of guests.

pub mod cgroup;
mod files;
mod kept;
pub mod mapping;
pub mod mounts;
pub mod nodes;
mod overlay;
pub mod pagemap;
mod panic_point;
pub mod pressure;
pub mod privileges;
pub mod process;
pub mod random;
pub mod seccomp;
mod signals;
pub mod slots;
pub mod sockets;
pub mod tap;
mod terminal;
pub mod transfer;
mod usage;
mod userfault;
pub mod vectors;

pub use cgroup::{Cgroup, MemoryLimit};
pub use files::{inherited_file, replace_file};
pub use kept::KeptFile;
pub use mapping::{Mapping, MappingKind};
pub use panic_point::{panic_point, panic_point_at};
pub use pressure::{MemInfo, PsiTrigger};
pub use signals::{Request, Signals};
pub use slots::SlotFile;
pub use terminal::{RawMode, Terminal};
pub use usage::{own_process, resident_bytes, thread_name};
pub use userfault::{Fault, Userfault};
