//! A session whose process gives up its rights once its guest runs: it reads an image that may be
//! anybody's for as long as the guest needs it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::qemu::Qemu;
use crate::failpoint::failpoint;
use crate::host::huge_pages;
use crate::host::procfs::AddressSpace;
use crate::host::sandbox::{self, Access, Sandbox};
use crate::image::Image;
use crate::revert::broker::{Broker, Rights};
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
    Inside(Arc<Broker>),
}

impl Confinement {
    /// One that is wanted where there is a program for the broker.
    pub fn wanted(program: Option<PathBuf>) -> Confinement {
        program.map_or(Confinement::None, Confinement::Wanted)
    }

    /// That of a successor, with what it was given of its predecessor's broker. One that is inside
    /// was given it; one outside begins anew, and the broker ends.
    pub fn inherited(broker: Option<OwnedFd>, program: Option<PathBuf>) -> Confinement {
        match broker.map(Broker::inherited) {
            Some(broker) if sandbox::is_inside() => Confinement::inside(broker),
            _ => Confinement::wanted(program),
        }
    }

    /// Inside, with this broker. What the sandbox refuses to open is opened by it.
    fn inside(broker: Broker) -> Confinement {
        let broker = Arc::new(broker);
        let opener = Arc::downgrade(&broker);
        sandbox::set_opener(Arc::new(move |path| match opener.upgrade() {
            Some(broker) => broker.open(path),
            None => Err(io::ErrorKind::PermissionDenied.into()),
        }));
        Confinement::Inside(broker)
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
    pub fn enter(&mut self, session: &Confined<'_>) {
        let Confinement::Wanted(program) = self else { return };
        *self = match session.enter(program) {
            Ok(broker) => Confinement::inside(broker),
            Err(error) => {
                tracing::warn!("the page server is not in a sandbox: {error}");
                Confinement::None
            }
        };
    }
}

/// What a session needs of the host from now on.
pub(super) struct Confined<'a> {
    pub qemu: &'a Qemu,
    /// QEMU's memory as /proc shows it.
    pub space: Option<&'a AddressSpace>,
    pub image: &'a Image,
    pub delivery: &'a Delivery,
    pub kept: Option<&'a Kept>,
    pub run: Option<&'a Entry>,
}

impl Confined<'_> {
    /// What is done for it outside.
    fn rights(&self) -> io::Result<Rights> {
        let Confined { qemu, image, delivery, .. } = self;
        let working_set = recorded::path(delivery, image).filter(|_| delivery.working_set);
        Ok(Rights {
            qemu: qemu.pid().filter(|_| delivery.collapse),
            working_set: working_set.map(std::path::absolute).transpose()?,
            files: image
                .files()
                .map(|(path, _)| std::path::absolute(path))
                .collect::<Result<_, _>>()?,
        })
    }

    fn access(&self) -> Access<'_> {
        Access {
            read: self.image.files().map(|(_, file)| file.as_fd()).collect(),
            read_in: vec![huge_pages::SETTINGS.into()],
            remove_in: self.qemu.socket_directories(),
            write_in: self.run.iter().map(|run| run.directory().to_owned()).collect(),
            remove_directories_in: self.run.and_then(Entry::removed_from).into_iter().collect(),
        }
    }

    fn enter(&self, program: &Path) -> io::Result<Broker> {
        let broker = Broker::start(program, &self.rights()?)?;
        let sandbox = Sandbox::new(&self.access())?;
        // A keeper that is confined has all that a successor needs in there, at whatever moment this
        // process dies.
        if let Some(kept) = self.kept {
            self.space.map_or(Ok(()), |space| kept.hold_address_space(space))?;
            kept.hold_broker(&broker)?;
        }
        failpoint("outside");
        sandbox.enter()?;
        if !sandbox.fences_files() {
            tracing::warn!(
                "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK): the page \
                 server may open any file of its user"
            );
        }
        if let Some(kept) = self.kept {
            kept.confine(sandbox);
        }
        Ok(broker)
    }
}
