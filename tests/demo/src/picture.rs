//! Memory over time as an SVG.

use std::fmt::Write;

use ebb_harness::size::MIB;

use crate::sampler::Sample;

const WIDTH: f64 = 960.0;
/// The plot within the picture.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 936.0;
const TOP: f64 = 108.0;
const BOTTOM: f64 = 428.0;
/// Height of a line of the list of phases.
const LINE: f64 = 20.0;
/// Least distance between two numbers of phases.
const BADGE: f64 = 22.0;

const RSS: &str = "#1f6fb4";
const OTHER: &str = "#d9730d";

/// When a part of a story began.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Seconds since the start.
    pub at: f64,
    /// What happens from here on.
    pub label: String,
}

/// What is drawn.
pub struct Picture<'a> {
    pub title: &'a str,
    pub subtitle: &'a str,
    /// What the two lines are: the resident memory, and what it is compared with.
    pub keys: [&'a str; 2],
    pub guest_memory: u64,
    pub marks: &'a [Mark],
    pub samples: &'a [Sample],
}

/// From seconds and bytes to places in the picture.
struct Scale {
    seconds: f64,
    bytes: f64,
}

impl Scale {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * seconds / self.seconds
    }

    fn y(&self, bytes: f64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * bytes / self.bytes
    }
}

/// The picture as SVG.
pub fn draw(picture: &Picture<'_>) -> String {
    let samples = picture.samples;
    let last = samples.last().map_or(1.0, |sample| sample.at.max(1.0));
    let most = samples
        .iter()
        .map(|sample| sample.rss.max(sample.other))
        .max()
        .unwrap_or(0);
    let most = most.max(picture.guest_memory) as f64;
    let scale = Scale {
        seconds: last * 1.01,
        bytes: most * 1.04,
    };
    let height = BOTTOM + 64.0 + LINE * picture.marks.len().div_ceil(2) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    title(&mut svg, picture);
    phases(&mut svg, &scale, picture.marks);
    axes(&mut svg, &scale);
    limit(&mut svg, &scale, picture.guest_memory);
    line(&mut svg, &scale, samples, RSS, true, |sample| sample.rss);
    line(&mut svg, &scale, samples, OTHER, false, |sample| {
        sample.other
    });
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, (x, y): (f64, f64), style: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{words}</text>"
    );
}

fn title(svg: &mut String, picture: &Picture<'_>) {
    let style = "font-size=\"16\" font-weight=\"bold\"";
    text(svg, (LEFT, 26.0), style, picture.title);
    text(svg, (LEFT, 46.0), "fill=\"#495057\"", picture.subtitle);
    let keys = [(LEFT, RSS), (LEFT + 380.0, OTHER)];
    for ((x, color), words) in keys.into_iter().zip(picture.keys) {
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"60\" width=\"14\" height=\"12\" fill=\"{color}\"/>"
        );
        text(svg, (x + 20.0, 71.0), "", words);
    }
}

/// A band and a number for each phase, and the list of what they are.
fn phases(svg: &mut String, scale: &Scale, marks: &[Mark]) {
    let mut free = 0.0_f64;
    for (index, mark) in marks.iter().enumerate() {
        let x = scale.x(mark.at);
        let end = marks.get(index + 1).map_or(RIGHT, |next| scale.x(next.at));
        if index % 2 == 0 {
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{}\" fill=\"#f1f3f5\"/>",
                end - x,
                BOTTOM - TOP
            );
        }
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{BOTTOM}\" stroke=\"#adb5bd\" \
             stroke-dasharray=\"3 3\"/>"
        );
        // In the middle of its band, but never on top of another number.
        let center = f64::midpoint(x, end).max(free);
        free = center + BADGE;
        badge(svg, (center, TOP - 14.0), index + 1);
        let row = index / 2;
        let column = LEFT + (index % 2) as f64 * (RIGHT - LEFT) / 2.0;
        let y = BOTTOM + 60.0 + LINE * row as f64;
        badge(svg, (column + 8.0, y - 4.5), index + 1);
        text(
            svg,
            (column + 24.0, y),
            "",
            &format!("from {:.1} s: {}", mark.at, mark.label),
        );
    }
}

fn badge(svg: &mut String, (x, y): (f64, f64), number: usize) {
    let _ = writeln!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"9\" fill=\"#495057\"/>"
    );
    let style = "fill=\"white\" font-size=\"11\" text-anchor=\"middle\"";
    text(svg, (x, y + 4.0), style, &number.to_string());
}

fn axes(svg: &mut String, scale: &Scale) {
    let mib = MIB as f64;
    for value in ticks(scale.bytes / mib) {
        let y = scale.y(value * mib);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\" stroke=\"#dee2e6\"/>"
        );
        text(
            svg,
            (LEFT - 8.0, y + 4.5),
            "text-anchor=\"end\"",
            &value.to_string(),
        );
    }
    for value in ticks(scale.seconds) {
        let x = scale.x(value);
        let end = BOTTOM + 5.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{BOTTOM}\" x2=\"{x:.1}\" y2=\"{end}\" stroke=\"#495057\"/>"
        );
        text(
            svg,
            (x, BOTTOM + 20.0),
            "text-anchor=\"middle\"",
            &value.to_string(),
        );
    }
    let _ = writeln!(
        svg,
        "<path d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\" fill=\"none\" stroke=\"#495057\"/>"
    );
    text(svg, (LEFT - 8.0, TOP - 10.0), "text-anchor=\"end\"", "MiB");
    text(
        svg,
        (RIGHT, BOTTOM + 36.0),
        "text-anchor=\"end\"",
        "seconds",
    );
}

/// The guest's memory size.
fn limit(svg: &mut String, scale: &Scale, bytes: u64) {
    let y = scale.y(bytes as f64);
    let _ = writeln!(
        svg,
        "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\" stroke=\"#868e96\" \
         stroke-dasharray=\"6 4\"/>"
    );
    let style = "fill=\"#495057\" font-size=\"12\" text-anchor=\"end\"";
    text(svg, (RIGHT - 4.0, y + 15.0), style, "the guest's memory");
}

fn line(
    svg: &mut String,
    scale: &Scale,
    samples: &[Sample],
    color: &str,
    filled: bool,
    value: impl Fn(&Sample) -> u64,
) {
    let mut points = String::new();
    for sample in samples {
        let _ = write!(
            points,
            "{:.1},{:.1} ",
            scale.x(sample.at),
            scale.y(value(sample) as f64)
        );
    }
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return;
    };
    if filled {
        let (start, end) = (scale.x(first.at), scale.x(last.at));
        let _ = writeln!(
            svg,
            "<polygon points=\"{start:.1},{BOTTOM} {points}{end:.1},{BOTTOM}\" fill=\"{color}\" \
             fill-opacity=\"0.15\"/>"
        );
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
        points.trim_end()
    );
}

/// Round values from 0 to `most`, about seven of them.
fn ticks(most: f64) -> impl Iterator<Item = f64> {
    let rough = (most / 7.0).max(1.0);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = step
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    (0..)
        .map(move |index| f64::from(index) * step)
        .take_while(move |value| *value <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(
            ticks(1065.0).collect::<Vec<_>>(),
            [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
        );
        assert_eq!(ticks(3.0).collect::<Vec<_>>(), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_picture_of_anything_is_well_formed() {
        let mut picture = Picture {
            title: "a < b & c",
            subtitle: "",
            keys: ["one", "two"],
            guest_memory: 1 << 30,
            marks: &[],
            samples: &[],
        };
        assert!(draw(&picture).ends_with("</svg>\n"));
        let sample = |at, rss, other| Sample { at, rss, other };
        let samples = [sample(0.0, 0, 0), sample(9.0, 1 << 30, 1 << 29)];
        let marks = [Mark {
            at: 0.0,
            label: "begin".to_owned(),
        }];
        (picture.samples, picture.marks) = (&samples, &marks);
        let svg = draw(&picture);
        assert!(svg.contains("a &lt; b &amp; c"));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
