//! Another program run to its end, in bounded time and memory.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use crate::cancel::Cancellation;

/// The most bytes of output that are read. A program that writes more gets SIGPIPE.
const MAX_SAID: u64 = 4 << 20;

/// How often we look whether the program has ended or was cancelled.
const NAP: Duration = Duration::from_millis(10);

/// Has a command run in a session of its own, so that signals of our terminal don't reach it.
pub(crate) fn in_own_session(command: &mut Command) {
    // SAFETY: setsid(2) is async-signal-safe and touches no memory; it is all that runs between
    // fork and exec.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
}

/// Has a command end when the thread that starts it does: PR_SET_PDEATHSIG, prctl(2). For a thread
/// that waits for its end.
pub(crate) fn ends_with_us(command: &mut Command) {
    let us = nix::unistd::getpid();
    // SAFETY: prctl(2) and getppid(2) are async-signal-safe and touch no memory; they are all that
    // runs between fork and exec.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // We may have died before.
            match nix::unistd::getppid() == us {
                true => Ok(()),
                false => Err(io::ErrorKind::Interrupted.into()),
            }
        });
    }
}

/// What a program returned.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Why there is no answer. The program has been killed by then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("can't be run: {0}")]
    Run(#[from] io::Error),
    #[error("did not end within {} s", .0.as_secs())]
    Late(Duration),
    #[error("was interrupted")]
    Stopped,
}

/// Runs a program to its end, with `input` as its standard input. It is killed after `limit`,
/// or when it is cancelled.
///
/// # Errors
/// When it can't be run, takes too long, or is cancelled. A program that fails is no error.
pub(crate) fn answer(
    mut command: Command,
    input: Vec<u8>,
    limit: Duration,
    cancel: &Cancellation,
) -> Result<Answer, ProgramError> {
    let deadline = Instant::now() + limit;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = Program(command.spawn()?);
    if let Some(mut stdin) = program.0.stdin.take() {
        // That the program does not read all of it is no error of ours.
        Builder::new().spawn(move || drop(stdin.write_all(&input)))?;
    }
    let (stdout, stderr) = (gather(program.0.stdout.take())?, gather(program.0.stderr.take())?);
    let mut status = None;
    while status.is_none() {
        if cancel.is_requested() {
            return Err(ProgramError::Stopped);
        }
        if Instant::now() >= deadline {
            return Err(ProgramError::Late(limit));
        }
        std::thread::sleep(NAP);
        status = program.0.try_wait()?;
    }
    // Processes that it started may still hold its output open.
    let said = |output: Receiver<Vec<u8>>| {
        let left = deadline.saturating_duration_since(Instant::now());
        output.recv_timeout(left).map_err(|_| ProgramError::Late(limit))
    };
    let (stdout, stderr) = (said(stdout)?, said(stderr)?);
    let status = status.ok_or(ProgramError::Late(limit))?;
    Ok(Answer { status, stdout, stderr })
}

/// Reads all of an output, in a thread of its own.
fn gather(output: Option<impl Read + Send + 'static>) -> io::Result<Receiver<Vec<u8>>> {
    let (sender, said) = channel();
    Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        if let Some(output) = output {
            // What was read before an error is what it said.
            let _ = output.take(MAX_SAID).read_to_end(&mut bytes);
        }
        // Fails when `answer` has returned.
        let _ = sender.send(bytes);
    })?;
    Ok(said)
}

/// A program that is killed on drop, unless it has ended.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // Does nothing to one that was reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_it_reads_and_says_is_passed_on() {
        let long = vec![b'x'; 1 << 20];
        let script = shell("cat; echo no >&2; exit 3");
        let answer = answer(script, long.clone(), HOUR, &Cancellation::default()).unwrap();
        assert_eq!((answer.stdout, answer.stderr.as_slice()), (long, &b"no\n"[..]));
        assert_eq!(answer.status.code(), Some(3));
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let forever = format!("echo $$ >{}; exec sleep 1000", pid.display());
        let cancel = Cancellation::new();
        std::thread::scope(|scope| {
            let run = scope.spawn(|| answer(shell(&forever), Vec::new(), HOUR, &cancel));
            while !fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')) {
                std::thread::sleep(NAP);
            }
            cancel.request();
            assert!(matches!(run.join().unwrap(), Err(ProgramError::Stopped)));
        });
        let pid = fs::read_to_string(&pid).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());

        let late = answer(shell("exec sleep 1000"), Vec::new(), NAP, &Cancellation::default());
        assert!(matches!(late, Err(ProgramError::Late(_))));
        let none = answer(Command::new("/no/such"), Vec::new(), HOUR, &Cancellation::default());
        assert!(matches!(none, Err(ProgramError::Run(_))));
    }
}
