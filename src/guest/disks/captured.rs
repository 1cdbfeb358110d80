//! The captured disks of a record: their frozen files are located and checked, and an overlay is
//! planned over each.

use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::disks::frozen;
use crate::guest::disks::overlay::{Overlay, OverlayOptions};
use crate::machine::{Disk, DiskRole};

/// The overlays of the captured disks among `disks`, each with its disk's position there. The
/// frozen files are those that are `given`, `(NAME, FILE)`, or where they were; `moved` applies
/// the caller's path rules. Disks that are only read are checked as well.
///
/// # Errors
/// When a file is not there or not unchanged, or a given one belongs to no captured disk.
pub fn overlays(
    disks: &[Disk],
    given: &[(String, PathBuf)],
    options: &OverlayOptions,
    moved: impl Fn(&str) -> String,
) -> Result<Vec<(usize, Overlay)>, GuestError> {
    frozen::check_names(disks, given)?;
    let mut found = Vec::new();
    for (at, disk) in disks.iter().enumerate() {
        match disk.role {
            DiskRole::Captured => {
                if let Some(far) = &options.far {
                    found.push((at, Overlay::new(disk, at, far.chain(disk)?, options)?));
                    continue;
                }
                let given = given.iter().find(|(name, _)| disk.is_called(name));
                let given = given.map(|(_, path)| absolute("disk", path)).transpose()?;
                let chain = frozen::chain(disk, given.as_deref(), &moved)?;
                found.push((at, Overlay::new(disk, at, chain, options)?));
            }
            DiskRole::ReadOnly => frozen::check_read_only(disk, &moved)?,
            DiskRole::Excluded | DiskRole::Empty => {}
        }
    }
    Ok(found)
}

/// The path of `what`, made absolute: the caller's relative paths start from our working
/// directory, not from QEMU's.
pub(in crate::guest) fn absolute(what: &'static str, path: &Path) -> Result<PathBuf, GuestError> {
    std::path::absolute(path).map_err(|source| GuestError::Path {
        what,
        path: path.to_owned(),
        problem: source.to_string(),
    })
}
