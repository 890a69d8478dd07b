//! `ebb top`: the machines of this host, live. A program of its own: what draws on terminals is as big as half a monitor.

mod draw;
#[cfg(test)]
mod picture;
mod sample;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ebb_vmm::api::machines::{Depth, Machine, ViewOptions, ask, processes};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::{Buffer, Cell};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyModifiers};
use ratatui::crossterm::terminal;
use sample::View;

/// Show the machines of this host, live.
#[derive(Parser)]
#[command(name = "ebb top")]
struct Arguments {
    #[command(flatten)]
    options: ViewOptions,
}

fn main() -> ExitCode {
    let options = Arguments::parse().options;
    let done = if options.once {
        once(&options)
    } else if io::stdout().is_terminal() {
        live(&options)
    } else {
        Err(io::Error::other(
            "standard output is no terminal; add --once",
        ))
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Such as `| head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "ebb top: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The machines that are to be shown.
fn look(options: &ViewOptions) -> io::Result<Vec<Machine>> {
    let mut found = processes(Path::new("/proc"))?;
    if !options.pids.is_empty() {
        found.retain(|process| options.pids.contains(&process.pid));
    }
    Ok(ask(&found, Depth::All))
}

/// Looks once, or twice where rates are to be shown, and prints that.
fn once(options: &ViewOptions) -> io::Result<()> {
    if options.json {
        return writeln!(io::stdout(), "{:#}", serde_json::json!(look(options)?));
    }
    let mut view = View::default();
    view.take(&look(options)?, Instant::now());
    std::thread::sleep(options.interval());
    view.take(&look(options)?, Instant::now());
    let (width, height) = terminal::size().unwrap_or((80, 24));
    let Ok(mut screen) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = screen.draw(|frame| draw::draw(frame, &view));
    write!(io::stdout(), "{}", text(screen.backend().buffer()))
}

/// What is drawn, without colours.
fn text(buffer: &Buffer) -> String {
    let line = |cells: &[Cell]| {
        let line: String = cells.iter().map(Cell::symbol).collect();
        format!("{}\n", line.trim_end())
    };
    let lines = buffer
        .content()
        .chunks(usize::from(buffer.area.width).max(1));
    lines.map(line).collect()
}

/// Looks again and again, until the user wants no more.
fn live(options: &ViewOptions) -> io::Result<()> {
    let mut view = View::default();
    view.take(&look(options)?, Instant::now());
    ratatui::run(|screen| {
        loop {
            screen.draw(|frame| draw::draw(frame, &view))?;
            let next = Instant::now() + options.interval();
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                if !event::poll(left)? {
                    break;
                }
                match event::read()? {
                    Event::Key(key) if ends(key) => return Ok(()),
                    Event::Key(key) => view.select(step(key)),
                    _ => {}
                }
                screen.draw(|frame| draw::draw(frame, &view))?;
            }
            view.take(&look(options)?, Instant::now());
        }
    })
}

fn ends(key: KeyEvent) -> bool {
    let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
    matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
        || (is_control && key.code == KeyCode::Char('c'))
}

/// By how many lines the selection moves.
fn step(key: KeyEvent) -> isize {
    match key.code {
        KeyCode::Up | KeyCode::Char('k') => -1,
        KeyCode::Down | KeyCode::Char('j') => 1,
        _ => 0,
    }
}

/// How long an interval is, for rates.
fn seconds(time: Duration) -> f64 {
    time.as_secs_f64().max(0.001)
}
