//! The agent's main loop: reads messages and passes them to their sessions.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ebb_nested_machine::error::{Context, Error, Result, chain};
use ebb_nested_machine::frame::{Frame, Message, PORT_NAME, read_message, write_message};

use crate::keep_kvm::KeptVm;
use crate::session::Session;

/// How long the port may take to appear.
const PORT_WAIT: Duration = Duration::from_secs(30);

/// The port to the host, shared by the threads of all sessions.
#[derive(Clone)]
pub struct Port(Arc<Mutex<File>>);

impl Port {
    /// Sends one message. If the host has closed the port, the main loop notices.
    pub fn send(&self, session: u32, frame: Frame) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write_message(&mut *file, &Message { session, frame }) {
            println!("nested-agent: send to the host: {error}");
        }
    }
}

/// Serves sessions until the host closes the port.
pub fn run() -> Result<()> {
    let path = find_port()?;
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    let mut reader = open().context(|| format!("open {}", path.display()))?;
    let writer = reader
        .try_clone()
        .context(|| format!("duplicate {}", path.display()))?;
    let port = Port(Arc::new(Mutex::new(writer)));
    let _vm = KeptVm::create().inspect_err(|error| println!("nested-agent: {}", chain(error)));
    port.send(0, Frame::Hello(describe()));
    let mut sessions: HashMap<u32, Session> = HashMap::new();
    loop {
        let message = match read_message(&mut reader) {
            Ok(message) => message,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error).context(|| "read from the host".into()),
        };
        sessions.retain(|_, session| !session.ended());
        dispatch(&port, &mut sessions, message);
    }
}

fn dispatch(port: &Port, sessions: &mut HashMap<u32, Session>, message: Message) {
    let id = message.session;
    if let Frame::Exec(exec) = &message.frame {
        match Session::start(port, id, exec) {
            Ok(session) => drop(sessions.insert(id, session)),
            Err(error) => port.send(id, Frame::Failed(chain(&error))),
        }
        return;
    }
    let Some(session) = sessions.get_mut(&id) else {
        return;
    }; // It has ended.
    match message.frame {
        Frame::Stdin(bytes) => session.input(bytes),
        Frame::StdinEof => session.end_input(),
        Frame::Signal(number) => session.signal(number),
        Frame::Resize(rows, columns) => session.resize(rows, columns),
        Frame::Kill => {
            session.kill();
            sessions.remove(&id);
        }
        other => println!("nested-agent: unexpected message {other:?}"),
    }
}

fn describe() -> String {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split(' ').next().unwrap_or_default();
    let kvm = fs::exists("/dev/kvm").unwrap_or(false);
    format!("uptime={uptime} kvm={}", if kvm { "yes" } else { "no" })
}

/// The device of the port named [`PORT_NAME`].
fn find_port() -> Result<PathBuf> {
    let class = "/sys/class/virtio-ports";
    let deadline = Instant::now() + PORT_WAIT;
    while Instant::now() < deadline {
        for entry in fs::read_dir(class).into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim_end() == PORT_NAME {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(Error::new(format!(
        "no port named {PORT_NAME} in {class} within {PORT_WAIT:?}"
    )))
}
