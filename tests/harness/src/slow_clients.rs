//! Many clients of one API that send a request a byte at a time, and never to its end.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Context, Result};

/// Time between two bytes.
const GAP: Duration = Duration::from_millis(100);
/// Of a thread that does next to nothing.
const STACK: usize = 64 << 10;
/// Descriptors of this process besides the clients'.
const OTHER_DESCRIPTORS: u64 = 256;

/// What the clients send at once, in turn: after that comes a byte at a time, of the path or of the body.
const BEGINNINGS: [&str; 2] = [
    "GET /",
    "PUT /lazy-memory/reclaim HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n",
];

/// The clients, a thread each. Who is cut off connects again.
pub struct SlowClients {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    socket: PathBuf,
    over: AtomicBool,
    connected: AtomicU64,
    cut_off: AtomicU64,
}

impl SlowClients {
    /// Starts so many.
    ///
    /// # Errors
    /// There are not enough descriptors or threads for them.
    pub fn start(socket: &Path, clients: usize) -> Result<Self> {
        let needed = clients as u64 + OTHER_DESCRIPTORS;
        let limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|current| current < needed) {
            let raised = Rlimit {
                current: Some(needed),
                ..limit
            };
            setrlimit(Resource::Nofile, raised).context("allow more descriptors")?;
        }
        let shared = Arc::new(Shared {
            socket: socket.to_owned(),
            over: AtomicBool::new(false),
            connected: AtomicU64::new(0),
            cut_off: AtomicU64::new(0),
        });
        let start = |index: usize| {
            let shared = Arc::clone(&shared);
            let client = move || shared.client(BEGINNINGS[index % BEGINNINGS.len()]);
            let thread = thread::Builder::new().stack_size(STACK).spawn(client);
            thread.context("start a client")
        };
        let threads = (0..clients).map(start).collect::<Result<_>>()?;
        Ok(Self { threads, shared })
    }

    /// Connections that they have made, also those that still wait to be accepted.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.shared.connected.load(Ordering::Relaxed)
    }

    /// Connections that the server has ended.
    #[must_use]
    pub fn cut_off(&self) -> u64 {
        self.shared.cut_off.load(Ordering::Relaxed)
    }

    /// Ends them all.
    pub fn end(self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Until it is over, or nobody listens any more.
    fn client(&self, beginning: &str) {
        while !self.over.load(Ordering::Relaxed) {
            // Waits for room in the server's backlog.
            let Ok(mut stream) = UnixStream::connect(&self.socket) else {
                return;
            };
            self.connected.fetch_add(1, Ordering::Relaxed);
            let mut sent = stream.write_all(beginning.as_bytes());
            while sent.is_ok() && !self.over.load(Ordering::Relaxed) {
                thread::sleep(GAP);
                sent = stream.write_all(b"1");
            }
            if sent.is_err() {
                self.cut_off.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
