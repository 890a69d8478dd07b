//! Curves over the number of workers, as an SVG.

use std::path::Path;

use plotters::prelude::*;

use super::BenchError;

/// A curve: its name, and its points by x.
pub struct Curve {
    /// What stands in the legend.
    pub name: String,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

/// Draws `curves` into `path`, with x on a logarithmic scale.
///
/// # Errors
/// The file cannot be written, or there is nothing to draw.
pub fn draw(
    path: &Path,
    (title, x_name, y_name): (&str, &str, &str),
    curves: &[Curve],
) -> Result<(), BenchError> {
    let all = || curves.iter().flat_map(|curve| curve.points.iter());
    let (mut last, mut top) = (1.0f64, 0.0f64);
    for (x, y) in all() {
        (last, top) = (last.max(*x), top.max(*y));
    }
    let failed = |error: &dyn std::fmt::Display| BenchError::System {
        what: format!("draw {}", path.display()),
        source: std::io::Error::other(error.to_string()),
    };
    let area = SVGBackend::new(path, (720, 440)).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d((1.0..last.max(2.0)).log_scale().base(2.0), 0.0..top * 1.1)
        .map_err(|error| failed(&error))?;
    let mesh = chart.configure_mesh().x_desc(x_name).y_desc(y_name).draw();
    mesh.map_err(|error| failed(&error))?;
    for (index, curve) in curves.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let line = LineSeries::new(curve.points.iter().copied(), color.stroke_width(2));
        chart
            .draw_series(line.point_size(3))
            .map_err(|error| failed(&error))?
            .label(curve.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()
        .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_becomes_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curve.svg");
        let curve = Curve {
            name: "measured".to_owned(),
            points: vec![(1.0, 8.9), (2.0, 5.65)],
        };
        draw(&path, ("title", "workers", "seconds"), &[curve]).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains("<svg") && text.contains("measured"));
    }
}
