//! The metrics for Prometheus, and that the alert rules and the dashboard name no others.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Bench;
use crate::api::prometheus;
use crate::control::METRICS;

/// What the server answers, head and body.
fn scrape(bench: &Bench) -> (String, String) {
    let mut stream = UnixStream::connect(bench.socket()).unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The names after `# TYPE`, each once.
fn names(text: &str) -> BTreeSet<&str> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let all: Vec<&str> = types.filter_map(|rest| rest.split(' ').next()).collect();
    let once = all.iter().copied().collect::<BTreeSet<_>>();
    assert_eq!(all.len(), once.len(), "a name is declared twice: {all:?}");
    once
}

#[test]
fn a_machine_is_scraped() {
    let bench = Bench::new();
    let (head, body) = scrape(&bench);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains(prometheus::CONTENT_TYPE), "{head}");
    for line in [
        "# TYPE ebb_lazy_memory_freed_bytes_total counter",
        "ebb_lazy_memory_lazy_bytes{machine=\"test\"} 4096",
        "ebb_balloon_target_bytes{machine=\"test\"} 67108864",
        "ebb_guest_free_bytes{machine=\"test\"} 4096",
        "ebb_disk_reads_total{machine=\"test\",disk=\"blk0\"} 0",
        "ebb_arena_lazy_bytes{machine=\"test\",arena=\"heap\"} 0",
        "# TYPE ebb_gate_pauses_seconds histogram",
        "ebb_gate_pauses_seconds_bucket{machine=\"test\",le=\"0.000001\"} 0",
        "ebb_gate_longest_pause_seconds{machine=\"test\"} 0",
    ] {
        assert!(
            body.lines().any(|it| it == line),
            "{line} is missing in\n{body}"
        );
    }
    // What the guest has not said is not there.
    assert!(!body.contains("ebb_guest_total_bytes"));
}

#[test]
fn a_machine_that_is_being_built_tells_what_there_is() {
    let bench = Bench::being_built();
    let (_, body) = scrape(&bench);
    assert!(body.contains("ebb_running{machine=\"test\"} 0\n"), "{body}");
    assert!(body.contains("ebb_output_log_dropped_bytes_total"));
    assert!(!body.contains("ebb_lazy_memory"));
}

/// All names, those of devices that no test machine has included.
fn all_names() -> BTreeSet<String> {
    let mut text = prometheus::every_name();
    text.sort();
    let count = text.len();
    text.dedup();
    assert_eq!(count, text.len(), "two metrics have one name");
    assert!(count > METRICS.iter().map(|it| it.2.len()).sum::<usize>());
    text.into_iter().collect()
}

/// The words of a text that look like names of ours.
fn words(text: &str) -> BTreeSet<String> {
    let is_part = |char: char| char.is_ascii_lowercase() || char == '_' || char.is_ascii_digit();
    let words = text.split(|char| !is_part(char));
    words
        .filter(|word| word.starts_with("ebb_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn rules_and_dashboard_name_metrics_that_exist() {
    let known = all_names();
    for file in ["ebb-alerts.yml", "ebb-dashboard.json"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../resources/metrics")
            .join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let used = words(&text);
        assert!(used.len() > 5, "{file} uses {used:?}");
        let is_known = |word: &String| {
            let base = ["_bucket", "_count"]
                .iter()
                .find_map(|end| word.strip_suffix(end));
            known.contains(word) || base.is_some_and(|base| known.contains(base))
        };
        let unknown: Vec<_> = used.iter().filter(|word| !is_known(word)).collect();
        assert!(
            unknown.is_empty(),
            "{file} names {unknown:?}, which nobody exports"
        );
    }
}

#[test]
fn what_is_scraped_is_among_all_names() {
    let bench = Bench::new();
    let (_, body) = scrape(&bench);
    let known = all_names();
    for name in names(&body) {
        assert!(known.contains(name), "{name}");
    }
}

/// The alerts in the rule file stand in the document for operators.
#[test]
fn every_alert_is_explained() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let rules = std::fs::read_to_string(root.join("resources/metrics/ebb-alerts.yml")).unwrap();
    let document = std::fs::read_to_string(root.join("docs/operating.md")).unwrap();
    let alerts = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    let unexplained: Vec<&str> = alerts
        .filter(|alert| !document.contains(&format!("`{alert}`")))
        .collect();
    assert_eq!(unexplained, [""; 0]);
}
