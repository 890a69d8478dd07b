//! The way to the guest's agent: its vsock, through the monitor's unix socket (in Firecracker's convention).

use std::io::{BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim::protos::TaskClient;
use containerd_shim::protos::ttrpc::Client;
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{Connection, STREAM_PORT, TASK_PORT};

use crate::machine::Machine;

/// How long a guest may take until its agent answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the answer to one attempt may take: a guest whose driver is just starting can miss the request.
const ANSWER: Duration = Duration::from_secs(1);

/// How often that is tried.
const PAUSE: Duration = Duration::from_millis(5);

/// Connects to a port of the guest.
fn connect(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).context(socket.display())?;
    stream.set_read_timeout(Some(ANSWER)).context("connect")?;
    writeln!(stream, "CONNECT {port}").context("connect")?;
    let mut answer = String::new();
    // The agent says nothing by itself: no byte of it can be lost in this reader.
    let mut reader = BufReader::new(stream.try_clone().context("dup")?);
    reader.read_line(&mut answer).context("connect")?;
    stream.set_read_timeout(None).context("connect")?;
    if answer.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(Error::new(format!("port {port}: nobody listens")))
    }
}

/// Waits for the agent, and returns a client of its service.
pub fn client(machine: &Machine) -> Result<TaskClient> {
    let end = Instant::now() + PATIENCE;
    loop {
        match connect(&machine.vsock(), TASK_PORT) {
            Ok(stream) => {
                let client = Client::new(stream.into_raw_fd()).context("the agent")?;
                return Ok(TaskClient::new(client));
            }
            Err(_) if machine.has_ended() => {
                return Err(Error::new(format!("the machine ended: {}", machine.log())));
            }
            Err(error) if Instant::now() > end => {
                return Err(error).context("the guest's agent does not answer");
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Connects to a standard stream, or for copies.
pub fn stream(machine: &Machine, what: &Connection) -> Result<UnixStream> {
    let line = serde_json::to_string(what).context("a stream")?;
    let mut connection = connect(&machine.vsock(), STREAM_PORT)?;
    writeln!(connection, "{line}").context("a stream")?;
    Ok(connection)
}
