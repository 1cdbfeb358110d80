//! The host: its kernel, the rights of this user, and what is left of its resources.

use std::fs::File;
use std::io;
use std::process::{Command, Stdio};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::geteuid;

use super::{Item, State};
use crate::host::pidfd::Pidfd;
use crate::host::procfs::MemInfo;
use crate::host::rights::{Lack, tracing_lack, user_name, userfaultfd_lack};
use crate::host::uffd::{self, DEVICE, Door};
use crate::host::{check_page_size, huge_pages};

/// Open files that a revert of a chain of images with some disks takes.
const OPEN_FILES: u64 = 1024;

/// Asks for everything that needs no QEMU.
pub(super) fn examine() -> Vec<Item> {
    vec![
        page_size(),
        system_call(),
        device(),
        write_protection(),
        tracing(),
        kvm(),
        transparent_huge_pages(),
        memory(),
        locked_memory(),
        open_files(),
    ]
}

fn page_size() -> Item {
    match check_page_size() {
        Ok(()) => Item::new("page size", State::Ok, "4 KiB, as images need it"),
        Err(error) => Item::new("page size", State::Missing, error.to_string()),
    }
}

/// An item for what a right is missing for.
pub(super) fn lacking(name: &str, state: State, lack: Lack, meaning: &str) -> Item {
    let Lack { why, remedies } = lack;
    Item::new(name, state, format!("{why}: {meaning}")).remedied(remedies.into_iter().next())
}

fn system_call() -> Item {
    let name = "userfaultfd";
    let Some(lack) = userfaultfd_lack(geteuid().as_raw(), false) else {
        let says = "by system call: any QEMU can save, and bring memory while a guest runs";
        return Item::new(name, State::Ok, says);
    };
    match Door::Device.knock() {
        Ok(()) => lacking(name, State::Degraded, lack, "only QEMU 8.0 and later have it"),
        Err(_) => {
            lacking(name, State::Missing, lack, "no save, and memory comes before a guest runs")
        }
    }
}

fn device() -> Item {
    let user = user_name(geteuid().as_raw());
    match Door::Device.knock() {
        Ok(()) => Item::new(DEVICE, State::Ok, "open: QEMU 8.0 and later take userfaultfd there"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Item::new(DEVICE, State::Degraded, "not there: it takes Linux 6.1")
        }
        Err(error) => {
            let says = format!("QEMU 8.0 and later would use it; user {user} can't: {error}");
            let item = Item::new(DEVICE, State::Degraded, says);
            item.remedied(format!("setfacl -m u:{user}:rw {DEVICE}"))
        }
    }
}

fn write_protection() -> Item {
    let name = "write protection";
    match uffd::write_protect_supported() {
        Ok(()) => Item::new(name, State::Ok, "QEMU can save a guest that runs on"),
        Err(error @ uffd::UffdError::NoFeature(_)) => {
            Item::new(name, State::Missing, error.to_string())
        }
        Err(_) => Item::new(name, State::Missing, "not known without userfaultfd"),
    }
}

/// Whether we may copy descriptors of our own children, as of the QEMUs that we start.
fn tracing() -> Item {
    let name = "tracing";
    let without = "memory goes by QEMU's socket, one round trip more for each fault";
    match (copy_from_child(), tracing_lack()) {
        (Ok(()), None) => Item::new(name, State::Ok, "memory goes directly into any QEMU of ours"),
        (Ok(()), Some(lack)) => {
            lacking(name, State::Degraded, lack, "`serve` fills other QEMUs by their socket")
        }
        (Err(_), Some(lack)) => lacking(name, State::Degraded, lack, without),
        (Err(error), None) => {
            Item::new(name, State::Degraded, format!("pidfd_getfd(2) fails ({error}): {without}"))
        }
    }
}

fn copy_from_child() -> io::Result<()> {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    // A pid is at most 2^22 (proc(5), pid_max).
    let copied = Pidfd::open(child.id() as i32).and_then(|child| child.copy_descriptor(0));
    // It ends by itself, with its input.
    drop(child.stdin.take());
    child.wait()?;
    copied.map(drop)
}

pub(super) fn kvm() -> Item {
    let device = "/dev/kvm";
    let user = user_name(geteuid().as_raw());
    match File::options().read(true).write(true).open(device) {
        Ok(_) => Item::new("KVM", State::Ok, "open: guests run at the processor's speed"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let says = format!("closed to user {user}: only guests without KVM can be reverted");
            let item = Item::new("KVM", State::Degraded, says);
            item.remedied(format!("setfacl -m u:{user}:rw {device}"))
        }
        Err(error) => {
            let says = format!("only guests without KVM can be reverted; {device}: {error}");
            Item::new("KVM", State::Degraded, says)
                .remedied("modprobe -a kvm_intel kvm_amd".to_owned())
        }
    }
}

fn transparent_huge_pages() -> Item {
    let name = "huge pages";
    match huge_pages::mode().as_deref() {
        None => Item::new(name, State::Degraded, "this kernel has no transparent huge pages"),
        Some("never") => {
            let says = "transparent ones are off (never): guests and saves are slower";
            let item = Item::new(name, State::Degraded, says);
            item.remedied(format!("sh -c 'echo madvise >{}'", huge_pages::ENABLED))
        }
        Some(mode) => Item::new(name, State::Ok, format!("transparent ones in mode {mode}")),
    }
}

fn memory() -> Item {
    match MemInfo::read() {
        Ok(MemInfo { total, available, .. }) => {
            let says = format!("{} MiB, of which {} are available", total >> 20, available >> 20);
            Item::new("memory", State::Ok, says)
        }
        Err(error) => Item::new("memory", State::Degraded, format!("/proc/meminfo: {error}")),
    }
}

fn locked_memory() -> Item {
    let name = "locked memory";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((RLIM_INFINITY, _)) => Item::new(name, State::Ok, "no limit"),
        Ok((limit, _)) => {
            let says = format!(
                "at most {} KiB: enough but for guests with `-overcommit mem-lock=on`",
                limit >> 10
            );
            Item::new(name, State::Ok, says)
        }
        Err(error) => Item::new(name, State::Degraded, format!("getrlimit(2): {error}")),
    }
}

fn open_files() -> Item {
    let name = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((limit, _)) if limit >= OPEN_FILES => {
            Item::new(name, State::Ok, format!("at most {limit}"))
        }
        Ok((limit, _)) => {
            let says = format!("at most {limit}: too few for long chains of images");
            Item::new(name, State::Degraded, says).remedied(format!("ulimit -n {OPEN_FILES}"))
        }
        Err(error) => Item::new(name, State::Degraded, format!("getrlimit(2): {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_says_something_and_has_its_own_name() {
        let items = examine();
        assert!(items.iter().all(|item| !item.says.is_empty()), "{items:?}");
        let mut names: Vec<_> = items.iter().map(|item| item.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), items.len());
    }

    #[test]
    fn descriptors_of_a_child_can_be_copied() {
        copy_from_child().unwrap();
        assert_ne!(tracing().state, State::Missing);
    }
}
