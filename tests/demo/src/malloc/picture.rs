//! Both runs over time as an SVG, with FLUSHALL at zero.

use ebb_harness::error::{Error, Result};
use ebb_harness::size::MIB;
use plotters::prelude::*;

use super::outcome::{Outcome, Run};
use crate::sampler::Sample;

const ARENA: RGBColor = RGBColor(31, 111, 180);
const LAZY: RGBColor = RGBColor(217, 115, 13);
const PLAIN: RGBColor = RGBColor(134, 142, 150);

/// What is drawn of a run.
struct Curve {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

fn points(run: &Run, value: impl Fn(&Sample) -> u64) -> Vec<(f64, f64)> {
    let point = |sample: &Sample| (sample.at - run.flushed_at, (value(sample) / MIB) as f64);
    // The last sample may be of a monitor that is gone.
    let living = run.samples.iter().filter(|sample| sample.rss > 0);
    living.map(point).collect()
}

/// The moments of a run that deserve a dot, as they are read off its curve.
fn moments(run: &Run) -> Vec<(f64, f64)> {
    let curve = points(run, |sample| sample.rss);
    let at = |moment: f64| {
        let moment = moment - run.flushed_at;
        curve.iter().copied().find(|(x, _)| *x >= moment)
    };
    [run.wanted_at, run.had_at]
        .into_iter()
        .filter_map(at)
        .collect()
}

/// The picture.
///
/// # Errors
/// There is nothing to draw.
pub fn draw(outcome: &Outcome) -> Result<String> {
    let mut svg = String::new();
    render(outcome, &mut svg).map_err(|error| Error::new(format!("drawing: {error}")))?;
    Ok(svg)
}

fn render(
    outcome: &Outcome,
    svg: &mut String,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (arena, plain) = (&outcome.arena, &outcome.plain);
    let curves = [
        Curve {
            name: "plain Redis, free page reporting: RSS",
            color: PLAIN,
            points: points(plain, |sample| sample.rss),
        },
        Curve {
            name: "Redis in an arena: RSS",
            color: ARENA,
            points: points(arena, |sample| sample.rss),
        },
        Curve {
            name: "of it lazily free",
            color: LAZY,
            points: points(arena, |sample| sample.other),
        },
    ];
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let from = all().map(|point| point.0).fold(0.0, f64::min);
    let to = all().map(|point| point.0).fold(1.0, f64::max);
    let top = all().map(|point| point.1).fold(1.0, f64::max);
    let area = SVGBackend::with_string(svg, (960, 520)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            "Redis: fill, FLUSHALL, a neighbour needs memory, fill again",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(from..to, 0.0..top * 1.3)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(
        "seconds from FLUSHALL; dots: the neighbour asks, and has what it wants or waits no longer",
    );
    let whole = |value: &f64| format!("{value:.0}");
    mesh.x_label_formatter(&whole).y_label_formatter(&whole);
    mesh.y_desc("MiB of the host")
        .light_line_style(WHITE)
        .draw()?;
    for Curve {
        name,
        color,
        points,
    } in curves
    {
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    for (run, color) in [(arena, ARENA), (plain, PLAIN)] {
        let dots = moments(run)
            .into_iter()
            .map(|at| Circle::new(at, 5, color.filled()));
        chart.draw_series(dots)?;
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight);
    legend.border_style(BLACK).background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_of_anything_is_well_formed() {
        let sample = |at, rss, other| Sample { at, rss, other };
        let run = Run {
            flushed_at: 1.0,
            samples: vec![sample(0.0, 1 << 30, 0), sample(9.0, 1 << 29, 1 << 28)],
            ..Run::default()
        };
        for run in [run, Run::default()] {
            let svg = draw(&Outcome::new(run.clone(), run)).unwrap();
            assert!(
                svg.contains("of it lazily free") && svg.ends_with("</svg>\n"),
                "{svg}"
            );
        }
    }
}
