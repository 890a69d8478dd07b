//! `docs/api.md`, compared with the routes and the declarations of metrics.

use std::fmt::Write;
use std::path::Path;

use ebb_core::metrics::{Kind, Unit};

use crate::api::routes::ROUTES;
use crate::control::METRICS;

/// If this is set, the test writes the generated part of the document.
const UPDATE: &str = "UPDATE_DOCS";

#[test]
fn the_document_of_the_api_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let found = std::fs::read_to_string(&path).unwrap();
    // The text before the metrics is written by hand.
    let by_hand = found.split("## Metrics\n").next().unwrap();
    let wanted = format!("{by_hand}{}", metrics());
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &wanted).unwrap();
    } else {
        assert!(
            found == wanted,
            "docs/api.md differs from the declarations; write it by: {UPDATE}=1 cargo test -p ebb-vmm --lib document"
        );
    }
    let section = |title: &str| {
        let section = by_hand.split(title).nth(1).expect(title);
        section.split("\n## ").next().unwrap_or_default()
    };
    let rows = section("## REST\n").lines();
    let documented: Vec<_> = rows
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let served = ROUTES
        .iter()
        .map(|(method, path, _)| format!("{method} {path}"));
    assert_eq!(documented, served.collect::<Vec<_>>());
}

/// The generated part.
fn metrics() -> String {
    let mut text = String::from(
        "## Metrics\n
From here on, this is made from the declarations in the code, by
`UPDATE_DOCS=1 cargo test -p ebb-vmm --lib document`; without the variable that test compares.

A counter never falls; it starts at 0 with the machine. A gauge rises and falls. A histogram is a list of 20 counts by size.
",
    );
    let mut last = "";
    for (request, object, metrics) in METRICS {
        if *request != last {
            let _ = write!(
                text,
                "\n### `GET {request}`\n\n| Name | Kind | Unit | Meaning |\n|---|---|---|---|\n"
            );
            last = request;
        }
        for metric in *metrics {
            let dot = if object.is_empty() { "" } else { "." };
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let unit = match metric.unit {
                Unit::Count => "",
                Unit::Bytes => "bytes",
                Unit::Microseconds => "µs",
            };
            let (name, help) = (metric.name, metric.help);
            let _ = writeln!(text, "| `{object}{dot}{name}` | {kind} | {unit} | {help} |");
        }
    }
    text
}
