//! The keeper, and what it starts in the place of a server that was killed.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use super::FAILED;
use crate::keeper::Successor;
use crate::libvirt::DomainAddress;
use crate::save::GuestAddress;

/// The program that runs now, even if its file has been replaced since.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";

/// What a keeper starts in the place of a server that prints in this way.
pub(super) fn successor(json: bool, serving_detached: bool) -> Successor {
    let mut arguments: Vec<OsString> = vec!["resume".into(), "--inherited".into()];
    if json {
        arguments.push("--json".into());
    }
    if serving_detached {
        arguments.push("--serving-detached".into());
    }
    Successor::new(THIS_PROGRAM, arguments)
}

/// What the keeper of a save of this guest to this image starts should the save be killed.
pub(super) fn cleaner(guest: &GuestAddress, image: &Path, json: bool) -> Successor {
    let mut arguments: Vec<OsString> = vec!["save".into(), "--recover".into()];
    if json {
        arguments.push("--json".into());
    }
    match guest {
        GuestAddress::Socket(socket) => arguments.extend(["--qmp".into(), socket.into()]),
        GuestAddress::Domain(DomainAddress { domain, uri, .. }) => {
            arguments.extend(["--domain".into(), domain.into()]);
            if let Some(uri) = uri {
                arguments.extend(["--connect".into(), uri.into()]);
            }
        }
    }
    arguments.extend(["--".into(), image.into()]);
    Successor::cleaning_up(THIS_PROGRAM, arguments)
}

/// Runs a keeper, where this process was started as one. Nothing else that the program begins with
/// has happened: a keeper stays beside a guest, and is to be small.
pub(super) fn run(arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.peekable();
    arguments.next_if(|argument| argument == "keeper")?;
    let cleans_up = arguments.next_if(|argument| argument == "--clean-up").is_some();
    arguments.next_if(|argument| argument == "--");
    let successor = arguments.collect();
    let kept = match cleans_up {
        true => crate::keeper::clean_up(successor),
        false => crate::keeper::run(successor),
    };
    Some(match kept {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snapback: a keeper is started by a page server or a save only ({error})");
            ExitCode::from(FAILED)
        }
    })
}
