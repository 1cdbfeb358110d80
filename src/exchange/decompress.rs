//! A file decompressed by the program that compressed it: libvirt calls the same ones,
//! so a host that has such a file has the program.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ExchangeError;
use super::patient::Patient;
use crate::cancel::Cancellation;

/// The most bytes kept of what a program says.
const MAX_SAID: u64 = 4096;

/// How long a program may take to end once its output is no longer read.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The output of a program that decompresses. Dropping it ends the program.
pub(super) struct Decompressed<'a> {
    path: PathBuf,
    tool: &'static str,
    child: Child,
    /// Dropped once no more output is wanted.
    stdout: Option<Patient<'a, ChildStdout>>,
    /// It has given all that it will.
    at_end: bool,
    stderr: Option<JoinHandle<String>>,
}

impl<'a> Decompressed<'a> {
    /// Has `tool` decompress what is left of `input`, which messages name `path`. Reading
    /// its output fails once cancellation is requested.
    pub fn start(
        tool: &'static str,
        input: File,
        path: &Path,
        cancel: &'a Cancellation,
    ) -> Result<Self, ExchangeError> {
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
        let (path, stdout) = (path.to_owned(), Some(Patient::new(stdout, cancel)));
        Ok(Decompressed { path, tool, child, stdout, at_end: false, stderr })
    }

    /// Takes no more of its output, of which there may be any amount, and waits for the
    /// program.
    ///
    /// # Errors
    /// When the program says that it failed, other than for want of a reader.
    pub fn end(mut self) -> Result<(), ExchangeError> {
        self.stdout = None;
        let unread = |status: ExitStatus| status.signal() == Some(libc::SIGPIPE);
        let problem = match self.wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(None) if !self.at_end => return Ok(()),
            Ok(Some(status)) if !self.at_end && unread(status) => return Ok(()),
            Ok(None) => "it has closed its output and does not end".into(),
            Ok(Some(status)) => {
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

    /// Waits for its end; none if it does not come.
    fn wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let status = self.child.try_wait()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Read for Decompressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stdout) = &mut self.stdout else { return Ok(0) };
        let len = stdout.read(buffer)?;
        self.at_end |= len == 0 && !buffer.is_empty();
        Ok(len)
    }
}

impl Drop for Decompressed<'_> {
    fn drop(&mut self) {
        // Fails when it has ended and was reaped by `end`, and does no harm then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// What a program makes of a MiB of zeros.
    fn compressed(tool: &str) -> Vec<u8> {
        let mut command = Command::new(tool);
        let mut child =
            command.arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&[0; 1 << 20]).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn output_without_end_is_not_waited_for() {
        for tool in ["gzip", "bzip2", "xz"] {
            let zeros = compressed(tool);
            let (input, mut feed) = io::pipe().unwrap();
            // Until the program has ended.
            let feeding = std::thread::spawn(move || while feed.write_all(&zeros).is_ok() {});
            let input = std::os::fd::OwnedFd::from(input).into();
            let cancel = Cancellation::new();
            let mut output = Decompressed::start(tool, input, Path::new("bomb"), &cancel).unwrap();
            output.read_exact(&mut [0; 100]).unwrap();
            output.end().unwrap();
            feeding.join().unwrap();
        }
    }

    #[test]
    fn what_a_program_says_of_its_input_is_told() {
        for (tool, cut) in [("gzip", true), ("xz", true), ("bzip2", false)] {
            let mut bytes = compressed(tool);
            if cut {
                bytes.truncate(bytes.len() - 4);
            } else {
                bytes[10] ^= 1;
            }
            let mut input = tempfile::tempfile().unwrap();
            input.write_all(&bytes).unwrap();
            io::Seek::rewind(&mut input).unwrap();
            let cancel = Cancellation::new();
            let mut output = Decompressed::start(tool, input, Path::new("cut"), &cancel).unwrap();
            io::copy(&mut output, &mut io::sink()).unwrap();
            let error = output.end().unwrap_err().to_string();
            assert!(error.contains("cut") && error.contains(tool), "{error}");
        }
    }
}
