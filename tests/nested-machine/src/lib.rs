//! The nested machine: stock KVM, in software, on hosts that have none; and what boots in guests.
//!
//! [`Machine`](machine::Machine) boots Debian's kernel under QEMU's emulated SVM and runs commands
//! in it; [`Runner`](runner::Runner) runs the same commands here or there, as
//! [`Platform`](platform::Platform) finds the host; [`Assets`](assets::Assets) names the kernel, its
//! modules and the images; [`initramfs`] builds the images that boot.

pub mod error;
pub mod frame;

#[cfg(feature = "host")]
pub mod assets;
#[cfg(feature = "host")]
pub mod bzimage;
#[cfg(feature = "host")]
mod clock;
#[cfg(feature = "host")]
pub mod cpio;
#[cfg(feature = "host")]
pub mod initramfs;
#[cfg(feature = "host")]
pub mod interactive;
#[cfg(feature = "host")]
pub mod machine;
#[cfg(feature = "host")]
pub mod modules;
#[cfg(feature = "host")]
pub mod package;
#[cfg(feature = "host")]
pub mod platform;
#[cfg(feature = "host")]
mod process;
#[cfg(feature = "host")]
pub mod runner;
#[cfg(feature = "host")]
pub mod session;
