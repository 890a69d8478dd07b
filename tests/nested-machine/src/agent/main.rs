//! The agent of the nested machine.
//!
//! As process 1 it is the machine's init: it mounts the host's folders, loads KVM, starts itself as the agent and reaps
//! orphans. As the agent it runs commands for the host, over a virtio-serial port.

mod init;
mod keep_kvm;
mod serve;
mod session;

use ebb_nested_machine::error::chain;

fn main() {
    let result = if rustix::process::getpid().is_init() {
        init::run()
    } else {
        serve::run()
    };
    if let Err(error) = result {
        println!("nested-agent: {}", chain(&error));
    }
    if rustix::process::getpid().is_init() {
        init::power_off();
    }
}
