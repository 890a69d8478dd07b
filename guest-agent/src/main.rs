//! `ebb-guest`: the command-line program for Ebb guests.

mod arena_info;
mod balloon;
mod bench;
mod discovery;
mod exercise;
mod install;
mod instruction_count;
mod meminfo;
mod note;
mod pattern;
mod run;
mod setup;
mod shell;
mod size;
mod stress;
mod talk;
mod terminal;
mod workload;

use std::process::ExitCode;

const USAGE: &str = "\
ebb-guest: programs and memory in an Ebb guest

  ebb-guest status    print whether this machine runs under Ebb, the hypercall interface, and the arenas
  ebb-guest setup     as root: create the devices of the arenas, /dev/daxN.M, with --mode 0660 and --group ebb
  ebb-guest install   as root: run setup at each boot of this Debian (initramfs-tools, systemd); --mode, --group, --root DIR
  ebb-guest uninstall as root: remove what install has written; --root DIR
  ebb-guest run --no-fork -- PROGRAM [ARGUMENT...]
                      run a program that never forks with its heap in an arena (libebb_malloc.so, or --library FILE before
                      the --); without --no-fork, with normal memory
  ebb-guest note      as root: tell the monitor where the kernel's vmcoreinfo note is, so that it can read the free lists;
                      not needed where the kernel's module qemu_fw_cfg is loaded
  ebb-guest recover   free the granules of dead programs in all arenas
  ebb-guest bench DEVICE
                      measure freeing and reusing a granule, compared with madvise on normal memory
  ebb-guest bench DEVICE pairs|spin SECONDS
                      free and reuse a granule, or only spin, for that time: for counting exits
  ebb-guest stress DEVICE PROCESSES THREADS SECONDS
                      share an arena among processes that check their memory and are killed at random
  ebb-guest exercise [OPTION...]
                      take and free normal memory in every way, and check every byte; --kernel, as root: also compact
                      it, drop caches, and take blocks of it off line
  ebb-guest workload  read commands from standard input, one a line; `help` lists them";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["status"] => {
            let found = discovery::report();
            setup::report();
            found
        }
        ["setup", ref words @ ..] => setup::main(words),
        ["install", ref words @ ..] => install::main(words, install::install),
        ["uninstall", ref words @ ..] => install::main(words, install::uninstall),
        ["note"] => note::main(),
        ["run", ref words @ ..] => run::main(words),
        ["recover"] => run::recover(),
        ["bench", ref words @ ..] => bench::main(words),
        ["bench-worker", ref words @ ..] => instruction_count::worker(words),
        ["stress", ref words @ ..] => stress::main(words),
        ["stress-worker", ref words @ ..] => stress::worker(words),
        ["exercise", ref words @ ..] => exercise::main(words),
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
