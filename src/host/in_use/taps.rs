//! Tap interfaces that a process is attached to.
//!
//! The kernel tells of a process's descriptor of /dev/net/tun which interface it is attached to
//! (`iff:` in its fdinfo), and whether an interface has anybody attached by its carrier.

use std::fs;
use std::path::{Path, PathBuf};

use super::owner::{self, Owner};
use crate::host::procfs::{self, processes};

/// Who is attached to a tap interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// This process.
    To(Owner),
    /// A process that we may not look into.
    Unseen,
}

/// Who is attached to the tap interface of this name, in our network namespace; `None` when
/// there is no such interface, or nobody is.
pub fn attached(name: &str) -> Option<Attached> {
    let interface = Path::new("/sys/class/net").join(name);
    // Only taps have this file. A name of dots and slashes leads elsewhere, and to none.
    fs::metadata(interface.join("tun_flags")).ok()?;
    // An interface that is down doesn't tell its carrier.
    let carrier = fs::read_to_string(interface.join("carrier")).ok();
    match carrier.as_deref().map(str::trim) {
        Some("0") => None,
        Some(_) => Some(holder(name).map_or(Attached::Unseen, Attached::To)),
        None => holder(name).map(Attached::To),
    }
}

/// The process that has a descriptor of the interface.
fn holder(name: &str) -> Option<Owner> {
    let tun = PathBuf::from("/dev/net/tun");
    let is_of_it = |pid: i32, fd: i32| {
        let info = || fs::read_to_string(procfs::path(pid, &format!("fdinfo/{fd}")));
        let named = |info: &str| {
            info.lines().filter_map(|line| line.strip_prefix("iff:")).any(|iff| iff.trim() == name)
        };
        owner::refers_to(pid, fd, &tun) && info().is_ok_and(|info| named(&info))
    };
    let mut holders =
        processes().filter(|pid| owner::seen_descriptors(*pid).any(|fd| is_of_it(*pid, fd)));
    holders.next().map(Owner::of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_has_nobody_attached() {
        for name in ["lo", "no-such-interface", "", "../../..", "a/b"] {
            assert_eq!(attached(name), None, "{name}");
        }
    }
}
