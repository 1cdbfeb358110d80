//! A file system on a disk that fails when it is told to: a FUSE server in this process
//! (fuse(4)), over a directory. Device-mapper's targets would do as well, but few kernels that
//! run tests have them.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::harness::text;
use crate::support::Result;

/// What the disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// What it should.
    Works,
    /// Refuses to read: EIO.
    FailsReads,
    /// Refuses to write: EIO.
    FailsWrites,
    /// Takes so long for each request to read or write.
    Slow(Duration),
    /// Does not answer: like a network file system whose server is gone.
    Stalls,
}

/// The file system. Dropping it unmounts it.
pub struct FaultyDisk {
    at: PathBuf,
    disk: Arc<(Mutex<Disk>, Condvar)>,
    server: Option<JoinHandle<()>>,
}

impl FaultyDisk {
    /// Mounts it at `at`; its files lie in `backing`. Both are directories.
    pub fn mount(at: PathBuf, backing: PathBuf) -> Result<FaultyDisk> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let (target, kind) = (CString::new(text(&at))?, c"fuse");
        let options = CString::new(options)?;
        let (kind, data) = (kind.as_ptr(), options.as_ptr().cast());
        // SAFETY: all pointers are to strings that outlive the call.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, data) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(format!("mounting by FUSE (as root?): {error}").into());
        }
        let disk = Arc::new((Mutex::new(Disk::Works), Condvar::new()));
        let files = Files { names: HashMap::new(), open: HashMap::new(), next: 2, backing };
        let mut server = Server { device, disk: Arc::clone(&disk), files };
        let server = Some(std::thread::spawn(move || server.run()));
        Ok(FaultyDisk { at, disk, server })
    }

    /// A file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Has the disk behave like this from now on.
    pub fn set(&self, disk: Disk) {
        *self.disk.0.lock().unwrap() = disk;
        self.disk.1.notify_all();
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        self.set(Disk::Works);
        let path = CString::new(text(&self.at)).unwrap();
        // SAFETY: the string outlives the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        // Its last user may still be there: the thread ends with the mount.
        drop(self.server.take());
    }
}

/// Requests, by their numbers in linux/fuse.h.
mod request {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const UNLINK: u32 = 10;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const RENAME2: u32 = 45;
}

/// Bytes of a request's header, and of an answer's.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Room for the largest request: what a write may carry, and its headers.
const MAX_WRITE: u32 = 1 << 20;
/// The directory's node.
const ROOT: u64 = 1;

struct Server {
    device: File,
    disk: Arc<(Mutex<Disk>, Condvar)>,
    files: Files,
}

struct Files {
    names: HashMap<String, u64>,
    open: HashMap<u64, File>,
    next: u64,
    backing: PathBuf,
}

type Answer = std::result::Result<Vec<u8>, i32>;

impl Server {
    fn run(&mut self) {
        let mut buffer = vec![0; MAX_WRITE as usize + 4096];
        loop {
            match self.device.read(&mut buffer) {
                Ok(len) => self.handle(&buffer[..len]),
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(_) => {}
            }
        }
    }

    fn handle(&mut self, bytes: &[u8]) {
        let (head, body) = bytes.split_at(IN_HEADER);
        let (opcode, unique, node) = (u32_at(head, 4), u64_at(head, 8), u64_at(head, 16));
        if [request::FORGET, request::BATCH_FORGET, request::INTERRUPT].contains(&opcode) {
            return;
        }
        let answer = self.answer(opcode, node, body);
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut out = ((OUT_HEADER + body.len()) as u32).to_le_bytes().to_vec();
        out.extend(error.to_le_bytes());
        out.extend(unique.to_le_bytes());
        out.extend(body);
        // It fails when whoever asked has been killed meanwhile.
        let _ = self.device.write(&out);
    }

    fn answer(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let files = &mut self.files;
        match opcode {
            request::INIT => {
                let mut out = vec![0; 64];
                out[..8].copy_from_slice(&body[..8]);
                out[8..12].copy_from_slice(&u32_at(body, 8).to_le_bytes());
                // FUSE_BIG_WRITES and FUSE_MAX_PAGES.
                out[12..16].copy_from_slice(&(1u32 << 5 | 1 << 22).to_le_bytes());
                out[16..20].copy_from_slice(&[12, 0, 10, 0]);
                out[20..24].copy_from_slice(&MAX_WRITE.to_le_bytes());
                out[24..28].copy_from_slice(&1u32.to_le_bytes());
                out[28..30].copy_from_slice(&((MAX_WRITE >> 12) as u16).to_le_bytes());
                Ok(out)
            }
            request::LOOKUP => files.entry(name(body)),
            request::GETATTR => Ok(attributes_out(&files.metadata(node)?)),
            request::SETATTR => {
                const SIZE: u32 = 1 << 3;
                if u32_at(body, 0) & SIZE != 0 {
                    files.file(node)?.set_len(u64_at(body, 16)).map_err(errno)?;
                }
                Ok(attributes_out(&files.metadata(node)?))
            }
            request::CREATE => {
                let name = name(&body[16..]);
                let path = files.backing.join(name);
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(false);
                options.open(path).map_err(errno)?;
                let entry = files.entry(name)?;
                Ok([entry, opened()].concat())
            }
            request::OPEN | request::OPENDIR => Ok(opened()),
            request::READ => {
                self.wait(Disk::FailsReads)?;
                let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
                let mut bytes = vec![0; size as usize];
                let read = self.files.file(node)?.read_at(&mut bytes, offset).map_err(errno)?;
                bytes.truncate(read);
                Ok(bytes)
            }
            request::WRITE => {
                self.wait(Disk::FailsWrites)?;
                let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
                let bytes = &body[40..40 + size as usize];
                self.files.file(node)?.write_all_at(bytes, offset).map_err(errno)?;
                Ok([size.to_le_bytes(), [0; 4]].concat())
            }
            request::FSYNC => {
                self.wait(Disk::FailsWrites)?;
                Ok(Vec::new())
            }
            request::UNLINK => {
                let name = name(body);
                files.names.remove(name);
                fs::remove_file(files.backing.join(name)).map_err(errno)?;
                Ok(Vec::new())
            }
            request::RENAME | request::RENAME2 => {
                let names = if opcode == request::RENAME { &body[8..] } else { &body[16..] };
                let (old, new) = (name(names), name(&names[name(names).len() + 1..]));
                let paths = (files.backing.join(old), files.backing.join(new));
                fs::rename(paths.0, paths.1).map_err(errno)?;
                if let Some(node) = files.names.remove(old) {
                    files.names.insert(new.to_owned(), node);
                }
                Ok(Vec::new())
            }
            request::LINK => {
                let (old, new) = (u64_at(body, 0), name(&body[8..]));
                let known = files.names.iter().find(|(_, node)| **node == old);
                let (from, _) = known.ok_or(libc::ENOENT)?;
                let (from, to) = (files.backing.join(from), files.backing.join(new));
                fs::hard_link(from, to).map_err(errno)?;
                files.names.insert(new.to_owned(), old);
                files.entry(new)
            }
            request::STATFS => {
                let mut out = vec![0; 80];
                for at in [0, 8, 16, 24, 32] {
                    out[at..at + 8].copy_from_slice(&(1u64 << 24).to_le_bytes());
                }
                for (at, value) in [(40, 4096u32), (44, 255), (48, 4096)] {
                    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                Ok(out)
            }
            request::READDIR | request::RELEASE | request::RELEASEDIR | request::FSYNCDIR => {
                Ok(Vec::new())
            }
            // Among them FLUSH: a descriptor is closed without waiting for the disk.
            _ => Err(libc::ENOSYS),
        }
    }

    /// Takes as long as the disk does, and fails if it `fails` like this.
    fn wait(&self, fails: Disk) -> std::result::Result<(), i32> {
        let (disk, changed) = &*self.disk;
        let disk = disk.lock().unwrap();
        let disk = *changed.wait_while(disk, |disk| *disk == Disk::Stalls).unwrap();
        match disk {
            Disk::Slow(time) => std::thread::sleep(time),
            disk if disk == fails => return Err(libc::EIO),
            _ => {}
        }
        Ok(())
    }
}

impl Files {
    fn file(&self, node: u64) -> std::result::Result<&File, i32> {
        self.open.get(&node).ok_or(libc::ENOENT)
    }

    fn metadata(&self, node: u64) -> std::result::Result<(u64, fs::Metadata), i32> {
        let metadata = match node {
            ROOT => fs::metadata(&self.backing),
            node => self.file(node)?.metadata(),
        };
        Ok((node, metadata.map_err(errno)?))
    }

    /// The answer to a look-up: the node of that name, which is a new one for another file.
    fn entry(&mut self, name: &str) -> Answer {
        let path = self.backing.join(name);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(errno)?;
        let ino = file.metadata().map_err(errno)?.ino();
        let known =
            self.names.get(name).copied().filter(|node| {
                self.open[node].metadata().is_ok_and(|metadata| metadata.ino() == ino)
            });
        let node = match known {
            Some(node) => node,
            None => {
                self.next += 1;
                self.names.insert(name.to_owned(), self.next);
                self.open.insert(self.next, file);
                self.next
            }
        };
        let mut out = vec![0; 40];
        out[..8].copy_from_slice(&node.to_le_bytes());
        out.extend(attributes(&self.metadata(node)?));
        Ok(out)
    }
}

fn attributes((node, metadata): &(u64, fs::Metadata)) -> Vec<u8> {
    let mut out = Vec::new();
    let seconds = [metadata.atime(), metadata.mtime(), metadata.ctime()].map(|time| time as u64);
    let sizes = [*node, metadata.len(), metadata.blocks()];
    out.extend(sizes.into_iter().chain(seconds).flat_map(u64::to_le_bytes));
    out.extend([0u8; 12]);
    let numbers = [metadata.mode(), metadata.nlink() as u32, 0, 0, 0, 4096, 0];
    out.extend(numbers.into_iter().flat_map(u32::to_le_bytes));
    out
}

fn attributes_out(of: &(u64, fs::Metadata)) -> Vec<u8> {
    [vec![0; 16], attributes(of)].concat()
}

/// A file that is open, past the page cache (FOPEN_DIRECT_IO): every read comes here.
fn opened() -> Vec<u8> {
    let mut out = vec![0; 16];
    out[8] = 1;
    out
}

fn name(body: &[u8]) -> &str {
    let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    std::str::from_utf8(&body[..end]).unwrap_or_default()
}

fn errno(error: std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
