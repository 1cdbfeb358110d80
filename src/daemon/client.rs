//! The other end of a daemon's socket.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::messages::{ErrorBody, GivenName};
use crate::kind::{Details, ErrorKind};
use crate::pools::{Change, GuestView, PoolConfig, PoolView, ResetView};

/// Why a daemon did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers.
    #[error(
        "no daemon answers at `{}` ({source}); start one by `snapback daemon`, or name its socket \
         by --socket or SNAPBACK_SOCKET",
        path.display()
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer can't be understood.
    #[error("the daemon at `{}` did not answer as it should: {problem}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// It says why not.
    #[error("{message}")]
    Refused {
        /// The kind of error.
        kind: ErrorKind,
        /// Why.
        message: String,
    },
}

impl ClientError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ClientError::Unreachable { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                ErrorKind::PermissionDenied
            }
            ClientError::Unreachable { .. } => ErrorKind::DaemonUnreachable,
            ClientError::Answer { .. } => ErrorKind::Internal,
            ClientError::Refused { kind, .. } => *kind,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            ClientError::Unreachable { path, .. } | ClientError::Answer { path, .. } => {
                Details::new(&self.to_string(), Some(path), None)
            }
            ClientError::Refused { .. } => Details::default(),
        }
    }
}

/// A daemon, by its socket.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// The daemon that listens on this Unix socket. Nothing is asked for yet.
    pub fn new(path: impl Into<PathBuf>) -> Client {
        Client { path: path.into() }
    }

    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All pools.
    ///
    /// # Errors
    /// As all requests: when the daemon does not answer, or says why not.
    pub async fn pools(&self) -> Result<Vec<PoolView>, ClientError> {
        self.ask(Method::GET, "/v1/pools", &()).await
    }

    /// Creates a pool.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn create(&self, config: &PoolConfig) -> Result<PoolView, ClientError> {
        self.ask(Method::POST, "/v1/pools", config).await
    }

    /// Changes a pool.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn change(&self, pool: &str, change: &Change) -> Result<PoolView, ClientError> {
        self.ask(Method::PATCH, &format!("/v1/pools/{}", encoded(pool)), change).await
    }

    /// Removes a pool with all its guests.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn remove(&self, pool: &str) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/pools/{}", encoded(pool)), &()).await
    }

    /// Takes a guest, under this name if there is one, within so many seconds.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn take(
        &self,
        pool: &str,
        name: Option<String>,
        timeout_s: Option<f64>,
    ) -> Result<GuestView, ClientError> {
        let path = format!("/v1/pools/{}/take", encoded(pool));
        self.ask(Method::POST, &path, &GivenName { name, timeout_s }).await
    }

    /// All guests that are taken.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn guests(&self) -> Result<Vec<GuestView>, ClientError> {
        self.ask(Method::GET, "/v1/guests", &()).await
    }

    /// Takes a guest back to its image.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn reset(&self, id: &str) -> Result<ResetView, ClientError> {
        self.ask(Method::POST, &format!("/v1/guests/{}/reset", encoded(id)), &()).await
    }

    /// Ends a guest.
    ///
    /// # Errors
    /// As [`pools`](Client::pools).
    pub async fn release(&self, id: &str) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/guests/{}", encoded(id)), &()).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Unreachable { path: self.path.clone(), source })?;
        let wrong = |problem: String| ClientError::Answer { path: self.path.clone(), problem };
        let broke = |error: hyper::Error| wrong(error.to_string());
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
        let connection = tokio::spawn(connection);
        let text = match serde_json::to_vec(body).map_err(|e| wrong(e.to_string()))? {
            text if text == b"null" => Vec::new(),
            text => text,
        };
        let request = Request::builder().method(method).uri(path).header(HOST, "snapback");
        let request = request.header(CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(Bytes::from(text)));
        let request = request.map_err(|error| wrong(error.to_string()))?;
        let answer = sender.send_request(request).await.map_err(broke)?;
        let status = answer.status();
        let text = answer.into_body().collect().await.map_err(broke)?.to_bytes();
        drop(sender);
        // It ends with the connection.
        connection.abort();
        if status.is_success() {
            let text = if text.is_empty() { b"null" } else { text.as_ref() };
            return serde_json::from_slice(text).map_err(|error| wrong(error.to_string()));
        }
        let ErrorBody { code, message, .. } =
            serde_json::from_slice(&text).map_err(|_| wrong(format!("HTTP status {status}")))?;
        let kind = ErrorKind::ALL.iter().copied().find(|kind| kind.code() == code);
        Err(ClientError::Refused { kind: kind.unwrap_or(ErrorKind::Internal), message })
    }
}

/// A name as a part of a URL's path.
fn encoded(name: &str) -> String {
    let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let encode = |byte: u8| match kept(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    name.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_part_of_a_path() {
        assert_eq!(encoded("a-1.b_c"), "a-1.b_c");
        assert_eq!(encoded("../x?y"), "..%2Fx%3Fy");
    }

    #[tokio::test]
    async fn nobody_at_the_socket_is_told_with_what_to_do() {
        let error = Client::new("/nowhere/daemon.sock").pools().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DaemonUnreachable);
        assert!(error.to_string().contains("snapback daemon"), "{error}");
    }
}
