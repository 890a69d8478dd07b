//! Debian's Prometheus, which scrapes one machine, and `promtool`, which asks it.

use std::process::{Child, Stdio};
use std::time::SystemTime;

use ebb_harness::error::{Context, Error, Result};
use ebb_harness::prometheus;
use ebb_harness::wait::{LONG, until};
use serde::Deserialize;
use tempfile::TempDir;

use super::panels::Query;
use super::picture::Line;

/// Where the machine has its metrics.
pub const TARGET: &str = "127.0.0.1:9464";
const SERVER: &str = "127.0.0.1:9465";

/// A running server.
pub struct Prometheus {
    child: Child,
    started: u64,
    _folder: TempDir,
}

/// A series of promtool's answer: labels, and times with values.
#[derive(Deserialize)]
struct Series {
    metric: std::collections::BTreeMap<String, String>,
    values: Vec<(f64, String)>,
}

/// Seconds since 1970.
fn now() -> Result<u64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Ok(since.context("the time")?.as_secs())
}

impl Prometheus {
    /// Starts it.
    ///
    /// # Errors
    /// It does not answer.
    pub fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-prometheus-").context("make a folder")?;
        let config = folder.path().join("config.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: ebb\n  static_configs: [{{targets: ['{TARGET}']}}]\n"
        );
        std::fs::write(&config, text).context("write its configuration")?;
        let child = prometheus::server()
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().display()))
            .args(["--log.level=error", "--web.listen-address", SERVER])
            .stdin(Stdio::null())
            .spawn()
            .context("start Prometheus")?;
        let server = Self {
            child,
            started: now()?,
            _folder: folder,
        };
        let up = Query {
            text: "up == 1".to_owned(),
            legend: String::new(),
        };
        until("Prometheus has scraped the machine", LONG, || {
            Ok(server.ask(&up).ok().filter(|lines| !lines.is_empty()))
        })?;
        Ok(server)
    }

    /// What it has for `query`, from its start until now.
    ///
    /// # Errors
    /// It has no answer.
    pub fn ask(&self, query: &Query) -> Result<Vec<Line>> {
        let mut command = prometheus::promtool();
        command.args(["query", "range", "--format=json", "--step=1s"]);
        command.arg(format!("--start={}", self.started));
        command.arg(format!("--end={}", now()?));
        let output = command.arg(format!("http://{SERVER}")).arg(&query.text);
        let output = output.output().context("start promtool")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Error::new(format!("{}: {said}", query.text)));
        }
        let series: Vec<Series> = serde_json::from_slice(&output.stdout).context(&query.text)?;
        series
            .into_iter()
            .map(|series| self.line(series, query))
            .collect()
    }

    fn line(&self, series: Series, query: &Query) -> Result<Line> {
        let labels = series.metric.iter();
        let name = labels.fold(query.legend.clone(), |name, (label, value)| {
            name.replace(&format!("{{{{{label}}}}}"), value)
        });
        let point = |(time, value): (f64, String)| {
            let value: f64 = value.parse().context(&query.text)?;
            Ok((time - self.started as f64, value))
        };
        let points: Vec<(f64, f64)> = series
            .values
            .into_iter()
            .map(point)
            .collect::<Result<_>>()?;
        // A quantile of nothing is no number.
        let points = points.into_iter().filter(|(_, value)| value.is_finite());
        Ok(Line {
            name,
            points: points.collect(),
        })
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
