//! A daemon's life: pools, listeners, and the end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::DaemonError;
use super::listen::{self, Caller};
use super::options::DaemonOptions;
use super::routes::{Served, router};
use crate::cancel::Cancellation;
use crate::pools::{Pools, PoolsOptions};

/// What a daemon tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum DaemonEvent {
    /// It answers requests.
    Listening {
        /// On this Unix socket.
        socket: PathBuf,
        /// And on this address by TCP.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        http: Option<SocketAddr>,
    },
}

/// Runs a daemon until `cancel` is requested. Guests that wait are ended then; those that were
/// taken run on, and the next daemon with the same state takes them up.
///
/// **Leave the process by _exit(2), or let the runtime be, when this has returned**: what brings a
/// guest's memory ends the guest with itself. The keeper of a guest whose memory is incomplete
/// replaces it.
///
/// # Errors
/// When it can't listen, or its pools can't be started.
pub async fn run(
    options: DaemonOptions,
    cancel: Cancellation,
    on_event: &mut impl FnMut(DaemonEvent),
) -> Result<(), DaemonError> {
    raise_descriptor_limit();
    let DaemonOptions { state, listen, group, http, token, pools, cache, arming, keeper } = options;
    if http.is_some() && token.is_none() {
        return Err(DaemonError::NoToken);
    }
    let (unix, socket) = listen::unix(&listen, group.as_deref())?;
    let tcp = match http {
        Some(address) => Some(listen::tcp(address).await?),
        None => None,
    };
    let options = PoolsOptions {
        keeper,
        cache,
        arming,
        address: Some(std::path::absolute(&socket.path).unwrap_or_else(|_| socket.path.clone())),
        ..PoolsOptions::new(state)
    };
    let pools = Pools::start(options, pools).await?;
    let served = Arc::new(Served { pools, token, began: Instant::now() });
    let service = router(Arc::clone(&served)).into_make_service_with_connect_info::<Caller>();
    on_event(DaemonEvent::Listening {
        socket: socket.path.clone(),
        http: tcp.as_ref().and_then(|listener| listener.local_addr().ok()),
    });
    // Each ends when this is dropped.
    let by_socket = axum::serve(unix, service.clone()).into_future();
    let by_tcp = async {
        match tcp {
            Some(tcp) => axum::serve(tcp, service).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = by_socket => {}
        _ = by_tcp => {}
        () = cancel.requested() => {}
    }
    served.pools.end_waiting().await;
    Ok(())
}

/// A guest takes some thirty descriptors, and 1024, as most processes are allowed (getrlimit(2)), are
/// soon used up.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("the limit of descriptors stays as it is: {error}");
    }
}
