//! What no two guests can share, moved to where one of them is alone: files and sockets to a
//! directory of its own, ports to free ones.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::command_line::{CommandLine, ports};
use crate::guest::start::collisions::exclusive_paths;
use crate::guest::start::paths;
use crate::guest::start::ports::NewPort;
use crate::machine::Machine;

/// The rules `(OLD, NEW)` that move what the record alone can have to `directory`, behind the
/// user's own, which come first.
pub(super) fn path_rules(
    machine: &Machine,
    given: &[(String, String)],
    directory: &Path,
) -> Result<Vec<(String, String)>, GuestError> {
    let users = paths::rules(given)?;
    let mut names = HashSet::new();
    let is_free = |path: &String| paths::replace(path, &users) == *path;
    let own = exclusive_paths(machine).into_iter().filter(is_free).map(|path| {
        let new = directory.join(own_name(&path, &mut names));
        (path, new.to_string_lossy().into_owned())
    });
    Ok(given.iter().cloned().chain(own).collect())
}

/// The rules that have every port of the record replaced for which the user has none.
pub(super) fn port_rules(line: &CommandLine, given: &[(u16, NewPort)]) -> Vec<(u16, NewPort)> {
    let mut rules = given.to_vec();
    for port in line.options().flat_map(ports::bound) {
        if !rules.iter().any(|(old, _)| *old == port.number) {
            rules.push((port.number, NewPort::Free));
        }
    }
    rules
}

/// A file's own name, made different from those already `taken`.
pub fn own_name(path: &str, taken: &mut HashSet<String>) -> String {
    let name = Path::new(path).file_name().map_or("file".into(), |name| name.to_string_lossy());
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    let mut names = std::iter::once(name.to_string()).chain(numbered);
    let free = names.find(|name| !taken.contains(name)).unwrap_or_default();
    taken.insert(free.clone());
    free
}

/// A guest's own directory, made unless it was there. Dropping it removes one that was made and
/// is empty.
#[derive(Debug)]
pub(in crate::guest) struct OwnDirectory(Option<PathBuf>);

impl OwnDirectory {
    pub fn make(path: &Path) -> Result<OwnDirectory, GuestError> {
        if path.is_dir() {
            return Ok(OwnDirectory(None));
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        match made {
            Ok(()) => Ok(OwnDirectory(Some(path.to_owned()))),
            Err(source) => Err(GuestError::OwnDirectory { path: path.to_owned(), source }),
        }
    }

    /// Leaves it to its guest.
    pub fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for OwnDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It fails where something is in it.
            let _ = fs::remove_dir(path);
        }
    }
}
