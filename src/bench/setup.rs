//! What all runs have in common, and the private directory of each.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::directory::Directory;
use super::{BenchError, BenchOptions, Cache, host};
use crate::guest::{CommandLine, OverlayOptions, RewriteOptions, exclusive_paths, own_name};
use crate::host::paths::parent_directory;
use crate::image::Image;
use crate::machine::Machine;
use crate::page::PAGE_SIZE;

/// What stands for a run's directory in paths.
const RUN: &str = "{run}";

/// What all runs have in common.
pub(super) struct Setup<'a> {
    pub options: &'a BenchOptions,
    pub machine: Machine,
    pub identity: String,
    pub image_bytes: u64,
    pub memory_bytes: u64,
    pub data_bytes: u64,
    /// The image's file and those of the images that it refers to.
    pub image_files: Vec<PathBuf>,
    /// A directory beside the image, for files that are as large.
    pub beside: Directory,
    /// How recorded paths are changed, with [`RUN`] in them.
    rules: Vec<(String, String)>,
    /// Writable disks that the image does not hold.
    pub disks: Vec<Disk>,
}

/// A disk that each run gets a copy of.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// As the recorded command line names it.
    pub recorded: String,
    /// Where it is.
    pub file: PathBuf,
    /// The name of its copies.
    pub name: String,
}

/// One run's own directory, and the paths that go with it.
pub(super) struct Run {
    directory: Directory,
    rules: Vec<(String, String)>,
    cwd: PathBuf,
    /// Where its guest's disks take room for what it writes.
    overlays: PathBuf,
}

impl<'a> Setup<'a> {
    pub fn new(options: &'a BenchOptions) -> Result<Setup<'a>, BenchError> {
        // Closed before the first run: an open image keeps pages in the page cache.
        let image = Image::open(&options.image)?;
        let manifest = image.manifest();
        let machine = manifest.machine.clone();
        if !machine.running || CommandLine::parse(&options.extra).has("S") {
            return Err(BenchError::Paused);
        }
        let directory = parent_directory(&options.image);
        // QEMU has another working directory, so paths for it must be absolute.
        let failed =
            |doing| move |source| BenchError::File { doing, path: directory.into(), source };
        let beside =
            std::path::absolute(directory).and_then(|directory| Directory::new(&directory));
        let beside = beside.map_err(failed("used for a private directory"))?;
        let mut rules = options.paths.clone();
        let mut names = HashSet::new();
        for path in exclusive_paths(&machine) {
            let name = own_name(&path, &mut names);
            rules.push((path, format!("{RUN}/{name}")));
        }
        let disks = disks_to_copy(&machine, &options.paths, &mut names)?;
        if let (Some(_), Some(disk)) = (&options.domain, disks.first()) {
            // libvirt's QEMU may not read copies just anywhere.
            return Err(BenchError::Disk { disk: disk.recorded.clone() });
        }
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        Ok(Setup {
            options,
            identity: manifest.identity.to_string(),
            image_bytes: image.file_len(),
            memory_bytes: bytes(manifest.data_pages + manifest.zero_pages),
            data_bytes: bytes(manifest.data_pages),
            image_files: image.files().map(|(path, _)| path.to_owned()).collect(),
            machine,
            beside,
            rules,
            disks,
        })
    }

    /// A new run's directory, with copies of the disks in it, made before time is taken.
    pub fn run(&self) -> Result<Run, BenchError> {
        let mut run = self.run_with(&[])?;
        for disk in &self.disks {
            let copy = run.directory.path().join(&disk.name);
            disk.copy_to(&copy)?;
            run.rules.push((disk.recorded.clone(), copy.display().to_string()));
        }
        Ok(run)
    }

    /// A new run's directory, with disks that are already there: `(recorded path, file)`.
    pub fn run_with(&self, disks: &[(String, String)]) -> Result<Run, BenchError> {
        let parent = std::env::temp_dir();
        let directory = Directory::new(&parent).map_err(|source| BenchError::File {
            doing: "used for a private directory",
            path: parent,
            source,
        })?;
        let here = directory.path().display().to_string();
        let in_here = |(old, new): &(String, String)| (old.clone(), new.replace(RUN, &here));
        let mut rules: Vec<_> = self.rules.iter().map(in_here).collect();
        rules.extend_from_slice(disks);
        let overlays = self.beside.path().to_owned();
        Ok(Run { directory, rules, cwd: self.machine.cwd.clone().into(), overlays })
    }

    /// Makes the machine ready for a run that reads these files.
    pub fn settle(&self, cache: Cache, files: &[PathBuf]) -> Result<(), BenchError> {
        files.iter().try_for_each(|file| cache.prepare(file))?;
        if let Err(error) = host::touch_memory(self.memory_bytes) {
            tracing::info!("memory was not touched ahead of a run: {error}");
        }
        Ok(())
    }

    /// Where the working set for the runs is recorded.
    pub fn working_set(&self) -> PathBuf {
        self.beside.path().join("working-set")
    }
}

impl Run {
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// How the recorded command line is changed for this run.
    pub fn rewrite(&self, options: &BenchOptions) -> RewriteOptions {
        RewriteOptions {
            qemu: options.qemu.clone(),
            paths: self.rules.clone(),
            ports: options.ports.clone(),
            extra: options.extra.clone(),
            // The disks that the image holds are only read.
            overlays: OverlayOptions {
                directory: Some(self.overlays.clone()),
                prefix: None,
                ephemeral: true,
                ..OverlayOptions::default()
            },
            ..RewriteOptions::default()
        }
    }

    /// Where a recorded path, or one in the run's directory, is in this run. It may be given
    /// as the command line has it, or as seen from our own working directory.
    pub fn place(&self, path: &str) -> PathBuf {
        let path = path.replace(RUN, &self.path().display().to_string());
        let seen = std::path::absolute(&path).unwrap_or_else(|_| path.clone().into());
        let moved = self.moved(&path).or_else(|| self.moved(seen.to_str()?));
        moved.map_or(seen, |moved| self.cwd.join(moved))
    }

    /// The path by the first rule that fits.
    fn moved(&self, path: &str) -> Option<String> {
        self.rules.iter().find_map(|(old, new)| {
            let below = path.strip_prefix(old.trim_end_matches('/'))?;
            (below.is_empty() || below.starts_with('/'))
                .then(|| format!("{}{below}", new.trim_end_matches('/')))
        })
    }
}

impl Disk {
    pub fn copy_to(&self, copy: &Path) -> Result<(), BenchError> {
        fs::copy(&self.file, copy).map(drop).map_err(|source| BenchError::File {
            doing: "copied for a run",
            path: self.file.clone(),
            source,
        })
    }
}

/// The writable disks that runs would change, except those that a path rule of the user maps.
fn disks_to_copy(
    machine: &Machine,
    rules: &[(String, String)],
    names: &mut HashSet<String>,
) -> Result<Vec<Disk>, BenchError> {
    let mut disks = Vec::new();
    for described in &machine.uncaptured_disks {
        // `NAME (FILE)`, as a save describes them.
        let path = described.rsplit_once(" (").and_then(|(_, path)| path.strip_suffix(')'));
        let path = path.unwrap_or(described);
        let below = |old: &str| {
            let rest = path.strip_prefix(old.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if rules.iter().any(|(old, _)| below(old)) {
            continue;
        }
        let file = Path::new(&machine.cwd).join(path);
        let named = machine.argv.iter().any(|argument| argument.contains(path));
        if !named || !fs::metadata(&file).is_ok_and(|meta| meta.is_file()) {
            return Err(BenchError::Disk { disk: described.clone() });
        }
        disks.push(Disk { recorded: path.into(), file, name: own_name(path, names) });
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_runs_directory_are_different() {
        let mut taken = HashSet::new();
        let names = ["/a/x", "/b/x", "x", "/a/y", "/"].map(|path| own_name(path, &mut taken));
        assert_eq!(names, ["x", "x-2", "x-3", "y", "file"]);
    }

    #[test]
    fn a_recorded_path_is_found_in_the_run() {
        let directory = Directory::new(&std::env::temp_dir()).unwrap();
        let here = directory.path().to_owned();
        let seen = std::path::absolute("seen").unwrap();
        let in_here = |name: &str| here.join(name).display().to_string();
        let rules = vec![
            ("/vm/".into(), in_here("vm")),
            ("serial.log".into(), in_here("serial.log")),
            ("relative".into(), "other".into()),
            (seen.display().to_string(), in_here("seen")),
        ];
        let run = Run { directory, rules, cwd: "/somewhere".into(), overlays: here.clone() };
        assert_eq!(run.place("/vm/port"), here.join("vm/port"));
        assert_eq!(run.place("serial.log"), here.join("serial.log"));
        assert_eq!(run.place("{run}/port"), here.join("port"));
        assert_eq!(run.place("relative"), Path::new("/somewhere/other"));
        assert_eq!(run.place("seen"), here.join("seen"));
        assert_eq!(run.place("/vmx/port"), Path::new("/vmx/port"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(run.place("port"), here.join("port"));
    }

    #[test]
    fn a_disk_is_copied_unless_its_user_looks_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk.qcow2").display().to_string();
        fs::write(&disk, "x").unwrap();
        let machine = Machine {
            argv: vec!["qemu".into(), "-drive".into(), format!("file={disk},if=virtio")],
            uncaptured_disks: vec![format!("virtio0 ({disk})")],
            ..Machine::default()
        };
        let copied = disks_to_copy(&machine, &[], &mut HashSet::new()).unwrap();
        assert_eq!((copied.len(), copied[0].name.as_str()), (1, "disk.qcow2"));
        let rules = [(directory.path().display().to_string(), "{run}".to_owned())];
        assert!(disks_to_copy(&machine, &rules, &mut HashSet::new()).unwrap().is_empty());
        fs::remove_file(&disk).unwrap();
        let error = disks_to_copy(&machine, &[], &mut HashSet::new()).unwrap_err().to_string();
        assert!(error.contains("virtio0") && error.contains("::paths`"), "{error}");
    }
}
