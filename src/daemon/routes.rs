//! What each request does.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, Stream};
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;

use super::listen::Caller;
use super::messages::{Failed, GivenName, Info, parse};
use super::{metrics, openapi, page};
use crate::kind::ErrorKind;
use crate::pools::{Change, PoolConfig, PoolEvent, Pools, Take};

/// The longest that a request for a guest may wait, in seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// What all requests have in common.
pub(super) struct Served {
    pub pools: Pools,
    pub token: Option<String>,
    pub began: Instant,
}

type Shared = State<Arc<Served>>;
type Answer<T> = Result<Json<T>, Failed>;

/// All requests.
pub(super) fn router(served: Arc<Served>) -> Router {
    let guarded = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/pools", get(list).post(create))
        .route("/v1/pools/{pool}", get(pool).patch(change).delete(remove))
        .route("/v1/pools/{pool}/take", post(take))
        .route("/v1/guests", get(guests))
        .route("/v1/guests/{id}", get(guest).delete(release))
        .route("/v1/guests/{id}/reset", post(reset))
        .route("/v1/events", get(events))
        .route("/metrics", get(metrics_text))
        .layer(middleware::from_fn_with_state(Arc::clone(&served), guard));
    // Neither tells anything of this daemon.
    let open = Router::new().route("/", get(page::page)).route("/v1/openapi.json", get(document));
    guarded.merge(open).fallback(unknown).method_not_allowed_fallback(unknown).with_state(served)
}

/// Lets those through who may.
async fn guard(
    State(served): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let allowed = match caller {
        Caller::Owner => Ok(()),
        Caller::Remote if !has_token(&served, &request) => Err(Failed::new(
            ErrorKind::Unauthorized,
            "by TCP each request takes the daemon's token: Authorization: Bearer TOKEN",
        )),
        Caller::Member | Caller::Remote if changes_pools(&request) => Err(Failed::new(
            ErrorKind::Forbidden,
            "what a pool is made of names programs and files: only the daemon's own user may say \
             it, by the Unix socket, or its configuration",
        )),
        Caller::Member | Caller::Remote => Ok(()),
    };
    match allowed {
        Ok(()) => next.run(request).await,
        Err(failed) => failed.into_response(),
    }
}

/// Whether it says what pools there are, and what they are made of.
fn changes_pools(request: &Request) -> bool {
    let takes = request.uri().path().ends_with("/take");
    request.uri().path().starts_with("/v1/pools") && request.method() != Method::GET && !takes
}

fn has_token(served: &Served, request: &Request) -> bool {
    let shown = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
    let shown = shown.and_then(|value| value.strip_prefix(b"Bearer "));
    match (&served.token, shown) {
        (Some(token), Some(shown)) => is_same(token.as_bytes(), shown),
        _ => false,
    }
}

/// Whether both are the same. How long it takes says nothing of where they differ.
fn is_same(token: &[u8], shown: &[u8]) -> bool {
    let differ = |(a, b): (&u8, &u8)| a ^ b;
    token.len() == shown.len() && token.iter().zip(shown).map(differ).fold(0, |a, b| a | b) == 0
}

async fn unknown(request: Request) -> Response {
    let what = format!("there is no {} {}", request.method(), request.uri().path());
    let body = Failed::new(ErrorKind::RequestInvalid, format!("{what}; see GET /v1/openapi.json"));
    let mut response = body.into_response();
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

async fn info(State(served): Shared) -> Json<Info> {
    Json(Info {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_s: served.began.elapsed().as_secs_f64(),
    })
}

async fn list(State(served): Shared) -> impl IntoResponse {
    Json(served.pools.list())
}

async fn create(State(served): Shared, body: Bytes) -> Result<Response, Failed> {
    let config: PoolConfig = parse(&body)?;
    let view = served.pools.create(config)?;
    Ok((StatusCode::CREATED, Json(view)).into_response())
}

async fn pool(State(served): Shared, Path(name): Path<String>) -> Answer<crate::pools::PoolView> {
    Ok(Json(served.pools.get(&name)?))
}

async fn change(
    State(served): Shared,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<crate::pools::PoolView> {
    let change: Change = parse(&body)?;
    Ok(Json(served.pools.change(&name, &change).await?))
}

async fn remove(State(served): Shared, Path(name): Path<String>) -> Result<StatusCode, Failed> {
    served.pools.remove(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn take(
    State(served): Shared,
    Path(pool): Path<String>,
    body: Bytes,
) -> Answer<crate::pools::GuestView> {
    let began = Instant::now();
    let GivenName { name, timeout_s } = parse(&body)?;
    let mut take = Take { name, began, ..Take::default() };
    if let Some(seconds) = timeout_s {
        if !(0.0..=MAX_TIMEOUT).contains(&seconds) {
            let what = format!("timeout_s: {seconds} is not from 0 to {MAX_TIMEOUT}");
            return Err(Failed::new(ErrorKind::RequestInvalid, what));
        }
        take.patience = Duration::from_secs_f64(seconds);
    }
    Ok(Json(served.pools.take(&pool, take).await?))
}

async fn guests(State(served): Shared) -> impl IntoResponse {
    Json(served.pools.guests())
}

async fn guest(State(served): Shared, Path(id): Path<String>) -> Answer<crate::pools::GuestView> {
    Ok(Json(served.pools.guest(&id)?))
}

async fn reset(State(served): Shared, Path(id): Path<String>) -> Answer<crate::pools::ResetView> {
    Ok(Json(served.pools.reset(&id).await?))
}

async fn release(State(served): Shared, Path(id): Path<String>) -> Result<StatusCode, Failed> {
    served.pools.release(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn metrics_text(State(served): Shared) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(&served.pools.figures()))
}

async fn document() -> impl IntoResponse {
    Json(openapi::document())
}

/// An event, with when it was told.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    event: &'a PoolEvent,
    unix_ms: u64,
}

/// Tells of each pool as it is now, and then what happens.
async fn events(
    State(served): Shared,
) -> Sse<impl Stream<Item = Result<Event, Infallible>> + use<>> {
    let events = served.pools.events();
    let first: Vec<_> = served.pools.list().into_iter().map(PoolEvent::Pool).collect();
    let first = stream::iter(first.into_iter().map(|event| Ok(told(&event))));
    let following = stream::unfold(events, |mut events| async move {
        loop {
            match events.recv().await {
                Ok(event) => return Some((Ok(told(&event)), events)),
                // Who is too slow misses some; each tells a state of its own.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    });
    use futures_util::StreamExt;
    Sse::new(first.chain(following)).keep_alive(KeepAlive::default())
}

fn told(event: &PoolEvent) -> Event {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let told = Told { event, unix_ms: since.as_millis() as u64 };
    // What consists of names, numbers and text can be written.
    Event::default().json_data(told).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_as_a_whole() {
        assert!(is_same(b"0123456789abcdef", b"0123456789abcdef"));
        for wrong in [&b""[..], b"0123456789abcdeg", b"0123456789abcde", b"0123456789abcdef0"] {
            assert!(!is_same(b"0123456789abcdef", wrong));
        }
    }
}
