//! A connection to libvirt's QEMU driver.

use virt::connect::Connect;

use super::error::LibvirtError;
use super::event_loop;

/// Every so many seconds a silent libvirtd is asked whether it is still there.
const KEEPALIVE_INTERVAL: i32 = 5;

/// How many of those questions may go unanswered.
const KEEPALIVE_COUNT: u32 = 6;

/// What messages call the default connection.
const DEFAULT: &str = "the default URI";

/// Connects to the libvirt at `uri`, or to the one that `virsh` takes by default. Blocks.
pub(super) fn open(uri: Option<&str>) -> Result<Connect, LibvirtError> {
    event_loop::ensure()?;
    let failed = |error: virt::error::Error| LibvirtError::Connect {
        uri: uri.unwrap_or(DEFAULT).to_owned(),
        reason: error.message().to_owned(),
    };
    let connect = Connect::open(uri).map_err(failed)?;
    let driver = connect.driver_type().map_err(failed)?;
    if driver != "QEMU" {
        return Err(LibvirtError::OtherDriver { uri: uri_of(&connect), driver });
    }
    if let Err(error) = connect.set_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT) {
        tracing::debug!("this connection has no keepalive: {error}");
    }
    Ok(connect)
}

/// Its URI, for messages.
pub(super) fn uri_of(connect: &Connect) -> String {
    connect.uri().unwrap_or_else(|_| DEFAULT.to_owned())
}
