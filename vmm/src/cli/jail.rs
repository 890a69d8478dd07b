//! `ebb jail`: runs a machine that is locked in.

use std::ffi::OsString;

use ebb_vmm::config::JailSpec;
use ebb_vmm::exit;
use ebb_vmm::jail::{self, JailError, Plan};

use super::{Cli, Command, complain, complain_of, parse, run};

/// Start a guest whose monitor is locked in, and stay with it until nothing is left of it
///
/// The monitor has namespaces of its own, a root with nothing but what the machine needs, an unprivileged user, a cgroup, and
/// Landlock where the kernel has it. Files keep their paths inside; no symbolic link is followed. Must be started by root.
///
/// Exit status: that of `ebb run`; 35 if the jail cannot be made; 128 and a signal's number if that has ended the monitor.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    jail: JailSpec,
    /// The options of `ebb run`
    #[arg(last = true, required = true, value_name = "OPTIONS OF RUN")]
    run: Vec<OsString>,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: Args) -> u8 {
    let words = ["ebb", "run"].map(OsString::from).into_iter();
    match parse(words.chain(args.run).collect()) {
        Err(status) => status,
        Ok((
            Cli {
                command: Command::Run(run),
            },
            _,
        )) => lock_in(args.jail, *run).unwrap_or_else(|error| {
            complain_of(&error);
            exit::BAD_ARGUMENTS
        }),
        Ok(_) => exit::BAD_ARGUMENTS,
    }
}

fn lock_in(jail: JailSpec, mut args: run::Args) -> Result<u8, JailError> {
    let mut plan = Plan::new(jail, &mut args.machine, args.outputs.files())?;
    plan.inherit(args.outputs.descriptor());
    let machine = args.machine.clone();
    let complain = |text: &dyn std::fmt::Display| complain(text);
    jail::run(plan, machine, &complain, |machine| {
        args.machine = machine;
        // A machine with no words is not saved: nothing could restore it in a jail.
        run::main(args, &[])
    })
}
