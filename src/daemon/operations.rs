//! All requests that a daemon answers, for the OpenAPI document.

use schemars::{Schema, SchemaGenerator};

use super::messages::{ErrorBody, GivenName, Info};
use crate::kind::ErrorKind;
use crate::pools::{Change, GuestView, PoolConfig, PoolEvent, PoolView, ResetView};

/// A request.
pub(super) struct Operation {
    pub method: &'static str,
    pub path: &'static str,
    pub id: &'static str,
    pub summary: &'static str,
    pub body: Option<Body>,
    pub status: u16,
    pub answer: Answer,
    /// Kinds of errors beside those that any request may end with.
    pub errors: &'static [ErrorKind],
}

/// The schema of a type.
pub(super) type Describe = fn(&mut SchemaGenerator) -> Schema;

pub(super) struct Body {
    pub of: Describe,
    pub required: bool,
}

pub(super) enum Answer {
    Nothing,
    Json(Describe),
    /// A stream of events (server-sent events).
    Events(Describe),
    Text(&'static str),
}

/// What any request may end with.
pub(super) const ANY: [ErrorKind; 3] =
    [ErrorKind::Unauthorized, ErrorKind::Forbidden, ErrorKind::RequestInvalid];

pub(super) fn error(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<ErrorBody>()
}

fn of<T: schemars::JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn required(of: Describe) -> Option<Body> {
    Some(Body { of, required: true })
}

/// All of them.
pub(super) fn all() -> Vec<Operation> {
    use ErrorKind::*;
    let operation = |method, path, id, summary, answer| Operation {
        method,
        path,
        id,
        summary,
        body: None,
        status: 200,
        answer,
        errors: &[],
    };
    let json = Answer::Json;
    vec![
        operation("get", "/v1/info", "info", "What the daemon says of itself", json(of::<Info>)),
        operation("get", "/v1/pools", "listPools", "All pools", json(of::<Vec<PoolView>>)),
        Operation {
            body: required(of::<PoolConfig>),
            status: 201,
            errors: &[PoolExists],
            ..operation(
                "post",
                "/v1/pools",
                "createPool",
                "Create a pool, which fills from now on. For the daemon's own user only",
                json(of::<PoolView>),
            )
        },
        Operation {
            errors: &[NoSuchPool],
            ..operation("get", "/v1/pools/{pool}", "getPool", "A pool", json(of::<PoolView>))
        },
        Operation {
            body: required(of::<Change>),
            errors: &[NoSuchPool],
            ..operation(
                "patch",
                "/v1/pools/{pool}",
                "changePool",
                "Change how many guests wait and may be taken. For the daemon's own user only",
                json(of::<PoolView>),
            )
        },
        Operation {
            status: 204,
            errors: &[NoSuchPool],
            ..operation(
                "delete",
                "/v1/pools/{pool}",
                "removePool",
                "Remove a pool with all its guests. For the daemon's own user only",
                Answer::Nothing,
            )
        },
        Operation {
            body: Some(Body { of: of::<GivenName>, required: false }),
            errors: &[NoSuchPool, PoolExists, PoolExhausted, PoolDegraded, QemuFailed],
            ..operation(
                "post",
                "/v1/pools/{pool}/take",
                "take",
                "Take a guest, which runs when this answers",
                json(of::<GuestView>),
            )
        },
        operation(
            "get",
            "/v1/guests",
            "listGuests",
            "All guests that are taken",
            json(of::<Vec<GuestView>>),
        ),
        Operation {
            errors: &[NoSuchGuest],
            ..operation(
                "get",
                "/v1/guests/{id}",
                "getGuest",
                "A guest, by its id or name",
                json(of::<GuestView>),
            )
        },
        Operation {
            errors: &[NoSuchGuest, QemuFailed],
            ..operation(
                "post",
                "/v1/guests/{id}/reset",
                "reset",
                "Take a guest back to its image; it runs when this answers",
                json(of::<ResetView>),
            )
        },
        Operation {
            status: 204,
            errors: &[NoSuchGuest],
            ..operation(
                "delete",
                "/v1/guests/{id}",
                "release",
                "End a guest. Its directory is removed",
                Answer::Nothing,
            )
        },
        operation(
            "get",
            "/v1/events",
            "events",
            "Each pool as it is now, and then what happens",
            Answer::Events(of::<PoolEvent>),
        ),
        operation(
            "get",
            "/metrics",
            "metrics",
            "Figures for Prometheus",
            Answer::Text("text/plain"),
        ),
        operation("get", "/", "page", "The status page", Answer::Text("text/html")),
        operation(
            "get",
            "/v1/openapi.json",
            "openapi",
            "This document",
            Answer::Json(|_| Schema::from(true)),
        ),
    ]
}
