//! A virtual machine as a QEMU process: recorded while it runs, and started from its record.
//!
//! [`capture`] takes the record of a running QEMU, [`describe()`] that of a given command line.
//! [`rewrite()`] makes a [`StartPlan`] from a record: the command line of a guest that waits for
//! its state, with overlays over its disks. [`Process::start`] carries the plan out.

mod board;
mod command_line;
mod control;
mod described;
mod devices;
#[cfg(test)]
mod disk_tests;
mod disks;
mod error;
#[cfg(test)]
mod network_tests;
pub mod physical;
mod process;
mod record;
mod rights;
mod start;
#[cfg(test)]
mod tests;

pub use board::Board;
pub use command_line::CommandLine;
pub use command_line::parameters::Params;
pub use control::control_sockets;
pub use described::{describe, describe_foreign, named_machine_type};
pub use devices::{device_paths, record_hotplug};
pub use disks::attached::{FoundDisk, disks};
pub use disks::captured::overlays;
pub use disks::drives::check_given;
pub use disks::frozen::check_unchanged;
pub use disks::overlay::{FarDisks, Overlay, OverlayOptions, Overlays, RESET_POINT};
pub use disks::stamp::{stamp_files, write_out};
pub use error::GuestError;
pub use process::{Log, Process, label_of};
pub use record::capture;
pub use rights::userfaultfd_lack;
pub use start::collisions::exclusive_paths;
pub use start::mapping::MappedMemory;
pub use start::needs::{FileNeed, InterfaceNeed, Needs, needs};
pub use start::own::own_name;
pub use start::paths::moved;
pub use start::plan::{Note, StartPlan};
pub use start::ports::NewPort;
pub use start::profile::Profile;
pub use start::reach::Reach;
pub use start::rewrite::{RewriteOptions, rewrite};
