//! `cargo xtask seccomp-check`: compares the lists of system calls, `resources/seccomp`, with what the monitor's threads
//! call while tests run. A rule that nobody needs must say why it is there, and a call that is in no list is a mistake.

mod rules;
mod trace;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::session::Command;

use crate::cargo::{TEST_PROGRAMS, build, build_malloc};
use crate::project::{binary, environment, output_folder, start_runner};
use crate::shell::{progress, show};
use crate::test::{Binary, test_binaries};
use crate::{project, setup};
use rules::Lists;

/// Tests that go through all roles, each in less than ten minutes. Under strace some are too slow for their limits and fail:
/// that does not matter here.
const TESTS: [&str; 14] = [
    "kvm_seccomp",
    "kvm_lifecycle",
    "kvm_teardown",
    "kvm_strict",
    "kvm_disk",
    "kvm_net",
    "kvm_balloon",
    "kvm_reporting",
    "kvm_pressure",
    "kvm_free_pages",
    "kvm_blk",
    "kvm_vsock",
    "kvm_pci",
    "kvm_snapshot",
];

/// Tests that write megabytes, a system call for each few bytes.
const FLOODS: [&str; 2] = ["output_that", "random"];

/// What tests look for beside the monitor, for their guests: `BINARIES` of tests/harness/src/debian.rs.
const BESIDE: [&str; 4] = ["libebb_malloc.so", "ebb-blocks", "ebb-cases", "ebb-churn"];

/// One test binary may take this long.
const TIME_LIMIT: Duration = Duration::from_secs(570);

/// Arguments of `seccomp-check`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only compare with what earlier runs have left in target/seccomp
    #[arg(long)]
    again: bool,
    /// Run these test binaries only, and add to what earlier runs have left
    binaries: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let out = output_folder("seccomp")?;
    let traces = out.join("traces");
    if !arguments.again {
        if arguments.binaries.is_empty() {
            let _ = fs::remove_dir_all(&traces);
        }
        fs::create_dir_all(&traces).context(|| format!("create {}", traces.display()))?;
        record(arguments, &out)?;
    }
    let lists = Lists::read(&project::root().join("resources/seccomp"))?;
    let calls = trace::read(&traces)?;
    let complaints = lists.compare(&calls);
    complaints.iter().for_each(|line| println!("{line}"));
    progress(format_args!(
        "{} rules, {} calls of threads with a filter, {} complaints",
        lists.len(),
        calls.len(),
        complaints.len()
    ));
    Ok(u8::from(!complaints.is_empty()))
}

/// Runs the tests with a monitor whose calls are written down, and not forbidden.
fn record(arguments: &Arguments, out: &Path) -> Result<()> {
    let assets = setup::ensure()?;
    build(&[&["ebb"], &TEST_PROGRAMS[..]].concat())?;
    build_malloc()?;
    let wanted = |test: &Binary| match arguments.binaries.as_slice() {
        [] => TESTS.contains(&test.name.as_str()),
        names => names.contains(&test.name),
    };
    let monitor = out.join("ebb");
    let script = format!(
        "#!/bin/sh\nword=$1\ncase $word in run | restore) shift ;; *) exec {ebb} \"$@\" ;; esac\n\
         case \" $word $* \" in *' --seccomp '* | ' restore '*) ;; *) set -- --seccomp log \"$@\" ;; esac\n\
         exec strace -D -f -qq -X raw -e 'raw=!prctl' -e signal=none -o {traces}/$$-$(date +%s%N) \
         {ebb} $word \"$@\"\n",
        ebb = binary("ebb").display(),
        traces = out.join("traces").display(),
    );
    let write = || {
        fs::write(&monitor, &script)?;
        fs::set_permissions(&monitor, fs::Permissions::from_mode(0o755))
    };
    write().context(|| format!("write {}", monitor.display()))?;
    for name in BESIDE {
        let (from, to) = (binary(name), out.join(name));
        fs::copy(&from, &to).context(|| format!("copy {}", from.display()))?;
    }
    let tests = test_binaries()?;
    let mut runner = Some(start_runner(&assets)?);
    for test in tests.iter().filter(|test| wanted(test)) {
        progress(&test.name);
        let running = match runner.take() {
            Some(running) => running,
            None => start_runner(&assets)?,
        };
        let mut command = Command::new([test.path.to_string_lossy().into_owned()]);
        for flood in FLOODS {
            command.argv.extend(["--skip", flood].map(str::to_owned));
        }
        command.env = environment(&assets, running.platform(), out);
        command.env.retain(|(name, _)| name != "EBB_BIN");
        let monitor = monitor.to_string_lossy().into_owned();
        command.env.push(("EBB_BIN".to_owned(), monitor));
        command
            .env
            .push(("RUST_TEST_THREADS".to_owned(), "2".to_owned()));
        command.cwd = Some(test.folder.clone());
        match running.run(&command, TIME_LIMIT, &mut show) {
            Ok(exit) => {
                progress(format_args!("{}: {exit:?}", test.name));
                runner = Some(running);
            }
            // What it has written down by then counts. The machine is not used any more.
            Err(error) => progress(format_args!("{}: {error}", test.name)),
        }
    }
    Ok(())
}
