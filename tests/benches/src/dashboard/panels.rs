//! The dashboard's panels: where each is, and what it asks.

use ebb_harness::error::{Context, Result};
use serde_json::Value;

/// As it is installed.
const DASHBOARD: &str = include_str!("../../../../resources/metrics/ebb-dashboard.json");

/// Grafana's `$__rate_interval` for scrapes each second: four of them.
const RATE_INTERVAL: &str = "4s";

/// One panel.
#[derive(Debug)]
pub struct Panel {
    /// Its title.
    pub title: String,
    /// The unit, by Grafana's name.
    pub unit: String,
    /// Left edge, upper edge, width and height in Grafana's grid, which is 24 wide.
    pub place: [u32; 4],
    /// What it asks.
    pub queries: Vec<Query>,
}

/// A query, and what its lines are called.
#[derive(Debug)]
pub struct Query {
    /// In PromQL.
    pub text: String,
    /// With `{{label}}` where the value of a label goes.
    pub legend: String,
}

/// All panels, for all machines.
///
/// # Errors
/// The file is not what Grafana writes.
pub fn panels() -> Result<Vec<Panel>> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).context("the dashboard")?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    panels.iter().map(panel).collect()
}

fn panel(value: &Value) -> Result<Panel> {
    let title = value["title"].as_str().context("a panel's title")?;
    let unit = value["fieldConfig"]["defaults"]["unit"].as_str();
    let edge = |name: &str| {
        let number = value["gridPos"][name].as_u64();
        number.and_then(|it| u32::try_from(it).ok()).context(title)
    };
    let targets = value["targets"].as_array().context(title)?;
    let query = |target: &Value| {
        let text = target["expr"].as_str().context(title)?;
        Ok(Query {
            text: text
                .replace("$machine", ".*")
                .replace("$__rate_interval", RATE_INTERVAL),
            legend: target["legendFormat"].as_str().context(title)?.to_owned(),
        })
    };
    Ok(Panel {
        title: title.to_owned(),
        unit: unit.context(title)?.to_owned(),
        place: [edge("x")?, edge("y")?, edge("w")?, edge("h")?],
        queries: targets.iter().map(query).collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_understood() {
        let panels = panels().unwrap();
        assert!(panels.len() >= 10);
        for panel in &panels {
            assert!(!panel.queries.is_empty(), "{panel:?}");
            for query in &panel.queries {
                assert!(!query.text.contains('$'), "{query:?}");
            }
        }
    }
}
