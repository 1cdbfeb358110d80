//! The host as a whole.

use std::fs;
use std::io;
use std::path::Path;

/// The host's memory in bytes (proc_meminfo(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemInfo {
    /// All that the kernel manages (`MemTotal`).
    pub total: u64,
    /// What holds nothing at all, not even a file's content (`MemFree`).
    pub free: u64,
    /// What programs can still have without swapping (`MemAvailable`).
    pub available: u64,
}

impl MemInfo {
    /// The host's memory now.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub fn read() -> io::Result<MemInfo> {
        let text = fs::read_to_string("/proc/meminfo")?;
        let bytes = |name| bytes_of(&text, name).ok_or(io::ErrorKind::InvalidData);
        Ok(MemInfo {
            total: bytes("MemTotal")?,
            free: bytes("MemFree")?,
            available: bytes("MemAvailable")?,
        })
    }
}

/// The processor's name (`model name` in proc_cpuinfo(5)), where the kernel tells one.
pub fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    field(&text, "model name").map(str::to_owned)
}

/// A kernel parameter by its dotted name, as sysctl(8) shows it, where there is such.
pub fn sysctl(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The value of a line `NAME: VALUE`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields
        .map(|(key, value)| (key.trim(), value.trim()))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// The value of a line `NAME: N kB`, in bytes.
pub(super) fn bytes_of(text: &str, name: &str) -> Option<u64> {
    let kib: u64 = field(text, name)?.strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_tells_of_its_memory() {
        let memory = MemInfo::read().unwrap();
        assert!(memory.total > 0 && memory.free <= memory.total, "{memory:?}");
        assert!(memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "MemTotal:  16 kB\nMemFree:\t4 kB\nmodel name\t: Some: CPU\nOdd: 5\n";
        assert_eq!(
            (bytes_of(text, "MemTotal"), bytes_of(text, "MemFree")),
            (Some(16384), Some(4096))
        );
        assert_eq!((bytes_of(text, "Mem"), bytes_of(text, "Odd")), (None, None));
        assert_eq!(field(text, "model name"), Some("Some: CPU"));
    }

    #[test]
    fn kernel_parameters_are_named_as_for_sysctl() {
        assert_eq!(sysctl("kernel.ostype").as_deref(), Some("Linux"));
        assert_eq!(sysctl("kernel.no-such-parameter"), None);
    }
}
