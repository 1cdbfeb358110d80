//! A real server that speaks S3, on the loopback: s3s-fs, which keeps objects as files.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Result, SOON, artifact, deps, spawn_bound, wait_until};

/// The bucket that there is.
pub const BUCKET: &str = "snapshots";
/// Its credentials.
pub const KEY_ID: &str = "snapback";
pub const SECRET: &str = "not-a-secret";

/// A server that runs until it is dropped.
pub struct S3Server {
    root: PathBuf,
    address: SocketAddr,
    child: Option<Child>,
}

impl S3Server {
    /// Starts one that keeps its objects in this directory.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(root: &Path) -> Result<S3Server> {
        fs::create_dir_all(root.join(BUCKET))?;
        // Nobody else is likely to take the port between here and there.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut server = S3Server { root: root.to_owned(), address, child: None };
        server.start_again()?;
        Ok(server)
    }

    /// Starts it again, at the same address, after [`S3Server::kill`].
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_again(&mut self) -> Result<()> {
        let mut command = Command::new(artifact(deps().join("s3s-fs/bin/s3s-fs"))?);
        command.args(["--host", "127.0.0.1", "--access-key", KEY_ID, "--secret-key", SECRET]);
        command.arg("--port").arg(self.address.port().to_string()).arg(&self.root);
        command.env("RUST_LOG", "error").stdout(Stdio::null());
        self.child = Some(spawn_bound(command)?);
        let address = self.address;
        wait_until(SOON, "the S3 server", || TcpStream::connect(address).is_ok())
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the bucket's objects are.
    pub fn objects(&self) -> PathBuf {
        self.root.join(BUCKET)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The variables by which a client reaches the server at this address, or a proxy before it.
pub fn environment(address: SocketAddr) -> [(&'static str, String); 4] {
    [
        ("AWS_ENDPOINT", format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID", KEY_ID.into()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.into()),
        ("AWS_REGION", "us-east-1".into()),
    ]
}
