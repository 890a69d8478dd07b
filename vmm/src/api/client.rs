//! A client of the API, for `ebb ctl` and for tests.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// Maximum length of an answer in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Time between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(2);

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No server listens on the socket.
    #[error("{}: {source}; is the machine running, and is this the path that it was given as --api-socket?", path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The server answered with a fault.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The `fault_message`.
        message: String,
    },
    /// No answer within this many seconds.
    #[error("no answer within {0} s; the machine may be busy, try again")]
    TimedOut(u64),
    /// The connection broke, or the answer is not HTTP with JSON.
    #[error("{what}: {cause}")]
    Broken {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        cause: String,
    },
}

fn broken(what: &'static str, cause: &dyn std::fmt::Display) -> ClientError {
    ClientError::Broken {
        what,
        cause: cause.to_string(),
    }
}

/// Sends one request to the API at `socket` and waits up to `limit` for the answer. Returns its JSON, or null for an
/// answer without a body.
///
/// # Errors
/// [`ClientError`]. An answer with an error status is [`ClientError::Refused`].
pub fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
    limit: Duration,
) -> Result<Value, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| broken("the client cannot start", &error))?;
    let work = async { timeout(limit, exchange(socket, method, path, body)).await };
    runtime
        .block_on(work)
        .unwrap_or(Err(ClientError::TimedOut(limit.as_secs())))
}

/// Connects. While others fill the server's backlog the kernel refuses that, and tells nobody when there is room.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(CONNECT_PAUSE).await,
            done => return done,
        }
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, ClientError> {
    let stream = connect(socket).await;
    let stream = stream.map_err(|source| ClientError::Connect {
        path: socket.to_owned(),
        source,
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broken("the connection broke off", &error))?;
    let driver = tokio::spawn(connection);
    let body = body.map_or_else(Bytes::new, |value| value.to_string().into());
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| broken("the request cannot be written", &error))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| broken("the request was not answered", &error))?;
    let status = response.status();
    let answer = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| broken("the answer cannot be read", &error))?
        .to_bytes();
    driver.abort();
    let value: Value = if answer.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&answer).map_err(|error| broken("the answer is no JSON", &error))?
    };
    if status.is_success() {
        return Ok(value);
    }
    let message = value["fault_message"].as_str();
    Err(ClientError::Refused {
        status: status.as_u16(),
        message: message.map_or_else(|| format!("HTTP status {status}"), str::to_owned),
    })
}
