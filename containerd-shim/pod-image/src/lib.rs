//! Makes what the guests of pods boot, from a Debian kernel that is installed: its image, and an initial RAM disk with the agent
//! (`ebb-pod-agent`) and the modules that it loads. The parts serve the images of tests, too.

pub mod cpio;
pub mod error;

#[cfg(feature = "host")]
pub mod initramfs;
#[cfg(feature = "host")]
pub mod kernel;
#[cfg(feature = "host")]
pub mod modules;
