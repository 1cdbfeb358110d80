//! What a daemon is told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::keeper::Successor;
use crate::pools::{PoolSettings, PoolsOptions};
use crate::runs;

/// What a daemon is told.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DaemonOptions {
    /// The directory of all that outlives it.
    pub state: PathBuf,
    /// The Unix socket on which it listens. One that systemd passes on (sd_listen_fds(3)) is used
    /// in its place.
    pub listen: PathBuf,
    /// The group whose members may use pools by the socket; nobody but its owner may without.
    pub group: Option<String>,
    /// The address on which it listens for HTTP by TCP, if it does.
    pub http: Option<SocketAddr>,
    /// What whoever comes by TCP has to show. There has to be one for `http`.
    pub token: Option<String>,
    /// Pools that are there from the start.
    pub pools: BTreeMap<String, PoolSettings>,
    /// As [`PoolsOptions::cache`](crate::pools::PoolsOptions::cache).
    pub cache: u64,
    /// As [`PoolsOptions::arming`](crate::pools::PoolsOptions::arming).
    pub arming: usize,
    /// As [`RevertOptions::keeper`](crate::RevertOptions::keeper).
    pub keeper: Option<Successor>,
}

impl DaemonOptions {
    /// A daemon at the default places, without pools.
    pub fn new() -> DaemonOptions {
        DaemonOptions {
            state: default_state(),
            listen: default_socket(),
            group: None,
            http: None,
            token: None,
            pools: BTreeMap::new(),
            cache: PoolsOptions::new("").cache,
            arming: 1,
            keeper: None,
        }
    }
}

impl Default for DaemonOptions {
    fn default() -> DaemonOptions {
        DaemonOptions::new()
    }
}

/// Where a daemon of this user listens unless it is told otherwise:
/// `/run/snapback/daemon.sock` of root, `$XDG_RUNTIME_DIR/snapback/daemon.sock` else.
pub fn default_socket() -> PathBuf {
    // A login of root's has a runtime directory of its own, of which the daemon knows nothing.
    let directory = match nix::unistd::geteuid().is_root() {
        true => PathBuf::from("/run/snapback"),
        false => runs::base(),
    };
    directory.join("daemon.sock")
}

/// Where a daemon of this user keeps what outlives it unless it is told otherwise:
/// `/var/lib/snapback` of root, `$XDG_STATE_HOME/snapback` or `~/.local/state/snapback` else.
fn default_state() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/snapback".into();
    }
    let of = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || of("HOME").unwrap_or_else(std::env::temp_dir).join(".local/state");
    of("XDG_STATE_HOME").unwrap_or_else(home).join("snapback")
}
