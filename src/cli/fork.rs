//! `snapback fork`: clones of a guest that runs, which goes on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::clones::{ClonesArgs, expanded};
use super::events::{CommandEvent, ForkedClone};
use super::failure::Failure;
use super::output::Output;
use super::{cancellation, host, identity, keeper, parse_compression, parse_path_pair};
use crate::fork::{ForkEvent, ForkOptions, fork};
use crate::guest::RewriteOptions;
use crate::image::Compression;
use crate::kind::ErrorKind;
use crate::revert::{CloneIdentity, RevertEvent, RevertOptions, Reverted};
use crate::runs::{RunOptions, new_id};
use crate::save::{DiskChoice, SaveOptions};

#[derive(Args)]
pub(super) struct ForkArgs {
    /// The guest's QMP socket (a unix socket)
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    #[command(flatten)]
    clones: ClonesArgs,
    /// Create each clone's QMP socket there; see --count for {n}, {name} and {dir}
    #[arg(long, value_name = "PATH")]
    qmp_out: Option<PathBuf>,
    /// Leave an image of the guest as well
    #[arg(long, value_name = "IMAGE")]
    keep: Option<PathBuf>,
    /// With --keep: how memory is stored: none, zstd, or zstd:LEVEL (-7 to 19)
    #[arg(long, value_name = "HOW", default_value = "zstd", value_parser = parse_compression)]
    compress: Compression,
    /// Leave disks alone: clones have none of what the guest can write to
    #[arg(long)]
    memory_only: bool,
    /// The directory of the overlays in which the guest goes on [default: that of each disk's file]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Leave a writable disk out: the name of a node, drive or device
    #[arg(long = "exclude-disk", value_name = "NODE")]
    exclude_disks: Vec<String>,
    /// In a clone, use the path NEW wherever the guest's command line names OLD or a path below it
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
    #[command(flatten)]
    host: host::HostArgs,
    #[command(flatten)]
    identity: identity::IdentityArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// More arguments for the clones' QEMUs
    #[arg(last = true, value_name = "QEMU ARGS")]
    extra: Vec<String>,
}

/// Runs the command.
pub(super) async fn run(args: ForkArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let cancel = cancellation()?;
    let clones = args.clones.identities_or_one(Path::new("fork"))?;
    let hooks = || clones.iter().map(|_| args.identity.hook());
    let (mut hooks, mut hooked): (Vec<_>, Vec<_>) = (hooks().collect(), Vec::new());
    let options = args.options(&clones)?;
    let outcome = fork(&options, cancel.clone(), |event| match event {
        ForkEvent::Save(event) => output.save(&event),
        ForkEvent::Clone { index, since_moment, event } => {
            let clone = &clones[index];
            let started = identity::start_when_running(&mut hooks[index], &event, Some(clone));
            let output = Arc::new(output.of_clone(&clone.name));
            match event {
                RevertEvent::Running { pid, ports, qmp } => {
                    let forked = ForkedClone {
                        name: clone.name.clone(),
                        qemu_pid: pid.unwrap_or_default(),
                        qmp,
                        dir: clone.directory.clone(),
                        ports,
                        since_moment_ms: since_moment.as_secs_f64() * 1e3,
                    };
                    tell_running(&output, forked);
                }
                event => output.revert(&event),
            }
            if let Some(started) = started {
                let ended = started.end_told(cancel.clone(), move |event| output.hooked(&event));
                hooked.push(tokio::spawn(ended));
            }
        }
    });
    let outcome = outcome.await;
    let mut hooks_ended = Ok(());
    for hook in hooked {
        let ended = hook.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
        hooks_ended = hooks_ended.and(ended);
    }
    ended(&output, &clones, outcome?)?;
    hooks_ended
}

fn tell_running(output: &Output, forked: ForkedClone) {
    let ForkedClone { qemu_pid, since_moment_ms, .. } = forked;
    match output.is_json() {
        true => output.print_json(&CommandEvent::Forked(Box::new(forked))),
        false => output.say(
            "running",
            &format!("QEMU process {qemu_pid}, {since_moment_ms:.1} ms behind the moment"),
        ),
    }
}

/// Tells which clones have failed.
fn ended(
    output: &Output,
    clones: &[CloneIdentity],
    outcome: Vec<Result<Reverted, crate::revert::RevertError>>,
) -> Result<(), Failure> {
    let mut failed = Vec::new();
    for (clone, outcome) in clones.iter().zip(outcome) {
        if let Err(error) = outcome {
            output.of_clone(&clone.name).failure(&error.into());
            failed.push(clone.name.as_str());
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let (names, total) = (failed.join(", "), clones.len());
    let message = format!("{} of {total} clones failed: {names}", failed.len());
    Err(Failure::said(ErrorKind::ClonesFailed, message))
}

impl ForkArgs {
    /// What they ask for.
    fn options(self, clones: &[CloneIdentity]) -> Result<ForkOptions, Failure> {
        let keep = self.keep.is_some();
        let journal = || std::env::temp_dir().join(format!("snapback-fork-{}.snap", new_id()));
        let image = self.keep.clone().unwrap_or_else(journal);
        let mut save = SaveOptions::new(self.qmp.clone(), image.clone());
        save.keeper = Some(keeper::cleaner(&save.guest, &image, self.json));
        save.compression = self.compress;
        save.overlay_dir = self.overlay_dir.clone();
        save.exclude_disks = self.exclude_disks.clone();
        if self.memory_only {
            save.disks = DiskChoice::None;
        }
        let clones = clones.iter().map(|clone| self.clone_options(clone));
        let clones = clones.collect::<Result<_, _>>()?;
        Ok(ForkOptions { keep, ..ForkOptions::new(save, clones) })
    }

    fn clone_options(&self, clone: &CloneIdentity) -> Result<RevertOptions, Failure> {
        let expand = |text: &String| clone.expand(text);
        let identity = self.identity.clone().of_clone(clone);
        let rewrite = RewriteOptions {
            qmp: self.qmp_out.as_deref().map(|path| expanded(path, clone)),
            paths: self.paths.iter().map(|(old, new)| (old.clone(), expand(new))).collect(),
            extra: self.extra.iter().map(expand).collect(),
            own: Some(clone.directory.clone()),
            ..RewriteOptions::default()
        };
        let mut options = RevertOptions::new("");
        options.rewrite = self.host.clone().of_clone(clone).apply(identity.apply(rewrite))?;
        options.agent = identity.agent();
        options.run = Some(RunOptions::new());
        Ok(options)
    }
}
