//! Host memory over time, one diagram for each pressure.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::machine::{SYSTEMS, System};
use crate::BenchError;
use crate::plot::add_lines;

/// One system under one pressure.
pub struct Line {
    /// The system.
    pub system: System,
    /// The pressure's name.
    pub pressure: &'static str,
    /// Seconds and MiB.
    pub points: Vec<(f64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `lines` into `path`.
///
/// # Errors
/// The file cannot be written.
pub fn draw(path: &Path, pressures: [&str; 3], lines: &[Line]) -> Result<(), BenchError> {
    let failed = |error: String| BenchError::System {
        what: format!("draw {}", path.display()),
        source: std::io::Error::other(error),
    };
    let area = SVGBackend::new(path, (900, 1080)).into_drawing_area();
    let all = lines.iter().flat_map(|line| line.points.iter());
    let (last, top) = all.fold((1.0f64, 1.0f64), |(last, top), (x, y)| {
        (last.max(*x), top.max(*y))
    });
    area.fill(&WHITE)
        .map_err(|error| failed(error.to_string()))?;
    let parts = area.split_evenly((pressures.len(), 1));
    for (part, pressure) in parts.iter().zip(pressures) {
        let lines: Vec<&Line> = lines
            .iter()
            .filter(|line| line.pressure == pressure)
            .collect();
        diagram(part, pressure, (last, top * 1.1), &lines).map_err(failed)?;
    }
    area.present().map_err(|error| failed(error.to_string()))
}

fn diagram(
    area: &Area,
    pressure: &str,
    (last, top): (f64, f64),
    lines: &[&Line],
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("host memory of the machine, pressure: {pressure}"),
            ("sans-serif", 17),
        )
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, 0.0..top)
        .map_err(|error| text(&error))?;
    let mesh = chart
        .configure_mesh()
        .x_desc("seconds")
        .y_desc("MiB")
        .draw();
    mesh.map_err(|error| text(&error))?;
    let lines = lines.iter().map(|line| {
        let index = SYSTEMS.iter().position(|system| *system == line.system);
        let name = line.system.name();
        (index.unwrap_or(0), name, line.points.clone())
    });
    add_lines(&mut chart, 0, lines, SeriesLabelPosition::LowerRight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pressure_has_its_diagram() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("footprint.svg");
        let line = Line {
            system: System::EbbAuto,
            pressure: "hard",
            points: vec![(0.0, 100.0), (10.0, 300.0)],
        };
        draw(&path, ["none", "light", "hard"], &[line]).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains("pressure: none") && text.contains("pressure: hard"));
        assert!(text.contains(System::EbbAuto.name()));
    }
}
