//! `pool`, `take` and `release`: what a daemon is asked for.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::events::{CommandEvent, Taken};
use super::failure::Failure;
use super::host::parse_netdev;
use super::identity::Renewed;
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

    /// The socket that the environment names, if it does.
    pub fn of_environment() -> Option<PathBuf> {
        std::env::var_os("SNAPBACK_SOCKET").map(PathBuf::from)
    }

    pub fn client(&self) -> Client {
        let elsewhere = || Client::new(SocketArgs::of_environment().unwrap_or_else(default_socket));
        self.named().unwrap_or_else(elsewhere)
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
    /// The pool's guests may take so many MiB of memory together: those that wait what their QEMUs
    /// have of their own, those that are taken --guest-memory each
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Count a guest that is taken with so many MiB [default: all of the machine's memory, and 64]
    #[arg(long, value_name = "MIB")]
    guest_memory: Option<u64>,
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
    #[command(flatten)]
    setup: SetupArgs,
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

/// What is done for each guest of its own: as `revert` has it.
#[derive(Args)]
struct SetupArgs {
    /// Give each guest a new generation ID, by which it knows that it is one of several. The image
    /// must have been saved with the device vmgenid
    #[arg(long, value_name = "WHICH")]
    vmgenid: Option<Renewed>,
    /// Give each network card a new address, by the guest's agent and ip(8) in the guest. Until then
    /// the guest finds the card's cable unplugged
    #[arg(long, value_name = "WHICH")]
    mac: Option<Renewed>,
    /// Have the guest's agent (qemu-guest-agent) run COMMAND by the guest's /bin/sh as soon as it
    /// runs; with {n}, {name} and {dir}
    #[arg(long, value_name = "COMMAND")]
    agent_exec: Vec<String>,
    /// Have the guest's agent set the guest's clock to this host's time as soon as it runs
    #[arg(long)]
    agent_set_time: bool,
    /// The socket of the guest's agent [default: that of the port org.qemu.guest_agent.0 on the
    /// command line]; with {n}, {name} and {dir}
    #[arg(long, value_name = "PATH")]
    agent: Option<String>,
    /// Have the daemon run COMMAND (by sh -c) as soon as a guest runs; see SNAPBACK_CLONE,
    /// SNAPBACK_DIR, SNAPBACK_PID, SNAPBACK_QMP and SNAPBACK_PORTS in its environment
    #[arg(long, value_name = "COMMAND")]
    hook_running: Option<String>,
}

#[derive(Args)]
struct SetArgs {
    /// Its name
    name: String,
    /// So many guests wait, armed
    #[arg(long, value_name = "N", required_unless_present_any = ["max", "memory"])]
    armed: Option<u32>,
    /// So many guests may be taken at a time
    #[arg(long, value_name = "N")]
    max: Option<u32>,
    /// Its guests may take so many MiB of memory together; 0 for no limit
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
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
            memory_mib: self.memory,
            guest_memory_mib: self.guest_memory,
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
            new_generation: self.setup.vmgenid.is_some(),
            new_macs: self.setup.mac.is_some(),
            agent_set_time: self.setup.agent_set_time,
            agent_exec: self.setup.agent_exec,
            agent: self.setup.agent,
            hook_running: self.setup.hook_running,
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
        PoolCommand::Set(SetArgs { name, armed, max, memory: memory_mib }) => {
            daemon.change(&name, &Change { armed, max, memory_mib }).await?
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
            memory(pool),
            pool.waiting.to_string(),
            pool.takes.to_string(),
            pool.image.display().to_string(),
        ]
    };
    let head = ["POOL", "STATE", "ARMED", "TAKEN", "MEMORY", "WAITING", "TAKES", "IMAGE"];
    print_table(head, &pools.iter().map(row).collect::<Vec<_>>());
    for pool in pools {
        if let Some(problem) = &pool.problem {
            print_line(&format!("{}: {} ({})", pool.name, problem.message, problem.code));
        }
    }
}

/// What the guests of a pool use, and what they are counted with where that is limited.
fn memory(pool: &PoolView) -> String {
    let used = pool.used_bytes.map(|bytes| format!("{} MiB", bytes >> 20));
    let counted = pool
        .memory
        .map(|memory| format!("counted {} of {} MiB", memory.counted >> 20, memory.limit >> 20));
    match (used, counted) {
        (Some(used), Some(counted)) => format!("{used}, {counted}"),
        (used, counted) => used.or(counted).unwrap_or_else(|| "-".to_owned()),
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
    if guest.setup.is_some() {
        output.say("", "until its agent and the pool's command are done, it is like all others");
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
