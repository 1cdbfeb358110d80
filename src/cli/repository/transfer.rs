//! `init`, `push`, `pull` and `list`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::events::ListedSnapshot;
use super::{
    RepositoryArgs, RepositoryEvent, SignArgs, blocking, on_repository, parse_name, waiting_for,
};
use crate::cli::failure::Failure;
use crate::cli::host::SiteArgs;
use crate::cli::output::{Output, print_line, print_table, size};
use crate::guest::Profile;
use crate::repository::{
    PullOptions, Pulled, PushOptions, Pushed, Recipients, Repository, Role, SnapshotName,
    list as listed, pull as pull_files, push as push_files,
};

/// How much of an id a table shows.
const SHOWN: usize = 8;

#[derive(Args)]
pub(in crate::cli) struct InitArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    #[command(flatten)]
    encryption: Encryption,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Whom something new is encrypted to.
#[derive(Args)]
pub(super) struct Encryption {
    /// Encrypt all that is stored to this age recipient (age1…); can be given several times.
    /// An --identity proves that it can be opened again
    #[arg(long, value_name = "RECIPIENT")]
    encrypt_to: Vec<String>,
    /// Encrypt all that is stored with the passphrase that is given
    #[arg(long, conflicts_with = "encrypt_to")]
    encrypt: bool,
}

impl Encryption {
    pub fn recipients(self) -> Recipients {
        let mut recipients = Recipients::nobody();
        (recipients.to, recipients.passphrase) = (self.encrypt_to, self.encrypt);
        recipients
    }
}

#[derive(Args)]
#[command(after_help = PUSH_HELP)]
pub(in crate::cli) struct PushArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The image
    image: PathBuf,
    /// The machine's name [default: that of its command line, or the image's file name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Tag the snapshot; can be given several times
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    #[command(flatten)]
    sign: SignArgs,
    #[command(flatten)]
    site: SiteArgs,
    /// Push memory alone, without the files of its disks
    #[arg(long)]
    no_disks: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// What the options of a revert are for.
const PUSH_HELP: &str = "\
--path, --port and --netdev are the snapshot's profile for another site: they change nothing that is \
pushed. `revert`, `drill` and `check --here` of the snapshot take them, unless they are given others.";

#[derive(Args)]
pub(in crate::cli) struct PullArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The snapshot: MACHINE, MACHINE@latest, MACHINE@2026-11-25, MACHINE@TAG, or an id's beginning
    #[arg(value_parser = parse_name)]
    name: SnapshotName,
    /// The image to write [default: MACHINE.snap]; its parents and disks come beside it
    to: Option<PathBuf>,
    /// Replace existing files
    #[arg(long)]
    force: bool,
    /// Leave out the files of its disks
    #[arg(long)]
    no_disks: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct ListArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Only snapshots of this machine
    machine: Option<String>,
    /// Print one JSON object a line, one for each snapshot
    #[arg(long)]
    pub json: bool,
}

/// Makes a repository.
pub(in crate::cli) async fn init(args: InitArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let (address, access) = (args.repository.address()?, args.repository.access.access(&output)?);
    let recipients = args.encryption.recipients();
    let made = blocking(move || {
        let repository = Repository::init(&address, &access, &recipients)?;
        let fingerprint = repository.fingerprint().map(|fingerprint| fingerprint.to_string());
        let conditional = repository.minds_conditions()?;
        Ok((repository.name().to_owned(), repository.id().to_string(), fingerprint, conditional))
    });
    let (repository, id, fingerprint, conditional) = made.await?;
    let mut says = match &fingerprint {
        Some(fingerprint) => format!(
            "{repository}, encrypted: without its key nothing in it can be read again; to take no \
             other for it: --trust {fingerprint}"
        ),
        None => format!("{repository}, not encrypted: who can write there can replace all of it"),
    };
    let encrypted = fingerprint.is_some();
    if !conditional {
        says +=
            "; its store puts objects on no conditions: let no two push the same snapshot at once";
    }
    let event =
        RepositoryEvent::Initialized { repository, id, encrypted, fingerprint, conditional };
    output.repository(&event, "made", &says);
    Ok(())
}

/// Pushes an image with its parents and disks.
pub(in crate::cli) async fn push(args: PushArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let mut options = PushOptions::new(args.image);
    options.machine = args.name;
    options.tags = args.tag.into_iter().collect();
    options.no_disks = args.no_disks;
    options.profile = args.site.profile();
    let repository = args.repository.signing(args.sign);
    let pushed = on_repository(&repository, &output, move |repository, output| {
        push_files(repository, &options, |moved| output.moved(moved))
    });
    output.pushed(&pushed.await?);
    Ok(())
}

impl Output {
    /// Tells that a snapshot is in the repository.
    pub(in crate::cli) fn pushed(&self, pushed: &Pushed) {
        let snapshot = ListedSnapshot::new(&pushed.manifest, pushed.manifest.tags.clone());
        let name = snapshot.name();
        let says = match pushed.was_there {
            true => format!("{name} was there already"),
            false => {
                let (files, own) = (size(snapshot.file_bytes), size(snapshot.own_bytes));
                format!("{name}: {files} of files, {own} of it new")
            }
        };
        let event = RepositoryEvent::Pushed { snapshot, was_there: pushed.was_there };
        self.repository(&event, "pushed", &says);
    }
}

/// Brings a snapshot back as files.
pub(in crate::cli) async fn pull(args: PullArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let PullArgs { repository, name, to, force, no_disks, .. } = args;
    let pulled = on_repository(&repository, &output, move |repository, output| {
        let manifest = repository.resolve(&name)?;
        let to = to.unwrap_or_else(|| format!("{}.snap", manifest.machine).into());
        let mut options = PullOptions::new(to);
        (options.force, options.no_disks) = (force, no_disks);
        pull_files(repository, manifest, &options, |moved| output.moved(moved))
    });
    tell_pulled(pulled.await?, &output);
    Ok(())
}

/// Tells what was brought back, and how it is reverted.
pub(super) fn tell_pulled(pulled: Pulled, output: &Output) {
    let image = pulled.files.last().map(|file| file.path.clone()).unwrap_or_default();
    let snapshot = ListedSnapshot::new(&pulled.manifest, pulled.manifest.tags.clone());
    let says = format!(
        "{}@{} to {}, {} fetched",
        snapshot.machine,
        snapshot.time,
        image.display(),
        size(pulled.fetched)
    );
    let moved: Vec<(String, String)> = pulled
        .files
        .iter()
        .filter(|file| file.role == Role::Disk)
        .map(|file| (file.was.clone(), file.path.display().to_string()))
        .collect();
    let profile = as_options(&pulled.manifest.profile);
    let files = pulled.files;
    let event = RepositoryEvent::Pulled { snapshot, fetched_bytes: pulled.fetched, image, files };
    output.repository(&event, "pulled", &says);
    if !output.is_json() && !moved.is_empty() {
        let paths = moved.iter().map(|(was, is)| format!("--path {was}={is}"));
        print_line("Its disks lie elsewhere now. Revert it with");
        print_line(&paths.collect::<Vec<_>>().join(" "));
    }
    if !output.is_json() && !profile.is_empty() {
        print_line(&format!("its profile for another site: {profile}"));
    }
}

/// A profile as the options of a revert.
fn as_options(profile: &Profile) -> String {
    let options = profile.iter().flat_map(|(name, values)| {
        values.iter().map(move |value| match shlex::try_quote(value) {
            Ok(value) => format!("--{name} {value}"),
            Err(_) => format!("--{name} {value:?}"),
        })
    });
    options.collect::<Vec<_>>().join(" ")
}

/// Lists snapshots.
pub(in crate::cli) async fn list(args: ListArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let machine = args.machine;
    let what = "reading the list of snapshots";
    let found = waiting_for(what, &args.repository, &output, move |repository, _| {
        listed(repository, machine.as_deref())
    });
    let found = found.await?.into_iter();
    let found: Vec<_> =
        found.map(|(manifest, tags)| ListedSnapshot::new(&manifest, tags)).collect();
    if args.json {
        found.into_iter().for_each(|one| output.print_json(&RepositoryEvent::Snapshot(one)));
        return Ok(());
    }
    let head =
        ["ID", "MACHINE", "TIME (UTC)", "FILES", "OWN", "PARENTS", "HOST", "TAGS", "PROFILE"];
    let rows = found.iter().map(|one| {
        [
            one.id[..SHOWN].to_owned(),
            one.machine.clone(),
            one.time.clone(),
            size(one.file_bytes),
            size(one.own_bytes),
            one.parents.len().to_string(),
            one.host.clone(),
            one.tags.iter().cloned().collect::<Vec<_>>().join(", "),
            as_options(&one.profile),
        ]
    });
    print_table(head, &rows.collect::<Vec<_>>());
    Ok(())
}
