//! Containers of Debian's containerd in guests: `ctr run --runtime io.containerd.ebb.v2`.

use std::io::Write;
use std::process::Stdio;

use ebb_harness::containerd::{Containerd, IMAGE};
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::host::Relative;

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

    // A program that is not there, and a volume of the host, are refused with their names.
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
    containerd.run(&["--memory-limit", &limit], "one", &["sleep", "1000"])?;
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

    // What is beyond the limit ends the program that wants it, not the machine.
    let more = ["tasks", "exec", "--exec-id", "more", "one"];
    let program = "dd if=/dev/zero of=/tmp/file bs=1M count=80";
    let ran = containerd.output(&[&more[..], &["sh", "-c", program]].concat())?;
    assert!(!ran.status.success(), "{ran:?}");
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
    containerd.vanished()
}

#[test]
fn nothing_is_left_when_the_machine_or_the_shim_dies() -> Result<()> {
    let containerd = Containerd::start()?;
    containerd.run(&[], "one", &["sleep", "1000"])?;
    kill(&find(&containerd, "ebb")?)?;
    containerd.await_state("one", "STOPPED")?;
    let _ = containerd.output(&["tasks", "delete", "one"])?;
    assert_eq!(containerd.state("one")?, None);
    containerd.vanished()?;

    containerd.run(&[], "two", &["sleep", "1000"])?;
    kill(&find(&containerd, "containerd-shim")?)?;
    containerd.vanished()?;
    assert_eq!(containerd.state("two")?, None);
    Ok(())
}
