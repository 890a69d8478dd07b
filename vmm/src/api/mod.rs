//! The REST API on a unix socket, in Firecracker's shape: JSON, 204 for "done", 400 and a `fault_message`
//! for "no". `routes` lists what can be asked, `server` serves it, `client` asks it.

mod client;
mod routes;
mod server;
mod view;

#[cfg(test)]
mod tests;

pub use client::{ClientError, request};
pub use server::{ApiError, Server, serve};
