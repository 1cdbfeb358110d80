//! `pack` and `unpack`: a snapshot in one file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::events::{ListedSnapshot, RepositoryEvent};
use super::transfer::{Encryption, tell_pulled};
use super::{AccessArgs, RepositoryArgs, SignArgs, blocking};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, size};
use crate::repository::{
    Moved, PackOptions, PackSource, PackedAt, PullOptions, PushOptions, Repository, SnapshotName,
    pack as pack_one, unpack as unpack_one,
};

#[derive(Args)]
pub(in crate::cli) struct PackArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The snapshot: an image, or the name of one in the repository
    what: String,
    /// The file to write; - is standard output
    to: PathBuf,
    #[command(flatten)]
    encryption: Encryption,
    #[command(flatten)]
    sign: SignArgs,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct UnpackArgs {
    /// The packed file; - is standard input
    from: PathBuf,
    /// The image to write; its parents and disks come beside it
    to: PathBuf,
    #[command(flatten)]
    access: AccessArgs,
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

fn place(path: PathBuf) -> PackedAt {
    match path.as_os_str() == "-" {
        true => PackedAt::Standard,
        false => PackedAt::File(path),
    }
}

/// Packs a snapshot into one file.
pub(in crate::cli) async fn pack(args: PackArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let args = PackArgs { repository: args.repository.signing(args.sign.clone()), ..args };
    let access = args.repository.access.access(&output)?;
    let to = place(args.to);
    // An image is a file; a name of a snapshot is taken for one if there is a file of that name.
    let from = match Path::new(&args.what).is_file() {
        true => None,
        false => Some((args.repository.address()?, args.what.parse::<SnapshotName>()?)),
    };
    let mut options = PackOptions::default();
    (options.recipients, options.force) = (args.encryption.recipients(), args.force);
    let (what, told, place) = (args.what, Arc::clone(&output), to.clone());
    let packed = blocking(move || {
        let tell = |moved: Moved| match place {
            // Standard output is the packed file's: no events, but a bar.
            PackedAt::Standard => told.advance_bytes(moved.done, moved.total),
            PackedAt::File(_) => told.moved(moved),
        };
        match from {
            None => {
                let files = PushOptions::new(what);
                pack_one(PackSource::Files(&files), &to, &access, &options, tell)
            }
            Some((address, name)) => {
                let repository = Repository::open(&address, &access)?;
                let manifest = repository.resolve(&name)?;
                let source = PackSource::Snapshot(&repository, &manifest);
                pack_one(source, &to, &access, &options, tell)
            }
        }
        .map(|manifest| (manifest, to))
    });
    let (manifest, to) = packed.await?;
    output.finish_bar();
    let PackedAt::File(file) = to else { return Ok(()) };
    let snapshot = ListedSnapshot::new(&manifest, manifest.tags.clone());
    let bytes = std::fs::metadata(&file)?.len();
    let says = format!("{} in {} of {}", snapshot.name(), size(bytes), file.display());
    let event = RepositoryEvent::Packed { snapshot, file, packed_bytes: bytes };
    output.repository(&event, "packed", &says);
    Ok(())
}

/// Brings a packed snapshot back as files.
pub(in crate::cli) async fn unpack(args: UnpackArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let access = args.access.access(&output)?;
    let (from, told) = (place(args.from), Arc::clone(&output));
    let mut options = PullOptions::new(args.to);
    (options.force, options.no_disks) = (args.force, args.no_disks);
    // What comes by standard input is kept first: how much it will be, nobody knows.
    let mut kept = (from == PackedAt::Standard).then(|| output.waiting("reading standard input"));
    let tell = move |moved| {
        drop(kept.take());
        told.moved(moved);
    };
    let work = move || unpack_one(&from, &access, &options, tell);
    tell_pulled(blocking(work).await?, &output);
    Ok(())
}
