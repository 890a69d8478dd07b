//! The nested machine: a virtual machine that offers KVM, for tests on hosts that have none.
//!
//! [`Machine`](machine::Machine) boots Debian's kernel in QEMU, which emulates a processor with SVM, and runs commands in it.
//! [`Runner`](runner::Runner) runs commands there or on the host, depending on [`Platform`](platform::Platform).
//! [`Assets`](assets::Assets) are the paths of kernel, modules and images, and [`initramfs`] builds what guests boot.

pub mod frame;

pub use ebb_pod_image::error;

#[cfg(feature = "host")]
pub mod assets;
#[cfg(feature = "host")]
pub mod bzimage;
#[cfg(feature = "host")]
mod clock;
#[cfg(feature = "host")]
pub mod initramfs;
#[cfg(feature = "host")]
pub mod interactive;
#[cfg(feature = "host")]
pub mod machine;
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
