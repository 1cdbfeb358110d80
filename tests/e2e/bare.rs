//! A QEMU with no guest in it but firmware: there in a moment.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::harness::Dir;
use crate::support::{Qemu, Result, qmp, spawn_bound};

/// RAM in MiB.
const MIB: &str = "64";

/// A QEMU. Dropping it kills it.
pub struct Bare {
    child: Child,
    pub socket: PathBuf,
}

impl Bare {
    /// Starts one whose control socket is `bare.sock` in the test's folder. Later
    /// arguments win over its own.
    pub fn start(dir: &Dir, qemu: Qemu, args: &[&str]) -> Result<Bare> {
        Bare::run(dir, qemu.command()?, args)
    }

    /// Starts one as another user.
    pub fn start_by(dir: &Dir, qemu: Qemu, user: u32) -> Result<Bare> {
        let mut command = qemu.command()?;
        command.uid(user).gid(user);
        Bare::run(dir, command, &[])
    }

    fn run(dir: &Dir, mut command: Command, args: &[&str]) -> Result<Bare> {
        let socket = dir.path("bare.sock");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]);
        command.args(["-m", MIB, "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(args).current_dir(dir.path("."));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.path("bare.stderr"))?);
        let bare = Bare { child: spawn_bound(command)?, socket };
        bare.query("query-version")?;
        Ok(bare)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What a command without arguments returns.
    pub fn query(&self, command: &str) -> Result<Value> {
        query(&self.socket, command)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Fails when it has ended; it is reaped here alone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What a command without arguments returns.
pub fn query(socket: &Path, command: &str) -> Result<Value> {
    qmp(socket, command, json!({}))
}
