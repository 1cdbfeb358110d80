//! Serial ports: lines out, lines in.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

/// Longest question that is read; more of a line is thrown away.
const LINE_BYTES: u64 = 512;

/// A serial port. Whole lines go out, whoever writes them.
pub struct Serial {
    output: Mutex<File>,
}

impl Serial {
    /// Opens the port raw, and indifferent to whether anybody is at the other end.
    pub fn open(path: &str) -> io::Result<Serial> {
        let port = open_raw(path)?;
        Ok(Serial { output: Mutex::new(port) })
    }

    /// Writes one line. What can't be written is lost: there is nobody to tell.
    pub fn line(&self, text: Arguments) {
        let line = format!("{text}\r\n");
        let mut port = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = port.write_all(line.as_bytes());
    }

    /// A reader of this port's lines.
    pub fn lines(&self) -> io::Result<Lines> {
        let port = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Lines { input: BufReader::new(port.try_clone()?) })
    }
}

/// Reads lines. A peer that leaves and another that comes are not seen here: a
/// serial port has no end.
pub struct Lines {
    input: BufReader<File>,
}

impl Lines {
    /// The next line, trimmed; bytes that aren't text are replaced.
    pub fn next(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.input.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line)?;
        let mut last = line.last().copied();
        while last.is_some_and(|byte| byte != b'\n') {
            let mut rest = Vec::new();
            self.input.by_ref().take(LINE_BYTES).read_until(b'\n', &mut rest)?;
            last = rest.last().copied();
        }
        Ok(String::from_utf8_lossy(&line).trim().to_string())
    }
}

fn open_raw(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
    // SAFETY: termios is plain integers, for which zero is a value; the calls read
    // and write that one struct, and the descriptor is open as long as `port` is.
    let done = unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        let mut done = libc::tcgetattr(port.as_raw_fd(), &mut settings);
        libc::cfmakeraw(&mut settings);
        // The speed goes in by hand: a static link finds no cfsetspeed of the version
        // which the libc crate asks for.
        settings.c_cflag &= !(libc::HUPCL | libc::CRTSCTS | libc::CBAUD);
        settings.c_cflag |= libc::CLOCAL | libc::CREAD | libc::B115200;
        done |= libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &settings);
        done
    };
    if done == 0 { Ok(port) } else { Err(io::Error::last_os_error()) }
}
