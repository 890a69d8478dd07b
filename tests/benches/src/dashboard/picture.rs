//! The panels as an SVG, each where the dashboard has it.

use std::fmt::Display;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::panels::Panel;
use crate::BenchError;
use crate::plot::add_lines;

/// Pixels of a step of Grafana's grid, to the right and down.
const STEP: (u32, u32) = (44, 30);
/// Steps of the grid from left to right.
const COLUMNS: u32 = 24;

/// One line of a panel.
pub struct Line {
    /// What stands in the legend.
    pub name: String,
    /// Seconds, and values in the panel's unit.
    pub points: Vec<(f64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `panels` into `path`.
///
/// # Errors
/// The file cannot be written.
pub fn draw(path: &Path, panels: &[(Panel, Vec<Line>)]) -> Result<(), BenchError> {
    let bottom = panels
        .iter()
        .map(|(panel, _)| panel.place[1] + panel.place[3]);
    let height = bottom.max().unwrap_or(1) * STEP.1;
    let area = SVGBackend::new(path, (COLUMNS * STEP.0, height)).into_drawing_area();
    let points = || panels.iter().flat_map(|(_, lines)| lines);
    let points = points().flat_map(|line| line.points.iter());
    let last = points.fold(1.0f64, |last, (time, _)| last.max(*time));
    let drawn = area.fill(&WHITE).map_err(|error| error.to_string());
    let drawn = drawn.and_then(|()| {
        for (panel, lines) in panels {
            let [x, y, width, height] = panel.place;
            let corner = (x * STEP.0, y * STEP.1);
            let part = area
                .clone()
                .shrink(corner, (width * STEP.0, height * STEP.1));
            one(&part, panel, last, lines).map_err(|error| error.to_string())?;
        }
        area.present().map_err(|error| error.to_string())
    });
    drawn.map_err(|error| BenchError::System {
        what: format!("draw {}", path.display()),
        source: std::io::Error::other(error),
    })
}

/// What a unit of Grafana's is shown in, and how many of it that is.
fn shown(unit: &str) -> (&str, f64) {
    match unit {
        "bytes" => ("MiB", 1048576.0),
        "Bps" => ("MiB/s", 1048576.0),
        "s" => ("ms", 1e-3),
        "ops" => ("1/s", 1.0),
        other => (other, 1.0),
    }
}

fn one(area: &Area<'_>, panel: &Panel, last: f64, lines: &[Line]) -> Result<(), String> {
    let text = |error: &dyn Display| error.to_string();
    let (unit, size) = shown(&panel.unit);
    let points = lines.iter().flat_map(|line| line.points.iter());
    let top = points.fold(0.0f64, |top, (_, value)| top.max(value / size));
    // Room for the legend above the lines.
    let top = if top > 0.0 { top } else { 1.0 } * (1.1 + 0.13 * lines.len() as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last, 0.0..top)
        .map_err(|error| text(&error))?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(WHITE).y_desc(unit);
    mesh.draw().map_err(|error| text(&error))?;
    let lines = lines.iter().enumerate().map(|(index, line)| {
        let points = line
            .points
            .iter()
            .map(|(time, value)| (*time, value / size));
        (index, &*line.name, points.collect())
    });
    add_lines(&mut chart, 0, lines, SeriesLabelPosition::UpperRight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_panel_is_drawn_in_its_unit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dashboard.svg");
        let panel = |title: &str, unit: &str, x| Panel {
            title: title.to_owned(),
            unit: unit.to_owned(),
            place: [x, 0, 12, 8],
            queries: Vec::new(),
        };
        let line = |name: &str, value| Line {
            name: name.to_owned(),
            points: vec![(0.0, 0.0), (10.0, value)],
        };
        let memory = (panel("Memory", "bytes", 0), vec![line("web RAM", 5e8)]);
        let nothing = (panel("Kicks", "ops", 12), vec![line("web", 0.0)]);
        draw(&path, &[memory, nothing]).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        for part in ["Memory", "MiB", "web RAM", "Kicks", "1/s"] {
            assert!(text.contains(part), "{part}");
        }
    }
}
