//! The program's arguments, and what each command does with the library.

mod backup;
mod bench;
mod broker;
mod check;
mod clones;
mod comparison;
mod completion;
mod config;
mod daemon;
mod detach;
mod disks;
mod doctor;
mod domain;
mod events;
pub mod examples;
mod exchange;
mod failure;
mod flags;
mod flatten;
mod fork;
mod hand_over;
mod hook;
mod host;
mod identity;
mod keeper;
mod log;
mod output;
mod pin;
mod pool;
#[cfg(test)]
mod reference;
mod report;
mod repository;
mod reset;
mod resume;
mod revert;
mod rtc;
mod runs;
mod save;
mod settings;
mod style;
mod table;
mod writing;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, FromArgMatches, Parser, Subcommand, ValueEnum};

use self::failure::Failure;
use self::output::Output;
use self::settings::Settings;
use self::style::Colour;
pub use self::table::command;
use crate::cancel::Cancellation;
use crate::guest::RewriteOptions;
use crate::image::Compression;
use crate::memory::FillDelay;
use crate::revert::{Delivery, Placement, RevertOptions, ServeOptions, Target};

/// Exit code of a program that could not begin.
const FAILED: u8 = 1;

/// Instant snapshot and instant revert for QEMU virtual machines.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print results, warnings and errors only: no progress, and no word on the way
    #[arg(long, short, global = true, help_heading = "Output")]
    quiet: bool,
    /// Whether words are coloured
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "Output",
        hide_possible_values = true
    )]
    color: Colour,
}

#[derive(Subcommand)]
enum Command {
    /// Take a snapshot of a running guest: memory, devices and disks
    Save(Box<save::SaveArgs>),
    /// Tell whether a save would work, without touching the guest; or check a repository
    Check(Box<check::CheckArgs>),
    /// Start a saved guest, which runs at once
    Revert(Box<revert::RevertArgs>),
    /// Start clones of a running guest, which goes on
    Fork(Box<fork::ForkArgs>),
    /// Take a reverted guest back to its image, inside its QEMU
    Reset(reset::ResetArgs),
    /// Bring a saved guest to a QEMU that waits for an incoming migration
    Serve(ServeArgs),
    /// Show or record an image's working set: the pages that a revert brings first
    WorkingSet(WorkingSetArgs),
    /// Show what an image holds
    Info(ImageArgs),
    /// Write an image in another program's format
    Export(exchange::ExportArgs),
    /// Make an image of a guest that QEMU or libvirt saved
    Import(exchange::ImportArgs),
    /// Check every checksum of an image
    Verify(VerifyArgs),
    /// Merge an image and all its parents into one image
    Flatten(flatten::FlattenArgs),
    /// Make a repository: snapshots kept in a directory or an object store
    Init(repository::InitArgs),
    /// Put a snapshot into a repository: its image, the image's parents, its disks
    Push(repository::PushArgs),
    /// Bring a snapshot of a repository back as files
    Pull(repository::PullArgs),
    /// List the snapshots of a repository
    List(repository::ListArgs),
    /// Try whether a snapshot of a repository can be reverted on this host
    Drill(repository::DrillArgs),
    /// Save what a configuration file names into a repository, and forget what it does not keep
    Backup(backup::BackupArgs),
    /// Add tags to a snapshot of a repository, or remove some
    Tag(repository::TagArgs),
    /// Forget snapshots of a repository, by rules or by name
    Forget(repository::ForgetArgs),
    /// Remove from a repository what no snapshot refers to
    Prune(repository::PruneArgs),
    /// Tell how two snapshots of a repository differ
    Diff(repository::DiffArgs),
    /// Copy snapshots from one repository to another
    Copy(repository::CopyArgs),
    /// Put a snapshot into one file, with its memory and its disks
    Pack(repository::PackArgs),
    /// Bring a packed snapshot back as files
    Unpack(repository::UnpackArgs),
    /// List the reverts that are under way
    Ps(runs::PsArgs),
    /// End the guest of a revert that is under way, with its server
    Stop(runs::StopArgs),
    /// Print the log of a revert in the background
    Logs(runs::LogsArgs),
    /// Remove what reverts have left whose processes were killed
    Gc(runs::GcArgs),
    /// Run pools of guests that wait to be taken
    Daemon(daemon::DaemonArgs),
    /// Create, show, change and remove a daemon's pools
    Pool(pool::PoolArgs),
    /// Take a guest of a pool, which runs at once
    Take(pool::TakeArgs),
    /// End a guest that was taken
    Release(pool::ReleaseArgs),
    /// Print the JSON Schema of what all commands print with --json
    Schema {
        /// Print the OpenAPI document of the daemon instead
        #[arg(long)]
        openapi: bool,
    },
    /// Show the settings of this user and this host
    Config(config::ConfigArgs),
    /// Tell what this host and its QEMUs can do, and what would make it more
    Doctor(doctor::DoctorArgs),
    /// Measure ways of reverting an image on this machine
    Bench(Box<bench::BenchArgs>),
    /// Keep the rights that a page server in its sandbox still needs
    #[command(hide = true)]
    Broker(broker::BrokerArgs),
    /// Go on with a reverted guest whose page server and keeper were both killed
    Resume(resume::ResumeArgs),
}

/// How memory is brought, in whatever way it reaches the guest.
#[derive(Args, Clone)]
struct DeliveryArgs {
    #[command(flatten)]
    fill: FillArgs,
    /// Neither use nor record the image's working set
    #[arg(long)]
    no_working_set: bool,
}

/// How memory is filled that the guest does not wait for.
#[derive(Args, Clone)]
struct FillArgs {
    /// Fill memory at most this fast, in bytes a second (suffixes K, M, G: powers of 1024);
    /// what the guest waits for does not count, and neither do zeros
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    fill_rate: Option<u64>,
    /// Fill memory only once the guest has asked for none for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    fill_delay: Option<Duration>,
    /// End the revert when memory can't be read from the image, instead of waiting until the image
    /// is repaired or replaced by a whole copy
    #[arg(long)]
    fail_on_damage: bool,
    /// Leave memory in small pages; else it is collapsed into huge ones once it is in place
    #[arg(long)]
    no_collapse: bool,
}

impl DeliveryArgs {
    fn delivery(self, placement: Placement) -> Delivery {
        Delivery { working_set: !self.no_working_set, ..self.fill.delivery(placement) }
    }
}

impl FillArgs {
    /// Without a working set.
    fn delivery(self, placement: Placement) -> Delivery {
        Delivery {
            placement,
            fill_rate: self.fill_rate,
            fill_delay: self.fill_delay.map(FillDelay::Quiet),
            working_set: false,
            collapse: !self.no_collapse,
            fail_on_damage: self.fail_on_damage,
            ..Delivery::default()
        }
    }
}

/// What this program may do while it serves a guest.
#[derive(Args, Clone)]
struct SandboxArgs {
    /// Keep all rights while the guest is served, instead of entering a sandbox
    #[arg(long)]
    no_sandbox: bool,
}

impl SandboxArgs {
    /// The program of the broker, where a sandbox is wanted.
    fn program(self) -> Option<PathBuf> {
        (!self.no_sandbox).then(|| keeper::THIS_PROGRAM.into())
    }
}

#[derive(Args)]
#[command(after_help = SERVE_HELP)]
struct ServeArgs {
    /// The image
    image: PathBuf,
    /// The socket on which QEMU waits for the migration
    #[arg(long, value_name = "unix:PATH", value_parser = parse_unix_address)]
    to: PathBuf,
    #[command(flatten)]
    rtc: rtc::RtcArgs,
    /// How memory reaches the guest
    #[arg(long, value_name = "WAY", default_value = "auto")]
    place: ServePlacementArg,
    #[command(flatten)]
    delivery: DeliveryArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// What has to be done before `serve`.
const SERVE_HELP: &str = "\
Before, start QEMU with the machine, the devices and the disks that the guest was saved with \
(`snapback info` shows its command line) and with `-incoming defer`, and tell it by QMP:

  {\"execute\": \"migrate-set-capabilities\", \"arguments\":
    {\"capabilities\": [{\"capability\": \"postcopy-ram\", \"state\": true}]}}
  {\"execute\": \"migrate-incoming\", \"arguments\": {\"uri\": \"unix:PATH\"}}

Never start it on a frozen disk itself: give it an overlay over each.";

#[derive(Args)]
struct WorkingSetArgs {
    /// The image
    image: PathBuf,
    /// Record one by a revert that is discarded, without network and without disk writes
    #[arg(long)]
    harvest: bool,
    /// With --harvest: how long the guest is watched
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = parse_seconds)]
    window: Duration,
    /// With --harvest: the QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ImageArgs {
    /// The image
    image: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct VerifyArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Check its parents as well
    #[arg(long)]
    chain: bool,
}

/// As [`PlacementArg`](revert::PlacementArg), without `map`: a QEMU that runs already has its memory.
#[derive(Clone, Copy, ValueEnum)]
enum ServePlacementArg {
    /// Directly into its memory where that works, else by QEMU's socket
    Auto,
    /// Directly into its memory, by QEMU's userfaultfd, or fail
    Uffd,
    /// By QEMU's postcopy socket
    Socket,
    /// By an ordinary stream, all memory before the guest runs: needs no `postcopy-ram`
    Eager,
}

impl From<ServePlacementArg> for Placement {
    fn from(placement: ServePlacementArg) -> Placement {
        match placement {
            ServePlacementArg::Auto => Placement::Auto,
            ServePlacementArg::Uffd => Placement::Uffd,
            ServePlacementArg::Socket => Placement::Socket,
            ServePlacementArg::Eager => Placement::Eager,
        }
    }
}

fn parse_compression(text: &str) -> Result<Compression, String> {
    const DEFAULT_LEVEL: i32 = 1;
    let level = match text {
        "none" => return Ok(Compression::None),
        "zstd" => DEFAULT_LEVEL,
        _ => match text.strip_prefix("zstd:").map(str::parse) {
            Some(Ok(level @ -7..=19)) => level,
            Some(_) => return Err("the level is a number from -7 to 19".into()),
            None => return Err("it is none, zstd, or zstd:LEVEL".into()),
        },
    };
    Ok(Compression::Zstd(level))
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let rate = digits.parse().ok().and_then(|n: u64| n.checked_mul(1 << shift));
    rate.filter(|rate| *rate > 0).ok_or("it is a number of bytes a second, such as 200M".into())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    seconds.ok_or("it is a number of seconds, such as 0.5".into())
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.strip_suffix('%').unwrap_or(text).parse().ok();
    let share = share.filter(|share| (0.0..=100.0).contains(share));
    share.map(|share: f64| share / 100.0).ok_or("it is a share from 0% to 100%".into())
}

fn parse_path_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.into(), new.into())),
        _ => Err("it has the form OLD=NEW".into()),
    }
}

fn parse_unix_address(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("it has the form unix:PATH".into()),
    }
}

/// Runs the program with its arguments. Wrong usage ends it here, with a message and exit
/// code 2.
pub fn main() -> ExitCode {
    hand_over::to_program_with_libvirt();
    if let Some(code) = keeper::run(std::env::args_os().skip(1)) {
        return code;
    }
    completion::answer();
    let arguments: Vec<_> = std::env::args_os().collect();
    let settings = match Settings::of_host(&arguments) {
        Ok(settings) => settings,
        Err(failure) => {
            let json = arguments.iter().any(|argument| argument == "--json");
            Output::new(json).failure(&failure);
            return ExitCode::from(failure.exit_code());
        }
    };
    let matches = settings.apply(table::of_program(&arguments)).get_matches_from(arguments);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    style::set_up(cli.color, cli.quiet || settings.is_true("quiet"));
    log::init();
    let command = match cli.command {
        // It is to be small: no runtime.
        Command::Broker(args) => return ExitCode::from(broker::run(args)),
        command => command,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("snapback: starting up failed: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let code = runtime.block_on(run(command, &settings));
    leave(code)
}

/// Ends the program without waiting for its threads: a blocking call that is stuck, such as a read
/// of a failed disk, must not keep it from ending. Nor may exit(3) be called while they run: the
/// destructors of libraries that it calls take away what libvirt's event loop is using, and a signal
/// ends the program instead of its exit code.
fn leave(code: u8) -> ! {
    // What can't be written has nobody to be told to.
    let _ = std::io::stdout().flush();
    // SAFETY: _exit(2) ends the process and returns to nobody. What this program leaves unflushed
    // in user space is its standard output alone, flushed above: standard error is not buffered.
    unsafe { libc::_exit(code.into()) }
}

/// Returns the exit code.
async fn run(command: Command, settings: &Settings) -> u8 {
    let (json, result) = match command {
        Command::Save(args) => (args.json || args.serving_detached, save::run(*args).await),
        Command::Check(args) => (args.json, check::run(*args).await),
        Command::Fork(args) => (args.json, fork::run(*args).await),
        Command::Revert(args) => (args.json || args.serving_detached, revert::run(*args).await),
        Command::Serve(args) => (args.json, serve(args).await),
        Command::WorkingSet(args) => (args.json, working_set(args).await),
        Command::Info(args) => (args.json, report::info(&args.image, &Output::new(args.json))),
        Command::Export(args) => (args.write.json, exchange::export(args).await),
        Command::Import(args) => (args.written.write.json, exchange::import(args).await),
        Command::Init(args) => (args.json, repository::init(args).await),
        Command::Push(args) => (args.json, repository::push(args).await),
        Command::Pull(args) => (args.json, repository::pull(args).await),
        Command::List(args) => (args.json, repository::list(args).await),
        Command::Drill(args) => (args.json, repository::drill(args).await),
        Command::Backup(args) => (args.json, backup::run(args).await),
        Command::Tag(args) => (args.json, repository::tag(args).await),
        Command::Forget(args) => (args.json, repository::forget(args).await),
        Command::Prune(args) => (args.json, repository::prune(args).await),
        Command::Diff(args) => (args.json, repository::diff(args).await),
        Command::Copy(args) => (args.json, repository::copy(args).await),
        Command::Pack(args) => (args.json, repository::pack(args).await),
        Command::Unpack(args) => (args.json, repository::unpack(args).await),
        Command::Reset(args) => (args.json, reset::reset(args).await),
        Command::Ps(args) => (args.json, runs::ps(args).await),
        Command::Stop(args) => (args.json, runs::stop(args).await),
        Command::Daemon(args) => (args.json, daemon::run(args).await),
        Command::Pool(args) => (args.json, pool::pool(args).await),
        Command::Take(args) => (args.json, pool::take(args).await),
        Command::Release(args) => (args.json, pool::release(args).await),
        Command::Logs(args) => (false, runs::logs(args)),
        Command::Gc(args) => (args.json, runs::gc(args)),
        Command::Schema { openapi } => (false, {
            let text = match openapi {
                true => format!("{:#}\n", crate::daemon::openapi_document()),
                false => events::schema_text(),
            };
            output::print_raw(&text);
            Ok(())
        }),
        Command::Config(args) => (args.json(), config::run(args, settings)),
        Command::Doctor(args) => (args.json, doctor::run(args).await),
        Command::Bench(args) => (args.json, bench::bench(*args).await),
        Command::Verify(VerifyArgs { image: args, chain }) => {
            (args.json, report::verify(&args.image, chain, &Output::new(args.json)))
        }
        Command::Resume(args) => (args.json || args.serving_detached, resume::run(args).await),
        Command::Broker(args) => return broker::run(args),
        Command::Flatten(args) => (args.written.write.json, flatten::flatten(args).await),
    };
    match result {
        Ok(()) => 0,
        Err(failure) => {
            Output::new(json).failure(&failure);
            failure.exit_code()
        }
    }
}

async fn serve(args: ServeArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    let options = ServeOptions {
        delivery: args.delivery.delivery(args.place.into()),
        rtc: args.rtc.into(),
        sandbox: args.sandbox.program(),
        ..ServeOptions::new(args.image, Target::Migration(args.to))
    };
    let served = crate::revert::serve(&options, cancellation()?, |e| output.revert(&e)).await;
    served.map(drop).map_err(revert::explained)
}

async fn working_set(args: WorkingSetArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    if args.harvest {
        let rewrite = RewriteOptions { qemu: args.qemu, ..RewriteOptions::default() };
        let options = RevertOptions { rewrite, ..RevertOptions::new(&args.image) };
        crate::revert::harvest(&options, args.window, cancellation()?, |e| output.revert(&e))
            .await?;
    }
    report::working_set(&args.image, &output)
}

/// Cancellation by an interrupt from the terminal (SIGINT) or by SIGTERM.
fn cancellation() -> Result<Cancellation, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).map_err(|e| Failure::io("listening for signals failed", &e));
    let (mut interrupt, mut terminate) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let cancel = Cancellation::new();
    let requested = cancel.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            requested.request();
        }
    });
    Ok(cancel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn rates_and_times_are_read_as_documented() {
        assert_eq!(parse_rate("4096"), Ok(4096));
        assert_eq!(parse_rate("200M"), Ok(200 << 20));
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "0", "M", "-1", "1T", "99999999999999999999", "18446744073709551615G"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "-1", "inf", "x"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn compression_is_read_as_documented() {
        assert_eq!(parse_compression("none"), Ok(Compression::None));
        assert_eq!(parse_compression("zstd"), Ok(Compression::Zstd(1)));
        assert_eq!(parse_compression("zstd:-5"), Ok(Compression::Zstd(-5)));
        for wrong in ["", "lz4", "zstd:", "zstd:20", "zstd:x", "zstd1"] {
            assert!(parse_compression(wrong).is_err(), "{wrong}");
        }
    }
}
