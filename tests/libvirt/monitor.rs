//! QMP through libvirt.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use snapback::libvirt::{Domain, DomainAddress, LibvirtError};

use crate::harness::Dir;
use crate::support::libvirt::{Libvirt, domain_options, shared_libvirt};
use crate::support::{Result, SOON};
use crate::tests;

tests! {
    a_domains_monitor_is_a_qmp
    what_is_not_there_is_named
}

/// Without waiting for a libvirt that does not answer.
const NOW: Duration = Duration::ZERO;

/// The address of a domain.
fn address(libvirt: &Libvirt, domain: &str) -> DomainAddress {
    let mut address = DomainAddress::new(domain);
    address.uri = Some(libvirt.uri());
    address
}

fn a_domains_monitor_is_a_qmp(_: &Dir) -> Result<()> {
    // Not that of other tests, which need its libvirtd.
    let libvirt = &Libvirt::start()?;
    let guest = libvirt.boot(&domain_options("monitored"))?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let domain = Domain::open(&address(libvirt, "monitored"), NOW).await?;
        let by_uuid = Domain::open(&address(libvirt, domain.uuid()), NOW).await?;
        assert_eq!(by_uuid.name(), "monitored");

        let qmp = domain.monitor().await?;
        assert_eq!(qmp.peer_pid(), Some(guest.pid as i32));
        let expected = Libvirt::usual_qemu().version();
        let version = qmp.version();
        assert_eq!((version.major.into(), version.minor.into()), expected);
        let mut events = qmp.events();
        qmp.stop().await?;
        events.wait(|event| event.name == "STOP" && event.timestamp > 0, SOON).await?;
        assert_eq!(qmp.status().await?, "paused");
        qmp.cont().await?;
        let refused = qmp.execute("no-such-command", ()).await.unwrap_err();
        assert!(refused.is_command_not_found(), "{refused}");

        let (_ours, theirs) = UnixStream::pair()?;
        qmp.getfd("test", theirs.as_fd()).await?;
        qmp.closefd("test").await?;

        // libvirtd goes and comes back: what is asked meanwhile waits.
        libvirt.stop_libvirtd();
        let asked = tokio::spawn({
            let qmp = qmp.clone();
            async move { qmp.status().await }
        });
        libvirt.start_libvirtd()?;
        assert_eq!(asked.await??, "running");
        qmp.stop().await?;
        events.wait(|event| event.name == "STOP", SOON).await?;
        qmp.cont().await?;

        // The end of QEMU is the end of the connection.
        drop(guest);
        let ended = async { while events.next().await.is_ok() {} };
        tokio::time::timeout(Duration::from_secs(60), ended).await?;
        assert!(qmp.status().await.is_err() && qmp.ended().is_some());
        Ok(())
    })
}

fn what_is_not_there_is_named(_: &Dir) -> Result<()> {
    let libvirt = shared_libvirt()?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let error = Domain::open(&address(libvirt, "nobody"), NOW).await.unwrap_err();
        assert!(matches!(error, LibvirtError::NoDomain { .. }), "{error}");
        let mut nowhere = DomainAddress::new("nobody");
        nowhere.uri = Some("qemu+unix:///system?socket=/nonexistent/libvirt-sock".into());
        let error = Domain::open(&nowhere, NOW).await.unwrap_err();
        assert!(matches!(error, LibvirtError::Connect { .. }), "{error}");
        nowhere.uri = Some("test:///default".into());
        let error = Domain::open(&nowhere, NOW).await.unwrap_err();
        assert!(matches!(error, LibvirtError::OtherDriver { .. }), "{error}");
        Ok(())
    })
}
