//! QEMU with a guest that the host drives as it does Ebb's: over the console, and QEMU itself over QMP.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::console::Console;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Images};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A machine that is about to start.
pub struct Machine<'a> {
    /// MiB of its memory, or what else `-m` takes.
    pub memory: &'a str,
    /// vCPUs.
    pub cpus: u32,
    /// More words for its kernel.
    pub cmdline: &'a str,
    /// `-device` and other options, with their values.
    pub more: &'a [&'a str],
}

/// A running QEMU, killed when dropped.
pub struct Qemu {
    child: Child,
    input: Option<ChildStdin>,
    console: Console,
    qmp: BufReader<UnixStream>,
    // Gone last.
    _folder: TempDir,
}

impl Qemu {
    /// Starts it as a member of `cgroup`: the newest QEMU that there is, on KVM.
    ///
    /// # Errors
    /// It cannot be started, or does not answer.
    pub fn start(machine: &Machine, cgroup: &Cgroup) -> Result<Self> {
        let images = Images::from_environment()?;
        let folder = TempDir::with_prefix("ebb-qemu-").context("make a temporary folder")?;
        let socket = folder.path().join("qmp");
        let words = std::env::var("EBB_QEMU").unwrap_or_default();
        let mut words = words.lines();
        let program = words.next().unwrap_or("qemu-system-x86_64");
        let mut command = cgroup.command(Path::new(program));
        command.args(words);
        for option in [
            "-M q35 -accel kvm -cpu host -nodefaults -no-user-config -display none -serial stdio -no-reboot",
            &format!("-m {} -smp {}", machine.memory, machine.cpus),
        ] {
            command.args(option.split(' '));
        }
        command.args(machine.more);
        let cmdline = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 {}",
            machine.cmdline
        );
        command.arg("-kernel").arg(&images.vmlinuz);
        command.arg("-initrd").arg(&images.initramfs);
        command.args(["-append", &cmdline, "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context(program)?;
        let output = child.stdout.take().context("no output")?;
        let console = Console::read(output);
        let input = child.stdin.take();
        let connected = until("QEMU's socket", LONG, || {
            if let Some(status) = child.try_wait().context("wait for QEMU")? {
                return Err(Error::new(format!("QEMU ends with {status}")));
            }
            Ok(UnixStream::connect(&socket).ok())
        })?;
        let mut qemu = Self {
            child,
            input,
            console,
            qmp: BufReader::new(connected),
            _folder: folder,
        };
        // It greets.
        qemu.line()?;
        qemu.ask("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the workload in the guest, and drives it from then on.
    ///
    /// # Errors
    /// It is not ready in time.
    pub fn guest(&mut self) -> Result<Guest> {
        let input = self.input.take().context("the console is taken already")?;
        Guest::attach(input, self.console.clone())
    }

    /// Makes a request over QMP.
    ///
    /// # Errors
    /// QEMU refuses it, or is gone.
    pub fn ask(&mut self, request: &str, arguments: &Value) -> Result<Value> {
        let text = json!({ "execute": request, "arguments": arguments });
        let socket = self.qmp.get_mut();
        socket
            .write_all(format!("{text}\n").as_bytes())
            .context(request)?;
        loop {
            let answer = self.line()?;
            // Events come in between.
            if let Some(done) = answer.get("return") {
                return Ok(done.clone());
            }
            if answer.get("error").is_some() {
                return Err(Error::new(format!("{text}: {answer}")));
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.qmp.read_line(&mut line).context("QMP")?;
        serde_json::from_str(&line).context(format_args!("QMP says {line:?}"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
