//! Draws the view: a row for each machine, and bars and sparklines of one.

use std::collections::VecDeque;

use ebb_vmm::config::human;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{
    Block, Cell, LineGauge, Paragraph, Row as TableRow, Sparkline, Table, TableState,
};

use crate::sample::{Row, View, name};

const RESIDENT: Color = Color::Blue;
const LAZY: Color = Color::Green;
const LISTED: Color = Color::Cyan;
const DISCARDED: Color = Color::DarkGray;
const GUEST: Color = Color::Yellow;

/// Lines of the details: six bars, three sparklines of two lines, and their frame.
const DETAILS: u16 = 14;

/// Draws everything.
pub fn draw(frame: &mut Frame, view: &View) {
    let area = frame.area();
    let [list, details, help] = Layout::vertical([
        Constraint::Min(3),
        Constraint::Length(if view.rows.is_empty() { 0 } else { DETAILS }),
        Constraint::Length(1),
    ])
    .areas(area);
    draw_list(frame, list, view);
    if let Some(row) = view.selection().and_then(|at| view.rows.get(at)) {
        draw_details(frame, details, row);
    }
    let keys = Line::styled(
        "↑ ↓ another machine   q quit",
        Style::new().fg(Color::DarkGray),
    );
    frame.render_widget(keys, help);
}

/// Titles and widths of the columns. A narrow terminal has no room for the last two.
const COLUMNS: [(&str, Constraint); 9] = [
    ("machine", Constraint::Fill(1)),
    ("state", Constraint::Length(9)),
    ("resident", Constraint::Length(8)),
    ("lazy", Constraint::Length(8)),
    ("free list", Constraint::Length(9)),
    ("discarded", Constraint::Length(9)),
    ("taken/s", Constraint::Length(8)),
    ("kicks/s", Constraint::Length(7)),
    ("paused", Constraint::Length(6)),
];

fn draw_list(frame: &mut Frame, area: Rect, view: &View) {
    let shown = COLUMNS.len() - if area.width < 100 { 2 } else { 0 };
    let columns = COLUMNS.iter().take(shown);
    let count = match view.rows.len() {
        0 => " no machine runs ".to_owned(),
        1 => " 1 machine ".to_owned(),
        count => format!(" {count} machines "),
    };
    let header = columns.clone().enumerate();
    let header = header.map(|(column, (title, _))| aligned(column, (*title).to_owned()));
    let rows = view.rows.iter().map(|row| list_row(row, shown));
    let table = Table::new(rows, columns.map(|(_, width)| *width))
        .header(TableRow::new(header).style(Style::new().fg(Color::DarkGray)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(Block::bordered().title(count));
    let mut state = TableState::new().with_selected(view.selection());
    frame.render_stateful_widget(table, area, &mut state);
}

/// Names to the left, numbers to the right.
fn aligned(column: usize, text: String) -> Cell<'static> {
    match column {
        0 | 1 => Cell::new(text),
        _ => Cell::new(Line::raw(text).right_aligned()),
    }
}

fn list_row(row: &Row, shown: usize) -> TableRow<'static> {
    let machine = &row.machine;
    let lazy = machine.lazy_memory.clone().unwrap_or_default();
    let texts = [
        format!("{} ({})", name(row), machine.pid),
        row.state().to_owned(),
        human(machine.resident_bytes),
        human(
            lazy.lazy
                .lazy_bytes
                .saturating_add(lazy.lazy.unmapped_bytes),
        ),
        human(lazy.free_pages.stats.resident_bytes),
        human(lazy.lazy.discarded_bytes),
        human(row.rates.taken),
        row.rates.kicks.to_string(),
        paused(row),
    ];
    let cells = texts.into_iter().take(shown).enumerate();
    let cells = cells.map(|(column, text)| aligned(column, text));
    let style = match row.state() {
        "no answer" => Style::new().fg(Color::Red),
        "running" => Style::new(),
        _ => Style::new().fg(Color::Yellow),
    };
    TableRow::new(cells).style(style)
}

/// The share of the time that vCPUs were kept out.
fn paused(row: &Row) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a share to look at")]
    let share = row.rates.paused_us as f64 / 10_000.0;
    format!("{share:.1} %")
}

fn draw_details(frame: &mut Frame, area: Rect, row: &Row) {
    let title = match &row.machine.info {
        Some(info) => format!(
            " {}, {} for {} s, {} of RAM, frees {}/s, reuses {}/s ",
            info.id,
            row.state(),
            info.uptime_ms / 1000,
            human(row.machine.memory_bytes.unwrap_or_default()),
            human(row.rates.freed),
            human(row.rates.reused),
        ),
        None => format!(" process {} ", row.machine.pid),
    };
    let block = Block::bordered().title(title);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    if let Some(trouble) = &row.machine.trouble {
        let text = Paragraph::new(trouble.as_str()).style(Style::new().fg(Color::Red));
        frame.render_widget(text.wrap(ratatui::widgets::Wrap { trim: true }), inner);
        return;
    }
    let [bars, lines] = Layout::vertical([Constraint::Length(6), Constraint::Min(0)]).areas(inner);
    draw_bars(frame, bars, row);
    let areas: [Rect; 3] = Layout::vertical([Constraint::Length(2); 3]).areas(lines);
    let rates = &row.rates;
    draw_line(
        frame,
        areas[0],
        "resident",
        &row.resident,
        RESIDENT,
        human(row.machine.resident_bytes),
    );
    draw_line(
        frame,
        areas[1],
        "taken/s",
        &row.taken,
        LAZY,
        human(rates.taken),
    );
    draw_line(
        frame,
        areas[2],
        "kicks/s",
        &row.kicks,
        GUEST,
        format!("{}, paused {}", rates.kicks, paused(row)),
    );
}

fn draw_bars(frame: &mut Frame, area: Rect, row: &Row) {
    let machine = &row.machine;
    let lazy = machine.lazy_memory.clone().unwrap_or_default();
    let all = machine.memory_bytes.unwrap_or_default();
    let guest = machine.statistics.map(|it| it.guest);
    let available = guest.and_then(|it| it.available_memory);
    let balloon = machine.balloon.map(|it| it.actual_mib << 20);
    let bars = [
        ("resident", Some(machine.resident_bytes), RESIDENT),
        (
            "lazily free",
            Some(
                lazy.lazy
                    .lazy_bytes
                    .saturating_add(lazy.lazy.unmapped_bytes),
            ),
            LAZY,
        ),
        (
            "free list",
            Some(lazy.free_pages.stats.resident_bytes),
            LISTED,
        ),
        ("discarded", Some(lazy.lazy.discarded_bytes), DISCARDED),
        ("balloon", balloon, GUEST),
        ("guest has left", available, GUEST),
    ];
    let areas: [Rect; 6] = Layout::vertical([Constraint::Length(1); 6]).areas(area);
    for ((label, value, color), area) in bars.into_iter().zip(areas) {
        let text = value.map_or_else(|| "-".to_owned(), human);
        let bar = LineGauge::default()
            .label(format!("{label:14} {text:>8}"))
            .ratio(share(value.unwrap_or_default(), all))
            .filled_style(Style::new().fg(color))
            .unfilled_style(Style::new().fg(Color::Black))
            .filled_symbol("█")
            .unfilled_symbol(" ");
        frame.render_widget(bar, area);
    }
}

#[allow(clippy::cast_precision_loss, reason = "a share to look at")]
fn share(part: u64, all: u64) -> f64 {
    match all {
        0 => 0.0,
        all => (part as f64 / all as f64).clamp(0.0, 1.0),
    }
}

fn draw_line(
    frame: &mut Frame,
    area: Rect,
    label: &str,
    values: &VecDeque<u64>,
    color: Color,
    now: String,
) {
    let [left, right] =
        Layout::horizontal([Constraint::Length(24), Constraint::Min(0)]).areas(area);
    let [first, second] = Layout::vertical([Constraint::Length(1); 2]).areas(left);
    frame.render_widget(Line::raw(label.to_owned()), first);
    frame.render_widget(Line::styled(now, Style::new().fg(Color::DarkGray)), second);
    let shown = values.len().saturating_sub(usize::from(right.width));
    let values: Vec<u64> = values.iter().skip(shown).copied().collect();
    frame.render_widget(
        Sparkline::default()
            .data(values)
            .style(Style::new().fg(color)),
        right,
    );
}
