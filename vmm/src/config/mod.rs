//! What the operator asks for: options parsed, then checked and made a typed description of the machine.

mod error;
mod files;
mod keys;
mod limits;
mod mac;
mod machine;
mod number;
mod rate;
mod size;
mod spec;
#[cfg(test)]
mod tests;
mod validate;

pub use error::ConfigError;
pub use files::{SocketPath, check_socket};
pub use keys::{choices, explain, parse_keys};
pub use mac::MacAddress;
pub use machine::{ArenaConfig, BalloonConfig, KernelConfig, MachineConfig, MemoryConfig};
pub use number::parse_size;
pub use rate::Rate;
pub use size::format_size;
pub use spec::{
    DiskConfig, KernelEntry, LazyConfig, LazyMode, MachineSpec, NetConfig, SerialConfig,
    SocketSpec, TeardownSpec,
};
