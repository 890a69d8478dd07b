//! `ebb ps`: lists the machines of this host.

use std::path::Path;

use ebb_vmm::api::machines::{Depth, Machine, ask, processes};
use ebb_vmm::config::human;
use ebb_vmm::exit;

/// List the running machines of this host: those of this user, or all for root
///
/// A machine that does not answer within a second is listed with the reason. Exit status: 0 done, 1 failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON list, with all that is known of each
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: &Args) -> u8 {
    let depth = if args.json { Depth::All } else { Depth::Name };
    let found = match processes(Path::new("/proc")) {
        Ok(found) => found,
        Err(error) => {
            super::complain(&format!("/proc: {error}; mount it"));
            return exit::FAILED;
        }
    };
    let machines = ask(&found, depth);
    match args.json {
        true => super::say(&format!("{:#}", serde_json::json!(machines))),
        false => super::say(&table(&machines)),
    }
    exit::STOP
}

/// One line for each machine, in columns.
fn table(machines: &[Machine]) -> String {
    let mut rows = vec![["ID", "PID", "STATE", "MEMORY", "SOCKET"].map(str::to_owned)];
    rows.extend(machines.iter().map(row));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn row(machine: &Machine) -> [String; 5] {
    let info = machine.info.as_ref();
    let place = match (&machine.socket, &machine.trouble) {
        (Some(socket), _) => socket.display().to_string(),
        (None, trouble) => format!("({})", trouble.as_deref().unwrap_or("none")),
    };
    [
        info.map_or_else(|| "-".to_owned(), |it| it.id.clone()),
        machine.pid.to_string(),
        info.map_or_else(|| "-".to_owned(), |it| format!("{:?}", it.state)),
        human(machine.resident_bytes),
        place,
    ]
    .map(|cell| printable(&cell))
}

/// Nothing that a terminal would obey: the answers may be anybody's.
fn printable(text: &str) -> String {
    let text = text.chars().take(200);
    text.map(|char| if char.is_control() { '?' } else { char })
        .collect()
}

#[cfg(test)]
mod tests {
    use ebb_vmm::control::InstanceInfo;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let named = Machine {
            pid: 7,
            resident_bytes: 3 << 20,
            socket: Some("/run/a".into()),
            info: Some(InstanceInfo {
                id: "a\x1b[2J".to_owned(),
                ..InstanceInfo::default()
            }),
            ..Machine::default()
        };
        let silent = Machine {
            pid: 12345,
            trouble: Some("no answer".to_owned()),
            ..Machine::default()
        };
        assert_eq!(
            table(&[named, silent]),
            "ID     PID    STATE     MEMORY  SOCKET\n\
             a?[2J  7      Building  3 MiB   /run/a\n\
             -      12345  -         0 B     (no answer)"
        );
    }
}
