//! `ebb-guest`: what runs inside an Ebb guest.

mod balloon;
mod bench;
mod data;
mod discovery;
mod install;
mod meminfo;
mod run;
mod setup;
mod shell;
mod size;
mod steps;
mod stress;
mod terminal;
mod workload;

use std::process::ExitCode;

const USAGE: &str = "\
ebb-guest: what runs inside an Ebb guest

  ebb-guest status    whether this machine runs under Ebb, which interface it offers, and its arenas
  ebb-guest setup     as root: make the arenas' devices, /dev/daxN.M; --mode 0666 lets every user use them
  ebb-guest install   as root: let a Debian do that at each boot (initramfs-tools, systemd); --mode 0666, --root DIR; or uninstall
  ebb-guest run -- PROGRAM [ARGUMENT...]
                      run a program with its heap in an arena (libebb_malloc.so, or --library FILE before the --)
  ebb-guest recover   free what dead programs have left in the arenas
  ebb-guest bench DEVICE
                      what freeing and taking back a granule costs, and what it costs without an arena
  ebb-guest bench DEVICE pairs|spin SECONDS
                      do that for so long, or keep the processor busy with nothing: for counting exits
  ebb-guest stress DEVICE PROCESSES THREADS SECONDS
                      processes that share an arena, check what they hold, and are killed at random
  ebb-guest workload  take commands on standard input, one a line; `help` lists them";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["status"] => {
            let found = discovery::report();
            setup::report();
            found
        }
        ["setup", ref words @ ..] => setup::main(words),
        ["install", ref words @ ..] => install::main(words, true),
        ["uninstall", ref words @ ..] => install::main(words, false),
        ["run", ref words @ ..] => run::main(words),
        ["recover"] => run::recover(),
        ["bench", ref words @ ..] => bench::main(words),
        ["steps", ref words @ ..] => steps::main(words),
        ["stress", ref words @ ..] => stress::main(words),
        ["stress-worker", ref words @ ..] => stress::worker(words),
        ["workload"] => workload::serve(),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
