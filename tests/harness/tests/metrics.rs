//! The alert rules and the dashboard's queries are ones that Prometheus takes.

use std::path::{Path, PathBuf};

use ebb_harness::error::{Context, Result};
use ebb_harness::prometheus;
use serde_json::Value;

fn resource(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join("resources/metrics").join(name)
}

#[test]
fn prometheus_takes_the_alert_rules() -> Result<()> {
    let path = resource("ebb-alerts.yml");
    prometheus::check(&["rules", &path.to_string_lossy()], "")
}

#[test]
fn prometheus_takes_the_queries_of_the_dashboard() -> Result<()> {
    let path = resource("ebb-dashboard.json");
    let text = std::fs::read_to_string(&path).context(path.display())?;
    let dashboard: Value = serde_json::from_str(&text).context(path.display())?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let mut rules = String::from("groups:\n- name: dashboard\n  rules:\n");
    let mut queries = 0;
    for panel in panels {
        assert!(
            panel["title"].is_string() && panel["gridPos"]["w"].is_u64(),
            "{panel}"
        );
        for target in panel["targets"].as_array().context("targets")? {
            let query = target["expr"].as_str().context("a query")?;
            // What Grafana puts in.
            let query = query
                .replace("$__rate_interval", "1m")
                .replace("$machine", ".*");
            queries += 1;
            rules.push_str(&format!(
                "  - record: query{queries}\n    expr: '{query}'\n"
            ));
        }
    }
    assert!(queries > 20, "{queries}");
    let folder = tempfile::tempdir().context("make a folder")?;
    let file = folder.path().join("rules.yml");
    std::fs::write(&file, rules).context(file.display())?;
    prometheus::check(&["rules", &file.to_string_lossy()], "")
}

#[test]
fn it_tells_what_is_wrong() {
    let wrong = "# HELP ebb_x_total A counter.\n# TYPE ebb_x_total gauge\nebb_x_total 1\n";
    let said = prometheus::check(&["metrics"], wrong)
        .unwrap_err()
        .to_string();
    assert!(said.contains("ebb_x_total"), "{said}");
}
