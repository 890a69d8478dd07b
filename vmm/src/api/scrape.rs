//! `--metrics-listen`: `GET /metrics`, and nothing else of the API, over TCP on loopback, for Prometheus.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::routes::{Fault, Handler, Reply};
use super::server::{ApiError, MAX_HEAD, READ_TIMEOUT, Served, carry_out, first, respond};

/// Connections that are served at the same time. Further ones wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 4;
/// Time that a connection may take, which is for one request.
const LIFETIME: Duration = Duration::from_secs(20);

/// Listens at `address`.
///
/// # Errors
/// [`ApiError::Listen`].
pub fn listen(address: SocketAddr) -> Result<TcpListener, ApiError> {
    let listen = || -> io::Result<TcpListener> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|source| ApiError::Listen { address, source })
}

/// Accepts connections until `stopped` is set.
pub(super) async fn accept(
    listener: tokio::net::TcpListener,
    served: Served,
    mut stopped: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut stop = pin!(stopped.wait_for(|stop| *stop));
    loop {
        let next = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&permits).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let Ok((permit, accepted)) = first(pin!(next), stop.as_mut()).await else {
            return;
        };
        match accepted {
            Ok((stream, _)) => {
                let served = served.clone();
                tokio::spawn(async move {
                    serve_connection(stream, served).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!("--metrics-listen: a connection was not accepted: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, served: Served) {
    let service = service_fn(|request| {
        let served = served.clone();
        async move { Ok::<_, Infallible>(respond(answer(request, served).await)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(READ_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(LIFETIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("--metrics-listen: a connection ended early: {error}"),
        Err(_) => tracing::debug!("--metrics-listen: a connection took too long"),
    }
}

async fn answer(request: Request<Incoming>, served: Served) -> Result<Reply, Fault> {
    if request.method() != Method::GET || request.uri().path() != "/metrics" {
        let message = "only GET /metrics is served here; use --api-socket for the rest";
        return Err(Fault::new(StatusCode::NOT_FOUND, message));
    }
    let commands = Arc::clone(&served.commands);
    let command = move || served.carry_out(&Method::GET, "/metrics", Some(Handler::Metrics), &[]);
    carry_out(&commands, command).await
}
