//! What the host forbids its users of what QEMU and we need, and the setting that allows it.

use std::fmt;
use std::io;
use std::path::Path;

use nix::unistd::{Uid, User, geteuid};

use super::procfs::sysctl;
use super::uffd::{DEVICE, Door};

/// The kernel parameter that lets everybody call userfaultfd(2) (its manual page).
const SWITCH: &str = "vm.unprivileged_userfaultfd";

/// The kernel parameter that says who may trace whom (Yama, ptrace(2)).
const YAMA_SCOPE: &str = "kernel.yama.ptrace_scope";

/// A right that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    /// What is forbidden to whom, and by what.
    pub why: String,
    /// Commands each of which allows it, the best one first. They take root.
    pub remedies: Vec<String>,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)?;
        let remedies: Vec<String> = self.remedies.iter().map(|cmd| format!("`{cmd}`")).collect();
        match remedies.is_empty() {
            true => Ok(()),
            false => write!(f, "; as root, {} allows it", remedies.join(" or ")),
        }
    }
}

/// Why a process of this user gets no userfaultfd that catches the kernel's accesses as well;
/// nothing where it gets one. `by_device` says whether it tries `/dev/userfaultfd` first.
///
/// Of another user only the kernel's switch is known, and not what else may forbid it.
pub fn userfaultfd_lack(user: u32, by_device: bool) -> Option<Lack> {
    let refusal = match user == geteuid().as_raw() {
        true if by_device && Door::Device.knock().is_ok() => return None,
        true => Door::SystemCall.knock().err()?,
        false if user == 0 || switch_is_on() => return None,
        false => io::ErrorKind::PermissionDenied.into(),
    };
    Some(explain(&refusal, user, by_device, switch_is_on()))
}

fn switch_is_on() -> bool {
    // Before Linux 5.2 there is no such switch, and everybody may.
    sysctl(SWITCH).is_none_or(|value| value != "0")
}

fn explain(refusal: &io::Error, user: u32, by_device: bool, switch_is_on: bool) -> Lack {
    if refusal.raw_os_error() == Some(libc::ENOSYS) {
        let why = "this kernel has no userfaultfd (CONFIG_USERFAULTFD)".to_owned();
        return Lack { why, remedies: Vec::new() };
    }
    let name = user_name(user);
    let mut remedies = Vec::new();
    let why = match user == 0 || switch_is_on {
        true => {
            let filter = "a seccomp filter or a security module, such as a container's";
            format!("{filter}, forbids userfaultfd(2) to user {name} ({refusal})")
        }
        false => {
            remedies.push(format!("sysctl {SWITCH}=1"));
            format!("user {name} may not call userfaultfd(2), as `{SWITCH}` is 0")
        }
    };
    if by_device && user != 0 && Path::new(DEVICE).exists() {
        remedies.push(format!("setfacl -m u:{name}:rw {DEVICE}"));
    }
    Lack { why, remedies }
}

/// What Yama forbids of tracing, as by pidfd_getfd(2), a process that is no descendant of ours.
/// Nothing where it forbids nothing.
pub fn tracing_lack() -> Option<Lack> {
    let scope = sysctl(YAMA_SCOPE)?;
    let may_be_traced = match scope.as_str() {
        "0" => return None,
        "1" => "only by its ancestors",
        "2" => "only with CAP_SYS_PTRACE",
        _ => "by nobody until the next boot",
    };
    let why = format!("a process may be traced {may_be_traced}, as `{YAMA_SCOPE}` is {scope}");
    let remedies = match scope.as_str() {
        "1" | "2" => vec![format!("sysctl {YAMA_SCOPE}=0")],
        _ => Vec::new(),
    };
    Some(Lack { why, remedies })
}

/// A user's name, or else the number.
pub fn user_name(user: u32) -> String {
    let found = User::from_uid(Uid::from_raw(user)).ok().flatten();
    found.map_or_else(|| user.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(user: u32, by_device: bool, switch_is_on: bool) -> Lack {
        let refusal = io::Error::from_raw_os_error(libc::EPERM);
        explain(&refusal, user, by_device, switch_is_on)
    }

    #[test]
    fn the_setting_is_named_that_forbids_it() {
        let lack = denied(65534, true, false);
        assert_eq!(lack.remedies[0], "sysctl vm.unprivileged_userfaultfd=1");
        let by_acl = format!("setfacl -m u:{}:rw {DEVICE}", user_name(65534));
        assert_eq!(lack.remedies.get(1).is_some(), Path::new(DEVICE).exists());
        assert!(lack.remedies.get(1).is_none_or(|remedy| *remedy == by_acl), "{lack}");
        assert!(denied(65534, false, false).remedies.len() == 1);
    }

    #[test]
    fn a_filter_is_told_from_the_setting() {
        for (user, on) in [(0, false), (65534, true)] {
            let lack = denied(user, false, on);
            assert!(lack.why.contains("seccomp") && lack.remedies.is_empty(), "{lack}");
        }
        let missing = explain(&io::Error::from_raw_os_error(libc::ENOSYS), 0, true, true);
        assert!(missing.why.contains("CONFIG_USERFAULTFD"), "{missing}");
    }

    #[test]
    fn users_have_names_or_numbers() {
        assert_eq!((user_name(0).as_str(), user_name(4_000_000).as_str()), ("root", "4000000"));
    }
}
