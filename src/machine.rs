//! The record of a virtual machine: what starting it again needs to know.
//!
//! Plain data, stored in an image and used to start QEMU. How a record is taken
//! from a living QEMU, and how a command line is rewritten, is `vm`'s business.

use serde::{Deserialize, Serialize};

/// A virtual machine at the moment of its snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Absolute path of the QEMU binary.
    pub binary: String,
    /// QEMU's version as QMP `query-version` tells it.
    pub qemu: QemuVersion,
    /// Versioned machine type, as the stream's configuration section names it
    /// (for example `pc-i440fx-7.2`).
    pub machine_type: String,
    /// The command line, `argv[0]` included.
    pub argv: Vec<String>,
    /// QEMU's working folder: relative paths in `argv` start here.
    pub cwd: String,
    /// The environment variables that change how QEMU finds its parts
    /// (`QEMU_*`, `LD_LIBRARY_PATH`); nothing else of the environment is kept,
    /// because it may hold secrets.
    pub env: Vec<(String, String)>,
    /// Whether the guest ran (as opposed to being paused) when it was saved.
    pub running: bool,
    /// Writable disks that were attached and are not part of the image.
    pub uncaptured_disks: Vec<String>,
}

/// A QEMU version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// For example 7 in 7.2.22.
    pub major: u32,
    /// For example 2 in 7.2.22.
    pub minor: u32,
    /// For example 22 in 7.2.22.
    pub micro: u32,
    /// The distributor's own part, as in ` (Debian 1:7.2+dfsg-7+deb12u18)`.
    pub package: String,
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}
