//! `snapback daemon`: pools of guests that wait to be taken.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use super::output::Output;
use super::{cancellation, keeper, parse_unix_address};
use crate::daemon::{DaemonConfig, DaemonEvent, DaemonOptions};

#[derive(Args)]
pub(super) struct DaemonArgs {
    /// A configuration file (TOML): the same options, and pools; what is given here goes ahead
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Listen on this Unix socket [default: /run/snapback/daemon.sock of root, else
    /// $XDG_RUNTIME_DIR/snapback/daemon.sock]
    #[arg(long, value_name = "unix:PATH", value_parser = parse_unix_address)]
    listen: Option<PathBuf>,
    /// Let the members of this group use pools by the socket
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Listen for HTTP by TCP as well; needs --token-file
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
    /// The file of the token that whoever comes by TCP has to show (mode 0600)
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Keep pools and guests in this directory [default: /var/lib/snapback of root, else
    /// ~/.local/state/snapback]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Keep at most so many MiB of decompressed chunks of each image, for all its guests [default:
    /// 256]
    #[arg(long, value_name = "MIB")]
    cache: Option<u64>,
    /// Arm so many guests at a time, of all pools together [default: 1]
    #[arg(long, value_name = "N")]
    arming: Option<usize>,
    /// Start no processes that serve guests on should this one be killed
    #[arg(long)]
    no_keeper: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub(super) async fn run(args: DaemonArgs) -> Result<(), Failure> {
    limit_arenas();
    let output = Output::new(args.json);
    let file = args.config.as_deref().map(DaemonConfig::read).transpose()?.unwrap_or_default();
    let config = DaemonConfig {
        state: args.state.or(file.state),
        listen: args.listen.or(file.listen),
        group: args.group.or(file.group),
        http: args.http.or(file.http),
        token_file: args.token_file.or(file.token_file),
        cache_mib: args.cache.or(file.cache_mib),
        arming: args.arming.or(file.arming),
        pools: file.pools,
    };
    let options = config.options()?;
    let keeper = (!args.no_keeper).then(|| keeper::successor(true, true));
    let options = DaemonOptions { keeper, ..options };
    let tell = &mut |event: DaemonEvent| match (args.json, &event) {
        (true, _) => output.print_json(&event),
        (false, DaemonEvent::Listening { socket, http }) => {
            let http = http.map(|address| format!(" and http://{address}")).unwrap_or_default();
            output.say("listening", &format!("on {}{http}", socket.display()));
        }
    };
    Ok(crate::daemon::run(options, cancellation()?, tell).await?)
}

/// Has malloc(3) keep to few arenas. The threads that fill guests' memory come and go, and what one
/// has put into the cache of an image the next one evicts: with an arena of its own for each, glibc's
/// default of eight for each processor, 256 MiB of cache came to 700 MiB of memory, most of it holes.
#[cfg(target_env = "gnu")]
fn limit_arenas() {
    const ARENAS: libc::c_int = 2;
    // SAFETY: mallopt(3) takes two numbers, and may be called at any time.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) } != 1 {
        tracing::debug!("malloc keeps to as many arenas as it likes");
    }
}

#[cfg(not(target_env = "gnu"))]
fn limit_arenas() {}
