//! `cargo xtask guest`: a shell in a guest.

use ebb_nested_machine::error::Result;
use ebb_nested_machine::session::Command;

use crate::cargo::build;
use crate::project::{binary, environment, output_folder, root, start_runner};
use crate::setup;
use crate::shell::progress;

/// Arguments of `guest`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Passed on to `ebb run`
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    build(&["ebb"])?;
    let out = output_folder("guest-out")?;
    let runner = start_runner(&assets)?;
    let ebb = binary("ebb");
    let words = [
        ebb.to_string_lossy().as_ref(),
        "run",
        "--kernel",
        &assets.vmlinuz.to_string_lossy(),
        "--initramfs",
        &assets.guest_initramfs.to_string_lossy(),
        "--cmdline",
        "console=ttyS0 quiet ebb.mode=shell",
        "--serial",
        "tty",
    ]
    .map(str::to_owned);
    let mut command = Command::new(words);
    let given = |name: &str| arguments.more.iter().any(|word| word == name);
    for (name, value) in [("--cpus", "boot=1"), ("--memory", "size=512M")] {
        if !given(name) {
            command.argv.extend([name.to_owned(), value.to_owned()]);
        }
    }
    command.argv.extend(arguments.more.iter().cloned());
    command.env = environment(&assets, runner.platform(), &out);
    command.cwd = Some(root());
    progress("a shell in a guest; it ends with `exit`, Ctrl-D or Ctrl-A X");
    let exit = runner.interactive(&command)?;
    Ok(exit.code() as u8)
}
