//! Which files can be opened (landlock(7)).

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

use crate::host::procfs::Mapping;

/// The rights that are asked for; a kernel that knows fewer of them fences off less.
const RIGHTS: ABI = ABI::V6;

/// This program, even if its file has been replaced.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// What the dynamic linker reads before this program begins (ld.so(8)).
const OF_THE_LINKER: [&str; 2] = ["/etc/ld.so.cache", "/etc/ld.so.preload"];

/// What can be opened from inside.
#[derive(Debug, Default)]
pub struct Access<'a> {
    /// Files that can be read.
    pub read: Vec<BorrowedFd<'a>>,
    /// Directories in which files can be read, whatever lies there by then.
    pub read_in: Vec<PathBuf>,
    /// Directories in which files can be removed, but neither read nor written.
    pub remove_in: Vec<PathBuf>,
    /// Directories in which files can be read, made, written, renamed and removed.
    pub write_in: Vec<PathBuf>,
    /// Directories in which empty directories can be removed.
    pub remove_directories_in: Vec<PathBuf>,
}

/// Makes a ruleset of what can be opened: what `access` names, and what starting this program
/// again takes. None where the kernel has no Landlock.
pub(super) fn ruleset(access: &Access<'_>) -> io::Result<Option<OwnedFd>> {
    build(access).map_err(io::Error::other)
}

fn build(access: &Access<'_>) -> Result<Option<OwnedFd>, RulesetError> {
    let read = BitFlags::from(AccessFs::ReadFile);
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .handle_access(AccessNet::from_all(RIGHTS))?
        // Not signals: a session that fails ends its QEMU, which is outside.
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    for file in &access.read {
        rules = rules.add_rule(PathBeneath::new(file, read))?;
    }
    // A rename takes the right to remove and to make.
    let write = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
    for (directories, rights) in [
        (&access.read_in, read),
        (&access.remove_in, AccessFs::RemoveFile.into()),
        (&access.write_in, read | write),
        (&access.remove_directories_in, AccessFs::RemoveDir.into()),
    ] {
        for directory in directories {
            rules = allow(rules, directory, rights)?;
        }
    }
    for file in program_files() {
        rules = allow(rules, &file, read | AccessFs::Execute)?;
    }
    for file in OF_THE_LINKER {
        rules = allow(rules, Path::new(file), read)?;
    }
    // Where a closed standard stream leads.
    rules = allow(rules, Path::new("/dev/null"), read | AccessFs::WriteFile)?;
    // Whether anybody listens on a socket is read there before its file is removed. The kernel
    // makes the files anew each time they are looked up, so the rule is for their directory; that
    // is the same one for as long as somebody has it open.
    if let Ok(tables) = File::open("/proc/self/net") {
        rules = rules.add_rule(PathBeneath::new(&tables, read))?;
        std::mem::forget(tables);
    }
    Ok(rules.into())
}

/// Adds a rule for a file or a directory, where it exists.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(file) => rules.add_rule(PathBeneath::new(file, rights)),
        Err(_) => Ok(rules),
    }
}

/// The files that hold this process's code: the program, its libraries, the dynamic linker.
fn program_files() -> Vec<PathBuf> {
    let mappings = Mapping::all_of(std::process::id() as i32).unwrap_or_default();
    let code = mappings.into_iter().filter(|mapping| mapping.executable);
    let libraries = code.filter_map(|mapping| mapping.path);
    [PathBuf::from(THIS_PROGRAM)].into_iter().chain(libraries).collect()
}
