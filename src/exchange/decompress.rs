//! A file decompressed by the program that compressed it: libvirt calls the same ones,
//! so a host that has such a file has the program.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use super::ExchangeError;

/// The most bytes kept of what a program says.
const MAX_SAID: u64 = 4096;

/// The output of a program that decompresses. Dropping it ends the program.
pub(super) struct Decompressed {
    path: PathBuf,
    tool: &'static str,
    child: Child,
    stdout: ChildStdout,
    stderr: Option<JoinHandle<String>>,
}

impl Decompressed {
    /// Has `tool` decompress what is left of `input`, which messages name `path`.
    pub fn start(
        tool: &'static str,
        input: File,
        path: &Path,
    ) -> Result<Decompressed, ExchangeError> {
        let failed =
            |problem: String| ExchangeError::Decompress { path: path.to_owned(), tool, problem };
        let mut command = Command::new(tool);
        command.arg("-dc").stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => failed("the program is not installed: install it".into()),
            _ => failed(error.to_string()),
        })?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed("it has no output".into()));
        };
        let listen = move || {
            let mut said = Vec::new();
            let _ = stderr.take(MAX_SAID).read_to_end(&mut said);
            String::from_utf8_lossy(&said).trim().replace('\n', "; ")
        };
        let stderr = Some(std::thread::spawn(listen));
        Ok(Decompressed { path: path.to_owned(), tool, child, stdout, stderr })
    }

    /// Waits for the program, which has given all that it will.
    ///
    /// # Errors
    /// When the program says that it failed.
    pub fn end(mut self) -> Result<(), ExchangeError> {
        let rest = io::copy(&mut self.stdout, &mut io::sink());
        let status = rest.and_then(|_| self.child.wait());
        let problem = match status {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => {
                let said = self.stderr.take().and_then(|thread| thread.join().ok());
                match said.unwrap_or_default() {
                    said if said.is_empty() => status.to_string(),
                    said => said,
                }
            }
            Err(error) => error.to_string(),
        };
        Err(ExchangeError::Decompress { path: self.path.clone(), tool: self.tool, problem })
    }
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stdout.read(buffer)
    }
}

impl Drop for Decompressed {
    fn drop(&mut self) {
        // Fails when it has ended and was reaped by `end`, and does no harm then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
