//! `containerd-shim-ebb-v2`: each pod of containerd in a guest of its own, whose free memory comes back to the host by itself.
//!
//! containerd starts this program for the first container of a pod; those that follow reach the same one. It starts `ebb run`
//! for the pod, and the agent in the guest (`ebb-pod-agent`) runs the containers. See docs/kubernetes.md.

mod agent;
mod cgroup;
mod copies;
mod guest;
mod hurried;
mod images;
mod machine;
mod messages;
mod network;
mod pod;
mod refused;
mod rootfs;
mod service;
mod settings;
mod shim;
mod streams;

use containerd_shim::Config;

/// The flags that ask for the version, as a program in Go takes them.
const VERSION: [&str; 4] = ["-v", "--v", "-version", "--version"];

fn main() {
    // The crate's parser knows them, and does nothing about them.
    if std::env::args()
        .skip(1)
        .any(|word| VERSION.contains(&word.as_str()))
    {
        println!("containerd-shim-ebb-v2 {}", env!("CARGO_PKG_VERSION"));
        return;
    }
    let config = Config {
        // The machine is this program's only child, and waited for.
        no_reaper: true,
        no_sub_reaper: true,
        ..Config::default()
    };
    containerd_shim::run::<shim::PodShim>("io.containerd.ebb.v2", Some(config));
}
