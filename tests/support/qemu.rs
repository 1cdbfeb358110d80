//! The QEMUs that tests run on, and where set-up put things.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Result;

/// A stock QEMU that tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// Debian 12's QEMU 7.2, installed by apt. `SNAPBACK_TEST_QEMU_7` names another.
    V7,
    /// QEMU 10.0 of bookworm-backports, run in place from the deps folder; with
    /// `SNAPBACK_TEST_NEWEST` set, QEMU 11.1 of trixie-backports (scripts/newest.sh).
    /// `SNAPBACK_TEST_QEMU_10` names another.
    V10,
}

/// What kind of processors a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// A PC: `qemu-system-x86_64`.
    X86_64,
    /// QEMU's board `virt`: `qemu-system-aarch64`.
    Aarch64,
}

/// Where set-up put what it made: `SNAPBACK_DEPS`, or `.deps` in the project.
pub fn deps() -> PathBuf {
    let folder = match std::env::var_os("SNAPBACK_DEPS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".deps"),
    };
    folder.canonicalize().unwrap_or(folder)
}

/// Whether the newer QEMU of the tests is the newest that there is.
fn newest() -> bool {
    std::env::var_os("SNAPBACK_TEST_NEWEST").is_some_and(|value| !value.is_empty())
}

/// Where a place of the system's is in the QEMU that is run from the deps folder.
fn unpacked(place: &str) -> PathBuf {
    let name = if newest() { "qemu-11.1" } else { "qemu-10.0" };
    deps().join(format!("{name}{place}"))
}

/// A file which set-up makes.
///
/// # Errors
/// When it isn't there, with what to do about it.
pub fn artifact(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path);
    }
    let path = path.display();
    Err(format!("{path} is missing: run `make test`, or once `make setup guest`").into())
}

impl Qemu {
    /// All of them, oldest first.
    pub const ALL: [Qemu; 2] = [Qemu::V7, Qemu::V10];

    /// The one of that number, as benchmarks are told it.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn parse(number: &str) -> std::result::Result<Qemu, String> {
        let named = |qemu: &Qemu| qemu.version().0.to_string() == number;
        Qemu::ALL.into_iter().find(named).ok_or("there are 7 and 10".into())
    }

    /// What QMP `query-version` answers: major and minor.
    pub fn version(self) -> (u64, u64) {
        match self {
            Qemu::V7 => (7, 2),
            Qemu::V10 if newest() => (11, 1),
            Qemu::V10 => (10, 0),
        }
    }

    /// The binary for PCs.
    pub fn binary(self) -> PathBuf {
        self.binary_for(Arch::X86_64)
    }

    /// The binary for guests of an architecture; where the environment names a binary for
    /// PCs, its neighbour.
    pub fn binary_for(self, arch: Arch) -> PathBuf {
        let (pc, name) = match arch {
            Arch::X86_64 => (true, "qemu-system-x86_64"),
            Arch::Aarch64 => (false, "qemu-system-aarch64"),
        };
        match (self.named(), self) {
            (Some(binary), _) if pc => binary,
            (Some(binary), _) => binary.with_file_name(name),
            (None, Qemu::V7) => Path::new("/usr/bin").join(name),
            (None, Qemu::V10) => unpacked("/usr/bin").join(name),
        }
    }

    /// The environment variables that it needs to find its parts.
    pub fn env(self) -> Vec<(String, String)> {
        match (self.named(), self) {
            (None, Qemu::V10) => {
                let modules = unpacked("/usr/lib/x86_64-linux-gnu/qemu");
                vec![("QEMU_MODULE_DIR".into(), modules.display().to_string())]
            }
            _ => Vec::new(),
        }
    }

    /// Its directories that have to be in the place of the system's where it is started without
    /// [`env`](Qemu::env) and [`args`](Qemu::args), as libvirt does to ask what it can.
    pub fn parts(self) -> Vec<(PathBuf, &'static str)> {
        const PARTS: [&str; 3] =
            ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/share/qemu", "/usr/share/seabios"];
        match (self.named(), self) {
            (None, Qemu::V10) => PARTS.into_iter().map(|place| (unpacked(place), place)).collect(),
            _ => Vec::new(),
        }
    }

    /// The arguments that it needs to find its parts (`-L`), ahead of any others.
    pub fn args(self) -> Vec<String> {
        match (self.named(), self) {
            (None, Qemu::V10) => {
                let own = unpacked("/usr/share");
                // ipxe, the network cards' ROMs, is the system's.
                [own.join("qemu"), own.join("seabios"), "/usr/share/qemu".into()]
                    .iter()
                    .chain([&PathBuf::from("/usr/lib/ipxe/qemu")])
                    .flat_map(|folder| ["-L".to_string(), folder.display().to_string()])
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether it is there.
    pub fn available(self) -> bool {
        self.binary().exists()
    }

    /// A command that starts the one for PCs, with nothing but what it needs to find its
    /// parts.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn command(self) -> Result<Command> {
        self.command_for(Arch::X86_64)
    }

    /// The same for guests of an architecture.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn command_for(self, arch: Arch) -> Result<Command> {
        let mut command = Command::new(artifact(self.binary_for(arch))?);
        command.args(self.args()).envs(self.env());
        Ok(command)
    }

    /// The binary which the environment names instead of the usual one; it must
    /// find its parts by itself.
    fn named(self) -> Option<PathBuf> {
        let variable = match self {
            Qemu::V7 => "SNAPBACK_TEST_QEMU_7",
            Qemu::V10 => "SNAPBACK_TEST_QEMU_10",
        };
        std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
    }
}
