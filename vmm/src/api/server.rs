//! The API's server: one thread, a limited number of connections, and a time limit for each step of a connection.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::admission::{Admission, MAX_CONNECTIONS, Peer};
use super::routes::{Fault, Handler, Reply};
use super::stream::Stream;
use super::waiting::Asker;
use super::{prometheus, routes, scrape};
use crate::config::{ConfigError, SocketPath, check_socket};
use crate::control::{Controller, Instance};
use crate::sys::panic_point;
use crate::sys::seccomp::Role;
use crate::sys::sockets::{BoundPath, FileIdentity, bind, remove_stale};

/// The option that names the socket.
const OPTION: &str = "--api-socket";
/// Requests that are carried out at the same time.
const MAX_COMMANDS: usize = MAX_CONNECTIONS;
/// Maximum length of a request's body in bytes.
const MAX_BODY: usize = 64 << 10;
/// Maximum length of a request's line and headers in bytes.
pub(super) const MAX_HEAD: usize = 16 << 10;
/// Time that a client has for a request's body.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 5 });
/// Time that a client has for its headers, for its body, and between two requests, while others wait for its place. Those who
/// have waited themselves have usually sent all before they get one.
pub(super) const CROWDED_TIMEOUT: Duration = Duration::from_millis(250);
/// After this time a connection accepts no further request if others wait. The one in progress is still answered.
const LIFETIME: Duration = Duration::from_secs(60);
/// Time that the last answer of a connection past its lifetime may take.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// Time that requests which are being carried out have to finish when the server stops.
const FINISH_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });
/// After so many connections that had to be refused no further one is accepted for a moment, so that refusing does not fill a processor.
/// Who waits behind them in the backlog waits that long.
const REFUSALS: u32 = 16;
const REFUSAL_TIME: Duration = Duration::from_millis(1);
/// Time after which the next connection is accepted when that has failed: the host has no descriptor, for instance.
const FAILURE_TIME: Duration = Duration::from_millis(100);
/// The answer to a connection that is refused.
const REFUSAL: &str = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: application/json\r\n\
    Content-Length: 100\r\n\r\n\
    {\"fault_message\":\"too many connections wait for the API; close those that you do not need, or wait\"}";
/// Time in which an answer that is there is written. A client that has not sent its request by then is cut off.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(20);

/// The server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The path cannot be used for a socket.
    #[error(transparent)]
    Path(#[from] ConfigError),
    /// The socket could not be created.
    #[error("--api-socket {}: {source}; choose a folder that you may write", path.display())]
    Bind {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The address for metrics cannot be listened at.
    #[error("--metrics-listen {address}: {source}; choose another port")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Error of the system call.
        source: io::Error,
    },
    /// The server's thread could not be started.
    #[error("the API's thread could not be started: {0}")]
    Thread(#[from] io::Error),
}

/// The machine, once it runs.
type Running = Option<Arc<dyn Controller>>;

/// The machine, once it is being built.
type Started = Option<Arc<dyn Instance>>;

/// What is served.
pub enum Front {
    /// A machine that is being built.
    Machine(Arc<dyn Instance>),
    /// One that is not started: who is asked until [`Server::set_instance`].
    Waiting(Asker),
}

/// What requests are made to.
#[derive(Clone)]
pub(super) struct Served {
    /// The clients are Firecracker's.
    as_firecracker: bool,
    /// Who is asked as long as there is no instance.
    asker: Option<Asker>,
    instance: watch::Receiver<Started>,
    machine: watch::Receiver<Running>,
    /// A command whose client has gone holds its permit until it is done.
    pub(super) commands: Arc<Semaphore>,
}

/// A running API server. Dropping it stops the server, joins its thread and removes the socket.
pub struct Server {
    stop: watch::Sender<bool>,
    instance: watch::Sender<Started>,
    machine: watch::Sender<Running>,
    thread: Option<JoinHandle<()>>,
    socket: BoundPath,
}

impl Server {
    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Device and inode of the socket.
    #[must_use]
    pub const fn identity(&self) -> FileIdentity {
        self.socket.identity()
    }

    /// A machine is being built now; `None`: it could not be built.
    pub fn set_instance(&self, instance: Option<Arc<dyn Instance>>) {
        self.instance.send_replace(instance);
    }

    /// The machine runs: requests to it, some of which may be waiting, are carried out from now on.
    pub fn set_machine(&self, machine: Arc<dyn Controller>) {
        self.machine.send_replace(Some(machine));
    }

    /// The socket will stay in the file system.
    pub fn leave_socket(&mut self) {
        self.socket.leave();
    }

    /// Removes the socket, while it is still open. Those who are connected stay so.
    pub fn remove_socket(&mut self) {
        self.socket.remove();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut server = f.debug_struct("Server");
        server.field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.remove_socket();
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Starts a thread that serves the API of `front` on a unix socket at `path`, which only this user may open
/// (mode 0600). A socket that a dead server left there is replaced.
///
/// Requests to a running machine wait until there is one, see [`Server::set_machine`].
///
/// Requests are carried out on further threads, so one that blocks does not delay other connections. When the
/// server is dropped, requests in progress have a second to finish.
///
/// # Errors
/// [`ApiError`] when the path cannot be used, another server listens there, or the thread cannot be started.
pub fn serve(path: &Path, front: Front) -> Result<Server, ApiError> {
    serve_with_metrics(path, None, front)
}

/// As [`serve`]; whoever connects to the listener `metrics` can ask for `GET /metrics`, too.
///
/// # Errors
/// As of [`serve`].
pub fn serve_with_metrics(
    path: &Path,
    metrics: Option<std::net::TcpListener>,
    front: Front,
) -> Result<Server, ApiError> {
    if check_socket(OPTION, path)? == SocketPath::Stale {
        remove_stale(path).map_err(|source| bind_error(path, source))?;
    }
    let (listener, socket) = bind(path).map_err(|source| bind_error(path, source))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let (listener, metrics) = {
        let _context = runtime.enter();
        let metrics = metrics.map(tokio::net::TcpListener::from_std).transpose()?;
        (tokio::net::UnixListener::from_std(listener)?, metrics)
    };
    let (stop, stopped) = watch::channel(false);
    let (as_firecracker, started, asker) = match front {
        Front::Machine(instance) => (instance.config().as_firecracker, Some(instance), None),
        Front::Waiting(asker) => (true, None, Some(asker)),
    };
    let (instance, machine) = (watch::Sender::new(started), watch::Sender::new(None));
    let served = Served {
        as_firecracker,
        asker,
        instance: instance.subscribe(),
        machine: machine.subscribe(),
        commands: Arc::new(Semaphore::new(MAX_COMMANDS)),
    };
    let thread = std::thread::Builder::new()
        .name("ebb-api".to_owned())
        .spawn(move || {
            Role::Api.enter();
            runtime.block_on(async {
                if let Some(metrics) = metrics {
                    tokio::spawn(scrape::accept(metrics, served.clone(), stopped.clone()));
                }
                accept(&listener, &served, stopped).await;
            });
            runtime.shutdown_timeout(FINISH_TIMEOUT);
        })?;
    Ok(Server {
        stop,
        instance,
        machine,
        thread: Some(thread),
        socket,
    })
}

fn bind_error(path: &Path, source: io::Error) -> ApiError {
    ApiError::Bind {
        path: path.to_owned(),
        source,
    }
}

/// Accepts connections until `stopped` is set, then waits for those in progress.
async fn accept(
    listener: &tokio::net::UnixListener,
    served: &Served,
    mut stopped: watch::Receiver<bool>,
) {
    let mut admission = Admission::new();
    let crowded = watch::Sender::new(false);
    let connection_stop = stopped.clone();
    let mut stop = pin!(stopped.wait_for(|stop| *stop));
    let (mut next_at, mut refusals) = (Instant::now(), 0u32);
    loop {
        while let Some((place, stream)) = admission.admit() {
            let (served, stop) = (served.clone(), connection_stop.clone());
            let crowded = crowded.subscribe();
            tokio::spawn(async move {
                serve_connection(stream, served, crowded, stop).await;
                drop(place);
            });
        }
        crowded.send_if_modified(|crowded| {
            let was = std::mem::replace(crowded, admission.is_crowded());
            was != *crowded
        });
        let event = next_event(&mut admission, listener, next_at);
        let event = first(pin!(event), stop.as_mut()).await;
        match event {
            Err(_) => break,
            Ok(Ok(())) => {}
            Ok(Err(Ok(stream))) => {
                if let Some(refused) = admission.arrive(peer(&stream), stream) {
                    // It has room for that, or is gone.
                    let _ = refused.try_write(REFUSAL.as_bytes());
                    refusals = refusals.wrapping_add(1);
                    if refusals.is_multiple_of(REFUSALS) {
                        next_at = Instant::now() + REFUSAL_TIME;
                    }
                }
            }
            Ok(Err(Err(error))) => {
                tracing::warn!("API: a connection was not accepted: {error}");
                next_at = Instant::now() + FAILURE_TIME;
            }
        }
    }
    let _ = timeout(2 * FINISH_TIMEOUT, admission.end()).await;
}

/// Waits until a place is free again, or there is a connection, as the error, not before `next_at`.
async fn next_event(
    admission: &mut Admission<UnixStream>,
    listener: &tokio::net::UnixListener,
    next_at: Instant,
) -> Result<(), io::Result<UnixStream>> {
    let next = async {
        if Instant::now() < next_at {
            sleep_until(next_at).await;
        }
        listener.accept().await.map(|(stream, _)| stream)
    };
    // Places are looked at first: no number of clients keeps the server from that.
    first(pin!(admission.wait_for_place()), pin!(next)).await
}

/// Who has connected.
fn peer(stream: &UnixStream) -> Peer {
    let found = stream.peer_cred().ok();
    // The kernel says 0 for one that it cannot name here.
    let pid = found.and_then(|it| it.pid()).filter(|pid| *pid != 0);
    (pid, found.map_or(u32::MAX, |it| it.uid()))
}

/// Returns the output of `wanted`, or as an error that of `stop` if that is ready first.
pub(super) async fn first<W: Future, S: Future>(
    mut wanted: Pin<&mut W>,
    mut stop: Pin<&mut S>,
) -> Result<W::Output, S::Output> {
    poll_fn(|context| {
        if let Poll::Ready(output) = wanted.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        stop.as_mut().poll(context).map(Err)
    })
    .await
}

/// What a connection is doing.
struct Activity {
    opened: Instant,
    /// Since when it has waited for a request, for the rest of its headers, or for its body; `None` while there is one.
    idle_since: Mutex<Option<Instant>>,
    /// A request is being carried out.
    is_busy: AtomicBool,
}

impl Activity {
    fn new() -> Self {
        let opened = Instant::now();
        Self {
            opened,
            idle_since: Mutex::new(Some(opened)),
            is_busy: AtomicBool::new(false),
        }
    }

    fn idle_since(&self) -> MutexGuard<'_, Option<Instant>> {
        // A time is always whole.
        self.idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The headers are there.
    fn begins(&self) {
        *self.idle_since() = Some(Instant::now());
    }

    /// So is the body.
    fn has_request(&self) {
        *self.idle_since() = None;
    }

    fn ends(&self) {
        self.is_busy.store(false, Ordering::Relaxed);
        *self.idle_since() = Some(Instant::now());
    }

    /// Waits until others wait for a place, and this connection has had its time.
    async fn is_overdue(&self, mut crowded: watch::Receiver<bool>) {
        let last = self.opened + LIFETIME;
        loop {
            if crowded.wait_for(|crowded| *crowded).await.is_err() {
                // The server ends, and says so in another way.
                return std::future::pending().await;
            }
            let now = Instant::now();
            let idle = *self.idle_since();
            let end = idle.map_or(last, |since| last.min(since + CROWDED_TIMEOUT));
            if now >= end {
                return;
            }
            sleep_until(end.min(now + CROWDED_TIMEOUT)).await;
        }
    }
}

/// Serves one connection. It may last: it is cut off when others want its place.
async fn serve_connection(
    stream: UnixStream,
    served: Served,
    crowded: watch::Receiver<bool>,
    mut stopped: watch::Receiver<bool>,
) {
    let activity = Activity::new();
    let service = service_fn(|request| {
        let (served, activity) = (served.clone(), &activity);
        async move {
            activity.begins();
            let reply = answer(request, served, activity).await;
            activity.ends();
            Ok::<_, Infallible>(respond(reply))
        }
    });
    let mut http = http1::Builder::new();
    http.header_read_timeout(None)
        .auto_date_header(false)
        .max_buf_size(MAX_HEAD);
    let stream = Stream::new(stream, served.as_firecracker);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let stop = pin!(stopped.wait_for(|stop| *stop));
    let overdue = pin!(activity.is_overdue(crowded));
    let end = pin!(first(overdue, stop));
    let is_stopped = match first(connection.as_mut(), end).await {
        Ok(result) => return log_end(result),
        Err(why) => why.is_err(),
    };
    let grace = match is_stopped {
        true if activity.is_busy.load(Ordering::Relaxed) => FINISH_TIMEOUT,
        false if activity.idle_since().is_none() => LAST_ANSWER_TIMEOUT,
        _ => FLUSH_TIMEOUT,
    };
    connection.as_mut().graceful_shutdown();
    if let Ok(result) = timeout(grace, connection).await {
        log_end(result);
    }
}

fn log_end(result: Result<(), hyper::Error>) {
    if let Err(error) = result {
        tracing::debug!("API: a connection ended early: {error}");
    }
}

/// Reads the request, waits for the machine if it is for one that runs, and then runs its handler on a thread that may
/// block. From then on the connection is busy.
async fn answer(
    request: Request<Incoming>,
    mut served: Served,
    activity: &Activity,
) -> Result<Reply, Fault> {
    panic_point();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let found = routes::find(&method, &path)?;
    let too_long = || {
        let message = format!("the body is longer than {MAX_BODY} bytes");
        Fault::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    if request.body().size_hint().lower() > MAX_BODY as u64 {
        return Err(too_long());
    }
    let body = Limited::new(request.into_body(), MAX_BODY);
    let body = match timeout(READ_TIMEOUT, body.collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_long()),
        Ok(Err(error)) => {
            let message = format!("the body cannot be read: {error}");
            return Err(Fault::bad_request(message));
        }
        Err(_) => {
            let message = format!("the body did not come within {} s", READ_TIMEOUT.as_secs());
            return Err(Fault::new(StatusCode::REQUEST_TIMEOUT, message));
        }
    };
    activity.has_request();
    if matches!(found.after, Some(Handler::Running(_) | Handler::Named(_))) {
        served.built().await;
    }
    let is_started = served.instance.borrow().is_some();
    activity.is_busy.store(true, Ordering::Relaxed);
    let commands = Arc::clone(&served.commands);
    let command = move || {
        panic_point();
        let asker = served.asker.as_ref().filter(|_| !is_started);
        let asked = asker.and_then(|asker| asker.ask(method.clone(), path.clone(), body.clone()));
        asked.unwrap_or_else(|| served.carry_out(&method, &path, found.after, &body))
    };
    carry_out(&commands, command).await
}

impl Served {
    /// Waits as long as a machine is being built.
    async fn built(&mut self) {
        let gone = pin!(self.instance.wait_for(Option::is_none));
        let _ = first(pin!(self.machine.wait_for(Option::is_some)), gone).await;
    }

    /// Carries out a request to a machine that is started.
    pub(super) fn carry_out(
        &self,
        method: &Method,
        path: &str,
        handler: Option<Handler>,
        body: &[u8],
    ) -> Result<Reply, Fault> {
        let (instance, machine) = (
            self.instance.borrow().clone(),
            self.machine.borrow().clone(),
        );
        match (handler, instance, machine) {
            (None, ..) => Err(Fault::bad_request(format!(
                "{method} {path} is possible only before the machine is started"
            ))),
            (Some(Handler::Always(handler)), Some(instance), _) => handler(instance.as_ref(), body),
            (Some(Handler::Metrics), Some(instance), machine) => Ok(Reply::Text(prometheus::text(
                instance.as_ref(),
                machine.as_deref(),
            ))),
            (Some(Handler::Running(handler)), _, Some(machine)) => handler(machine.as_ref(), body),
            (Some(Handler::Named(handler)), _, Some(machine)) => {
                handler(machine.as_ref(), routes::name_in(path), body)
            }
            // The server outlives its connections.
            (Some(_), ..) => Err(Fault::internal("the machine has ended")),
        }
    }
}

/// Runs `command` on a thread of its own, at most as many at a time as `commands` has permits. Not on tokio's threads:
/// tokio panics where the host has no thread left.
pub(super) async fn carry_out(
    commands: &Arc<Semaphore>,
    command: impl FnOnce() -> Result<Reply, Fault> + Send + 'static,
) -> Result<Reply, Fault> {
    // The semaphore is never closed.
    let permit = Arc::clone(commands).acquire_owned().await.ok();
    let (sender, answer) = oneshot::channel();
    let thread = std::thread::Builder::new().name("ebb-api-command".to_owned());
    let run = move || {
        // Whoever asked may have gone.
        let _ = sender.send(command());
        drop(permit);
    };
    if let Err(error) = thread.spawn(run) {
        let message = format!("the host has no thread for it: {error}");
        return Err(Fault::new(StatusCode::SERVICE_UNAVAILABLE, message));
    }
    let ended = |_| Err(Fault::internal("the command failed: it has panicked"));
    answer.await.unwrap_or_else(ended)
}

/// Makes an HTTP response of a reply or a fault.
pub(super) fn respond(reply: Result<Reply, Fault>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    let json = match reply {
        Ok(Reply::Done) => {
            *response.status_mut() = StatusCode::NO_CONTENT;
            return response;
        }
        Ok(Reply::Text(text)) => {
            let text_type = HeaderValue::from_static(prometheus::CONTENT_TYPE);
            response.headers_mut().insert(CONTENT_TYPE, text_type);
            *response.body_mut() = Full::from(text);
            return response;
        }
        Ok(Reply::Json(value)) => value,
        Err(fault) => {
            *response.status_mut() = fault.status;
            if let Some(allow) = fault.allow.and_then(|it| HeaderValue::from_str(&it).ok()) {
                response.headers_mut().insert(ALLOW, allow);
            }
            json!({ "fault_message": fault.message })
        }
    };
    let json_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json_type);
    *response.body_mut() = Full::from(json.to_string());
    response
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_client_is_known_by_its_process() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let (_other, one) = std::os::unix::net::UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        let _context = runtime.enter();
        let found = peer(&UnixStream::from_std(one).unwrap());
        let own = i32::try_from(std::process::id()).ok();
        assert_eq!(found, (own, rustix::process::getuid().as_raw()));
    }

    #[test]
    fn clients_that_go_do_not_make_more_threads() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let commands = Arc::new(Semaphore::new(2));
        let (starts, started) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let ends = Arc::new(std::sync::Mutex::new(ends));
        let command = |number| {
            let (starts, ends) = (starts.clone(), Arc::clone(&ends));
            move || {
                let _ = starts.send(number);
                let _ = ends.lock().map(|ends| ends.recv());
                Ok(Reply::Done)
            }
        };
        runtime.unwrap().block_on(async {
            for number in 0..4 {
                // Polled once, then dropped, as when its client goes.
                let mut asked = pin!(carry_out(&commands, command(number)));
                let gone = first(asked.as_mut(), pin!(std::future::ready(()))).await;
                assert!(gone.is_err());
            }
            end.send(()).unwrap();
            end.send(()).unwrap();
            end.send(()).unwrap();
            assert!(carry_out(&commands, command(4)).await.is_ok());
        });
        drop(starts);
        let mut numbers: Vec<_> = started.into_iter().collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 4]);
    }
}
