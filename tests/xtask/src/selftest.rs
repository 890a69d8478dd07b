//! `cargo xtask selftest`: checks what tests rely on in the nested machine.

use std::time::{Duration, Instant};

use ebb_nested_machine::error::{Error, Result, chain};
use ebb_nested_machine::frame::Exit;
use ebb_nested_machine::machine::{Machine, Options};
use ebb_nested_machine::runner::Runner;
use ebb_nested_machine::session::{Command, Event, Output};

use crate::project::root;
use crate::setup;
use crate::shell::{Seconds, progress};

/// How long any one command may take here.
const LIMIT: Duration = Duration::from_secs(60);

type Check = fn(&Machine) -> Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("KVM and its counters are there", kvm_is_there),
    ("commands are kept off CPU 0", off_cpu_0),
    (
        "output, exit codes and signals come back",
        results_come_back,
    ),
    ("much output comes back whole", much_output),
    ("sessions run side by side", side_by_side),
    ("input reaches the command", input),
    ("a terminal is one", terminal),
    ("only the shares are writable", shares),
    ("what runs too long is killed", time_out),
    ("a dropped session takes its processes along", dropped),
    ("a missing program is named", missing),
];

/// Arguments of `selftest`.
#[derive(clap::Args)]
pub struct Arguments {}

/// Runs the subcommand: on the nested machine, even where the host could run guests itself.
pub fn run(_: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    let machine = Machine::boot(&assets, &Options::for_repository(&root()))?;
    progress(format_args!(
        "nested machine up in {}",
        Seconds(machine.boot_time())
    ));
    Ok(u8::from(!check_all(&machine)))
}

/// Runs the checks on a runner that must be nested. Returns true if all passed.
pub fn check(runner: &Runner) -> Result<bool> {
    match runner {
        Runner::Nested(machine) => Ok(check_all(machine)),
        Runner::Direct => Err(Error::new("the self-test needs the nested machine")),
    }
}

fn check_all(machine: &Machine) -> bool {
    let mut passed = true;
    for (name, check) in CHECKS {
        let start = Instant::now();
        let result = check(machine);
        let time = Seconds(start.elapsed());
        match &result {
            Ok(()) => println!("    ok     {name} ({time})"),
            Err(error) => println!("    FAILED {name} ({time}): {}", chain(error)),
        }
        passed &= result.is_ok();
    }
    passed
}

fn shell(machine: &Machine, script: &str) -> Result<Output> {
    machine.run(&Command::new(["sh", "-c", script]), LIMIT)
}

fn expect(what: bool, found: impl std::fmt::Debug) -> Result<()> {
    if what {
        Ok(())
    } else {
        Err(Error::new(format!("found {found:?}")))
    }
}

fn kvm_is_there(machine: &Machine) -> Result<()> {
    let script = "test -r /dev/kvm -a -w /dev/kvm && cat /sys/module/kvm_amd/parameters/npt && \
                  test -e /sys/kernel/debug/kvm/remote_tlb_flush && cat /proc/pressure/memory && \
                  grep -w memory /sys/fs/cgroup/cgroup.subtree_control";
    let output = shell(machine, script)?;
    let good = output.status.success() && output.stdout.starts_with(b"Y\n");
    expect(good, text(&output))
}

fn off_cpu_0(machine: &Machine) -> Result<()> {
    let output = shell(machine, "grep Cpus_allowed_list /proc/self/status")?;
    let list = String::from_utf8_lossy(&output.stdout);
    let (_, list) = list.split_once(':').unwrap_or_default();
    expect(list.trim().starts_with('1'), text(&output))
}

fn results_come_back(machine: &Machine) -> Result<()> {
    let output = shell(machine, "echo out; echo err >&2; exit 7")?;
    let good = output.stdout == b"out\n" && output.stderr == b"err\n";
    expect(good && output.status == Exit::Code(7), text(&output))?;
    let output = shell(machine, "kill -9 $$")?;
    expect(output.status == Exit::Signal(9), text(&output))
}

fn much_output(machine: &Machine) -> Result<()> {
    let output = shell(machine, "head -c 5000000 /dev/zero; sleep 1 & exit 0")?;
    expect(output.stdout.len() == 5_000_000, output.stdout.len())
}

fn side_by_side(machine: &Machine) -> Result<()> {
    let commands = (0..4).map(|n| Command::new(["sh", "-c", &format!("sleep 1; echo {n}")]));
    let sessions: Result<Vec<_>> = commands.map(|command| machine.exec(&command)).collect();
    for (session, n) in sessions?.into_iter().zip(0..) {
        let mut out: Vec<u8> = Vec::new();
        session.wait(LIMIT, &mut |_, bytes| out.extend(bytes))?;
        expect(out == format!("{n}\n").as_bytes(), &out)?;
    }
    Ok(())
}

fn input(machine: &Machine) -> Result<()> {
    let session = machine.exec(&Command::new(["wc", "-c"]))?;
    session.write_stdin(&vec![b'x'; 300_000])?;
    session.close_stdin()?;
    let mut out = Vec::new();
    session.wait(LIMIT, &mut |_, bytes| out.extend(bytes))?;
    expect(out == b"300000\n", String::from_utf8_lossy(&out))
}

fn terminal(machine: &Machine) -> Result<()> {
    let script = "test -t 0 && stty size; read line; echo got $line; stty size";
    let mut command = Command::new(["sh", "-c", script]);
    command.tty = Some((33, 77));
    let session = machine.exec(&command)?;
    session.resize(44, 99)?;
    session.write_stdin(b"words\r")?;
    let mut out = Vec::new();
    let exit = session.wait(LIMIT, &mut |_, bytes| out.extend(bytes))?;
    let out = String::from_utf8_lossy(&out);
    expect(
        exit.success() && out.contains("got words") && out.ends_with("44 99\r\n"),
        &out,
    )
}

fn shares(machine: &Machine) -> Result<()> {
    let file = root().join("target/nested/selftest");
    let path = file.display();
    let script = format!(
        "echo here > '{path}' && ! touch /etc/x '{}/x'",
        root().display()
    );
    let output = shell(machine, &script)?;
    expect(output.status.success(), text(&output))?;
    let content = std::fs::read(&file).unwrap_or_default();
    let _ = std::fs::remove_file(&file); // It has been read.
    expect(content == b"here\n", content)
}

fn time_out(machine: &Machine) -> Result<()> {
    let command = Command::new(["bash", "-c", "exec -a too-long sleep 600"]);
    let result = machine.run(&command, Duration::from_secs(2));
    expect(
        result.is_err_and(|error| error.to_string().contains("killed after 2")),
        "no time-out",
    )?;
    processes_end(machine, "too-long")
}

fn dropped(machine: &Machine) -> Result<()> {
    let script = "bash -c 'exec -a left-behind sleep 600' & echo up; wait";
    let mut session = machine.exec(&Command::new(["sh", "-c", script]))?;
    let event = session.next_event(LIMIT)?;
    expect(matches!(event, Some(Event::Output(..))), event)?;
    drop(session);
    processes_end(machine, "left-behind")
}

/// Waits until no process of this name is left.
fn processes_end(machine: &Machine, name: &str) -> Result<()> {
    let script = format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do \
         grep -l ^{name} /proc/[0-9]*/cmdline 2>/dev/null || exit 0; sleep 0.5; done; exit 1"
    );
    let output = shell(machine, &script)?;
    expect(output.status.success(), text(&output))
}

fn missing(machine: &Machine) -> Result<()> {
    let result = machine.run(&Command::new(["/nosuch/program"]), LIMIT);
    let error = result
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default();
    expect(error.contains("/nosuch/program"), error)
}

fn text(output: &Output) -> (Exit, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status, text(&output.stdout), text(&output.stderr))
}
