//! The connection to one running domain, opened anew when it broke. Everything here blocks.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::address::DomainAddress;
use super::calls;
use super::connection;
use super::error::LibvirtError;
use super::events::Subscription;
use crate::qmp::Inbox;

/// For how long after a connection broke calls wait until libvirt is back.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The time between two attempts to connect.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// A domain, as long as it runs, over one connection after the other.
pub(super) struct Link {
    uri: Option<String>,
    name: String,
    uuid: String,
    /// Its number: another one with the next start.
    id: u32,
    /// Where QEMU's events go.
    inbox: Arc<Inbox>,
    current: Mutex<Current>,
}

struct Current {
    handle: Arc<Handle>,
    /// When the connection was found broken.
    lost: Option<Instant>,
}

/// A domain of one connection. The order is that in which they are dropped.
struct Handle {
    _events: Subscription,
    domain: Domain,
    connect: Connect,
}

impl Link {
    /// Connects to a domain that runs. Waits for a libvirt that does not answer, for as long as
    /// `patience` lasts.
    pub fn open(address: &DomainAddress, patience: Duration) -> Result<Link, LibvirtError> {
        let start = Instant::now();
        let connect = loop {
            match connection::open(address.uri.as_deref()) {
                Err(LibvirtError::Connect { .. }) if start.elapsed() < patience => {
                    std::thread::sleep(RETRY_EVERY);
                }
                opened => break opened?,
            }
        };
        let domain = look_up(&connect, &address.domain)?;
        Link::over(connect, domain, address.uri.clone())
    }

    /// Takes over the connection to `uri`, in which this domain was found or started.
    pub fn over(
        connect: Connect,
        domain: Domain,
        uri: Option<String>,
    ) -> Result<Link, LibvirtError> {
        let failed = |error| refused("looking at the domain", error);
        let name = domain.name().map_err(failed)?;
        let uuid = domain.uuid_string().map_err(failed)?;
        let Some(id) = domain.id() else { return Err(LibvirtError::ShutOff { domain: name }) };
        let inbox = Arc::new(Inbox::default());
        let handle = Handle::new(connect, domain, &inbox).map_err(failed)?;
        let current = Current { handle: Arc::new(handle), lost: None };
        let current = Mutex::new(current);
        Ok(Link { uri, name, uuid, id, inbox, current })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Calls libvirt. `doing` names in an error what was asked for.
    ///
    /// # Errors
    /// [`LibvirtError::Lost`] when the connection broke meanwhile: whether it was done is unknown.
    pub fn call<T>(
        &self,
        doing: &str,
        call: impl FnOnce(&Domain) -> Result<T, Error>,
    ) -> Result<T, LibvirtError> {
        let handle = self.handle()?;
        call(&handle.domain).map_err(|error| {
            if !handle.is_alive() {
                return LibvirtError::Lost { doing: doing.to_owned() };
            }
            match self.runs(&handle.domain) {
                false => LibvirtError::ShutOff { domain: self.name.clone() },
                true => refused(doing, error),
            }
        })
    }

    /// Asks libvirt something: once more where the connection broke meanwhile.
    pub fn ask<T>(
        &self,
        doing: &str,
        question: impl Fn(&Domain) -> Result<T, Error>,
    ) -> Result<T, LibvirtError> {
        match self.call(doing, &question) {
            Err(LibvirtError::Lost { .. }) => self.call(doing, &question),
            answer => answer,
        }
    }

    /// Has QEMU carry out a command of its monitor, and returns QEMU's whole answer.
    pub fn monitor_command(
        &self,
        doing: &str,
        command: &str,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<String, LibvirtError> {
        self.call(doing, |domain| match fd {
            Some(fd) => calls::command_with_file(domain, command, fd),
            None => domain.qemu_monitor_command(command, 0),
        })
    }

    /// The domain over a connection that stands. Where it broke, waits until it can be made anew,
    /// as long as [`PATIENCE`] lasts.
    fn handle(&self) -> Result<Arc<Handle>, LibvirtError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.handle.is_alive() {
            return Ok(current.handle.clone());
        }
        let lost = *current.lost.get_or_insert_with(Instant::now);
        loop {
            match self.reopen() {
                Ok(handle) => {
                    *current = Current { handle: Arc::new(handle), lost: None };
                    return Ok(current.handle.clone());
                }
                Err(LibvirtError::Connect { .. } | LibvirtError::Lost { .. })
                    if lost.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(RETRY_EVERY);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn reopen(&self) -> Result<Handle, LibvirtError> {
        let connect = connection::open(self.uri.as_deref())?;
        let lost = |error: Error| LibvirtError::Lost { doing: error.message().to_owned() };
        let domain = look_up(&connect, &self.uuid)?;
        if !self.runs(&domain) {
            return Err(LibvirtError::ShutOff { domain: self.name.clone() });
        }
        Handle::new(connect, domain, &self.inbox).map_err(lost)
    }

    /// Whether the domain still runs in the same QEMU.
    fn runs(&self, domain: &Domain) -> bool {
        domain.is_active().unwrap_or(true) && domain.id().is_none_or(|id| id == self.id)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("name", &self.name).field("uri", &self.uri).finish()
    }
}

impl Handle {
    fn new(connect: Connect, domain: Domain, inbox: &Arc<Inbox>) -> Result<Handle, Error> {
        let events = Subscription::new(&connect, &domain, inbox)?;
        Ok(Handle { _events: events, domain, connect })
    }

    fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }
}

/// The domain of this name or UUID. A name that looks like a UUID is one.
fn look_up(connect: &Connect, domain: &str) -> Result<Domain, LibvirtError> {
    let found = match Uuid::parse_str(domain) {
        Ok(_) => connect.lookup_domain_by_uuid_string(domain),
        Err(_) => connect.lookup_domain_by_name(domain),
    };
    found.map_err(|error| match error.code().is(ErrorNumber::NoDomain) {
        true => {
            let uri = connection::uri_of(connect);
            LibvirtError::NoDomain { domain: domain.to_owned(), uri }
        }
        false if !connect.is_alive().unwrap_or(false) => {
            LibvirtError::Lost { doing: "looking up the domain".to_owned() }
        }
        false => refused("looking up the domain", error),
    })
}

pub(super) fn refused(doing: &str, error: Error) -> LibvirtError {
    LibvirtError::Refused { doing: doing.to_owned(), reason: error.message().to_owned() }
}
