//! A guest's main memory as a private mapping of a file: clean pages are the page
//! cache's, which all guests of that file share, and what a guest writes is its own.

use std::path::PathBuf;

use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::{Board, GuestError};
use crate::machine::QemuVersion;

/// From this version on a memory backend can begin inside a file
/// (`memory-backend-file,offset=`).
const OFFSET: (u32, u32) = (8, 1);
/// From this version on a file can be mapped privately that may only be read
/// (`readonly=on,rom=off`); before, QEMU opens it for writing, and writes nothing.
const READ_ONLY: (u32, u32) = (8, 2);

/// Kinds of memory backends that the file can replace.
const KINDS: [&str; 3] = ["memory-backend-ram", "memory-backend-memfd", "memory-backend-file"];

/// Memory that lies in a file as QEMU can map it.
#[derive(Debug, Clone)]
pub struct MappedMemory {
    /// The file, absolute.
    pub file: PathBuf,
    /// The QEMU that is to map it.
    pub qemu: QemuVersion,
    /// Blocks of the machine: name, length in bytes, and offset in the file.
    pub blocks: Vec<(String, u64, u64)>,
}

impl MappedMemory {
    /// Maps the command line's main memory from the file. Returns the names of the mapped
    /// blocks.
    pub(in crate::guest) fn put(&self, line: &mut CommandLine) -> Result<Vec<String>, GuestError> {
        self.check_version()?;
        refuse_shared(line)?;
        let mut mapped = Vec::new();
        for option in line.options_mut().filter(|option| option.name() == "object") {
            let spec = Spec::parse(option.value());
            let kind = match &spec {
                Spec::Params(params) => params.implied().or_else(|| params.get("qom-type")),
                Spec::Json(_) => spec.get("qom-type"),
            };
            let Some(kind) = kind.filter(|kind| kind.starts_with("memory-backend-")) else {
                continue;
            };
            let id = spec.get("id").unwrap_or_default();
            let Some(block) = self.blocks.iter().find(|(name, _, _)| name == id) else { continue };
            if !KINDS.contains(&kind) || spec.flag("hugetlb") == Some(true) {
                return Err(not_mapped(format!("{option} is no ordinary memory")));
            }
            if kind == "memory-backend-file" && spec.flag("share") == Some(true) {
                return Err(not_mapped(format!("what is written to {option} belongs in its file")));
            }
            option.value = Some(self.backend(block)?);
            mapped.push(block.0.clone());
        }
        // A machine whose main memory comes from a backend has no block of such a name.
        match self
            .blocks
            .iter()
            .find(|(name, _, _)| Board::main_memories().any(|main| main == name))
        {
            Some(block) if !mapped.contains(&block.0) => {
                self.put_main(line, block)?;
                mapped.push(block.0.clone());
                Ok(mapped)
            }
            None if mapped.is_empty() => {
                let known: Vec<_> = Board::main_memories().collect();
                Err(not_mapped(format!(
                    "the machine has no block of a known name ({}), nor one of a backend's name",
                    known.join(", ")
                )))
            }
            _ => Ok(mapped),
        }
    }

    /// Arguments that map main memory from the file where it has a backend of its own name already,
    /// as libvirt gives it one, which can't be replaced: another is called so with `prefix` in
    /// front, and takes its place. Returns also the name of the mapped block.
    ///
    /// # Errors
    /// When it can't be mapped.
    pub fn in_front(&self, prefix: &str) -> Result<(Vec<String>, String), GuestError> {
        self.check_version()?;
        let is_main = |name: &String| Board::main_memories().any(|main| main == name);
        let Some((name, len, offset)) = self.blocks.iter().find(|(name, ..)| is_main(name)) else {
            return Err(not_mapped("its main memory is of several parts, or not of a known name"));
        };
        let block = (format!("{prefix}{name}"), *len, *offset);
        let machine = format!("memory-backend={}", block.0);
        let arguments = ["-object".into(), self.backend(&block)?, "-machine".into(), machine];
        Ok((arguments.into(), name.clone()))
    }

    fn check_version(&self) -> Result<(), GuestError> {
        match (self.qemu.major, self.qemu.minor) < OFFSET {
            true => Err(not_mapped(format!(
                "QEMU {} maps whole files only (8.1 and later map parts)",
                self.qemu
            ))),
            false => Ok(()),
        }
    }

    /// Maps main memory that has no backend on the command line.
    fn put_main(
        &self,
        line: &mut CommandLine,
        block: &(String, u64, u64),
    ) -> Result<(), GuestError> {
        if line.has("mem-path") || line.has("numa") {
            return Err(not_mapped("its memory is given by -mem-path or -numa without a backend"));
        }
        line.push(CommandOption::new("object", self.backend(block)?));
        let machines =
            line.options_mut().filter(|option| ["machine", "M"].contains(&option.name()));
        let Some(machine) = machines.last() else {
            line.push(CommandOption::new("machine", format!("memory-backend={}", block.0)));
            return Ok(());
        };
        let mut params = Params::parse(machine.value());
        if let Some(backend) = params.get("memory-backend") {
            return Err(not_mapped(format!("the backend {backend} is no block of the image")));
        }
        params.set("memory-backend", &block.0);
        machine.value = Some(params.to_string());
        Ok(())
    }

    fn backend(&self, (name, len, offset): &(String, u64, u64)) -> Result<String, GuestError> {
        let file = self.file.to_str().ok_or_else(|| not_mapped("its path is not UTF-8"))?;
        let mut params = Params::parse("memory-backend-file");
        params.set("id", name);
        params.set("size", &len.to_string());
        params.set("mem-path", file);
        params.set("offset", &offset.to_string());
        params.set("share", "off");
        if (self.qemu.major, self.qemu.minor) >= READ_ONLY {
            params.set("readonly", "on");
            params.set("rom", "off");
        }
        Ok(params.to_string())
    }
}

/// Refuses memory shared with another process, which would see the file and not the guest's
/// writes.
fn refuse_shared(line: &CommandLine) -> Result<(), GuestError> {
    match line.options().find(|option| option.value().contains("vhost-user")) {
        Some(option) => Err(not_mapped(format!("{option} shares memory with another process"))),
        None => Ok(()),
    }
}

fn not_mapped(problem: impl Into<String>) -> GuestError {
    GuestError::NotMapped { problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(version: (u32, u32), args: &[&str]) -> Result<(Vec<String>, String), String> {
        put_blocks(version, args, &["pc.ram", "m0"])
    }

    fn put_blocks(
        version: (u32, u32),
        args: &[&str],
        names: &[&str],
    ) -> Result<(Vec<String>, String), String> {
        let qemu = QemuVersion { major: version.0, minor: version.1, ..QemuVersion::default() };
        let sizes = [("pc.ram", 4096, 2 << 20), ("mach-virt.ram", 4096, 2 << 20)];
        let all = [&sizes[..], &[("m0", 8192, 4 << 20)]].concat();
        let all = all.iter().filter(|(name, ..)| names.contains(name));
        let blocks = all.map(|(name, len, offset)| (name.to_string(), *len, *offset)).collect();
        let memory = MappedMemory { file: "/a,b.snap".into(), qemu, blocks };
        let mut line = CommandLine::parse(args.iter().copied());
        let mapped = memory.put(&mut line).map_err(|e| e.to_string())?;
        Ok((mapped, line.into_args().join(" ")))
    }

    #[test]
    fn main_memory_comes_from_the_file() {
        let file =
            "memory-backend-file,id=pc.ram,size=4096,mem-path=/a,,b.snap,offset=2097152,share=off";
        let (mapped, line) = put((10, 0), &["-machine", "pc,usb=off"]).unwrap();
        assert_eq!(mapped, ["pc.ram"]);
        let expected =
            format!("-machine pc,usb=off,memory-backend=pc.ram -object {file},readonly=on,rom=off");
        assert_eq!(line, expected);
        let (_, line) = put((8, 1), &[]).unwrap();
        assert_eq!(line, format!("-object {file} -machine memory-backend=pc.ram"));
    }

    #[test]
    fn a_backend_gives_way_to_the_file() {
        let args = [
            "-object",
            "memory-backend-memfd,id=m0,size=8K,share=on",
            "-M",
            "pc,memory-backend=m0",
        ];
        let (mapped, line) = put_blocks((9, 0), &args, &["m0"]).unwrap();
        assert_eq!(mapped, ["m0"]);
        assert!(line.starts_with("-object memory-backend-file,id=m0,size=8192"), "{line}");
        let args = ["-object", r#"{"qom-type":"memory-backend-ram","id":"m0","size":8192}"#];
        assert_eq!(put_blocks((9, 0), &args, &["m0"]).unwrap().0, ["m0"]);
    }

    #[test]
    fn memory_that_was_plugged_in_does_not_stand_for_main_memory() {
        let args = ["-object", "memory-backend-ram,id=m0,size=8K", "-device", "pc-dimm,memdev=m0"];
        let (mapped, line) = put((9, 0), &args).unwrap();
        assert_eq!(mapped, ["m0", "pc.ram"]);
        assert!(line.contains("id=pc.ram") && line.contains("memory-backend=pc.ram"), "{line}");
    }

    #[test]
    fn a_backend_that_can_not_give_way_is_passed_over() {
        let qemu = QemuVersion { major: 9, minor: 0, ..QemuVersion::default() };
        let blocks = vec![("pc.ram".to_owned(), 4096, 2 << 20)];
        let mut memory = MappedMemory { file: "/vm.snap".into(), qemu, blocks };
        let (arguments, block) = memory.in_front("x-").unwrap();
        assert_eq!(block, "pc.ram");
        assert!(arguments[1].starts_with("memory-backend-file,id=x-pc.ram,size=4096,"));
        assert_eq!(arguments[3], "memory-backend=x-pc.ram");
        memory.blocks[0].0 = "ram-node0".into();
        assert!(memory.in_front("x-").is_err());
    }

    #[test]
    fn main_memory_has_the_name_that_the_board_gives_it() {
        let (mapped, line) = put_blocks((9, 0), &["-M", "virt"], &["mach-virt.ram"]).unwrap();
        assert_eq!(mapped, ["mach-virt.ram"]);
        assert!(line.starts_with("-M virt,memory-backend=mach-virt.ram"), "{line}");
        let error = put_blocks((9, 0), &["-M", "microvm"], &["m0"]).unwrap_err();
        assert!(error.contains("(pc.ram, mach-virt.ram)"), "{error}");
    }

    #[test]
    fn what_can_not_be_mapped_is_named() {
        assert!(put((7, 2), &[]).unwrap_err().contains("8.1"));
        assert!(
            put((9, 0), &["-chardev", "socket,id=vhost-user0"]).unwrap_err().contains("vhost-user")
        );
        assert!(put((9, 0), &["-M", "pc,memory-backend=x"]).unwrap_err().contains("backend x"));
        let kept = ["-object", "memory-backend-file,id=m0,mem-path=/nv,share=on"];
        assert!(put((9, 0), &kept).unwrap_err().contains("belongs in its file"));
        let huge = ["-object", "memory-backend-memfd,id=m0,hugetlb=on"];
        assert!(put((9, 0), &huge).unwrap_err().contains("hugetlb"));
    }
}
