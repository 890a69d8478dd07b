//! The monitor's REST API, over its unix socket.

use std::io::{Read, Write};
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

/// What lazy memory is doing; the fields that tests need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct LazyMemory {
    /// The VM's generation.
    pub generation: u64,
    /// Bytes freed by the guest, still with the guest's pages.
    pub lazy_bytes: u64,
    /// Bytes freed by the guest whose host pages are returned.
    pub discarded_bytes: u64,
    /// Bytes ever freed lazily.
    pub freed_bytes_total: u64,
    /// Bytes ever taken back by the guest.
    pub reused_bytes_total: u64,
    /// Reclaims started by host memory pressure.
    pub pressure_events_total: u64,
    /// Bytes ever returned to the host by reclaim.
    pub reclaimed_bytes_total: u64,
    /// Bytes ever discarded at once.
    pub eager_bytes_total: u64,
    /// `madvise` calls made to discard lazy memory.
    pub discard_calls_total: u64,
    /// Discard calls that failed.
    pub discard_failures_total: u64,
    /// Free page reporting.
    pub reporting: Reporting,
    /// Strict mode, where it is on.
    pub strict: Option<Strict>,
}

/// Strict mode, a part of [`LazyMemory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct Strict {
    /// Missing pages that were made.
    pub faults_total: u64,
    /// Lazily free pages that vCPUs touched.
    pub vcpu_violations_total: u64,
    /// Lazily free pages that threads of the monitor touched.
    pub device_violations_total: u64,
}

/// Free page reporting, a part of [`LazyMemory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct Reporting {
    /// Messages.
    pub messages_total: u64,
    /// Ranges in them.
    pub ranges_total: u64,
    /// Bytes in those.
    pub bytes_total: u64,
    /// Bytes that were left alone for the guest's poison.
    pub poisoned_bytes_total: u64,
    /// `madvise` calls made for them.
    pub calls_total: u64,
    /// Calls that failed.
    pub failures_total: u64,
    /// Bytes returned to the host at once.
    pub discarded_bytes_total: u64,
    /// Bytes that the host may take.
    pub marked_bytes_total: u64,
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

    /// The state of lazy memory.
    ///
    /// # Errors
    /// As for [`Api::must`].
    pub fn lazy(&self) -> Result<LazyMemory> {
        serde_json::from_value(self.get("/lazy-memory")?).context("GET /lazy-memory")
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
