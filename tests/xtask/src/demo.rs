//! `cargo xtask demo [STORY]`: stories about lazy memory, narrated.

use std::time::Duration;

use ebb_nested_machine::error::Result;
use ebb_nested_machine::session::Command;

use crate::cargo::{build, build_malloc};
use crate::project::{binary, environment, output_folder, root, start_runner};
use crate::setup;
use crate::shell::{progress, show};

/// How long the demo may take.
const TIME_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Arguments of `demo`.
#[derive(clap::Args)]
pub struct Arguments {
    /// `lazy`: a guest hands memory back; `free-pages`: a guest frees memory and says nothing; `malloc`: Redis with its heap
    /// in an arena, compared with a plain Redis
    #[arg(default_value = "lazy", value_parser = ["lazy", "free-pages", "malloc"])]
    story: String,
    /// Passed on to ebb-demo
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    build(&["ebb", "ebb-demo"])?;
    if arguments.story == "malloc" {
        build_malloc()?;
    }
    let out = output_folder("demo")?;
    let runner = start_runner(&assets)?;
    let program = binary("ebb-demo").to_string_lossy().into_owned();
    let folder = out.to_string_lossy().into_owned();
    let mut command = Command::new([program, "--out".into(), folder, arguments.story.clone()]);
    command.argv.extend(arguments.more.iter().cloned());
    command.env = environment(&assets, runner.platform(), &out);
    command.cwd = Some(root());
    let exit = runner.run(&command, TIME_LIMIT, &mut show)?;
    if exit.success() {
        progress(format_args!(
            "pictures and numbers are in {}",
            out.display()
        ));
    }
    Ok(exit.code() as u8)
}
