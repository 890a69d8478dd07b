//! The monitor's REST API, over its unix socket.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::ops::Index;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::size::MIB;

/// How long the monitor may take for an answer; a reclaim of a big guest takes a while.
const LIMIT: Duration = Duration::from_secs(120);

/// Asks the monitor behind a socket.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// An answer of any kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// HTTP's status code.
    pub status: u16,
    /// The body; `Null` when there is none.
    pub body: Value,
}

/// Metrics by name, as `docs/api.md` lists them. `metrics["gate.kicks_total"]` panics if there is none of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics(BTreeMap<String, u64>);

impl Metrics {
    /// Takes all numbers out of an answer.
    pub fn of(answer: &Value) -> Self {
        let mut metrics = BTreeMap::new();
        collect(answer, "", &mut metrics);
        Self(metrics)
    }

    /// The metrics of one object in the answer, named without it.
    #[must_use]
    pub fn part(&self, object: &str) -> Self {
        let inner = |name: &str| Some(name.strip_prefix(object)?.strip_prefix('.')?.to_owned());
        let metrics = self.0.iter();
        Self(
            metrics
                .filter_map(|(name, value)| Some((inner(name)?, *value)))
                .collect(),
        )
    }

    /// Returns true if nothing has been counted.
    #[must_use]
    pub fn are_zero(&self) -> bool {
        !self.0.is_empty() && self.0.values().all(|value| *value == 0)
    }
}

impl Index<&str> for Metrics {
    type Output = u64;

    fn index(&self, name: &str) -> &u64 {
        let found = self.0.get(name);
        found.unwrap_or_else(|| panic!("there is no metric {name} in {self:?}"))
    }
}

fn collect(value: &Value, path: &str, into: &mut BTreeMap<String, u64>) {
    if let Some(number) = value.as_u64() {
        into.insert(path.to_owned(), number);
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        let dot = if path.is_empty() { "" } else { "." };
        collect(value, &format!("{path}{dot}{name}"), into);
    }
}

/// The balloon, sizes in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Balloon {
    /// What the host asked for.
    pub amount_mib: u64,
    /// What the guest has handed back.
    pub actual_mib: u64,
    /// The guest's driver tells before it reuses a page.
    pub lazy: bool,
    /// The guest's driver reports free pages.
    pub free_page_reporting: bool,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics.
    pub stats_polling_interval_s: u64,
}

/// What one reclaim did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Reclaimed {
    /// Bytes returned to the host.
    pub reclaimed_bytes: u64,
    /// Time it took in microseconds.
    pub duration_us: u64,
}

impl Api {
    /// A client of this socket; connects with every request.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Makes a request, with a JSON body unless it is `Null`.
    ///
    /// # Errors
    /// When there is no answer, or one that is not HTTP with JSON.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Result<Answer> {
        let what = format!("{method} {path}");
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.exchange(method, path, &text)
            .and_then(|raw| parse(&raw))
            .context(what)
    }

    fn exchange(&self, method: &str, path: &str, body: &str) -> Result<Vec<u8>> {
        let socket = self.socket.display();
        let mut stream = UnixStream::connect(&self.socket).context(&socket)?;
        stream.set_read_timeout(Some(LIMIT)).context(&socket)?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream
            .write_all(format!("{head}{body}").as_bytes())
            .context(&socket)?;
        let mut raw = Vec::new();
        stream.read_to_end(&mut raw).context(&socket)?;
        Ok(raw)
    }

    /// A request that must succeed.
    ///
    /// # Errors
    /// As for [`Api::request`], or when the status says that it failed.
    pub fn must(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let answer = self.request(method, path, body)?;
        if (200..300).contains(&answer.status) {
            return Ok(answer.body);
        }
        Err(Error::new(format!(
            "{method} {path}: {} {}",
            answer.status, answer.body
        )))
    }

    /// GET.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn get(&self, path: &str) -> Result<Value> {
        self.must("GET", path, &Value::Null)
    }

    /// The metrics as Prometheus gets them.
    ///
    /// # Errors
    /// When there is no answer, or one that is no text.
    pub fn metrics_text(&self) -> Result<String> {
        let raw = self.exchange("GET", "/metrics", "")?;
        let text = String::from_utf8(raw).context("GET /metrics")?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .context("GET /metrics: no body")?;
        match head.contains("200 OK") {
            true => Ok(body.to_owned()),
            false => Err(Error::new(format!("GET /metrics: {text}"))),
        }
    }

    /// Returns true if the machine of the process `pid` answers, and has been built.
    #[must_use]
    pub fn is_running(&self, pid: u32) -> bool {
        let info = self.get("/");
        info.is_ok_and(|info| info["pid"] == pid && info["state"] == "Running")
    }

    /// The metrics of lazy memory.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn lazy(&self) -> Result<Metrics> {
        Ok(Metrics::of(&self.get("/lazy-memory")?))
    }

    /// The balloon.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn balloon(&self) -> Result<Balloon> {
        serde_json::from_value(self.get("/balloon")?).context("GET /balloon")
    }

    /// Asks the guest for `bytes`, whole MiB.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn set_balloon(&self, bytes: u64) -> Result<()> {
        let body = json!({ "amount_mib": bytes / MIB });
        self.must("PATCH", "/balloon", &body).map(drop)
    }

    /// Takes up to `bytes`, whole MiB, of what is lazily free.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn reclaim(&self, bytes: u64) -> Result<Reclaimed> {
        let body = json!({ "amount_mib": bytes.div_ceil(MIB) });
        let answer = self.must("PUT", "/lazy-memory/reclaim", &body)?;
        serde_json::from_value(answer).context("PUT /lazy-memory/reclaim")
    }

    /// Ends the machine.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn stop(&self) -> Result<()> {
        let body = json!({ "action_type": "InstanceStop" });
        self.must("PUT", "/actions", &body).map(drop)
    }
}

fn parse(raw: &[u8]) -> Result<Answer> {
    let text = String::from_utf8_lossy(raw);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("the answer has no end of header")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let status = status.context(format_args!("no status in {head:?}"))?;
    let body = match body {
        "" => Value::Null,
        body => serde_json::from_str(body).context(format_args!("body {body:?}"))?,
    };
    Ok(Answer { status, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_by_name() {
        let answer = json!({ "a": 1, "gate": { "kicks": 2, "pauses": [3] }, "mode": "off" });
        let metrics = Metrics::of(&answer);
        assert_eq!((metrics["a"], metrics["gate.kicks"]), (1, 2));
        assert_eq!(metrics.part("gate"), Metrics::of(&json!({ "kicks": 2 })));
        assert!(!metrics.are_zero() && !metrics.part("none").are_zero());
        assert!(Metrics::of(&json!({ "a": 0, "b": { "c": 0 } })).are_zero());
    }

    #[test]
    #[should_panic(expected = "there is no metric none")]
    fn a_metric_that_is_not_there() {
        let _ = Metrics::of(&json!({ "a": 1 }))["none"];
    }

    #[test]
    fn answers_with_and_without_a_body() {
        let answer = parse(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        assert_eq!(
            answer,
            Answer {
                status: 204,
                body: Value::Null
            }
        );
        let answer = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{\"a\": 1}\n").unwrap();
        assert_eq!(
            answer,
            Answer {
                status: 200,
                body: json!({ "a": 1 })
            }
        );
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\n\r\nhello").is_err());
    }
}
