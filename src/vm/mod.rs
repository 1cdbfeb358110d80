//! A virtual machine as a process: its command line captured from a living
//! QEMU, rewritten into that of a guest to be reverted, and started.

mod attached;
mod backend;
mod capture;
mod collisions;
mod command_line;
mod described;
#[cfg(test)]
mod disk_tests;
mod drives;
mod error;
mod frozen;
mod host;
mod isolate;
mod mapping;
mod overlay;
mod params;
mod process;
mod qcow2;
mod rewrite;
mod stamp;
#[cfg(test)]
mod tests;

pub use attached::{FoundDisk, disks};
pub use capture::capture;
pub use collisions::exclusive_paths;
pub use command_line::{Arg, CommandLine, CommandOption};
pub use described::{describe, describe_foreign, named_machine_type};
pub use drives::check_given;
pub use error::VmError;
pub use mapping::MappedMemory;
pub use overlay::{Overlay, OverlayOptions};
pub use params::{Params, Spec};
pub use process::Process;
pub use qcow2::write_overlay;
pub use rewrite::{Note, RewriteOptions, StartPlan, rewrite};
pub use stamp::{stamp, stamp_files, write_out};
