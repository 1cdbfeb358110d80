//! A session whose process gives up its rights once its guest runs: it reads an image that may be
//! anybody's for as long as the guest needs it.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::qemu::Qemu;
use crate::host::sandbox::{Access, Sandbox};
use crate::image::Image;
use crate::revert::broker::Broker;
use crate::revert::kept::Kept;
use crate::revert::options::Delivery;
use crate::revert::recorded;
use crate::runs::Entry;

/// How a session's process stands with its sandbox.
#[derive(Debug, Default)]
pub(super) enum Confinement {
    /// It keeps all its rights.
    #[default]
    None,
    /// It is to enter one. The program `snapback`, which becomes its broker.
    Wanted(PathBuf),
    /// It is in one, and has this broker.
    Inside(Broker),
}

impl Confinement {
    /// One that is wanted where there is a program for the broker.
    pub fn wanted(program: Option<PathBuf>) -> Confinement {
        program.map_or(Confinement::None, Confinement::Wanted)
    }

    /// What does for this process what it may not do any more.
    pub fn broker(&self) -> Option<&Broker> {
        match self {
            Confinement::Inside(broker) => Some(broker),
            _ => None,
        }
    }

    /// Enters the sandbox where one is wanted. All that takes more rights must have been done.
    /// A failure is only logged: the guest comes first.
    pub fn enter(
        &mut self,
        qemu: &Qemu,
        image: &Image,
        delivery: &Delivery,
        kept: Option<&Kept>,
        run: Option<&Entry>,
    ) {
        let Confinement::Wanted(program) = self else { return };
        *self = match enter_sandbox(program, qemu, image, delivery, kept, run) {
            Ok(broker) => Confinement::Inside(broker),
            Err(error) => {
                tracing::warn!("the page server is not in a sandbox: {error}");
                Confinement::None
            }
        };
    }
}

fn enter_sandbox(
    program: &Path,
    qemu: &Qemu,
    image: &Image,
    delivery: &Delivery,
    kept: Option<&Kept>,
    run: Option<&Entry>,
) -> io::Result<Broker> {
    let pid = qemu.pid();
    let working_set = recorded::path(delivery, image);
    let broker = Broker::start(
        program,
        pid.filter(|_| delivery.collapse),
        working_set.as_deref().filter(|_| delivery.working_set),
    )?;
    let access = Access {
        read: image.files().map(|(_, file)| file.as_fd()).collect(),
        read_in: image.files().flat_map(|(path, _)| directories_of(path)).collect(),
        remove_in: qemu.socket_directories(),
        write_in: run.iter().map(|run| run.directory().to_owned()).collect(),
        remove_directories_in: run.and_then(Entry::removed_from).into_iter().collect(),
    };
    let sandbox = Sandbox::new(&access)?;
    if let Some((kept, pid)) = kept.zip(pid) {
        kept.hold_address_space(pid);
    }
    sandbox.enter()?;
    if !sandbox.fences_files() {
        tracing::warn!(
            "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK): the page server \
             may open any file of its user"
        );
    }
    if let Some(kept) = kept {
        kept.confine(sandbox, &broker)?;
    }
    Ok(broker)
}

/// Where a file of this name is looked for when its image can't be read any more: in the directory
/// of its name, and in that to which the name leads.
fn directories_of(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let places = [std::path::absolute(path), std::fs::canonicalize(path)];
    places.into_iter().flatten().filter_map(|path| path.parent().map(Path::to_owned))
}
