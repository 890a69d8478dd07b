//! The nested machine: QEMU with emulated SVM, a shared root, and an agent that runs commands.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::assets::Assets;
use crate::clock::tsc_khz;
use crate::error::{Context, Error, Result};
use crate::frame::{Exit, Frame, Message, read_message, write_message};
use crate::initramfs::{self, Share};
use crate::process::Helper;
use crate::session::{Command, Output, Session, Stream};

/// Lines of the console that an error shows.
const TAIL: usize = 30;

/// The vhost-user file server that comes with Debian 12's QEMU.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// What the machine is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of CPUs that commands run on. The machine has one more, CPU 0, which no command is put on.
    pub cpus: u32,
    /// Memory in MiB; the host gives it page by page as it is touched.
    pub memory_mib: u32,
    /// Memory nodes, 1 or 2; the second has half of the memory and of the CPUs.
    pub nodes: u32,
    /// Host folders seen at their own paths; everything else of the host is read-only.
    pub shares: Vec<Share>,
    /// Where console.log and qemu.log are kept.
    pub log_dir: PathBuf,
    /// How long the agent may take to answer.
    pub boot_timeout: Duration,
    /// Added to the kernel's command line.
    pub cmdline: String,
}

impl Options {
    /// 4 CPUs (`EBB_NESTED_CPUS` overrides), 8 GiB (`EBB_NESTED_MIB` overrides), one memory node (`EBB_NESTED_NODES`
    /// overrides), the repository `root` read-only but for its `target` folder.
    pub fn for_repository(root: &Path) -> Self {
        let share = |path: PathBuf, writable| Share { path, writable };
        let number = |name: &str, default| {
            std::env::var(name)
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(default)
        };
        Self {
            cpus: number("EBB_NESTED_CPUS", 4),
            memory_mib: number("EBB_NESTED_MIB", 8192),
            nodes: number("EBB_NESTED_NODES", 1),
            shares: vec![share(root.into(), false), share(root.join("target"), true)],
            log_dir: root.join("target/nested"),
            boot_timeout: Duration::from_secs(120),
            cmdline: String::new(),
        }
    }
}

/// How often a boot is tried: an emulated kernel with several processors dies now and then, with QEMU before 8.1 in
/// about one boot of a dozen on a busy host.
const BOOT_ATTEMPTS: u32 = 3;

/// A running nested machine. Dropping it ends it and everything in it.
pub struct Machine {
    link: Arc<Link>,
    hello: String,
    boot: Duration,
    retries: u32,
    qemu: Helper,
    virtiofsd: Helper,
}

impl Machine {
    /// Boots the machine and waits for its agent.
    ///
    /// # Errors
    /// When a helper cannot be started, or the agent does not answer in time: then the message
    /// carries the last lines of the console.
    pub fn boot(assets: &Assets, options: &Options) -> Result<Self> {
        let mut retries = 0;
        loop {
            match Self::boot_once(assets, options) {
                Ok(mut machine) => {
                    machine.retries = retries;
                    return Ok(machine);
                }
                Err(error) if retries + 1 < BOOT_ATTEMPTS => {
                    eprintln!("==> the nested machine did not come up, trying again: {error}");
                    retries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn boot_once(assets: &Assets, options: &Options) -> Result<Self> {
        let start = Instant::now();
        let folder = &options.log_dir;
        fs::create_dir_all(folder).context(|| format!("create {}", folder.display()))?;
        let image = initramfs::nested_machine(assets, &options.shares)?;
        let (listener, fs_socket) = socket_pair_by_listener()?;
        let (ours, theirs) = UnixStream::pair().context(|| "make a socket pair".into())?;
        let virtiofsd = start_virtiofsd(folder, listener)?;
        let qemu = start_qemu(assets, options, &image, [fs_socket.into(), theirs.into()])?;
        let (link, hello) = Link::new(ours, folder.join("console.log"))?;
        let mut machine = Self {
            link,
            hello: String::new(),
            boot: Duration::ZERO,
            retries: 0,
            qemu,
            virtiofsd,
        };
        machine.await_hello(&hello, options.boot_timeout)?;
        machine.boot = start.elapsed();
        Ok(machine)
    }

    /// Returns false if the machine has ended, for instance because its kernel has panicked.
    pub fn is_alive(&self) -> bool {
        self.link.lock().is_some()
    }

    /// How long the boot took.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// How many boots failed before this one.
    pub fn boot_retries(&self) -> u32 {
        self.retries
    }

    /// What the agent said of the machine, such as `uptime=2.9 kvm=yes`.
    pub fn description(&self) -> &str {
        &self.hello
    }

    /// Starts a command.
    ///
    /// # Errors
    /// When the machine is gone.
    pub fn exec(&self, command: &Command) -> Result<Session> {
        Session::start(Arc::clone(&self.link), command)
    }

    /// Runs a command to its end and collects its output.
    ///
    /// # Errors
    /// As for [`Session::wait`].
    pub fn run(&self, command: &Command, timeout: Duration) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let session = self.exec(command)?;
        session.close_stdin()?;
        let status: Exit = session.wait(timeout, &mut |stream, bytes| match stream {
            Stream::Stdout => stdout.extend(bytes),
            Stream::Stderr => stderr.extend(bytes),
        })?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    fn await_hello(&mut self, hello: &Receiver<String>, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            match hello.recv_timeout(Duration::from_millis(50)) {
                Ok(text) => {
                    self.hello = text;
                    return Ok(());
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(self.link.gone("booting"));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            for (name, helper) in [("QEMU", &mut self.qemu), ("virtiofsd", &mut self.virtiofsd)] {
                if let Some(status) = helper.try_wait()? {
                    let text = format!("{name} ended during boot with {status}");
                    return Err(self.link.with_logs(&text));
                }
            }
            if Instant::now() > deadline {
                let text = format!("no answer from the agent within {timeout:?}");
                return Err(self.link.with_logs(&text));
            }
        }
    }
}

/// A listening socket and a connection to it, with no name in any file system.
fn socket_pair_by_listener() -> Result<(UnixListener, UnixStream)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("ebb-nested-{}-{number}", std::process::id());
    let what = || format!("make the abstract socket {name}");
    let address = SocketAddr::from_abstract_name(&name).context(what)?;
    let listener = UnixListener::bind_addr(&address).context(what)?;
    let stream = UnixStream::connect_addr(&address).context(what)?;
    Ok((listener, stream))
}

fn log_file(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(name);
    File::create(&path).context(|| format!("create {}", path.display()))
}

fn start_virtiofsd(folder: &Path, listener: UnixListener) -> Result<Helper> {
    let log = log_file(folder, "virtiofsd.log")?;
    let mut command = Process::new(VIRTIOFSD);
    command
        .arg(format!("--fd={}", listener.as_raw_fd()))
        // The namespace sandbox cannot pivot into `/`. Without cache=always every open drops the
        // machine's page cache; the price is that it may miss what the host changes meanwhile.
        .args([
            "-f",
            "-o",
            "source=/",
            "-o",
            "sandbox=chroot",
            "-o",
            "cache=always",
        ])
        .args(["-o", "log_level=warn"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Helper::spawn(command, vec![listener.into()])
}

fn start_qemu(
    assets: &Assets,
    options: &Options,
    initramfs: &[u8],
    [fs_socket, agent]: [OwnedFd; 2],
) -> Result<Helper> {
    let image = memory_file(initramfs)?;
    let cpus = (options.cpus + 1).to_string();
    let console = options.log_dir.join("console.log");
    let log = log_file(&options.log_dir, "qemu.log")?;
    let (program, data) = assets
        .qemu
        .split_first()
        .context(|| "find an emulator".into())?;
    let mut command = Process::new(program);
    command
        .args(data)
        .args([
            "-name",
            "ebb-nested",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args(["-display", "none", "-accel", "tcg,thread=multi"])
        .args(["-cpu", "EPYC,+svm,+npt", "-smp", &cpus])
        .args(memory(options))
        .arg("-kernel")
        .arg(&assets.vmlinux)
        .args(["-initrd", &format!("/proc/self/fd/{}", image.as_raw_fd())])
        .args(["-append", &cmdline(options)])
        .args([
            "-serial",
            &format!("file:{}", console.display().to_string().replace(',', ",,")),
        ])
        .args([
            "-chardev",
            &format!("socket,id=fs,fd={}", fs_socket.as_raw_fd()),
        ])
        .args([
            "-device",
            "vhost-user-fs-pci,chardev=fs,tag=host,queue-size=1024",
        ])
        .args([
            "-chardev",
            &format!("socket,id=agent,fd={}", agent.as_raw_fd()),
        ])
        .args(["-device", "virtio-serial-pci"])
        .args([
            "-device",
            &format!(
                "virtserialport,chardev=agent,name={}",
                crate::frame::PORT_NAME
            ),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Helper::spawn(command, vec![image, fs_socket, agent])
}

/// The arguments for the machine's board and memory.
fn memory(options: &Options) -> Vec<String> {
    let (all, board) = (options.memory_mib, "q35,hpet=off");
    let words = if options.nodes < 2 {
        format!(
            "-machine {board},memory-backend=ram -m {all}M \
             -object memory-backend-memfd,id=ram,size={all}M,share=on"
        )
    } else {
        let (half, middle, last) = (all / 2, options.cpus.div_ceil(2), options.cpus);
        format!(
            "-machine {board} -m {}M \
             -object memory-backend-memfd,id=ram0,size={half}M,share=on \
             -object memory-backend-memfd,id=ram1,size={half}M,share=on \
             -numa node,nodeid=0,memdev=ram0,cpus=0-{middle} \
             -numa node,nodeid=1,memdev=ram1,cpus={}-{last}",
            half * 2,
            middle + 1
        )
    };
    words.split_whitespace().map(str::to_owned).collect()
}

/// The command line of the machine's kernel. Mitigations only cost time under emulation.
///
/// Nothing may enter a guest on CPU 0: it gets interrupts, and commands get the others. When any CPU restores its
/// floating-point state, QEMU 11.1 clears a bit in CPU 0's `hflags2` without an atomic operation (`cpu_set_fpus`,
/// `cpu_clear_ignne`). If CPU 0 enters or leaves a guest at that moment, its bits for nested paging and for the global
/// interrupt flag can be set back, and the guest dies of a triple fault or hears no interrupt.
fn cmdline(options: &Options) -> String {
    let base = "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr psi=1 tsc=reliable \
                random.trust_cpu=on rcupdate.rcu_expedited=1 isolcpus=0 irqaffinity=0";
    // Calibrated on a busy host, its clock and that of all its guests would run several times too fast.
    format!("{base} tsc_early_khz={} {}", tsc_khz(), options.cmdline)
}

fn memory_file(bytes: &[u8]) -> Result<OwnedFd> {
    let what = || format!("put {} bytes into a memory file", bytes.len());
    let file = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC).context(what)?);
    std::io::Write::write_all(&mut &file, bytes).context(what)?;
    Ok(file.into())
}

/// The host's end of the agent's port, shared by all sessions.
pub(crate) struct Link {
    writer: Mutex<UnixStream>,
    /// `None` when the machine is gone.
    sessions: Mutex<Option<HashMap<u32, Sender<Frame>>>>,
    next: AtomicU32,
    console: PathBuf,
}

impl Link {
    fn new(stream: UnixStream, console: PathBuf) -> Result<(Arc<Self>, Receiver<String>)> {
        let mut reader = stream
            .try_clone()
            .context(|| "duplicate the agent's socket".into())?;
        let link = Arc::new(Self {
            writer: Mutex::new(stream),
            sessions: Mutex::new(Some(HashMap::new())),
            next: AtomicU32::new(1),
            console,
        });
        let (sender, hello) = mpsc::channel();
        let reading = Arc::clone(&link);
        thread::Builder::new()
            .name("nested agent".into())
            .spawn(move || {
                while let Ok(message) = read_message(&mut reader) {
                    match message.frame {
                        Frame::Hello(text) => drop(sender.send(text)),
                        frame => reading.deliver(message.session, frame),
                    }
                }
                reading.lock().take();
            })
            .context(|| "start the thread that reads from the agent".into())?;
        Ok((link, hello))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u32, Sender<Frame>>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, session: u32, frame: Frame) {
        if let Some(sender) = self
            .lock()
            .as_ref()
            .and_then(|sessions| sessions.get(&session))
        {
            let _ = sender.send(frame); // A session that was dropped does not listen.
        }
    }

    pub(crate) fn register(&self) -> Result<(u32, Receiver<Frame>)> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        let mut sessions = self.lock();
        let sessions = sessions
            .as_mut()
            .ok_or_else(|| self.gone("starting a command"))?;
        sessions.insert(id, sender);
        Ok((id, receiver))
    }

    pub(crate) fn forget(&self, session: u32) {
        if let Some(sessions) = self.lock().as_mut() {
            sessions.remove(&session);
        }
    }

    pub(crate) fn send(&self, session: u32, frame: Frame) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_message(&mut *writer, &Message { session, frame })
            .context(|| "send to the nested machine".into())
    }

    /// The error for a machine that ended while it was needed.
    pub(crate) fn gone(&self, doing: &str) -> Error {
        self.with_logs(&format!("the nested machine ended during {doing:?}"))
    }

    /// An error that shows the end of the console, and QEMU's own words.
    fn with_logs(&self, text: &str) -> Error {
        let qemu = self.console.with_file_name("qemu.log");
        let path = self.console.display();
        let (console, qemu) = (tail(&self.console), tail(&qemu));
        Error::new(format!(
            "{text}\nQEMU said:\n{qemu}\nlast lines of {path}:\n{console}"
        ))
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains("TCG doesn't support requested feature"))
        .collect();
    let from = lines.len().saturating_sub(TAIL);
    lines[from..]
        .iter()
        .map(|line| format!("  {line}\n"))
        .collect()
}
