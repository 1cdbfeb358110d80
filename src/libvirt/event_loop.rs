//! libvirt's event loop, on a thread of its own. Without one, libvirt delivers no events and
//! does not see that a connection broke.

use std::os::raw::c_void;
use std::sync::OnceLock;

use virt::event::{event_register_default_impl, event_run_default_impl};
use virt::sys;

use super::error::LibvirtError;

/// Sees to it that the event loop runs. It has to before a connection is opened, and runs from
/// then on.
pub(super) fn ensure() -> Result<(), LibvirtError> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED.get_or_init(start).clone().map_err(LibvirtError::Thread)
}

fn start() -> Result<(), String> {
    // SAFETY: the handler has the type that libvirt asks for, and ignores its arguments.
    unsafe { sys::virSetErrorFunc(std::ptr::null_mut(), Some(ignore)) };
    event_register_default_impl().map_err(|error| error.to_string())?;
    let run = || {
        while let Ok(()) = event_run_default_impl() {}
        tracing::warn!("libvirt's event loop has ended");
    };
    let thread = std::thread::Builder::new().name("libvirt-events".into()).spawn(run);
    thread.map(drop).map_err(|error| error.to_string())
}

/// In place of libvirt's own handler, which prints every error to stderr: ours are told by whoever
/// asked for something.
unsafe extern "C" fn ignore(_: *mut c_void, _: sys::virErrorPtr) {}
