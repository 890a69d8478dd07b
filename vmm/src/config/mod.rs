//! What the operator asks for: raw text parsed, then validated into a typed description of the machine.

mod error;
mod machine;
mod options;
mod spec;
mod validate;

pub use error::ConfigError;
pub use machine::{
    ArenaConfig, BalloonConfig, DiskConfig, KernelConfig, KernelEntry, LazyConfig, LazyMode,
    MachineConfig, MemoryConfig, Reporting, SerialConfig,
};
pub use options::{format_size, parse_size};
pub use spec::{ArenaSpec, CpusSpec, MachineSpec, MemorySpec, SocketSpec, TeardownSpec, Toggle};
pub use validate::{SocketPath, check_socket};
