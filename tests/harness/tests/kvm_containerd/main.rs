//! Containers of Debian's containerd in guests: `ctr run --runtime io.containerd.ebb.v2`.

mod behaviour;
mod blocks;
mod pods;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use ebb_harness::containerd::{Containerd, IMAGE};
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::host::Relative;
use ebb_harness::namespace::{MTU, Namespace};
use ebb_harness::network::{fetch, serve_once};
use ebb_harness::wait::{LONG, until};
use serde_json::Value;

/// What `ctr tasks exec` in the container says.
fn exec(containerd: &Containerd, name: &str, id: &str, words: &[&str]) -> Result<String> {
    let options = ["tasks", "exec", "--exec-id", id, name];
    containerd.done(&[&options, words].concat())
}

fn kill(relative: &Relative) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(relative.pid.cast_signed()).context("no process")?;
    let done = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    done.map_err(|error| Error::new(error.to_string()))
}

/// The only process of this name.
fn find(containerd: &Containerd, name: &str) -> Result<Relative> {
    let all = containerd.relatives()?;
    let found = all.iter().find(|relative| relative.name == name);
    found.cloned().context(format_args!("no {name}: {all:?}"))
}

/// MiB of the guest's memory, from /proc/meminfo.
fn total_mib(text: &str) -> Result<u64> {
    let kib = text.split_whitespace().nth(1).context("MemTotal")?;
    Ok(kib.parse::<u64>().context("MemTotal")? >> 10)
}

#[test]
fn a_container_has_a_guest_of_its_own_and_leaves_nothing() -> Result<()> {
    let containerd = Containerd::start()?;
    let program = "cat /proc/cmdline; echo problem >&2; exit 7";
    let run = ["run", "--rm", "--runtime", "io.containerd.ebb.v2"];
    let ran = containerd.output(&[&run, &[IMAGE, "one", "sh", "-c", program][..]].concat())?;
    let (out, errors) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    assert_eq!(ran.status.code(), Some(7), "{out}{errors}");
    // The monitor's, not that of this kernel.
    assert!(out.contains("console=ttyS0 quiet panic=-1"), "{out}");
    assert_eq!(errors, "problem\n");
    containerd.vanished()?;

    // A program that is not there, and a volume that is too large to copy, are refused with their names.
    let ran = containerd.output(&[&run, &[IMAGE, "two", "nothing"][..]].concat())?;
    let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(
        errors.contains("exec: \"nothing\": executable file not found"),
        "{errors}"
    );
    let mount = "type=bind,src=/usr,dst=/host,options=rbind";
    let words = [&run, &["--mount", mount, IMAGE, "three", "true"][..]].concat();
    let errors = String::from_utf8_lossy(&containerd.output(&words)?.stderr).into_owned();
    assert!(errors.contains("volume /usr at /host"), "{errors}");
    for name in ["two", "three"] {
        // ctr leaves what it could not start.
        let _ = containerd.output(&["tasks", "delete", "--force", name])?;
    }
    containerd.vanished()
}

#[test]
fn a_running_container_takes_programs_input_limits_and_signals() -> Result<()> {
    let containerd = Containerd::start()?;
    let limit = (64 << 20).to_string();
    let namespace = Namespace::create("one")?;
    let before = namespace.interfaces()?;
    let network = format!("network:{}", namespace.path().display());
    let options = ["--memory-limit", &limit, "--with-ns", &network];
    let program = "echo from the guest >/tmp/word; exec httpd -f -h /tmp";
    containerd.run(&options, "one", &["sh", "-c", program])?;
    check_network(&containerd, &namespace)?;
    // 64 MiB, what is added for the kernel, and what that keeps for itself.
    let total = total_mib(&exec(
        &containerd,
        "one",
        "total",
        &["grep", "MemTotal", "/proc/meminfo"],
    )?)?;
    assert!((64..192).contains(&total), "{total} MiB");
    let mut command = containerd.command(&["tasks", "exec", "--exec-id", "input", "one", "cat"]);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut cat = spawned.context("ctr")?;
    let written = cat
        .stdin
        .take()
        .context("stdin")?
        .write_all(b"to the guest and back\n");
    written.context("write")?;
    let answer = cat.wait_with_output().context("ctr")?;
    assert_eq!(
        String::from_utf8_lossy(&answer.stdout),
        "to the guest and back\n"
    );

    // The machine is where containerd wants the container to be.
    let monitor = find(&containerd, "ebb")?.pid;
    let own = fs::read_to_string(format!("/proc/{monitor}/cgroup")).context("the cgroup")?;
    let cgroup = own.trim().strip_prefix("0::/").context(&own)?;
    assert!(cgroup.ends_with("/one"), "{cgroup}");
    let cgroup = Path::new("/sys/fs/cgroup").join(cgroup);

    let metrics = containerd.done(&["tasks", "metrics", "one"])?;
    let has = |name: &str, value: &str| {
        let words = metrics.lines().map(|line| line.split_whitespace());
        words
            .map(Vec::from_iter)
            .any(|words| words == [name, value])
    };
    assert!(
        has("memory.usage_limit", &limit) && has("pids.current", "1"),
        "{metrics}"
    );
    containerd.done(&["tasks", "pause", "one"])?;
    containerd.await_state("one", "PAUSED")?;
    containerd.done(&["tasks", "resume", "one"])?;
    containerd.await_state("one", "RUNNING")?;

    use_too_much(&containerd)?;
    let _ = containerd.output(&["tasks", "kill", "--signal", "SIGKILL", "one"])?;
    containerd.await_state("one", "STOPPED")?;
    containerd
        .done(&["tasks", "delete", "--force", "one"])
        .or_else(|error| {
            let exited = error.to_string().contains("exit with non-zero exit code");
            if exited {
                Ok(String::new())
            } else {
                Err(error)
            }
        })?;
    containerd.vanished()?;
    assert_eq!(namespace.interfaces()?, before);
    assert!(!cgroup.exists(), "{}", cgroup.display());
    Ok(())
}

/// A program in the container "one" wants more than its limit, and what it leaves is freed.
fn use_too_much(containerd: &Containerd) -> Result<()> {
    // What is beyond the limit ends the program that wants it, not the machine.
    let more = ["tasks", "exec", "--exec-id", "more", "one"];
    let program = "dd if=/dev/zero of=/tmp/file bs=1M count=80";
    let ran = containerd.output(&[&more[..], &["sh", "-c", program]].concat())?;
    assert!(!ran.status.success(), "{ran:?}");
    exec(containerd, "one", "empty", &["sh", "-c", ": >/tmp/file"])?;
    until("what that program has freed is told", LONG, || {
        let told = containerd.done(&["tasks", "metrics", "--format", "json", "one"])?;
        let told: Value = serde_json::from_str(&told).context(&told)?;
        let pages = told["memory"]["pglazyfree"].as_u64().unwrap_or(0);
        Ok((pages > (16 << 20) / 4096).then_some(()))
    })
}

/// The container "one" has what its namespace has, reaches the other end, and is reached from there.
fn check_network(containerd: &Containerd, namespace: &Namespace) -> Result<()> {
    let guest = Namespace::guest().to_string();
    let word = until("the container answers", LONG, || {
        Ok(fetch(&guest, "/word").ok())
    })?;
    assert_eq!(String::from_utf8_lossy(&word), "from the guest\n");
    let content: Vec<u8> = (0..200_000_u32)
        .flat_map(|it| format!("{it}\n").into_bytes())
        .collect();
    let port = serve_once(Namespace::host(), content.clone())?;
    let address = format!("http://{}:{port}/", Namespace::host());
    let got = exec(
        containerd,
        "one",
        "fetch",
        &["wget", "-q", "-O", "-", &address],
    )?;
    assert!(got.as_bytes() == content, "{} bytes", got.len());
    let show = |id, words: &[&str]| exec(containerd, "one", id, &[&["ip"], words].concat());
    let link = show("link", &["link", "show", "dev", "eth0"])?;
    let own = namespace.ip(&["link", "show", "dev", "eth0"])?;
    let mac = own
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1);
    let mac = mac.context("no address")?;
    assert!(
        link.contains(mac) && link.contains(&format!("mtu {MTU} ")),
        "{link}"
    );
    let routes = show("routes", &["route"])?;
    assert!(
        routes.contains("default via 10.77.0.1 dev eth0"),
        "{routes}"
    );
    let neighbours = show("neighbours", &["neigh"])?;
    assert!(
        neighbours.contains("10.77.0.9 dev eth0 lladdr 02:00:00:00:00:09"),
        "{neighbours}"
    );
    Ok(())
}

#[test]
fn nothing_is_left_when_the_guest_the_machine_or_the_shim_dies() -> Result<()> {
    let containerd = Containerd::start()?;
    // Only in its own guest it is privileged: that one's kernel crashes.
    let crash = ["sh", "-c", "sleep 1; echo c >/proc/sysrq-trigger"];
    containerd.run(&["--privileged"], "crash", &crash)?;
    containerd.await_state("crash", "STOPPED")?;
    let _ = containerd.output(&["tasks", "delete", "crash"])?;
    assert_eq!(containerd.state("crash")?, None);
    containerd.vanished()?;

    containerd.run(&[], "one", &["sleep", "1000"])?;
    kill(&find(&containerd, "ebb")?)?;
    containerd.await_state("one", "STOPPED")?;
    let _ = containerd.output(&["tasks", "delete", "one"])?;
    assert_eq!(containerd.state("one")?, None);
    containerd.vanished()?;

    let namespace = Namespace::create("two")?;
    let before = namespace.interfaces()?;
    let network = format!("network:{}", namespace.path().display());
    containerd.run(&["--with-ns", &network], "two", &["sleep", "1000"])?;
    assert_ne!(namespace.interfaces()?, before);
    kill(&find(&containerd, "containerd-shim")?)?;
    containerd.vanished()?;
    assert_eq!(namespace.interfaces()?, before);
    assert_eq!(containerd.state("two")?, None);
    Ok(())
}
