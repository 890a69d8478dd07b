//! The host's side of a guest's network interface.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::wait::LONG;

/// A tap with an address, and nothing else on its network but a guest. Removed when this is dropped.
pub struct Tap {
    name: String,
    address: Ipv4Addr,
}

impl Tap {
    /// Makes the tap `name` with `address` in a network of 256 addresses.
    ///
    /// # Errors
    /// When busybox cannot do it.
    pub fn create(name: &str, address: Ipv4Addr, mtu: u16) -> Result<Self> {
        busybox(&["tunctl", "-t", name])?;
        let tap = Self {
            name: name.to_owned(),
            address,
        };
        let (network, mtu) = (format!("{address}/24"), mtu.to_string());
        busybox(&["ip", "addr", "add", &network, "dev", name])?;
        busybox(&["ip", "link", "set", "dev", name, "mtu", &mtu])?;
        tap.set_up(true)?;
        Ok(tap)
    }

    /// Takes the interface up or down.
    ///
    /// # Errors
    /// When busybox cannot do it.
    pub fn set_up(&self, up: bool) -> Result<()> {
        let to = if up { "up" } else { "down" };
        busybox(&["ip", "link", "set", "dev", &self.name, to])
    }

    /// A counter of the host's for this interface. What the guest sends is `rx`.
    ///
    /// # Errors
    /// When the kernel has no such counter.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        let text = fs::read_to_string(&path).context(&path)?;
        text.trim().parse().context(&path)
    }

    /// Opens the tap for a process to inherit.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self) -> Result<File> {
        const DEVICE: &str = "/dev/net/tun";
        let file = OpenOptions::new().read(true).write(true).open(DEVICE);
        let file = file.context(DEVICE)?;
        let mode = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru {
                ifru_flags: mode as libc::c_short,
            },
        };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if rc < 0 {
            return Err(std::io::Error::last_os_error()).context(&self.name);
        }
        fcntl_setfd(&file, FdFlags::empty()).context("fcntl")?;
        Ok(file)
    }

    /// Serves addresses of this network to its guests until the answer is dropped.
    ///
    /// # Errors
    /// When busybox cannot be started.
    pub fn serve_addresses(&self) -> Result<Server> {
        let folder = TempDir::with_prefix("ebb-dhcp-").context("make a temporary folder")?;
        let [a, b, c, _] = self.address.octets();
        let path = |name: &str| folder.path().join(name);
        let (leases, pid) = (path("leases"), path("pid"));
        fs::write(&leases, "").context(leases.display())?;
        let lines = format!(
            "start {a}.{b}.{c}.10\nend {a}.{b}.{c}.20\ninterface {}\noption subnet 255.255.255.0\n\
             lease_file {}\npidfile {}\n",
            self.name,
            leases.display(),
            pid.display(),
        );
        let config = path("config");
        fs::write(&config, lines).context(config.display())?;
        let mut command = Command::new("busybox");
        command.args(["udhcpd", "-f"]).arg(config);
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Server {
            child: child.context("busybox udhcpd")?,
            _folder: folder,
        })
    }

    /// As [`serve_once`], at the tap's address.
    ///
    /// # Errors
    /// When nothing can be served there.
    pub fn serve_once(&self, content: Vec<u8>) -> Result<u16> {
        serve_once(self.address, content)
    }
}

/// Sends `content` to the next client that asks for anything by HTTP at an address of the host's. Returns the port.
///
/// # Errors
/// When nothing can be served there.
pub fn serve_once(address: Ipv4Addr, content: Vec<u8>) -> Result<u16> {
    let listener = TcpListener::bind((address, 0)).context("bind")?;
    let port = listener.local_addr().context("bind")?.port();
    thread::spawn(move || {
        // Who fetches it notices an error.
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let head = format!(
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
            content.len()
        );
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&content);
    });
    Ok(port)
}

impl Drop for Tap {
    fn drop(&mut self) {
        // `tunctl -d` is refused while a monitor still has it.
        let _ = busybox(&["ip", "link", "delete", "dev", &self.name]);
    }
}

/// A server of addresses; killed when this is dropped.
pub struct Server {
    child: Child,
    _folder: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of what the server at `address` has at `path`.
///
/// # Errors
/// When there is no server, or it answers with something else.
pub fn fetch(address: &str, path: &str) -> Result<Vec<u8>> {
    let what = format!("http://{address}{path}");
    let mut stream = TcpStream::connect((address, 80)).context(&what)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).context(&what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context(&what)?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.context(format!("{what}: an answer without a head"))?;
    let body = answer.split_off(end + 4);
    let head = String::from_utf8_lossy(&answer);
    if !head.starts_with("HTTP/1.1 200") && !head.starts_with("HTTP/1.0 200") {
        return Err(Error::new(format!("{what}: {head}")));
    }
    Ok(body)
}

/// A stream to `port` of a guest whose vsock has the socket `path`. Reading from it takes a while at most.
///
/// # Errors
/// Nobody is there, or the guest refuses.
pub fn connect_through(path: &Path, port: u32) -> Result<UnixStream> {
    let what = || format!("port {port} through {}", path.display());
    let mut stream = UnixStream::connect(path).context(what())?;
    stream.set_read_timeout(Some(LONG)).context(what())?;
    let request = format!("CONNECT {port}\n");
    stream.write_all(request.as_bytes()).context(what())?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).context(what())?;
        line.extend(byte);
    }
    line.starts_with(b"OK ").then_some(stream).context(what())
}

/// A stream to `port` of the guest with the number `cid`, by the host's kernel (vsock(7)).
///
/// # Errors
/// The kernel's.
pub fn connect_vsock(cid: u32, port: u32) -> Result<OwnedFd> {
    let kind = SocketType::STREAM;
    let socket = socket_with(AddressFamily::VSOCK, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.context("socket")?;
    // SAFETY: all zeroes are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the call reads `len` bytes of `address`, which lives as long as it runs.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if rc < 0 {
        return Err(std::io::Error::last_os_error()).context(format_args!("port {port} of {cid}"));
    }
    Ok(socket)
}

fn busybox(words: &[&str]) -> Result<()> {
    let output = Command::new("busybox").args(words).output();
    let output = output.context("run busybox")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("busybox {words:?}: {said}")))
}
