//! The REST API on a unix socket, in the style of Firecracker's: JSON bodies, status 204 for success without an answer,
//! 400 with a `fault_message` for failure. `routes` lists the endpoints, `server` serves them, `client` sends requests;
//! `view` gives the configuration Firecracker's names; `prometheus` writes the metrics for it.
//! `docs/api.md` describes the API for users.

mod client;
mod drives;
mod prometheus;
mod routes;
mod server;
mod view;

#[cfg(test)]
mod tests;

pub use client::{ClientError, request};
pub use server::{ApiError, Server, serve};
