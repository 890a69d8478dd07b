//! Every endpoint: the table of paths and methods, and one handler for each.

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::view;
use crate::control::{Command, CommandError, Controller, Response};

/// What a request is answered with when all went well.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    /// 204.
    Done,
    /// 200 and this.
    Json(Value),
}

impl Reply {
    fn json(value: &impl Serialize) -> Result<Self, Fault> {
        serde_json::to_value(value)
            .map(Self::Json)
            .map_err(|error| Fault::internal(format!("the answer cannot be written: {error}")))
    }
}

/// What a request is answered with otherwise: a status and the `fault_message`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub status: StatusCode,
    pub message: String,
    /// The methods of the path, when the request's is not among them.
    pub allow: Option<String>,
}

impl Fault {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            allow: None,
        }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

impl From<CommandError> for Fault {
    fn from(error: CommandError) -> Self {
        Self::bad_request(error.to_string())
    }
}

type Handler = fn(&dyn Controller, &[u8]) -> Result<Reply, Fault>;

/// All that can be asked. A new endpoint is a line here and a function below.
const ROUTES: &[(Method, &str, Handler)] = &[
    (Method::GET, "/", get_info),
    (Method::GET, "/version", get_version),
    (Method::GET, "/vm/config", get_config),
    (Method::GET, "/balloon", get_balloon),
    (Method::PATCH, "/balloon", patch_balloon),
    (Method::GET, "/balloon/statistics", get_statistics),
    (Method::PATCH, "/balloon/statistics", patch_statistics),
    (Method::PUT, "/actions", put_action),
    (Method::GET, "/lazy-memory", get_lazy_memory),
    (Method::PUT, "/lazy-memory/reclaim", put_reclaim),
    (Method::GET, "/arenas", get_arenas),
    (Method::GET, "/teardown", get_teardown),
    (Method::PATCH, "/teardown", patch_teardown),
];

/// Finds the handler of a request.
pub(super) fn find(method: &Method, path: &str) -> Result<Handler, Fault> {
    let mut methods = Vec::new();
    for (known, _, handler) in ROUTES.iter().filter(|route| route.1 == path) {
        if known == method {
            return Ok(*handler);
        }
        methods.push(known.as_str());
    }
    if methods.is_empty() {
        let mut paths: Vec<_> = ROUTES.iter().map(|route| route.1).collect();
        paths.dedup();
        let message = format!("there is no {path}; there are {}", paths.join(", "));
        return Err(Fault::new(StatusCode::NOT_FOUND, message));
    }
    let methods = methods.join(", ");
    Err(Fault {
        status: StatusCode::METHOD_NOT_ALLOWED,
        message: format!("{path} does not know {method}; it knows {methods}"),
        allow: Some(methods),
    })
}

/// Runs a command whose answer is one kind of [`Response`], and replies with what `$reply` makes of it.
macro_rules! ask {
    ($controller:expr, $command:expr, $response:pat => $reply:expr) => {
        match $controller.execute($command)? {
            $response => $reply,
            other => Err(Fault::internal(format!("unexpected answer {other:?}"))),
        }
    };
}

fn get_info(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::Info, Response::Info(info) => Reply::json(&info))
}

fn get_version(_: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    Ok(Reply::Json(
        json!({ "vmm_version": env!("CARGO_PKG_VERSION") }),
    ))
}

fn get_config(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::Config, Response::Config(config) => Ok(Reply::Json(view::config(&config))))
}

fn get_balloon(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::Balloon, Response::Balloon(state) => Ok(Reply::Json(view::balloon(&state))))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonUpdate {
    amount_mib: u64,
}

fn patch_balloon(controller: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: BalloonUpdate = parse(body)?;
    let bytes = mebibytes(update.amount_mib)?;
    ask!(controller, Command::SetBalloon { bytes }, Response::Done => Ok(Reply::Done))
}

fn get_statistics(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::BalloonStatistics,
        Response::BalloonStatistics(statistics) => Reply::json(&statistics))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StatisticsUpdate {
    stats_polling_interval_s: u16,
}

fn patch_statistics(controller: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: StatisticsUpdate = parse(body)?;
    let seconds = update.stats_polling_interval_s;
    if seconds == 0 {
        return Err(Fault::bad_request(
            "stats_polling_interval_s is 0, but statistics cannot be turned off while the machine runs; give 1 or more",
        ));
    }
    ask!(controller, Command::SetStatisticsInterval { seconds }, Response::Done => Ok(Reply::Done))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: String,
}

fn put_action(controller: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let action: Action = parse(body)?;
    match action.action_type.as_str() {
        "InstanceStop" => {
            ask!(controller, Command::Stop, Response::Done => Ok(Reply::Done))
        }
        "InstanceStart" => Err(Fault::bad_request(
            "InstanceStart is not possible: the machine is already running",
        )),
        other => Err(Fault::bad_request(format!(
            "unknown action_type '{other}'; there are InstanceStart, InstanceStop"
        ))),
    }
}

fn get_lazy_memory(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::LazyMemory, Response::LazyMemory(state) => Reply::json(&*state))
}

fn get_arenas(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::Arenas, Response::Arenas(arenas) => Reply::json(&arenas))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reclaim {
    amount_mib: Option<u64>,
    amount_bytes: Option<u64>,
}

fn put_reclaim(controller: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let reclaim: Reclaim = parse(body)?;
    let bytes = match (reclaim.amount_mib, reclaim.amount_bytes) {
        (Some(mib), None) => mebibytes(mib)?,
        (None, Some(bytes)) => bytes,
        _ => {
            return Err(Fault::bad_request(
                "give one of amount_mib and amount_bytes",
            ));
        }
    };
    if bytes == 0 {
        return Err(Fault::bad_request("the amount is 0; give 1 or more"));
    }
    ask!(controller, Command::Reclaim { bytes }, Response::Reclaimed(outcome) => Reply::json(&outcome))
}

fn get_teardown(controller: &dyn Controller, _: &[u8]) -> Result<Reply, Fault> {
    ask!(controller, Command::Teardown, Response::Teardown(state) => Reply::json(&state))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TeardownUpdate {
    workers: Option<usize>,
    batch_bytes: Option<u64>,
}

fn patch_teardown(controller: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: TeardownUpdate = parse(body)?;
    let (workers, batch) = (update.workers, update.batch_bytes);
    ask!(controller, Command::SetTeardown { workers, batch }, Response::Done => Ok(Reply::Done))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    // Serde would take an array for the fields in their order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(Fault::bad_request("the body is no JSON object"));
    }
    serde_json::from_slice(body)
        .map_err(|error| Fault::bad_request(format!("the body is not what is due here: {error}")))
}

fn mebibytes(amount: u64) -> Result<u64, Fault> {
    amount.checked_mul(1 << 20).ok_or_else(|| {
        Fault::bad_request(format!(
            "amount_mib is {amount}, but 64 bits hold at most {}",
            u64::MAX >> 20
        ))
    })
}
