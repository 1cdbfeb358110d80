//! A virtual machine as a process: its command line captured from a living
//! QEMU, rewritten into that of a guest to be reverted, and started.

mod command_line;
mod error;
mod params;

pub use command_line::{Arg, CommandLine, CommandOption};
pub use error::VmError;
pub use params::{Params, Spec};
