//! `pool`, `take` and `release`: what a daemon is asked for.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::events::{CommandEvent, Taken};
use super::failure::Failure;
use super::host::parse_netdev;
use super::output::{Output, print_line, print_table};
use super::{host, parse_path_pair, parse_seconds};
use crate::daemon::{Client, default_socket};
use crate::guest::NewPort;
use crate::pools::{Change, PoolConfig, PoolSettings, PoolState, PoolView};
use crate::revert::Preload;

/// The daemon that is asked.
#[derive(Args, Clone)]
pub(super) struct SocketArgs {
    /// The daemon's socket [default: $SNAPBACK_SOCKET, else /run/snapback/daemon.sock of root,
    /// $XDG_RUNTIME_DIR/snapback/daemon.sock of others]
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
}

impl SocketArgs {
    /// The daemon, if one is named here.
    pub fn named(&self) -> Option<Client> {
        self.socket.clone().map(Client::new)
    }

    pub fn client(&self) -> Client {
        let of_environment = || std::env::var_os("SNAPBACK_SOCKET").map(PathBuf::from);
        self.named().unwrap_or_else(|| Client::new(of_environment().unwrap_or_else(default_socket)))
    }
}

#[derive(Args)]
pub(super) struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
    #[command(flatten)]
    socket: SocketArgs,
    /// Print one JSON object a line
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Subcommand)]
enum PoolCommand {
    /// Create a pool of an image's guests
    Create(Box<CreateArgs>),
    /// Show all pools
    List,
    /// Change how many guests wait and may be taken
    Set(SetArgs),
    /// Remove a pool with all its guests
    Remove(RemoveArgs),
}

#[derive(Args)]
struct CreateArgs {
    /// Its name: letters, digits, ., _ and -
    name: String,
    /// The image
    image: PathBuf,
    /// So many guests wait, armed
    #[arg(long, value_name = "N", default_value_t = 1)]
    armed: u32,
    /// So many guests may be taken at a time
    #[arg(long, value_name = "N", default_value_t = 16)]
    max: u32,
    /// What of a guest's memory is in place while it waits
    #[arg(long, value_name = "WHAT", default_value = "working-set")]
    preload: PreloadArg,
    /// Don't track what guests write: a reset takes a new process
    #[arg(long)]
    not_resettable: bool,
    /// Have guests share memory that they have not written, by a flat copy of the image that the
    /// daemon keeps
    #[arg(long)]
    share: bool,
    /// The name of each guest, with {n} for its number [default: NAME-{n}]
    #[arg(long, value_name = "TEMPLATE")]
    guest_name: Option<String>,
    /// The directory of each guest, with {n} or {name} [default: one in the daemon's own]
    #[arg(long, value_name = "TEMPLATE")]
    dir: Option<String>,
    /// Bind the port NEW of this host in the place of OLD; auto, the default for all, is any free
    /// one
    #[arg(long = "port", value_name = "OLD=NEW", value_parser = host::parse_port_pair)]
    ports: Vec<(u16, NewPort)>,
    /// Use the path NEW wherever the recorded command line names OLD or a path below it; with {n},
    /// {name} and {dir}
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
    /// Use the network backend SPEC in place of the recorded one with this id; with {n}, {name} and
    /// {dir}
    #[arg(long = "netdev", value_name = "ID=SPEC", value_parser = parse_netdev)]
    netdevs: Vec<(String, String)>,
    /// The QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Give each guest a new generation ID
    #[arg(long)]
    new_generation: bool,
    /// Release a guest so many seconds after it was taken
    #[arg(long, value_name = "SECONDS")]
    lifetime: Option<u64>,
    /// Fill the rest of a guest's memory once it has asked for none for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    fill_delay: Option<Duration>,
    /// More arguments for QEMU, with {n}, {name} and {dir}
    #[arg(last = true, value_name = "QEMU ARGS")]
    extra: Vec<String>,
}

#[derive(Args)]
struct SetArgs {
    /// Its name
    name: String,
    /// So many guests wait, armed
    #[arg(long, value_name = "N", required_unless_present = "max")]
    armed: Option<u32>,
    /// So many guests may be taken at a time
    #[arg(long, value_name = "N")]
    max: Option<u32>,
}

#[derive(Args)]
struct RemoveArgs {
    /// Its name
    name: String,
}

#[derive(Args)]
pub(super) struct TakeArgs {
    /// The pool
    pool: String,
    /// The name that the guest is to have
    #[arg(long)]
    name: Option<String>,
    /// Wait so many seconds for a guest at most [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    timeout: Option<Duration>,
    #[command(flatten)]
    socket: SocketArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(super) struct ReleaseArgs {
    /// The id or the name of the guest
    id: String,
    #[command(flatten)]
    socket: SocketArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PreloadArg {
    /// What its device state brings along
    None,
    /// Its recorded working set
    WorkingSet,
    /// All of it
    All,
}

impl From<PreloadArg> for Preload {
    fn from(preload: PreloadArg) -> Preload {
        match preload {
            PreloadArg::None => Preload::Nothing,
            PreloadArg::WorkingSet => Preload::WorkingSet,
            PreloadArg::All => Preload::All,
        }
    }
}

impl CreateArgs {
    fn config(self) -> Result<PoolConfig, Failure> {
        let port = |(old, new): (u16, NewPort)| match new {
            NewPort::Free => (old.to_string(), 0),
            NewPort::Number(number) => (old.to_string(), number),
        };
        let settings = PoolSettings {
            armed: self.armed,
            max: self.max,
            preload: self.preload.into(),
            resettable: !self.not_resettable,
            share: self.share,
            dir: self.dir,
            guest_name: self.guest_name,
            ports: self.ports.into_iter().map(port).collect(),
            paths: self.paths.into_iter().collect(),
            netdevs: self.netdevs.into_iter().collect(),
            qemu: self.qemu.as_deref().map(std::path::absolute).transpose()?,
            arguments: self.extra,
            new_generation: self.new_generation,
            lifetime_s: self.lifetime,
            fill_delay_ms: self.fill_delay.map(|delay| delay.as_millis() as u64),
            // The daemon's working directory is another one.
            ..PoolSettings::new(std::path::absolute(&self.image)?)
        };
        Ok(PoolConfig { name: self.name, settings })
    }
}

/// Runs `pool`.
pub(super) async fn pool(args: PoolArgs) -> Result<(), Failure> {
    let (output, daemon) = (Output::new(args.json), args.socket.client());
    let view = match args.command {
        PoolCommand::Create(args) => daemon.create(&args.config()?).await?,
        PoolCommand::Set(SetArgs { name, armed, max }) => {
            daemon.change(&name, &Change { armed, max }).await?
        }
        PoolCommand::Remove(RemoveArgs { name }) => {
            daemon.remove(&name).await?;
            match output.is_json() {
                true => output.print_json(&CommandEvent::PoolRemoved { pool: name }),
                false => print_line(&format!("removed  {name}")),
            }
            return Ok(());
        }
        PoolCommand::List => {
            let pools = daemon.pools().await?;
            return match output.is_json() {
                true => {
                    pools.into_iter().for_each(|pool| output.print_json(&event(pool)));
                    Ok(())
                }
                false => {
                    show(&pools);
                    Ok(())
                }
            };
        }
    };
    match output.is_json() {
        true => output.print_json(&event(view)),
        false => show(&[view]),
    }
    Ok(())
}

fn event(pool: PoolView) -> CommandEvent {
    CommandEvent::Pool(Box::new(pool))
}

fn show(pools: &[PoolView]) {
    let row = |pool: &PoolView| {
        let state = match pool.state {
            PoolState::Ready => "ready",
            PoolState::Filling => "filling",
            PoolState::Degraded => "degraded",
        };
        [
            pool.name.clone(),
            state.to_owned(),
            format!("{} of {}", pool.ready, pool.armed),
            format!("{} of {}", pool.running, pool.max),
            pool.waiting.to_string(),
            pool.takes.to_string(),
            pool.image.display().to_string(),
        ]
    };
    let head = ["POOL", "STATE", "ARMED", "TAKEN", "WAITING", "TAKES", "IMAGE"];
    print_table(head, &pools.iter().map(row).collect::<Vec<_>>());
    for pool in pools {
        if let Some(problem) = &pool.problem {
            print_line(&format!("{}: {} ({})", pool.name, problem.message, problem.code));
        }
    }
}

/// Runs `take`.
pub(super) async fn take(args: TakeArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    let timeout = args.timeout.map(|timeout| timeout.as_secs_f64());
    let guest = args.socket.client().take(&args.pool, args.name, timeout).await?;
    if args.json {
        output.print_json(&CommandEvent::Running(Box::new(Taken::new(guest))));
        return Ok(());
    }
    let took = guest.ms.map(|ms| format!("{ms:.1} ms")).unwrap_or_default();
    let name = &guest.name;
    output
        .say("running", &format!("{name} ({}), QEMU process {}: {took}", guest.id, guest.qemu_pid));
    if let Some(qmp) = &guest.qmp {
        output.say("", &format!("QMP at {}", qmp.display()));
    }
    for (old, new) in &guest.ports {
        output.say("", &format!("port {new} of this host in the place of {old}"));
    }
    Ok(())
}

/// Runs `release`.
pub(super) async fn release(args: ReleaseArgs) -> Result<(), Failure> {
    let (client, output, id) = (args.socket.client(), Output::new(args.json), &args.id);
    client.release(id).await?;
    match output.is_json() {
        true => output.print_json(&CommandEvent::Released { id: id.to_owned() }),
        false => print_line(&format!("released {id}")),
    }
    Ok(())
}
