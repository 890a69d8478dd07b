//! The pictures in `docs/images`: what is drawn for two machines, as SVG. The test writes them with `UPDATE_DOCS=1` and
//! compares them without.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use ebb_vmm::api::machines::Machine;
use ebb_vmm::control::{
    BalloonState, BalloonStatistics, InstanceInfo, InstanceState, LazyMemoryState,
};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};

use crate::draw::draw;
use crate::sample::View;
use crate::text;

const MIB: u64 = 1 << 20;
/// Size of a character in the picture.
const CELL: (usize, usize) = (9, 18);

/// A machine after `second` seconds: it frees and reuses, and for some time the host is short of memory.
fn web(second: u64) -> Machine {
    let taken = 35 * second.saturating_sub(40).min(30);
    let wave = 40 * (second % 9);
    let mut lazy = LazyMemoryState::default();
    lazy.lazy.lazy_bytes = (1400 - taken + wave) * MIB;
    lazy.lazy.discarded_bytes = taken * MIB;
    lazy.lazy.freed_bytes_total = 64 * second * MIB;
    lazy.lazy.reused_bytes_total = 60 * second * MIB;
    lazy.lazy.reclaimed_bytes_total = taken * MIB;
    lazy.gate.kicks_total = taken * taken / 9;
    lazy.gate.pause_us_total = taken * 90;
    lazy.free_pages.stats.resident_bytes = 310 * MIB;
    let mut statistics = BalloonStatistics::default();
    statistics.guest.available_memory = Some(2200 * MIB);
    Machine {
        pid: 4711,
        resident_bytes: (3300 - taken + wave) * MIB,
        memory_bytes: Some(4096 * MIB),
        info: Some(InstanceInfo {
            id: "web".to_owned(),
            state: InstanceState::Running,
            uptime_ms: 5_000_000 + second * 1000,
            ..InstanceInfo::default()
        }),
        lazy_memory: Some(lazy),
        balloon: Some(BalloonState {
            actual_mib: 256,
            ..BalloonState::default()
        }),
        statistics: Some(statistics),
        ..Machine::default()
    }
}

fn silent() -> Machine {
    Machine {
        pid: 5012,
        resident_bytes: 900 * MIB,
        trouble: Some("no answer within 1 s; the machine may be busy, try again".to_owned()),
        ..Machine::default()
    }
}

fn paused() -> Machine {
    let mut machine = web(0);
    machine.pid = 4800;
    machine.resident_bytes = 700 * MIB;
    if let Some(info) = &mut machine.info {
        info.id = "batch-2".to_owned();
        info.state = InstanceState::Paused;
    }
    machine
}

fn example() -> View {
    let mut view = View::default();
    let start = Instant::now();
    for second in 0..100 {
        view.take(
            &[web(second), paused(), silent()],
            start + Duration::from_secs(second),
        );
    }
    view
}

fn drawn(view: &View, width: u16, height: u16) -> Buffer {
    let Ok(mut screen) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = screen.draw(|frame| draw(frame, view));
    screen.backend().buffer().clone()
}

fn color(color: Color, default: &'static str) -> &'static str {
    match color {
        Color::Blue => "#5f9ff0",
        Color::Green => "#5fc27e",
        Color::Cyan => "#4fc3c3",
        Color::Yellow => "#e0b040",
        Color::Red => "#e06060",
        Color::DarkGray => "#8a8f98",
        _ => default,
    }
}

/// One rectangle and one letter for each cell that has any.
fn svg(buffer: &Buffer) -> String {
    let (width, height) = (
        usize::from(buffer.area.width),
        usize::from(buffer.area.height),
    );
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"monospace\" font-size=\"15\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#16181d\"/>\n",
        width * CELL.0,
        height * CELL.1
    );
    for (at, cell) in buffer.content().iter().enumerate() {
        let (x, y) = (at % width * CELL.0, at / width * CELL.1);
        let mut ink = color(cell.fg, "#d8dbe0");
        if cell.modifier.contains(Modifier::REVERSED) {
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{ink}\"/>",
                CELL.0, CELL.1
            );
            ink = "#16181d";
        }
        let eighths = match cell.symbol() {
            " " => continue,
            symbol => "▁▂▃▄▅▆▇█".chars().position(|it| symbol == it.to_string()),
        };
        let _ = match eighths {
            // Letters leave gaps between lines.
            Some(eighths) => {
                let tall = CELL.1 * (eighths + 1) / 8;
                let y = y + CELL.1 - tall;
                writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{tall}\" fill=\"{ink}\"/>",
                    CELL.0
                )
            }
            None => {
                let symbol = cell.symbol().replace('&', "&amp;").replace('<', "&lt;");
                writeln!(
                    svg,
                    "<text x=\"{x}\" y=\"{}\" fill=\"{ink}\">{symbol}</text>",
                    y + 14
                )
            }
        };
    }
    svg.push_str("</svg>\n");
    svg
}

#[test]
fn the_pictures_in_the_documents_are_up_to_date() {
    let view = example();
    for (name, width, height) in [("top.svg", 80, 24), ("top-wide.svg", 140, 32)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../docs/images")
            .join(name);
        let wanted = svg(&drawn(&view, width, height));
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == wanted,
            "{name} is not what is drawn; write it by: UPDATE_DOCS=1 cargo test -p ebb-top"
        );
    }
}

#[test]
fn a_small_terminal_shows_every_machine_and_the_selected_one() {
    let mut view = example();
    let shown = text(&drawn(&view, 80, 24));
    for part in [
        "3 machines",
        "web (4711)",
        "batch-2 (4800)",
        "- (5012)",
        "no answer",
        "paused",
        "1.03 GiB",
        "lazily free",
    ] {
        assert!(shown.contains(part), "{part} is missing in\n{shown}");
    }
    view.select(2);
    let shown = text(&drawn(&view, 80, 24));
    assert!(shown.contains("no answer within 1 s"), "{shown}");
}

#[test]
fn no_size_and_no_answer_panics() {
    let mut view = example();
    for (width, height) in [(1, 1), (10, 3), (79, 5), (500, 200)] {
        drawn(&view, width, height);
        drawn(&View::default(), width, height);
    }
    // A machine that tells the largest numbers.
    let mut machine = web(1);
    if let Some(lazy) = &mut machine.lazy_memory {
        lazy.lazy.lazy_bytes = u64::MAX;
        lazy.lazy.unmapped_bytes = u64::MAX;
        lazy.gate.pause_us_total = u64::MAX;
    }
    machine.resident_bytes = u64::MAX;
    if let Some(info) = &mut machine.info {
        info.id = "\x1b[2J\n".repeat(100);
    }
    view.take(&[machine], Instant::now() + Duration::from_secs(1000));
    let shown = text(&drawn(&view, 80, 24));
    assert!(!shown.contains('\x1b'), "what a terminal would obey");
}
