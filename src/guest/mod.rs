//! A virtual machine as a process: recorded from a living QEMU, its command line
//! rewritten into that of a guest to be reverted, its disks put on overlays, and started.

mod board;
mod command_line;
mod described;
#[cfg(test)]
mod disk_tests;
mod disks;
mod error;
mod process;
mod record;
mod start;
#[cfg(test)]
mod tests;

pub use board::Board;
pub use command_line::parameters::{Params, Spec};
pub use command_line::{Arg, CommandLine, CommandOption};
pub use described::{describe, describe_foreign, named_machine_type};
pub use disks::attached::{FoundDisk, disks};
pub use disks::drives::check_given;
pub use disks::overlay::{Overlay, OverlayOptions};
pub use disks::qcow2::write_overlay;
pub use disks::stamp::{stamp, stamp_files, write_out};
pub use error::VmError;
pub use process::Process;
pub use record::capture;
pub use start::collisions::exclusive_paths;
pub use start::mapping::MappedMemory;
pub use start::rewrite::{Note, RewriteOptions, StartPlan, rewrite};
