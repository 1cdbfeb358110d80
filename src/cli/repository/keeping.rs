//! `tag`, `forget`, `prune`, `diff`, `copy`, and `check` of a repository.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::events::{ListedSnapshot, RepositoryEvent};
use super::{
    AccessArgs, RepositoryArgs, SignArgs, blocking, on_repository, parse_name, waiting_for,
};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, print_line, size};
use crate::cli::parse_share;
use crate::kind::ErrorKind;
use crate::repository::{
    Address, CheckOptions, ForgetOptions, Looked, PruneOptions, Pruned, Repository,
    RepositoryError, Retention, SnapshotName, check as check_all, copy as copy_one,
    diff as differences, forget as forget_all, prune as prune_all, tag as set_tags,
};

#[derive(Args)]
pub(in crate::cli) struct TagArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The snapshot
    #[arg(value_parser = parse_name)]
    name: SnapshotName,
    /// Tags to add
    tags: Vec<String>,
    /// Take this tag away; can be given several times
    #[arg(long, value_name = "TAG")]
    remove: Vec<String>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = FORGET_HELP)]
pub(in crate::cli) struct ForgetArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Snapshots to forget, tagged or not
    #[arg(value_parser = parse_name)]
    names: Vec<SnapshotName>,
    /// Keep the last N snapshots of each machine
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "names")]
    keep_last: usize,
    /// Keep the last of each of the last N hours in which there is one
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "names")]
    keep_hourly: usize,
    /// The same for days
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "names")]
    keep_daily: usize,
    /// The same for weeks, which begin on Mondays
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "names")]
    keep_weekly: usize,
    /// The same for months
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "names")]
    keep_monthly: usize,
    /// Only of this machine
    #[arg(long, value_name = "NAME", conflicts_with = "names")]
    machine: Option<String>,
    /// Only tell what would be forgotten
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// What is kept besides.
const FORGET_HELP: &str = "\
A snapshot that any rule keeps is kept, and so is one with a tag. Times are in UTC. What is \
forgotten still takes room until `snapback prune` has removed it.";

#[derive(Args)]
pub(in crate::cli) struct PruneArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// How long what nothing refers to stays, once it has been found: a later prune removes it.
    /// With 0s it goes at once, if no push is under way
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_time)]
    grace: Duration,
    /// Put what is needed of packs that are partly unused into new ones, until no more than this share
    /// of the repository is unused; 100% leaves them as they are
    #[arg(long, value_name = "P%", default_value = "5%", value_parser = parse_share)]
    max_unused: f64,
    #[command(flatten)]
    sign: SignArgs,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct DiffArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The first snapshot
    #[arg(value_parser = parse_name)]
    a: SnapshotName,
    /// The second
    #[arg(value_parser = parse_name)]
    b: SnapshotName,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct CopyArgs {
    /// The repository to copy from
    #[arg(long, value_name = "ADDRESS")]
    from: String,
    /// The repository to copy to
    #[arg(long, value_name = "ADDRESS")]
    to: String,
    /// The snapshots [default: all]
    #[arg(value_parser = parse_name)]
    names: Vec<SnapshotName>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    sign: SignArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

fn parse_time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "it is a time such as 24h, 30min or 0s".into())
}

/// Adds and removes tags.
pub(in crate::cli) async fn tag(args: TagArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let TagArgs { repository, name, tags, remove, .. } = args;
    let done = on_repository(&repository, &output, move |repository, _| {
        let manifest = repository.resolve(&name)?;
        let (add, remove) = (tags.into_iter().collect(), remove.into_iter().collect());
        let tags = set_tags(repository, &manifest, &add, &remove)?;
        Ok(ListedSnapshot::new(&manifest, tags))
    });
    let snapshot = done.await?;
    let tags = snapshot.tags.iter().cloned().collect::<Vec<_>>().join(", ");
    let says = format!("{} has the tags: {tags}", snapshot.name());
    output.repository(&RepositoryEvent::Tagged(snapshot), "tagged", &says);
    Ok(())
}

/// Forgets snapshots.
pub(in crate::cli) async fn forget(args: ForgetArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let mut options = ForgetOptions::default();
    let mut retention = Retention::default();
    (retention.last, retention.hourly) = (args.keep_last, args.keep_hourly);
    (retention.daily, retention.weekly) = (args.keep_daily, args.keep_weekly);
    retention.monthly = args.keep_monthly;
    options.retention = retention;
    (options.names, options.machine, options.dry_run) = (args.names, args.machine, args.dry_run);
    let dry_run = args.dry_run;
    let what = "looking at the repository's snapshots";
    let looked = waiting_for(what, &args.repository, &output, move |repository, _| {
        forget_all(repository, &options)
    });
    looked.await?.into_iter().for_each(|one| output.looked(one, dry_run));
    Ok(())
}

impl Output {
    /// Tells what becomes of a snapshot that was looked at.
    pub(in crate::cli) fn looked(&self, one: Looked, dry_run: bool) {
        let kept = !one.kept_by.is_empty();
        let snapshot = ListedSnapshot::new(&one.manifest, one.tags);
        let (what, says) = match (kept, dry_run) {
            (true, _) => ("kept", format!("{} ({})", snapshot.name(), one.kept_by.join(", "))),
            (false, true) => ("would go", snapshot.name()),
            (false, false) => ("forgotten", snapshot.name()),
        };
        let kept_by = one.kept_by.iter().map(|&why| why.to_owned()).collect();
        let event = RepositoryEvent::Forgotten { snapshot, kept, kept_by, dry_run };
        self.repository(&event, what, &says);
    }

    /// Tells what a prune has done.
    pub(in crate::cli) fn pruned(&self, pruned: Pruned, dry_run: bool) {
        let would = if dry_run { "would be " } else { "" };
        let mut says = format!(
            "{} kept; {} {would}removed, {} {would}marked to be removed later",
            size(pruned.kept_bytes),
            size(pruned.removed_bytes),
            size(pruned.marked_bytes)
        );
        if pruned.waiting_packs > 0 {
            says += &format!("; {} packs wait for their time", pruned.waiting_packs);
        }
        if !pruned.held_by.is_empty() {
            says += &format!(", and for pushes that are under way: {}", pruned.held_by.join(", "));
        }
        if pruned.repacked_packs > 0 {
            says += &format!(
                "; {} {would}repacked, which frees {} once a later prune removes the old packs",
                size(pruned.repacked_bytes),
                size(pruned.freed_bytes)
            );
        }
        if pruned.signed_packs > 0 {
            says += &format!(
                "; {} packs are not repacked, since the snapshots in them are signed with another key: give \
                 theirs by --sign-key",
                pruned.signed_packs
            );
        }
        self.repository(&RepositoryEvent::Pruned { pruned, dry_run }, "pruned", &says);
    }
}

/// Removes what nothing refers to.
pub(in crate::cli) async fn prune(args: PruneArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let mut options = PruneOptions::default();
    (options.grace, options.dry_run) = (args.grace, args.dry_run);
    options.max_unused = args.max_unused;
    let dry_run = args.dry_run;
    let what = "looking for what nothing refers to";
    let repository = args.repository.signing(args.sign);
    let pruned = waiting_for(what, &repository, &output, move |repository, _| {
        prune_all(repository, &options)
    });
    output.pruned(pruned.await?, dry_run);
    Ok(())
}

/// Checks a repository.
pub(in crate::cli) async fn check(
    repository: RepositoryArgs,
    read_data: f64,
    json: bool,
) -> Result<(), Failure> {
    let output = Arc::new(Output::new(json));
    let options = CheckOptions { read_data };
    let what = if read_data > 0.0 { "reading the repository" } else { "checking the repository" };
    let checked = waiting_for(what, &repository, &output, move |repository, output| {
        let (checked, damages) = check_all(repository, &options, |damage| {
            let affects = match damage.snapshots.len() {
                0 => "no snapshot needs it".to_owned(),
                _ => {
                    let all = damage.snapshots.iter().cloned().collect::<Vec<_>>().join(", ");
                    format!("affects {all}")
                }
            };
            let says = format!("{}: {}; {affects}", damage.object, damage.problem);
            output.repository(&RepositoryEvent::RepositoryDamaged(damage), "DAMAGED", &says);
        })?;
        Ok((checked, damages, repository.name().to_owned()))
    });
    let (checked, damages, repository) = checked.await?;
    let says = format!(
        "{} snapshots of {} files in {} packs ({}), of which {} were read",
        checked.snapshots,
        checked.maps,
        checked.packs,
        size(checked.pack_bytes),
        checked.read_packs
    );
    output.repository(&RepositoryEvent::RepositoryChecked { checked, damages }, "checked", &says);
    match damages {
        0 => Ok(()),
        damages => Err(RepositoryError::CheckFailed { repository, damages }.into()),
    }
}

/// Tells how two snapshots differ.
pub(in crate::cli) async fn diff(args: DiffArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let DiffArgs { repository, a, b, .. } = args;
    let what = "comparing the snapshots";
    let found = waiting_for(what, &repository, &output, move |repository, _| {
        let (a, b) = (repository.resolve(&a)?, repository.resolve(&b)?);
        differences(repository, &a, &b)
    });
    for one in found.await? {
        let length = |bytes: Option<u64>| bytes.map_or("nothing".to_owned(), size);
        let says = format!(
            "{}: {} -> {}, {} new, {} gone",
            one.what,
            length(one.before),
            length(one.after),
            size(one.new),
            size(one.gone)
        );
        match args.json {
            true => output.print_json(&RepositoryEvent::Difference(one)),
            false => print_line(&says),
        }
    }
    Ok(())
}

/// Copies snapshots from one repository to another.
pub(in crate::cli) async fn copy(args: CopyArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let (from, to): (Address, Address) = (args.from.parse()?, args.to.parse()?);
    if from == to {
        let problem = "both are the same repository".to_owned();
        return Err(Failure::said(ErrorKind::OptionsInvalid, problem));
    }
    let access = args.access.access(&output)?.with_sign_key(args.sign.sign_key);
    let (names, told) = (args.names, Arc::clone(&output));
    blocking(move || {
        let (from, to) = (Repository::open(&from, &access)?, Repository::open(&to, &access)?);
        let manifests = match names.is_empty() {
            true => from.manifests()?,
            false => names.iter().map(|name| from.resolve(name)).collect::<Result<_, _>>()?,
        };
        for manifest in manifests {
            let (copied, was_there) = copy_one(&from, &manifest, &to, |moved| told.moved(moved))?;
            let snapshot = ListedSnapshot::new(&copied, copied.tags.clone());
            let says = match was_there {
                true => format!("{} was there already", snapshot.name()),
                false => format!("{}: {} of it new", snapshot.name(), size(snapshot.own_bytes)),
            };
            told.repository(&RepositoryEvent::Copied { snapshot, was_there }, "copied", &says);
        }
        Ok(())
    })
    .await
}
