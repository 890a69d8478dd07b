//! The REST API on a unix socket, in the style of Firecracker's: JSON bodies, status 204 for success without an answer,
//! 400 with a `fault_message` for failure. `routes` lists the endpoints, `server` serves them in the order of `admission`, `client` sends requests;
//! `view` gives the configuration Firecracker's names; `prometheus` writes the metrics for it; `machines` finds the servers of
//! this host. Requests to a machine that is not started go by `waiting` to the first thread, and are those of `before`.
//! `docs/api.md` describes the API for users.

mod admission;
pub mod before;
mod client;
mod drives;
pub mod machines;
mod prometheus;
mod routes;
mod scrape;
mod server;
mod stream;
mod view;
mod waiting;

#[cfg(test)]
mod tests;

pub use client::{ClientError, request};
pub use routes::{FIRECRACKER_VERSION, Fault, Reply};
pub use scrape::listen;
pub use server::{ApiError, Front, Server, serve, serve_with_metrics};
pub use view::config as describe;
pub use waiting::{Ask, Asker, Asks, waiting};
