//! `snapback revert`: one guest, or several clones of it, here or in the background.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use super::output::Output;
use super::repository::FarArgs;
use super::{
    DeliveryArgs, SandboxArgs, cancellation, clones, detach, disks, domain, host, identity, keeper,
    parse_path_pair, rtc,
};
use crate::cancel::Cancellation;
use crate::guest::RewriteOptions;
use crate::revert::{CloneIdentity, Placement, Preload, RevertError, RevertOptions};
use crate::runs::RunOptions;

#[derive(Args, Clone)]
pub(super) struct RevertArgs {
    /// The image; or a snapshot of a repository, such as s3://BUCKET/PREFIX/web1@latest, or
    /// web1@latest with --repo
    image: PathBuf,
    /// The QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Create a QMP socket there (a Unix socket)
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Use the path NEW wherever the recorded command line names OLD or a path below it
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
    #[command(flatten)]
    far: FarArgs,
    #[command(flatten)]
    domain: domain::DomainArgs,
    #[command(flatten)]
    clones: clones::ClonesArgs,
    #[command(flatten)]
    host: host::HostArgs,
    #[command(flatten)]
    identity: identity::IdentityArgs,
    #[command(flatten)]
    disks: disks::RevertDisksArgs,
    #[command(flatten)]
    rtc: rtc::RtcArgs,
    /// How memory reaches the guest
    #[arg(long, value_name = "WAY", default_value = "auto")]
    place: PlacementArg,
    #[command(flatten)]
    delivery: DeliveryArgs,
    /// The image is under way: follow its save, which was given --followable, from the moment on
    #[arg(long, conflicts_with_all = ["domain", "new", "resettable", "check", "preload"])]
    follow: bool,
    /// Let the guest run only once its working set is in place
    #[arg(long, conflicts_with = "no_working_set")]
    preload: bool,
    /// Verify the whole image first; with --place map nothing else verifies it
    #[arg(long)]
    check: bool,
    /// Have the guest be such that `snapback reset` can take it back inside its QEMU: a process
    /// tracks what it writes, until it ends or an interrupt comes
    #[arg(long, conflicts_with_all = ["domain", "new"])]
    resettable: bool,
    /// Return as soon as the guest runs; memory is filled in the background
    #[arg(long)]
    detach: bool,
    /// With --detach: the log file of the background server [default: a new file in a
    /// private directory, which is named]
    #[arg(long, value_name = "FILE", requires = "detach")]
    log: Option<PathBuf>,
    /// Start no process that serves the guest on should this one be killed
    #[arg(long)]
    no_keeper: bool,
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Set by --detach for the server that it starts
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub serving_detached: bool,
    /// Set by --detach: the id of this revert
    #[arg(long, hide = true, requires = "serving_detached")]
    run_id: Option<String>,
    /// More arguments for QEMU
    #[arg(last = true, value_name = "QEMU ARGS")]
    extra: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum PlacementArg {
    /// Mapped from a flat image, else directly into its memory, else by QEMU's socket, else
    /// eagerly
    Auto,
    /// Directly into its memory, by QEMU's userfaultfd, or fail
    Uffd,
    /// By QEMU's postcopy socket
    Socket,
    /// By a private mapping of a flat image, or fail
    Map,
    /// By an ordinary stream, all memory before the guest runs: needs no userfaultfd
    Eager,
}

impl From<PlacementArg> for Placement {
    fn from(placement: PlacementArg) -> Placement {
        match placement {
            PlacementArg::Auto => Placement::Auto,
            PlacementArg::Uffd => Placement::Uffd,
            PlacementArg::Socket => Placement::Socket,
            PlacementArg::Map => Placement::Map,
            PlacementArg::Eager => Placement::Eager,
        }
    }
}

/// Runs the command.
pub(super) async fn run(args: RevertArgs) -> Result<(), Failure> {
    let output = match args.serving_detached {
        true => Output::of_server(),
        false => Output::new(args.json),
    };
    let cancel = cancellation()?;
    let Some(clones) = args.clones.identities(&args.image)? else {
        return match args.detach {
            true => detach::revert(args.log, None, args.identity.awaited(), cancel, output).await,
            false => start(args, None, cancel, output).await,
        };
    };
    clones::for_each(clones, &output, |clone, output| {
        let (args, cancel) = (args.clone().of_clone(&clone), cancel.clone());
        async move {
            match args.clones.only {
                Some(_) => start(args, Some(clone), cancel, output).await,
                // A server can serve one guest only: it gives up all other rights.
                None if !args.detach => detach::serve_clone(clone.number, cancel, output).await,
                None => {
                    let awaited = args.identity.awaited();
                    detach::revert(args.log, Some(clone.number), awaited, cancel, output).await
                }
            }
        }
    })
    .await
}

impl RevertArgs {
    /// The arguments of one clone.
    fn of_clone(self, clone: &CloneIdentity) -> RevertArgs {
        let expand = |text: String| clone.expand(&text);
        let path = |path: PathBuf| clones::expanded(&path, clone);
        RevertArgs {
            qmp: self.qmp.map(path),
            log: self.log.map(path),
            paths: self.paths.into_iter().map(|(old, new)| (expand(old), expand(new))).collect(),
            host: self.host.of_clone(clone),
            identity: self.identity.of_clone(clone),
            disks: self.disks.of_clone(clone),
            extra: self.extra.into_iter().map(expand).collect(),
            ..self
        }
    }
}

/// Brings back one guest and serves it.
async fn start(
    args: RevertArgs,
    clone: Option<CloneIdentity>,
    cancel: Cancellation,
    output: Output,
) -> Result<(), Failure> {
    let rewrite = RewriteOptions {
        qemu: args.qemu,
        qmp: args.qmp,
        paths: args.paths,
        extra: args.extra,
        own: clone.as_ref().map(|clone| clone.directory.clone()),
        ..RewriteOptions::default()
    };
    let mut run = RunOptions::new();
    run.again = args.resettable.then(detach::this).transpose()?;
    if let Some(id) = args.run_id {
        // Its standard error goes to the log.
        run.log = std::fs::read_link("/proc/self/fd/2").ok();
        run.id = id;
    }
    let keeper = (!args.no_keeper).then(|| keeper::successor(args.json, args.serving_detached));
    let mut delivery = args.delivery.delivery(args.place.into());
    if args.serving_detached {
        // Its events go to a log that grows for as long as it runs.
        delivery.progress_every = Duration::from_secs(1);
    }
    let output = Arc::new(output);
    let far = match args.follow {
        true => None,
        false => args.far.open(&args.image, &output).await?,
    };
    let image = match far {
        Some(far) => RevertOptions::from_afar(far),
        None => RevertOptions::new(args.image),
    };
    let mut rewrite = args.host.apply(args.disks.apply(args.identity.apply(rewrite)))?;
    if let (Some(far), Some(clone)) = (&image.far, &clone) {
        // What is in it of each clone's own.
        let expand = |value: &String| clone.expand(value);
        let own = far.profile().iter();
        let own = own.map(|(name, values)| (name.clone(), values.iter().map(expand).collect()));
        rewrite.add_profile(&own.collect()).map_err(RevertError::from)?;
    }
    let options = RevertOptions {
        rewrite,
        domain: args.domain.options(),
        delivery,
        preload: if args.preload { Preload::WorkingSet } else { Preload::Nothing },
        rtc: args.rtc.into(),
        check: args.check,
        follow: args.follow,
        resettable: args.resettable,
        keeper,
        sandbox: args.sandbox.program(),
        agent: args.identity.agent(),
        run: Some(run),
        ..image
    };
    let (mut hook, mut hooked) = (args.identity.hook(), None);
    let (mut awaited, mut told) = (args.identity.awaited(), Ok(()));
    let mut waiting = args.check.then(|| output.waiting("checking all of the image"));
    let reverted = crate::revert::revert(&options, cancel.clone(), |event| {
        waiting.take();
        // Ahead of the sandbox, from within which nothing can be started.
        let started = identity::start_when_running(&mut hook, &event, clone.as_ref());
        if let Some(failure) = awaited.hear(&event) {
            told = Err(failure);
        }
        output.revert(&event);
        if let Some(started) = started {
            let output = Arc::clone(&output);
            let ended = started.end_told(cancel.clone(), move |event| output.hooked(&event));
            hooked = Some(tokio::spawn(ended));
        }
    });
    let reverted = reverted.await;
    let hooked = match hooked {
        Some(task) => task.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())),
        None => Ok(()),
    };
    reverted.map_err(explained)?;
    told.and(hooked)
}

/// What failed in a revert, with the argument in place of the option.
pub(super) fn explained(error: RevertError) -> Failure {
    match error {
        RevertError::Rtc(why) => Failure::from(RevertError::Rtc(why)).in_words(format!(
            "the machine's clock can't go on from the moment: {why}; leave out --rtc keep"
        )),
        error => error.into(),
    }
}
