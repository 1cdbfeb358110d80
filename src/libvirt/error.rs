//! What can go wrong between us and libvirt.

use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::qmp::QmpError;

/// Why something could not be done by libvirt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibvirtError {
    /// This program was built without libvirt.
    #[error(
        "this snapback was built without libvirt: install the package snapback-libvirt, or build it with \
         `cargo build --features libvirt` (which needs the package libvirt-dev, or libvirt-devel)"
    )]
    NotBuilt,
    /// No libvirt answers there.
    #[error(
        "can't connect to libvirt at {uri}: {reason}; does its daemon (virtqemud or libvirtd) \
         run? `virsh -c {uri} list --all` asks the same"
    )]
    Connect {
        /// The connection URI.
        uri: String,
        /// libvirt's words.
        reason: String,
    },
    /// The connection is not to libvirt's QEMU driver.
    #[error(
        "{uri} is a connection of libvirt's driver {driver}, not QEMU: give another one, such as \
         qemu:///system"
    )]
    OtherDriver {
        /// The connection URI.
        uri: String,
        /// The driver.
        driver: String,
    },
    /// There is no such domain.
    #[error("libvirt at {uri} has no domain {domain}: `virsh -c {uri} list --all` lists them")]
    NoDomain {
        /// The name or UUID.
        domain: String,
        /// The connection URI.
        uri: String,
    },
    /// The domain does not run, or not any more.
    #[error("the domain {domain} is shut off")]
    ShutOff {
        /// Its name.
        domain: String,
    },
    /// A domain of that name runs.
    #[error("the domain {domain} runs: `DomainOptions::replace` ends it first")]
    Runs {
        /// Its name.
        domain: String,
    },
    /// Its QEMU is not found among the processes of this host.
    #[error(
        "the QEMU process of the domain {domain} is not found: snapback has to run on the \
         domain's own host, and see its processes"
    )]
    NoProcess {
        /// Its name.
        domain: String,
    },
    /// The connection broke. Whether it was done is unknown.
    #[error("the connection to libvirt broke while {doing} was under way")]
    Lost {
        /// What was asked for.
        doing: String,
    },
    /// libvirt refuses, or fails.
    #[error("libvirt failed at {doing}: {reason}")]
    Refused {
        /// What was asked for.
        doing: String,
        /// libvirt's words.
        reason: String,
    },
    /// The file that stands for mapped memory can't be made.
    #[error("`{path}`, by which QEMU maps the image, can't be made: {source}", path = path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The domain's monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A thread for libvirt's calls or events can't be had.
    #[error("a thread for libvirt can't be started: {0}")]
    Thread(String),
}

impl LibvirtError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            LibvirtError::NotBuilt => ErrorKind::HostUnsupported,
            LibvirtError::Connect { .. } => ErrorKind::LibvirtUnreachable,
            LibvirtError::Lost { .. } => ErrorKind::MonitorFailed,
            LibvirtError::OtherDriver { .. } => ErrorKind::NotQemu,
            LibvirtError::NoDomain { .. } => ErrorKind::NoSuchDomain,
            LibvirtError::Runs { .. } => ErrorKind::DomainRuns,
            LibvirtError::ShutOff { .. } => ErrorKind::QemuEnded,
            LibvirtError::NoProcess { .. } => ErrorKind::NotQemu,
            LibvirtError::Refused { .. } => ErrorKind::LibvirtRefused,
            LibvirtError::Memory { source, .. } => ErrorKind::of_io(source),
            LibvirtError::Qmp(error) => error.kind(),
            LibvirtError::Thread(_) => ErrorKind::Io,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            LibvirtError::Qmp(error) => error.details(),
            LibvirtError::Memory { path, .. } => Details::new(&self.to_string(), Some(path), None),
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}
