//! A machine that is not started yet: what clients of Firecracker's API ask for before `InstanceStart`. Each request changes the
//! [`Draft`], which is then checked as a command line of `ebb run` is.

mod bodies;
mod draft;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use hyper::Method;
use serde_json::Value;

use super::prometheus;
use super::routes::{self, Fault, Reply, parse};
use super::waiting::Ask;
use crate::config::MachineConfig;
use bodies::{Action, Load, Logger};

pub(super) use bodies::HINTING;
pub use bodies::log_level;

pub use draft::{Draft, Process};

/// What comes of a request.
pub enum Step {
    /// Nothing else is to be done.
    Reply(Reply),
    /// Build this machine and run it.
    Start(Box<MachineConfig>),
    /// Build the machine of a snapshot.
    Load(LoadSpec),
    /// Change where the log goes, and what is in it.
    Logger(LoggerSpec),
}

/// Where the memory of a snapshot comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadMemory {
    /// From its memory file.
    File(PathBuf),
    /// From the page server that listens on this socket.
    Server(PathBuf),
}

/// A snapshot to start from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadSpec {
    /// Its state file.
    pub state: PathBuf,
    /// Its memory.
    pub memory: LoadMemory,
    /// Run the guest at once.
    pub resume: bool,
    /// Another path of the vsock's socket.
    pub vsock: Option<PathBuf>,
    /// Other taps: names of interfaces, and of taps.
    pub taps: Vec<(String, String)>,
}

/// The log. `None` leaves something as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoggerSpec {
    /// The file that it goes to.
    pub path: Option<PathBuf>,
    /// The least important lines in it.
    pub level: Option<tracing::Level>,
}

/// Changes the draft, or reads it. The word is that of the path that stands for `{id}`.
pub(super) type Handler = fn(&mut Draft, &str, &[u8]) -> Result<Step, Fault>;

/// What can be asked before the start.
pub(super) const ROUTES: &[(Method, &str, Handler)] = &[
    (Method::GET, "/", |draft, _, _| reply(&draft.info())),
    (Method::GET, "/version", |_, _, _| reply(&routes::version())),
    (Method::GET, "/vm/config", |draft, _, _| {
        reply(&draft.view())
    }),
    (Method::GET, "/machine-config", |draft, _, _| {
        reply(&draft.machine())
    }),
    (Method::PUT, "/machine-config", |draft, _, body| {
        done(draft.set_machine(parse(body)?))
    }),
    (Method::PATCH, "/machine-config", |draft, _, body| {
        done(draft.update_machine(parse(body)?))
    }),
    (Method::PUT, "/boot-source", |draft, _, body| {
        done(draft.set_boot(parse(body)?))
    }),
    (Method::PUT, "/drives/{id}", |draft, id, body| {
        done(draft.set_drive(id, parse(body)?))
    }),
    (
        Method::PUT,
        "/network-interfaces/{id}",
        |draft, id, body| done(draft.set_net(id, parse(body)?)),
    ),
    (Method::PUT, "/vsock", |draft, _, body| {
        done(draft.set_vsock(parse(body)?))
    }),
    (Method::PUT, "/entropy", |draft, _, body| {
        done(draft.set_entropy(parse(body)?))
    }),
    (Method::GET, "/balloon", |draft, _, _| {
        reply(&draft.balloon()?)
    }),
    (Method::PUT, "/balloon", |draft, _, body| {
        done(draft.set_balloon(parse(body)?))
    }),
    (Method::PUT, "/serial", |draft, _, body| {
        done(draft.set_serial(parse(body)?))
    }),
    (Method::PUT, "/logger", put_logger),
    (Method::GET, "/metrics", |draft, _, _| {
        Ok(Step::Reply(Reply::Text(prometheus::head(&draft.info()))))
    }),
    (Method::PUT, "/metrics", |draft, _, body| {
        done(draft.set_metrics(parse(body)?))
    }),
    (Method::PUT, "/actions", put_action),
    (Method::PUT, "/snapshot/load", put_load),
];

/// Carries out a request to a machine that is not started.
///
/// # Errors
/// [`Fault`]; the draft is as it was.
pub fn step(draft: &mut Draft, ask: &Ask) -> Result<Step, Fault> {
    let (method, path, body) = (&ask.method, ask.path.as_str(), &ask.body);
    request(draft, method, path, body)
}

/// As [`step`], for a request of a configuration file.
///
/// # Errors
/// As [`step`].
pub fn put(draft: &mut Draft, path: &str, body: &Value) -> Result<Step, Fault> {
    request(draft, &Method::PUT, path, body.to_string().as_bytes())
}

fn request(draft: &mut Draft, method: &Method, path: &str, body: &[u8]) -> Result<Step, Fault> {
    match routes::find(method, path)?.before {
        Some(handler) => handler(draft, routes::name_in(path), body),
        None => Err(Fault::bad_request(format!(
            "{method} {path} is for a machine that runs; start it first (InstanceStart)"
        ))),
    }
}

/// The requests that a configuration file stands for: paths of PUT requests, and their bodies.
///
/// # Errors
/// What is wrong with the file.
pub fn requests_of(file: Value) -> Result<Vec<(String, Value)>, String> {
    let Value::Object(sections) = file else {
        return Err("it holds no JSON object".to_owned());
    };
    let mut requests = Vec::new();
    for (section, value) in sections {
        let id = match section.as_str() {
            "drives" => "drive_id",
            "network-interfaces" => "iface_id",
            "mmds-config" => {
                requests.push(("/mmds/config".to_owned(), value));
                continue;
            }
            _ => {
                requests.push((format!("/{section}"), value));
                continue;
            }
        };
        let Value::Array(devices) = value else {
            return Err(format!("{section} is no list"));
        };
        for device in devices {
            let name = device[id].as_str().map(str::to_owned);
            let name = name.ok_or_else(|| format!("{section}: a device without {id}"))?;
            requests.push((format!("/{section}/{name}"), device));
        }
    }
    // What is not there in a file may stand as null.
    requests.retain(|(_, body)| !body.is_null());
    Ok(requests)
}

fn reply(value: &impl serde::Serialize) -> Result<Step, Fault> {
    Reply::json(value).map(Step::Reply)
}

fn done(changed: Result<(), Fault>) -> Result<Step, Fault> {
    changed.map(|()| Step::Reply(Reply::Done))
}

fn put_action(draft: &mut Draft, _: &str, body: &[u8]) -> Result<Step, Fault> {
    let action: Action = parse(body)?;
    match action.action_type.as_str() {
        "InstanceStart" => Ok(Step::Start(Box::new(draft.finished()?))),
        other => Err(Fault::bad_request(format!(
            "{other} is not possible before the start; there is InstanceStart"
        ))),
    }
}

fn put_logger(_: &mut Draft, _: &str, body: &[u8]) -> Result<Step, Fault> {
    let logger: Logger = parse(body)?;
    Ok(Step::Logger(logger.spec()?))
}

fn put_load(draft: &mut Draft, _: &str, body: &[u8]) -> Result<Step, Fault> {
    let load: Load = parse(body)?;
    if !draft.is_empty() {
        return Err(Fault::bad_request(
            "the snapshot says what the machine is made of; load it before anything but the logger is set",
        ));
    }
    Ok(Step::Load(load.spec()?))
}
