//! QEMU's events as libvirt passes them on, and the end of a domain. The crate `virt` has no
//! functions for them: libvirt's own are called.

use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::mem;
use std::ptr::null;
use std::sync::Arc;

use serde_json::Value;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use crate::qmp::{Event, Inbox};

/// Has the events of a domain's QEMU delivered, until it is dropped.
#[derive(Debug)]
pub(super) struct Subscription {
    connect: Connect,
    qemu: c_int,
    lifecycle: c_int,
}

impl Subscription {
    /// Delivers QEMU's events to `inbox`, and ends it when the domain stops.
    pub fn new(connect: &Connect, domain: &Domain, inbox: &Arc<Inbox>) -> Result<Self, Error> {
        let connect = connect.clone();
        let opaque = || Arc::into_raw(inbox.clone()).cast_mut().cast::<c_void>();
        // SAFETY: connection and domain are alive. The callback has the type that libvirt asks
        // for; `opaque` is a reference of its own to the inbox, which `release` gives up when
        // libvirt calls the callback no more.
        let qemu = unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                connect.as_ptr(),
                domain.as_ptr(),
                null(),
                Some(on_qemu_event),
                opaque(),
                Some(release),
                0,
            )
        };
        if qemu < 0 {
            return Err(Error::last_error());
        }
        let mut subscription = Subscription { connect, qemu, lifecycle: -1 };
        // SAFETY: libvirt takes callbacks of all types as a generic one, and calls that of
        // VIR_DOMAIN_EVENT_ID_LIFECYCLE as a virConnectDomainEventCallback (its
        // `VIR_DOMAIN_EVENT_CALLBACK`), which `on_lifecycle` is.
        let generic = unsafe {
            mem::transmute::<LifecycleCallback, sys::virConnectDomainEventGenericCallback>(Some(
                on_lifecycle,
            ))
        };
        // SAFETY: as above.
        let lifecycle = unsafe {
            sys::virConnectDomainEventRegisterAny(
                subscription.connect.as_ptr(),
                domain.as_ptr(),
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE as c_int,
                generic,
                opaque(),
                Some(release),
            )
        };
        if lifecycle < 0 {
            return Err(Error::last_error());
        }
        subscription.lifecycle = lifecycle;
        Ok(subscription)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // SAFETY: the connection is alive. The numbers are those of its callbacks; libvirt
        // refuses one that it doesn't know, as that of a connection which broke.
        unsafe {
            sys::virConnectDomainQemuMonitorEventDeregister(self.connect.as_ptr(), self.qemu);
            if self.lifecycle >= 0 {
                sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), self.lifecycle);
            }
        }
    }
}

/// `virConnectDomainEventCallback`.
type LifecycleCallback = Option<
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int,
>;

/// Called on the thread of the event loop, as all here.
unsafe extern "C" fn on_qemu_event(
    _connect: sys::virConnectPtr,
    _domain: sys::virDomainPtr,
    name: *const c_char,
    seconds: c_longlong,
    micros: c_uint,
    details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt gives the name as a string, and `opaque` as it was registered; the
    // reference that it is lasts until `release`.
    let (name, inbox) = unsafe { (CStr::from_ptr(name), &*opaque.cast::<Inbox>()) };
    let data = match details.is_null() {
        true => Value::Object(serde_json::Map::new()),
        // SAFETY: libvirt gives them as a string where there are any.
        false => serde_json::from_slice(unsafe { CStr::from_ptr(details) }.to_bytes())
            .unwrap_or_default(),
    };
    let seconds = u64::try_from(seconds).unwrap_or(0);
    inbox.event(Event {
        name: name.to_string_lossy().into_owned(),
        data,
        timestamp: seconds.saturating_mul(1_000_000).saturating_add(micros.into()),
    });
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    _domain: sys::virDomainPtr,
    event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: as for `on_qemu_event`.
    let inbox = unsafe { &*opaque.cast::<Inbox>() };
    if event == sys::VIR_DOMAIN_EVENT_STOPPED as c_int {
        inbox.end("the domain has stopped".to_owned());
    }
    0
}

/// Gives up the reference that a callback had.
unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: it was made by Arc::into_raw for that callback, and libvirt releases it once.
    drop(unsafe { Arc::from_raw(opaque.cast::<Inbox>()) });
}
