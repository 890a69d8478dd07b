//! Process 1 of a guest that runs the containers of a pod. The host's shim asks it for containers (see the library).
//!
//! The same program, with words on its command line, becomes a container's process: see [`enter`].

mod boot;
mod cgroup;
mod container;
mod copies;
mod credentials;
mod enter;
mod inside;
mod interfaces;
mod layers;
mod mounts;
mod process;
mod reaper;
mod request;
mod stats;
mod streams;
mod task;

use std::process::ExitCode;
use std::sync::Arc;

use containerd_shim_protos::create_task;
use containerd_shim_protos::ttrpc::Server;
use ebb_pod::TASK_PORT;
use ebb_pod::error::{Context, Result};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["enter", request] => enter::run(request),
        ["inside", request] => inside::run(request),
        _ => serve().map(|()| 1),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("ebb-pod-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prepares the guest, and serves until the machine ends.
fn serve() -> Result<()> {
    boot::prepare()?;
    interfaces::loopback()?;
    let reaper = reaper::Reaper::start();
    let pod = Arc::new(container::Pod::new(reaper));
    streams::serve(Arc::clone(&pod))?;
    let service = create_task(Arc::new(task::Service::new(pod)));
    // Requests that wait for a process take a thread each.
    let mut server = Server::new()
        .bind(&format!("vsock://-1:{TASK_PORT}"))
        .context("the task port")?
        .register_service(service);
    server.start().context("the task service")?;
    loop {
        std::thread::park();
    }
}
