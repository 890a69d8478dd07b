//! What the operator asks for: options parsed, then checked and made a typed description of the machine.

mod balloon;
mod disk;
mod error;
mod files;
mod jail;
mod keys;
mod lazy;
mod limits;
mod loopback;
mod mac;
mod machine;
mod net;
mod number;
mod rate;
mod rng;
mod size;
mod spec;
#[cfg(test)]
mod tests;
mod validate;
mod vsock;

pub use disk::{DiskConfig, DiskEngine};
pub use error::ConfigError;
pub use files::{SocketPath, check_socket, check_vsock_path};
pub use jail::{JailCgroup, JailSpec};
pub use keys::{choices, explain, parse_keys, quote};
pub use lazy::{LazyConfig, LazyMode};
pub use loopback::Loopback;
pub use mac::MacAddress;
pub use machine::{ArenaConfig, BalloonConfig, KernelConfig, MachineConfig, MemoryConfig};
pub use net::NetConfig;
pub use number::parse_size;
pub use rate::Rate;
pub use rng::RngLimits;
pub use size::{format_size, human};
pub use spec::{
    KernelCache, KernelEntry, MachineSpec, SerialConfig, SocketSpec, TeardownSpec, Transport,
};
pub use validate::check_id;
pub use vsock::VsockConfig;
