//! The peer: QEMU's own file of a guest, in which each page has its place (mapped-ram). It is downloaded
//! whole by the same network, and loaded by QEMU.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::proxy::Proxy;
use crate::support::{
    Guest, GuestOptions, Pidfd, Qemu, Qmp, Result, SOON, run, spawn_bound, wait_for, wait_until,
};

const FILE: &str = "mapped-ram";

/// A guest in such a file, packed without its holes, behind a network of its own.
pub struct MappedRam {
    options: GuestOptions,
    /// Where the guest was booted, and is started again.
    home: PathBuf,
    archive: PathBuf,
    proxy: Proxy,
}

impl MappedRam {
    /// Writes it of a guest, which is paused by that.
    pub fn save(guest: &Guest, options: &GuestOptions, folder: &Path) -> Result<MappedRam> {
        let file = folder.join(FILE);
        let mut qmp = Qmp::connect(&guest.qmp_path)?;
        capable(&mut qmp)?;
        qmp.execute("migrate", json!({ "uri": format!("file:{}", file.display()) }))?;
        wait_until(Duration::from_secs(120), "the file to be written", || {
            let status = qmp.execute("query-migrate", json!({}));
            status.is_ok_and(|status| status["status"] == "completed")
        })?;
        let archive = folder.join("mapped-ram.tar");
        run(Command::new("tar").arg("-C").arg(folder).arg("-cSf").arg(&archive).arg(FILE))?;
        fs::remove_file(file)?;
        let proxy = Proxy::start(serve(archive.clone())?)?;
        Ok(MappedRam { options: options.clone(), home: guest.dir.clone(), archive, proxy })
    }

    /// The network.
    pub fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// Bytes to download.
    pub fn bytes(&self) -> Result<u64> {
        Ok(fs::metadata(&self.archive)?.len())
    }

    /// Downloads it. Returns the milliseconds that it took.
    pub fn download(&self, folder: &Path) -> Result<f64> {
        let began = Instant::now();
        let mut stream = BufReader::new(TcpStream::connect(self.proxy.address())?);
        stream.get_mut().write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let mut line = String::new();
        while stream.read_line(&mut line)? > 2 {
            line.clear();
        }
        let mut unpacked = Command::new("tar");
        unpacked.arg("-C").arg(folder).arg("-xf").arg("-").stdin(Stdio::piped());
        let mut unpacked = unpacked.spawn()?;
        let mut to = unpacked.stdin.take().ok_or("no input")?;
        // The proxy keeps the connection.
        let bytes = self.bytes()?;
        let mut body = stream.take(bytes);
        let copied = std::io::copy(&mut body, &mut to)?;
        drop(to);
        if !unpacked.wait()?.success() || copied != bytes {
            return Err("the file did not arrive whole".into());
        }
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// Loads what was downloaded. Returns the milliseconds from QEMU's readiness until the guest runs; all
    /// of its memory is there then.
    pub fn load(&self, folder: &Path) -> Result<f64> {
        let mut command = Qemu::V10.command_for(self.options.arch)?;
        command.args(self.options.qemu_args(&self.home)?).args(["-incoming", "defer"]);
        command.current_dir(&self.home).stdin(Stdio::null()).stdout(Stdio::null());
        // Of the guest that was booted there.
        let socket = self.home.join("qmp.sock");
        let _ = fs::remove_file(&socket);
        let mut qemu = spawn_bound(command)?;
        let end = Pidfd::open(qemu.id())?;
        let loaded = (|| {
            wait_for(SOON, "QEMU to listen", || Ok(socket.exists().then_some(())))?;
            let mut qmp = Qmp::connect(&socket)?;
            let began = Instant::now();
            capable(&mut qmp)?;
            let uri = format!("file:{}", folder.join(FILE).display());
            qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
            wait_until(SOON, "the guest to run", || {
                let status = qmp.execute("query-status", json!({}));
                status.is_ok_and(|status| status["running"] == true)
            })?;
            Ok(began.elapsed().as_secs_f64() * 1e3)
        })();
        end.kill()?;
        qemu.wait()?;
        fs::remove_file(folder.join(FILE))?;
        loaded
    }
}

fn capable(qmp: &mut Qmp) -> Result<()> {
    let on = json!([{ "capability": "mapped-ram", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": on }))?;
    Ok(())
}

/// Serves a file to whoever asks, until the end of the process.
fn serve(file: PathBuf) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if let Err(error) = answer(client, &file) {
                eprintln!("serving {}: {error}", file.display());
            }
        }
    });
    Ok(address)
}

fn answer(client: TcpStream, file: &Path) -> Result<()> {
    let mut from = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    while from.read_line(&mut line)? > 2 {
        line.clear();
    }
    let (mut to, mut file) = (client, File::open(file)?);
    let length = file.metadata()?.len();
    write!(to, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")?;
    std::io::copy(&mut file, &mut to)?;
    Ok(())
}
