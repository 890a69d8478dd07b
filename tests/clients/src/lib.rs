//! What the programs of this package share: each is a client that others wrote, and takes one machine from its start to its
//! end. `tests/harness/tests/kvm_clients.rs` runs them.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::io::{AsyncBufReadExt, AsyncRead, BufReader};
use serde_json::Value;

/// What a step of a client gives.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The whole program may take this long: a client that waits for ever is to fail.
const WHOLE: Duration = Duration::from_secs(400);

/// A guest on an emulated processor may take this long for anything.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What the guest's console says when the guest serves.
pub const READY: &str = "EBB-GUEST-OK ready";

/// What the program was given.
pub struct Setup {
    /// An empty folder.
    pub folder: PathBuf,
    /// The monitor under Firecracker's name.
    pub firecracker: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initramfs: PathBuf,
}

impl Setup {
    /// Reads the arguments, `FOLDER FIRECRACKER`, and the environment. The program ends when its time is up.
    ///
    /// # Errors
    /// One is missing.
    pub fn new() -> Result<Self> {
        std::thread::spawn(|| {
            std::thread::sleep(WHOLE);
            eprintln!("not done after {} s", WHOLE.as_secs());
            std::process::exit(1);
        });
        let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
        let variable = |name: &str| {
            let value = std::env::var_os(name).map(PathBuf::from);
            value.ok_or(format!("{name} is not set"))
        };
        let (Some(folder), Some(firecracker)) = (arguments.next(), arguments.next()) else {
            return Err("arguments: FOLDER FIRECRACKER".into());
        };
        Ok(Self {
            folder,
            firecracker,
            kernel: variable("EBB_GUEST_VMLINUZ")?,
            initramfs: variable("EBB_GUEST_INITRAMFS")?,
        })
    }

    /// A file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A new disk of 1 MiB in the folder.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::write(&path, vec![b'd'; 1 << 20])?;
        Ok(path)
    }

    /// The kernel's command line for a guest that serves on its console.
    pub fn boot_args() -> String {
        "console=ttyS0 quiet loglevel=3 reboot=k panic=1 pci=off ebb.mode=run".to_owned()
    }
}

/// Fails if `right` is false.
///
/// # Errors
/// `what` is wrong.
pub fn check(right: bool, what: impl std::fmt::Debug) -> Result<()> {
    if right {
        return Ok(());
    }
    Err(format!("not as it should be: {what:?}").into())
}

/// Waits until the file holds `text`.
///
/// # Errors
/// It does not in time.
pub fn wait_for(file: &Path, text: &str) -> Result<()> {
    wait_until(text, || {
        Ok(std::fs::read_to_string(file)
            .unwrap_or_default()
            .contains(text))
    })
}

/// Looks again and again until `is_so`.
///
/// # Errors
/// That of `is_so`, or it is not so in time.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > end {
            return Err(format!("in vain: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Reads a console until a line holds `text`. The rest of it is read by nobody, but may still be written.
///
/// # Errors
/// There is none in time.
pub async fn wait_for_line(console: impl AsyncRead + Unpin, text: &str) -> Result<()> {
    let mut output = BufReader::new(console);
    let mut line = Vec::new();
    while !String::from_utf8_lossy(&line).contains(text) {
        line.clear();
        let read = tokio::time::timeout(PATIENCE, output.read_until(b'\n', &mut line)).await??;
        check(read > 0, "the console has ended")?;
    }
    // Dropped, it would be closed.
    std::mem::forget(output);
    Ok(())
}

/// What the API answers, asked by hand: for clients that cannot ask.
///
/// # Errors
/// There is no answer in JSON.
pub fn get(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}
