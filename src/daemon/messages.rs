//! What requests and answers consist of, beside what pools are made of: JSON, and errors with a
//! code.

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::kind::ErrorKind;
use crate::pools::PoolError;

/// What a daemon says of itself.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct Info {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_s: f64,
}

/// What is said with a request for a guest.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GivenName {
    /// The name that it is to have, which no other guest of the pool may have: letters, digits,
    /// `.`, `_` and `-`, 32 at most [default: that of the pool's template].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How many seconds to wait for a guest at most [default: 30].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
}

/// Why a request was not done.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct ErrorBody {
    /// The kind of error: a word that never changes.
    pub code: String,
    /// What failed, why, and what to do.
    pub message: String,
    /// Whether the same may succeed later with nothing changed by hand.
    pub retryable: bool,
}

/// Why a request was not done.
pub(super) struct Failed {
    kind: ErrorKind,
    message: String,
}

impl Failed {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Failed {
        Failed { kind, message: message.into() }
    }

    fn status(&self) -> StatusCode {
        use ErrorKind::*;
        match self.kind {
            RequestInvalid | OptionsInvalid => StatusCode::BAD_REQUEST,
            Unauthorized => StatusCode::UNAUTHORIZED,
            Forbidden => StatusCode::FORBIDDEN,
            NoSuchPool | NoSuchGuest => StatusCode::NOT_FOUND,
            PoolExists => StatusCode::CONFLICT,
            PoolExhausted | PoolDegraded => StatusCode::SERVICE_UNAVAILABLE,
            NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl From<PoolError> for Failed {
    fn from(error: PoolError) -> Failed {
        Failed { kind: error.kind(), message: error.to_string() }
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = self.status();
        let body = ErrorBody {
            code: self.kind.code().to_owned(),
            message: self.message,
            retryable: self.kind.retryable(),
        };
        (status, Json(body)).into_response()
    }
}

/// The body of a request, which may be empty where all of it may be left out.
pub(super) fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failed> {
    let text = if body.is_empty() { b"{}" } else { body.as_ref() };
    // Of a list the fields would be read in their order.
    let read = serde_json::from_slice::<Map<String, Value>>(text);
    read.and_then(|fields| T::deserialize(Value::Object(fields)))
        .map_err(|error| Failed::new(ErrorKind::RequestInvalid, format!("the body: {error}")))
}
