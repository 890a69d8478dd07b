//! Process 1: mounts, modules, and reaping.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{chroot, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ebb_nested_machine::error::{Context, Result};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};

/// Where the host's root is mounted writable. Sessions do not see it.
const HOST: &str = "/host";
/// The root of the sessions.
const ROOT: &str = "/newroot";

/// Prepares the machine, starts the agent and reaps until the agent ends.
pub fn run() -> Result<()> {
    mount_fs("proc", "proc", "/proc", "")?;
    load_modules()?;
    let shares = fs::read_to_string("/ebb/shares").context(|| "read /ebb/shares".into())?;
    make_dir(HOST)?;
    make_dir(ROOT)?;
    mount_fs("virtiofs", "host", HOST, "")?;
    mount_bind(HOST, ROOT).context(|| format!("bind {HOST} on {ROOT}"))?;
    read_only(ROOT)?;
    mount_kernel_filesystems()?;
    for line in shares.lines() {
        share(line)?;
    }
    enter_root()?;
    enable_memory_cgroups();
    raise_loopback();
    serve()
}

/// Turns the machine off.
pub fn power_off() -> ! {
    rustix::fs::sync();
    loop {
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn mount_fs(kind: &str, source: &str, target: &str, data: &str) -> Result<()> {
    let data = CString::new(data).context(|| format!("options of {target}"))?;
    mount(source, target, kind, MountFlags::empty(), data.as_c_str())
        .context(|| format!("mount {kind} on {target}"))
}

fn read_only(target: &str) -> Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(target, flags, c"").context(|| format!("make {target} read-only"))
}

fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).context(|| format!("create folder {path}"))
}

/// Loads every module listed in /ebb/modules, in order: a file, then its parameters.
fn load_modules() -> Result<()> {
    let list = fs::read_to_string("/ebb/modules").context(|| "read /ebb/modules".into())?;
    for line in list.lines() {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let image = fs::read(file).context(|| format!("read module {file}"))?;
        let parameters = CString::new(parameters).context(|| format!("parameters of {file}"))?;
        rustix::system::init_module(&image, &parameters)
            .context(|| format!("load module {file}"))?;
    }
    Ok(())
}

fn mount_kernel_filesystems() -> Result<()> {
    let table = [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("tmpfs", "/tmp", "mode=1777"),
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/var/tmp", "mode=1777"),
    ];
    for (kind, target, options) in table {
        mount_fs(kind, kind, &format!("{ROOT}{target}"), options)?;
    }
    for folder in ["/dev/pts", "/dev/shm"] {
        make_dir(&format!("{ROOT}{folder}"))?;
    }
    let table = [
        ("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("debugfs", "/sys/kernel/debug", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ];
    for (kind, target, options) in table {
        mount_fs(kind, kind, &format!("{ROOT}{target}"), options)?;
    }
    let table = [
        ("/proc/self/fd", "fd"),
        ("fd/0", "stdin"),
        ("fd/1", "stdout"),
        ("fd/2", "stderr"),
    ];
    for (target, name) in table {
        // Fails if devtmpfs has created it.
        let _ = symlink(target, format!("{ROOT}/dev/{name}"));
    }
    Ok(())
}

/// Mounts one shared folder at its own path: `rw /path` or `ro /path`.
fn share(line: &str) -> Result<()> {
    let (mode, path) = line
        .split_once(' ')
        .context(|| format!("bad share {line:?}"))?;
    let (from, to) = (format!("{HOST}{path}"), format!("{ROOT}{path}"));
    if !Path::new(&to).exists() {
        make_dir(&to)?; // Under one of the tmpfs: a checkout in /tmp.
    }
    mount_bind(&from, &to).context(|| format!("bind {from} on {to}"))?;
    if mode == "ro" { read_only(&to) } else { Ok(()) }
}

fn enter_root() -> Result<()> {
    std::env::set_current_dir(ROOT).context(|| format!("enter {ROOT}"))?;
    mount_move(".", "/").context(|| format!("move {ROOT} to /"))?;
    chroot(".").context(|| "change root".into())?;
    std::env::set_current_dir("/").context(|| "enter /".into())
}

fn enable_memory_cgroups() {
    let file = "/sys/fs/cgroup/cgroup.subtree_control";
    if let Err(error) = fs::write(file, "+memory +cpu +pids +io") {
        println!("nested-agent: write {file}: {error}");
    }
}

fn raise_loopback() {
    let status = Command::new("/bin/busybox")
        .args(["ifconfig", "lo", "127.0.0.1", "up"])
        .status();
    if !status.as_ref().is_ok_and(|s| s.success()) {
        println!("nested-agent: cannot raise the loopback interface: {status:?}");
    }
}

/// Runs the agent, which is this program too, and reaps processes until the agent ends.
fn serve() -> Result<()> {
    let agent = Command::new("/proc/self/exe")
        .arg("agent")
        .spawn()
        .context(|| "start the agent process".into())?;
    let agent = agent.id() as i32;
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == agent => {
                println!("nested-agent: agent ended: {status:?}");
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "wait for processes".into()),
        }
    }
}
