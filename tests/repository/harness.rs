//! Snapshots to push, without guests, and the program run on a repository.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use snapback::image::{Details, Image, ImageWriter, Sections, WriterOptions};
use snapback::page::{Block, BlockId, PAGE_SIZE, Page};
use snapback::record::{Disk, DiskFile, DiskRole, Machine};
use tempfile::TempDir;

use crate::support::proxy::Proxy;
use crate::support::s3::{BUCKET, S3Server, environment};
use crate::support::{Result, spawn_bound, wait_until};

/// A folder, a server that speaks S3, and the network between.
pub struct Site {
    pub folder: TempDir,
    pub server: S3Server,
    pub proxy: Proxy,
}

impl Site {
    pub fn new() -> Result<Site> {
        let folder = tempfile::Builder::new().prefix("snapback-repository-").tempdir()?;
        let server = S3Server::start(&folder.path().join("s3"))?;
        let proxy = Proxy::start(server.address())?;
        Ok(Site { folder, server, proxy })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program on the repository in the bucket, through the proxy.
    pub fn snapback(&self, args: &[&str]) -> Command {
        let mut command = snapback(&format!("s3://{BUCKET}/site"), args);
        command.envs(environment(self.proxy.address())).current_dir(self.folder.path());
        command
    }

    /// Runs it, and returns its events.
    pub fn run(&self, args: &[&str]) -> Result<Vec<Value>> {
        events(self.snapback(args))
    }
}

/// The program with `--json` on this repository. Nothing of the tests' own environment names another.
pub fn snapback(repository: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    command.args(&args[..1]).arg("--json").args(&args[1..]);
    command.env("SNAPBACK_REPOSITORY", repository);
    let keys = ["PASSPHRASE", "PASSPHRASE_FILE", "PASSPHRASE_COMMAND", "IDENTITY"];
    for name in keys.into_iter().chain(["TRUST", "TRUST_KEY", "SIGN_KEY"]) {
        command.env_remove(format!("SNAPBACK_{name}"));
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a command that is to succeed, and returns its events.
pub fn events(mut command: Command) -> Result<Vec<Value>> {
    let output = command.output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?}: {}: {stderr}", output.status).into());
    }
    read_events(&output)
}

pub fn read_events(output: &Output) -> Result<Vec<Value>> {
    let lines = std::str::from_utf8(&output.stdout)?.lines();
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Runs a command that is to fail, and returns its error's code and its exit code.
pub fn failure(mut command: Command) -> Result<(String, i32)> {
    let output = command.output()?;
    let events = read_events(&output)?;
    let error = events.last().filter(|event| event["event"] == "error");
    let error = error.ok_or_else(|| format!("{command:?} did not fail: {events:?}"))?;
    let code = error["code"].as_str().unwrap_or_default().to_owned();
    Ok((code, output.status.code().unwrap_or(-1)))
}

/// The event of this name.
pub fn event<'a>(events: &'a [Value], name: &str) -> Result<&'a Value> {
    let found = events.iter().find(|event| event["event"] == name);
    Ok(found.ok_or_else(|| format!("no {name} in {events:?}"))?)
}

/// Starts a command in the background that is killed with the test.
pub fn start(mut command: Command) -> Result<Child> {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    spawn_bound(command)
}

/// Waits until a process has stopped itself at a failpoint.
pub fn wait_for_stop(child: &Child) -> Result<()> {
    let stat = format!("/proc/{}/stat", child.id());
    let is_stopped = || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "));
    wait_until(Duration::from_secs(60), "a process to stop", is_stopped)
}

/// Bytes that look like nothing else, from a seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}

/// A machine's memory, for images of it.
pub struct Memory {
    pub name: String,
    pub moment_unix_us: u64,
    pub bytes: Vec<u8>,
    /// The files of its disk, the one on top first.
    pub disks: Vec<PathBuf>,
}

impl Memory {
    /// A fifth of it zeros, a fifth repetitive.
    pub fn new(name: &str, seed: u64, mib: usize) -> Memory {
        let mut bytes = noise(seed, mib << 20);
        let fifth = bytes.len() / 5;
        bytes[fifth..2 * fifth].fill(0);
        bytes[2 * fifth..3 * fifth].chunks_mut(64).for_each(|line| line.fill(line[0]));
        let moment_unix_us = 1_795_600_000_000_000;
        Memory { name: name.into(), moment_unix_us, bytes, disks: Vec::new() }
    }

    /// Writes an image of it, on top of another one if that is given.
    pub fn save(&self, path: &Path, parent: Option<&Path>) -> Result<()> {
        let block = Block { name: "pc.ram".into(), len: self.bytes.len() as u64, page_size: 4096 };
        // Two workers write chunks in whatever order they come to them; what is cut by content, and so what two
        // images are found to have in common, would depend on it.
        let mut options = WriterOptions::default();
        options.workers = 1;
        let blocks = vec![block];
        let mut writer = match parent {
            None => ImageWriter::create(path, options, blocks)?,
            Some(parent) => ImageWriter::create_on(path, options, blocks, &Image::open(parent)?)?,
        };
        for (number, bytes) in self.bytes.chunks(PAGE_SIZE).enumerate() {
            let page = Page { block: BlockId(0), number: number as u64 };
            writer.page(page, bytes.try_into()?)?;
        }
        let file = |path: &PathBuf| DiskFile {
            path: path.display().to_string(),
            format: "raw".into(),
            ..DiskFile::default()
        };
        let disk = Disk {
            role: DiskRole::Captured,
            chain: self.disks.iter().map(file).collect(),
            ..Disk::default()
        };
        let machine = Machine {
            argv: ["qemu", "-name", &self.name].map(str::to_owned).to_vec(),
            disks: vec![disk],
            ..Machine::default()
        };
        let details =
            Details { machine, moment_unix_us: self.moment_unix_us, ..Details::default() };
        writer.finish(details, Sections::default())?;
        Ok(())
    }
}

/// A raw disk with some data and large holes.
pub fn disk(path: &Path, seed: u64) -> Result<()> {
    let mut file = File::create(path)?;
    file.set_len(64 << 20)?;
    file.write_all(&noise(seed, 3 << 20))?;
    file.write_all_at(&noise(seed + 1, (1 << 20) + 77), 40 << 20)?;
    file.write_all_at(b"the end", (64 << 20) - 7)?;
    Ok(())
}

/// Whether two files have the same bytes.
pub fn same(a: &Path, b: &Path) -> Result<bool> {
    Ok(fs::read(a)? == fs::read(b)?)
}
