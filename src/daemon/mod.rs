//! The daemon: pools of guests, for any language that speaks HTTP.
//!
//! - `options`, `config`: what it is told, as options and by a configuration file.
//! - `run`: its life: pools, listeners, and the end.
//! - `listen`: the Unix socket and the TCP port, and who is at the other end.
//! - `messages`: what requests and answers consist of.
//! - `routes`: what each request does. `operations` lists them, for the OpenAPI document (`openapi`).
//! - `page`: the status page, and what a browser is to allow it.
//! - `metrics`: the figures of pools, as Prometheus reads them.
//! - `client`: the other end, for the program's own commands.

mod client;
mod config;
mod error;
mod listen;
mod messages;
mod metrics;
mod openapi;
mod operations;
mod options;
mod page;
mod routes;
mod run;

pub use client::{Client, ClientError};
pub use config::{ConfigError, DaemonConfig};
pub use error::DaemonError;
pub use openapi::document as openapi_document;
pub use options::{DaemonOptions, default_socket};
pub use run::{DaemonEvent, run};
