//! A virtual machine as a process: its command line captured from a living
//! QEMU, rewritten into that of a guest to be reverted, and started.

mod backend;
mod capture;
mod collisions;
mod command_line;
mod error;
mod host;
mod isolate;
mod params;
mod process;
mod rewrite;
#[cfg(test)]
mod tests;

pub use capture::capture;
pub use collisions::exclusive_paths;
pub use command_line::{Arg, CommandLine, CommandOption};
pub use error::VmError;
pub use params::{Params, Spec};
pub use process::Process;
pub use rewrite::{Note, RewriteOptions, StartPlan, rewrite};
