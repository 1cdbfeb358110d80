//! What the kernel tells under /proc (proc(5)): one parser for each of its formats.

mod address_space;
mod mappings;
mod memory;
mod pagemap;
mod process;
mod system;

pub use address_space::AddressSpace;
pub use mappings::{Mapping, ranges_of_len};
pub use memory::ProcessMemory;
pub use pagemap::{PAGEMAP_SCAN, Pagemap, flags};
pub use process::{
    arguments, descriptor_link, descriptors, memory_in_use, own_memory, owner, path, processes,
    reads_directly, resident_memory, started,
};
pub use system::{MemInfo, cpu_model, sysctl};
