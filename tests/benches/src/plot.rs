//! Lines with a legend, and curves over the number of workers as an SVG.

use std::path::Path;

use plotters::coord::ranged1d::Ranged;
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
    let lines = curves.iter().enumerate();
    let lines = lines.map(|(index, curve)| (index, &*curve.name, curve.points.clone()));
    let place = SeriesLabelPosition::MiddleRight;
    add_lines(&mut chart, 3, lines, place).map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

/// Draws lines, and a legend of them at `place`. Each has the number of its color, a name, and points, which are marked by dots
/// of `dot` pixels.
///
/// # Errors
/// What the drawing library says.
pub fn add_lines<'a, 'n, D: DrawingBackend + 'a, X, Y>(
    chart: &mut ChartContext<'a, D, Cartesian2d<X, Y>>,
    dot: u32,
    lines: impl IntoIterator<Item = (usize, &'n str, Vec<(f64, f64)>)>,
    place: SeriesLabelPosition,
) -> Result<(), String>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    for (index, name, points) in lines {
        let color = Palette99::pick(index).to_rgba();
        let line = LineSeries::new(points, color.stroke_width(2)).point_size(dot);
        let drawn = chart.draw_series(line);
        drawn
            .map_err(|error| error.to_string())?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    let mut labels = chart.configure_series_labels();
    labels.position(place).background_style(WHITE.mix(0.8));
    let drawn = labels.border_style(BLACK).draw();
    drawn.map_err(|error| error.to_string())
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
