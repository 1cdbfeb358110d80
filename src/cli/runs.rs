//! `ps`, `stop`, `logs` and `gc`: the reverts that are under way, and what killed ones left.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::events::{CacheOf, CommandEvent};
use super::failure::Failure;
use super::output::{Output, print_line, print_table};
use super::pool::SocketArgs;
use crate::daemon::{Client, ClientError};
use crate::pools::CacheView;
use crate::runs::{self, LeftOver, LeftOverKind, Run, RunsError, Stopped};

/// How long a daemon may take to tell of its caches that was not named.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Args)]
pub(super) struct PsArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Print one JSON object a line, one for each revert
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(super) struct StopArgs {
    /// The id of the revert, or its beginning (`snapback ps` shows ids)
    id: String,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(super) struct LogsArgs {
    /// The id of the revert, or its beginning (`snapback ps` shows ids)
    id: String,
}

#[derive(Args)]
pub(super) struct GcArgs {
    /// Remove without asking
    #[arg(long)]
    yes: bool,
    /// Print one JSON object a line; without --yes nothing is removed then
    #[arg(long)]
    pub json: bool,
}

/// Lists the reverts that are under way, and what daemons keep of their images.
pub(super) async fn ps(args: PsArgs) -> Result<(), Failure> {
    let (output, runs) = (Output::new(args.json), runs::list()?);
    let caches = caches(&args.socket, &runs).await?;
    if args.json {
        runs.into_iter().for_each(|run| output.print_json(&CommandEvent::Run(Box::new(run))));
        let events = caches.into_iter().map(|cache| CommandEvent::Cache(Box::new(cache)));
        events.for_each(|event| output.print_json(&event));
        return Ok(());
    }
    let head =
        ["ID", "QEMU", "SERVER", "KEEPER", "WAY", "PRESENT", "FAULTS", "RESTARTS", "AGE", "IMAGE"];
    print_table(head, &runs.iter().map(row).collect::<Vec<_>>());
    for run in runs.iter().filter(|run| run.waits_for.is_some()) {
        let what = run.waits_for.as_deref().unwrap_or_default();
        print_line(&format!("{} is waiting for the {what}, and goes on when it answers", run.id));
    }
    for run in runs.iter().filter(|run| run.is_stuck()) {
        let (id, image) = (&run.id, run.image.display());
        let pid = run.qemu_pid.unwrap_or_default();
        let goes_on = match run.image.exists() {
            true => format!("`snapback resume {image} --pid {pid}` goes on with it"),
            // One of a repository.
            false => format!("{image} is not on this host; `snapback stop {id}` ends it"),
        };
        print_line(&format!(
            "{id} waits for memory that nobody brings: its server and keeper were killed; {goes_on}"
        ));
    }
    if runs.iter().any(Run::is_over) {
        print_line("`snapback gc` removes what reverts have left that have no process any more");
    }
    for CacheOf { daemon, image, pools, cache } in &caches {
        let (daemon, image, pools) = (daemon.display(), image.display(), pools.join(", "));
        let CacheView { bytes, limit, hits, misses, .. } = cache;
        let found = *hits as f64 * 100.0 / (hits + misses).max(1) as f64;
        print_line(&format!(
            "the daemon at {daemon} keeps {} of at most {} MiB of {image} decompressed ({pools}); \
             {found:.0} % of what guests have asked for was there",
            bytes >> 20,
            limit >> 20
        ));
    }
    Ok(())
}

/// The caches of all daemons that are known of: those of the reverts that are under way, and the one
/// that is named, which has to answer.
async fn caches(named: &SocketArgs, runs: &[Run]) -> Result<Vec<CacheOf>, Failure> {
    let mut daemons: BTreeSet<PathBuf> =
        runs.iter().filter_map(|run| Some(run.pool()?.daemon.clone())).collect();
    let mut caches = Vec::new();
    match named.named() {
        Some(daemon) => {
            daemons.remove(daemon.path());
            caches.extend(caches_of(&daemon).await?);
        }
        None => daemons.extend(SocketArgs::of_environment()),
    }
    for daemon in daemons {
        // Its guests outlive it, and one that hangs keeps nobody from seeing what there is.
        let asked = tokio::time::timeout(PATIENCE, caches_of(&Client::new(daemon))).await;
        caches.extend(asked.ok().and_then(Result::ok).unwrap_or_default());
    }
    Ok(caches)
}

async fn caches_of(daemon: &Client) -> Result<Vec<CacheOf>, ClientError> {
    let mut caches: Vec<(bool, CacheOf)> = Vec::new();
    for pool in daemon.pools().await? {
        let Some(cache) = pool.cache else { continue };
        // Guests that share memory have a flat copy of the image, and so another cache.
        let known =
            |(share, of): &&mut (bool, CacheOf)| *share == pool.share && of.image == pool.image;
        match caches.iter_mut().find(known) {
            Some((_, of)) => of.pools.push(pool.name),
            None => {
                let (daemon, pools) = (daemon.path().to_owned(), vec![pool.name]);
                caches.push((pool.share, CacheOf { daemon, image: pool.image, pools, cache }));
            }
        }
    }
    Ok(caches.into_iter().map(|(_, cache)| cache).collect())
}

/// The columns of a revert.
fn row(run: &Run) -> [String; 10] {
    fn shown<T: ToString>(value: Option<T>) -> String {
        value.map_or("-".to_owned(), |value| value.to_string())
    }
    [
        run.id.clone(),
        shown(run.qemu_pid),
        shown(run.server_pid),
        shown(run.keeper_pid),
        shown(run.way.as_ref()),
        shown(run.present.map(|share| format!("{:.0} %", share * 100.0))),
        shown(run.faults),
        shown(run.restarts),
        format!("{:.0} s", run.age_s),
        run.image.display().to_string(),
    ]
}

/// Ends a guest with its server.
pub(super) async fn stop(args: StopArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    let run = runs::find(&args.id)?;
    if let Some(of) = run.pool() {
        // Without its daemon, it is ended as any other is.
        match Client::new(&of.daemon).release(&run.id).await {
            Err(ClientError::Unreachable { .. }) => {}
            released => {
                released?;
                let (id, qemu_pid) = (run.id.clone(), run.qemu_pid);
                return tell_stopped(&output, id, Stopped::of_pool(qemu_pid));
            }
        }
    }
    let stopped = run.stop()?;
    tell_stopped(&output, run.id, stopped)
}

fn tell_stopped(output: &Output, id: String, stopped: Stopped) -> Result<(), Failure> {
    let Stopped { qemu_pid, removed, kept, .. } = stopped;
    if output.is_json() {
        output.print_json(&CommandEvent::Ended { id, qemu_pid, removed, kept });
        return Ok(());
    }
    match qemu_pid {
        Some(pid) => print_line(&format!("ended    {id} (QEMU process {pid})")),
        None => print_line(&format!("ended    {id} (its QEMU had ended before)")),
    }
    removed.iter().for_each(|path| print_line(&format!("removed  {}", path.display())));
    // What a guest with all its memory has written is its owner's: no record leads there any more.
    let who = match runs::base().join(&id).exists() {
        true => "`snapback gc` removes it",
        false => "remove it by hand",
    };
    for path in &kept {
        let path = path.display();
        print_line(&format!(
            "kept     {path}: the guest has written to it; {who} if nobody needs it"
        ));
    }
    Ok(())
}

/// Prints the log of a revert's server.
pub(super) fn logs(args: LogsArgs) -> Result<(), Failure> {
    let run = runs::find(&args.id)?;
    let path = run.log()?;
    let copied = File::open(path).and_then(|mut log| io::copy(&mut log, &mut io::stdout().lock()));
    match copied {
        // Nothing is done about a reader that has gone away.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(RunsError::Log { path: path.to_owned(), source: error }.into())
        }
        _ => Ok(()),
    }
}

/// Removes what killed reverts have left.
pub(super) fn gc(args: GcArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    let found = runs::left_overs()?;
    let remove = args.yes || (!args.json && !found.is_empty() && is_wanted(&found));
    let mut failed = None;
    for left in found {
        let removed = match remove.then(|| left.remove()) {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                failed.get_or_insert(error);
                false
            }
            None => false,
        };
        match args.json {
            true => output.print_json(&CommandEvent::LeftOver { left, removed }),
            false if removed => print_line(&format!("removed  {}", describe(&left))),
            false => {}
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// Shows what was found, and asks whether to remove it.
fn is_wanted(found: &[LeftOver]) -> bool {
    found.iter().for_each(|left| print_line(&format!("found    {}", describe(left))));
    if !io::stdin().is_terminal() {
        print_line("`snapback gc --yes` removes all of that");
        return false;
    }
    let mut answer = String::new();
    let mut stderr = io::stderr();
    let _ = write!(stderr, "Remove all of that? [y/N] ").and_then(|()| stderr.flush());
    let read = io::stdin().lock().read_line(&mut answer);
    read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

fn describe(left: &LeftOver) -> String {
    let path = left.path.display();
    match left.what {
        LeftOverKind::Overlay => format!("{path} (an overlay: what a guest had written)"),
        LeftOverKind::Socket => format!("{path} (a socket on which nobody listens)"),
        LeftOverKind::Log => format!("{path} (the log of a server that has ended)"),
        LeftOverKind::Record => format!("{path} (the record of a revert)"),
    }
}
