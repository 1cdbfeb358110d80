//! `snapback save`: its arguments, and what it runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use super::hook::{Hook, RunningHook};
use super::output::Output;
use super::repository::SaveToArgs;
use super::{cancellation, detach, keeper, parse_compression, parse_rate};
use crate::cancel::Cancellation;
use crate::image::Compression;
use crate::kind::ErrorKind;
use crate::libvirt::DomainAddress;
use crate::revert::{RevertOptions, prove};
use crate::runs::RunOptions;
use crate::save::{
    DiskChoice, GuestAddress, Quiesce, Reading, SaveEvent, SaveOptions, recover, save,
    save_resettable,
};

#[derive(Args)]
pub(super) struct SaveArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// The image to write; or the machine's name in a repository, such as s3://BUCKET/PREFIX/web1, or
    /// web1 with --repo
    image: PathBuf,
    #[command(flatten)]
    to: SaveToArgs,
    /// Write at most this fast, in bytes a second (suffixes K, M, G: powers of 1024)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<u64>,
    /// Run COMMAND (by sh -c) as soon as the moment has passed; see SNAPBACK_IMAGE,
    /// SNAPBACK_MOMENT_UNIX_US, SNAPBACK_MOMENT_MONOTONIC_US and SNAPBACK_PAUSE_MS in its
    /// environment
    #[arg(long, value_name = "COMMAND")]
    on_moment: Option<String>,
    /// Fail instead of waiting when the guest was reverted and its memory is not complete yet
    #[arg(long)]
    no_wait: bool,
    /// Let `snapback revert --follow` bring the guest back from the moment on, while the image is
    /// still written. The guest's memory that is not zero is held once more, until who follows has it
    #[arg(long, conflicts_with_all = ["recover", "resettable"])]
    followable: bool,
    /// Revert the new image at once, isolated from networks and disks, to see that its guest runs,
    /// and discard that guest; fail if it doesn't run
    #[arg(long, conflicts_with = "recover")]
    prove: bool,
    /// Clean up behind a save of this image that was killed; saves nothing
    #[arg(long)]
    recover: bool,
    /// With --resettable: return as soon as the guest can be reset; its writes are tracked in the
    /// background
    #[arg(long, requires = "resettable", conflicts_with_all = ["prove", "recover"])]
    detach: bool,
    /// With --detach: the log file of the background server [default: a new file in a
    /// private directory, which is named]
    #[arg(long, value_name = "FILE", requires = "detach")]
    log: Option<PathBuf>,
    /// Start no process that cleans up should this one be killed
    #[arg(long)]
    no_keeper: bool,
    /// Set by --detach for the server that it starts
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub(super) serving_detached: bool,
    /// Set by --detach: the id under which the guest is recorded
    #[arg(long, hide = true, requires = "serving_detached")]
    run_id: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Which guest, and how it is saved: what `save` and `check` have in common.
#[derive(Args)]
pub(super) struct GuestArgs {
    /// The guest's QMP socket (a unix socket)
    #[arg(long, value_name = "SOCKET", required_unless_present = "domain")]
    qmp: Option<PathBuf>,
    /// A domain of libvirt's that runs, in place of a QMP socket
    #[arg(long, value_name = "NAME|UUID", conflicts_with = "qmp")]
    domain: Option<String>,
    /// With --domain: libvirt's connection URI [default: the one that virsh takes]
    #[arg(long, value_name = "URI", requires = "domain")]
    connect: Option<String>,
    /// What becomes of writable disks [default: overlay; copy where the save goes to a repository]
    #[arg(long, value_name = "HOW")]
    disks: Option<Disks>,
    /// Save memory and devices only: the same as --disks none
    #[arg(long, conflicts_with = "disks")]
    memory_only: bool,
    /// The directory of the overlays, to which the guest writes from the moment on [default:
    /// that of each disk's file]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Leave a writable disk out: the name of a node, drive or device
    #[arg(long = "exclude-disk", value_name = "NODE")]
    exclude_disks: Vec<String>,
    /// Save although a revert can't bring this device back: the id of one that was plugged in, or
    /// the name of a disk that no option defines, as `check` tells it
    #[arg(long = "allow-missing-device", value_name = "ID")]
    allow_missing_devices: Vec<String>,
    /// How memory is stored: none, zstd, or zstd:LEVEL (-7 to 19)
    #[arg(long, value_name = "HOW", default_value = "zstd", value_parser = parse_compression)]
    compress: Compression,
    /// Store only what differs from this image, which the new one then refers to
    #[arg(long, value_name = "IMAGE")]
    parent: Option<PathBuf>,
    /// Freeze the guest's file systems around the moment, by qemu-guest-agent on this socket, or
    /// through libvirt (auto)
    #[arg(long, value_name = "AGENT_SOCKET|auto", value_parser = parse_quiesce)]
    quiesce: Option<Quiesce>,
    /// How memory is read: from outside, beside QEMU's stream, where that may be, or by the stream
    /// alone, which takes longer and pauses a guest without disks for less
    #[arg(long, value_name = "HOW", default_value = "auto")]
    read: Read,
    /// Replace an existing image
    #[arg(long)]
    force: bool,
    /// Have the guest, which goes on, be such that `snapback reset` can take it back to the image
    /// inside its QEMU: a process tracks what it writes, until it ends or an interrupt comes
    #[arg(long, conflicts_with_all = ["domain", "quiesce"])]
    resettable: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Read {
    /// From outside where we may trace QEMU, and by its stream
    Auto,
    /// By QEMU's stream alone
    Stream,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Disks {
    /// They are frozen, and the guest goes on in overlays over them
    Overlay,
    /// They are frozen, copied beside the image, and the guest goes on in its own files
    Copy,
    /// The same by clones that share the disks' blocks, on a file system that can (btrfs, XFS)
    Reflink,
    /// They are left as they are, and are no part of the snapshot
    None,
}

/// What stands for the agent's channel that libvirt has.
const AUTO: &str = "auto";

fn parse_quiesce(text: &str) -> Result<Quiesce, String> {
    Ok(match text {
        AUTO => Quiesce::Libvirt,
        socket => Quiesce::Socket(socket.into()),
    })
}

impl GuestArgs {
    /// Whether no guest is named.
    pub(super) fn is_none(&self) -> bool {
        self.qmp.is_none() && self.domain.is_none()
    }

    /// The guest.
    fn address(&self) -> GuestAddress {
        match (&self.domain, &self.qmp) {
            (Some(domain), _) => {
                let mut address = DomainAddress::new(domain);
                address.uri = self.connect.clone();
                address.into()
            }
            (None, socket) => socket.clone().unwrap_or_default().into(),
        }
    }

    pub(super) fn options(self, image: PathBuf) -> SaveOptions {
        let guest = self.address();
        let disks = match self.disks {
            _ if self.memory_only => DiskChoice::None,
            Some(Disks::None) => DiskChoice::None,
            None | Some(Disks::Overlay) => DiskChoice::Overlay,
            Some(Disks::Copy) => DiskChoice::Copy,
            Some(Disks::Reflink) => DiskChoice::Reflink,
        };
        SaveOptions {
            disks,
            overlay_dir: self.overlay_dir,
            exclude_disks: self.exclude_disks,
            allow_missing_devices: self.allow_missing_devices,
            compression: self.compress,
            parent: self.parent,
            quiesce: self.quiesce,
            reading: match self.read {
                Read::Auto => Reading::Auto,
                Read::Stream => Reading::Stream,
            },
            force: self.force,
            resettable: self.resettable,
            ..SaveOptions::new(guest, image)
        }
    }
}

/// Runs the command.
pub(super) async fn run(mut args: SaveArgs) -> Result<(), Failure> {
    let output = Arc::new(match args.serving_detached {
        true => Output::of_server(),
        false => Output::new(args.json).of_domain(args.guest.domain.is_some()),
    });
    if args.detach {
        return detach::save(args.log, cancellation()?, &output).await;
    }
    let guest = args.guest.address();
    if args.recover {
        let done = recover(guest, &args.image, |event| output.save(&event)).await?;
        output.recovered(&done);
        return Ok(());
    }
    let to = args.to.open(&args.image, &output).await?;
    if let Some(to) = &to {
        if args.guest.resettable {
            let message = "a guest is reset to an image on this host: save it to a file";
            return Err(Failure::said(ErrorKind::OptionsInvalid, message.into()));
        }
        args.image = to.image();
        // What is on its way elsewhere leaves the guest where it was.
        args.guest.disks.get_or_insert(Disks::Copy);
    }
    let keeper = keeper::cleaner(&guest, &args.image, args.json);
    let options = SaveOptions {
        keeper: (!args.no_keeper).then_some(keeper),
        no_wait: args.no_wait,
        bandwidth: args.bandwidth,
        followable: args.followable,
        run: args.guest.resettable.then(|| recorded_as(args.run_id)),
        ..args.guest.options(args.image)
    };
    let whatever = "the image is not affected";
    let mut hook = args.on_moment.map(|command| Hook::new("--on-moment", command, whatever));
    let (mut running, mut resettable) = (None, None);
    let cancel = cancellation()?;
    let on_event = |event| {
        if let Some(started) = start_at_moment(&mut hook, &event, &options.image) {
            running = Some(started);
        }
        match event {
            // Told last, when nothing else is to come.
            SaveEvent::Resettable { .. } => resettable = Some(event),
            event => output.save(&event),
        }
    };
    let outcome = match options.resettable {
        true => {
            save_resettable(&options, cancel.clone(), on_event).await.map(|(_, guest)| Some(guest))
        }
        false => save(&options, cancel.clone(), on_event).await.map(|_| None),
    };
    let ended = match running {
        Some(hook) => hook.end(cancel.clone()).await,
        None => Ok(()),
    };
    let guest = outcome?;
    if args.prove {
        prove_image(&options.image, cancel.clone(), &output).await?;
    }
    ended?;
    if let Some(to) = to {
        return to.push(&output).await;
    }
    match guest {
        Some(Ok(guest)) => {
            resettable.iter().for_each(|event| output.save(event));
            Ok(guest.serve(cancel, |event| output.save(&event)).await?)
        }
        Some(Err(error)) => {
            let what = "the guest can't be reset inside its QEMU".to_owned();
            output.save(&SaveEvent::Note { what, why: error.to_string() });
            Ok(())
        }
        None => Ok(()),
    }
}

/// How a guest is recorded, of which a server in the background has been told its id and log.
fn recorded_as(id: Option<String>) -> RunOptions {
    let mut run = RunOptions::new();
    if let Some(id) = id {
        // Its standard error goes to the log.
        run.log = std::fs::read_link("/proc/self/fd/2").ok();
        run.id = id;
    }
    run
}

/// Shows that the image can be reverted.
async fn prove_image(image: &Path, cancel: Cancellation, output: &Output) -> Result<(), Failure> {
    let waiting = output.waiting("reverting it once");
    let proved = prove(&RevertOptions::new(image), cancel, |_| {}).await;
    drop(waiting);
    match proved {
        Ok(after) => {
            output.proved(after);
            Ok(())
        }
        Err(error) => {
            let message = format!(
                "the image {} is whole, but its guest could not be shown to run again: {error}",
                image.display()
            );
            Err(Failure::said(ErrorKind::NotProved, message))
        }
    }
}

/// Starts the command of `--on-moment` when the moment is told.
fn start_at_moment(
    hook: &mut Option<Hook>,
    event: &SaveEvent,
    image: &Path,
) -> Option<RunningHook> {
    let SaveEvent::Moment { unix_us, monotonic_us, pause_ms, .. } = event else { return None };
    let image = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
    let pause = pause_ms.map(|ms| ms.to_string()).unwrap_or_default();
    Some(hook.take()?.start([
        ("SNAPBACK_IMAGE", image.into()),
        ("SNAPBACK_MOMENT_UNIX_US", unix_us.to_string().into()),
        ("SNAPBACK_MOMENT_MONOTONIC_US", monotonic_us.to_string().into()),
        ("SNAPBACK_PAUSE_MS", pause.into()),
    ]))
}
