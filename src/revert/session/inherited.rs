//! A guest whose server has died: the session is entered where it runs.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::adopted::{Adopted, Control};
use super::confined::Confinement;
use super::connection::Connection;
use super::contents::fill_options;
use super::lifecycle::Lifecycle;
use super::qemu::Qemu;
use super::running::Running;
use crate::cancel::Cancellation;
use crate::host::procfs::AddressSpace;
use crate::keeper::Inheritance;
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::kept::{Details, Kept, note_keepers};
use crate::runs::{Entry, ProcessId};

impl Running {
    /// Goes on with a guest whose server has died. `cancel` holds for the session.
    ///
    /// # Errors
    /// When something that was left can't be used. QEMU has then been ended.
    pub fn inherit(inheritance: Inheritance, cancel: Cancellation) -> Result<Running, RevertError> {
        let Inheritance {
            ledger,
            image,
            qemu,
            control,
            output,
            stream,
            userfaultfd,
            mappings,
            page_map,
            broker,
            keeper,
            ..
        } = inheritance;
        let details = Details::read(&ledger);
        let domain = details.as_ref().ok().and_then(|details| details.domain.clone());
        let control = match (control, domain) {
            (Some(socket), _) => Control::Socket(socket),
            (None, Some(domain)) => Control::Domain(domain),
            (None, None) => Control::Nobody,
        };
        // From here on an error ends it.
        let qemu = Adopted::new(qemu, ledger.qemu(), control, output);
        let space = match mappings.zip(page_map) {
            Some((mappings, page_map)) => Some(AddressSpace::of(mappings, page_map)),
            // Before this process enters a sandbox of its own.
            None => qemu.pid().and_then(|pid| AddressSpace::open(pid).ok()),
        };
        let details = details.map_err(PostcopyError::Inherited)?;
        let image = details.open_image(File::from(image))?;
        let Details { delivery, sandbox, run, .. } = details;
        let fill = fill_options(&delivery, &image, Vec::new());
        let server = ProcessId::serving(std::process::id() as i32, &ledger);
        let kept = Kept::inherited(&keeper, ledger);
        let mut connection = Connection::new(
            Qemu::Adopted(qemu),
            Lifecycle::taken_over(),
            Arc::clone(&image),
            delivery,
            cancel,
        );
        let pid = connection.qemu.pid();
        connection.run = run.map(|run| Entry::take_over(run, Some(server))).inspect(|run| {
            // The predecessor may have died before it was written. In the sandbox, where QEMU can't
            // be seen, it has been.
            run.note(move |record| record.qemu = pid.and_then(ProcessId::of).or(record.qemu));
        });
        note_keepers(&keeper, &kept.ledger, connection.run.as_ref());
        connection.keep(keeper, kept);
        connection.space = space.map(Arc::new);
        connection.confinement = Confinement::inherited(broker, sandbox);
        connection.take_over(UnixStream::from(stream), userfaultfd, fill)?;
        Ok(Running { connection })
    }
}
