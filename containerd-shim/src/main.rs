//! `containerd-shim-ebb-v2`: each pod of containerd in a guest of its own, whose free memory comes back to the host by itself.
//!
//! containerd starts this program for the first container of a pod; those that follow reach the same one. It starts `ebb run`
//! for the pod, and the agent in the guest (`ebb-pod-agent`) runs the containers. See docs/kubernetes.md.

mod agent;
mod copies;
mod machine;
mod pod;
mod rootfs;
mod service;
mod settings;
mod shim;
mod streams;

use containerd_shim::Config;

fn main() {
    let config = Config {
        // The machine is this program's only child, and waited for.
        no_reaper: true,
        no_sub_reaper: true,
        ..Config::default()
    };
    containerd_shim::run::<shim::PodShim>("io.containerd.ebb.v2", Some(config));
}
