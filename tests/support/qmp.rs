//! A QMP client that owes nothing to the crate's own, so that each checks the other.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::{Result, SOON, wait_for};

/// A connection to a QEMU's control socket, past its greeting.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects. QEMU serves one client at a time: this waits for its turn.
    ///
    /// # Errors
    /// When nobody listens, or no greeting comes.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let what = format!("a QMP server at {}", socket.display());
        let stream = wait_for(SOON, &what, || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut client = Qmp { stream: BufReader::new(stream), events: Vec::new() };
        if client.receive()?.get("QMP").is_none() {
            return Err(format!("{} does not greet as QMP does", socket.display()).into());
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Executes a command and returns what it `return`s.
    ///
    /// # Errors
    /// When QEMU answers with an error, or not at all within a minute.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.receive().map_err(|e| format!("{command}: {e}"))?;
            if let Some(error) = message.get("error") {
                return Err(format!("{command}: QEMU answers {error}").into());
            }
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// The events that came in while answers were awaited.
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err("QEMU closed the control socket".into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}

/// Executes one command over a connection of its own.
///
/// # Errors
/// When QEMU can't be reached or answers with an error.
pub fn qmp(socket: &Path, command: &str, arguments: Value) -> Result<Value> {
    Qmp::connect(socket)?.execute(command, arguments)
}

/// The guest's run state, such as `running` or `paused`.
///
/// # Errors
/// When QEMU can't be reached.
pub fn query_status(socket: &Path) -> Result<String> {
    let status = qmp(socket, "query-status", json!({}))?;
    let state = status["status"].as_str().ok_or("query-status tells no status")?;
    Ok(state.to_string())
}

/// Stops the guest's vCPUs.
///
/// # Errors
/// When QEMU can't be reached.
pub fn stop(socket: &Path) -> Result<()> {
    qmp(socket, "stop", json!({})).map(drop)
}

/// Lets the guest's vCPUs run.
///
/// # Errors
/// When QEMU can't be reached.
pub fn cont(socket: &Path) -> Result<()> {
    qmp(socket, "cont", json!({})).map(drop)
}

/// Has QEMU write `size` bytes of guest-physical memory from `address` on to a file.
///
/// # Errors
/// When QEMU can't be reached, or can't write there.
pub fn pmemsave(socket: &Path, address: u64, size: u64, file: &Path) -> Result<()> {
    let arguments = json!({"val": address, "size": size, "filename": file});
    qmp(socket, "pmemsave", arguments).map(drop)
}
