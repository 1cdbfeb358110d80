//! How a reset is asked for from another process: a Unix socket, a line of JSON each way.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::identity::Identity;

/// The name of the socket in the directory of a revert.
pub(crate) const SOCKET: &str = "reset.sock";

/// A line is no longer than this, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// How long whoever asks may take to say what.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// To take the guest back.
    Reset,
    /// To track its writes no more: somebody else is about to write-protect its memory.
    LetGo,
    /// To tell what is tracked ([`Tracked`]).
    Tell,
}

/// What is tracked of a guest's memory. As long as it is, a page there that is in memory and
/// write-protected is what the image has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tracked {
    /// The image.
    pub image: Identity,
    /// Its blocks whose writes are tracked by write protection: names, as the image has them, and
    /// addresses in QEMU's memory. None where the guest's memory is mapped from the image.
    pub blocks: Vec<(String, u64)>,
}

/// What has come of a reset inside QEMU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResetOutcome {
    /// The guest is back at its image, and goes on from there.
    Done {
        /// Host pages that were written back.
        pages: u64,
        /// How long it took, in milliseconds.
        took_ms: f64,
    },
    /// The guest can't be reset so, and goes on as it was.
    Refused {
        /// Why.
        why: String,
    },
    /// It failed half-way, and the guest's QEMU has been ended.
    Failed {
        /// Why.
        why: String,
    },
}

/// What a reset inside QEMU has done.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Reset {
    /// Host pages that were written back.
    pub pages: u64,
    /// How long it took until the guest ran again, in milliseconds.
    pub took_ms: f64,
}

impl From<Reset> for ResetOutcome {
    fn from(Reset { pages, took_ms }: Reset) -> ResetOutcome {
        ResetOutcome::Done { pages, took_ms }
    }
}

/// How a guest was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResetWay {
    /// Inside its QEMU.
    InPlace,
    /// By a new process in the place of its QEMU.
    NewProcess,
}

/// Where resets are asked for.
pub(crate) struct Requests(UnixListener);

/// A request that waits for its answer.
pub(crate) struct Asked {
    pub request: Request,
    stream: UnixStream,
}

impl Requests {
    /// Listens at this path, for this user alone.
    ///
    /// # Errors
    /// When there is something already, or the directory can't be written to.
    pub fn listen(path: &Path) -> io::Result<Requests> {
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
        Ok(Requests(listener))
    }

    /// Waits for the next request. Safe to cancel. Whoever says nothing that is understood is hung
    /// up on.
    pub async fn next(&self) -> Asked {
        loop {
            let Ok((stream, _)) = self.0.accept().await else {
                // Of descriptors, for example, there may be more again.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let asked = tokio::time::timeout(PATIENCE, read_line(stream)).await;
            if let Ok(Ok((request, stream))) = asked {
                return Asked { request, stream };
            }
        }
    }
}

impl Asked {
    /// Answers it. Who has asked may be gone, which changes nothing.
    pub async fn answer(self, answer: &ResetOutcome) {
        self.say(answer).await;
    }

    /// Answers [`Request::Tell`].
    pub async fn tell(self, tracked: &Tracked) {
        self.say(tracked).await;
    }

    async fn say(mut self, answer: &impl Serialize) {
        let _ = write_line(&mut self.stream, answer).await;
    }
}

/// Asks the server that listens at this path, and waits for its answer: a [`Tracked`] to
/// [`Request::Tell`], a [`ResetOutcome`] to the others.
///
/// # Errors
/// When nobody listens there, or the server ends before it has answered, or doesn't understand.
pub(crate) async fn ask<T: DeserializeOwned>(path: &Path, request: Request) -> io::Result<T> {
    let mut stream = UnixStream::connect(path).await?;
    write_line(&mut stream, &request).await?;
    Ok(read_line(stream).await?.0)
}

async fn read_line<T: DeserializeOwned>(stream: UnixStream) -> io::Result<(T, UnixStream)> {
    use tokio::io::AsyncReadExt;
    let mut reader = BufReader::new(stream.take(MAX_LINE));
    let mut line = String::new();
    if reader.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((serde_json::from_str(&line)?, reader.into_inner().into_inner()))
}

async fn write_line(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_asked_is_answered_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET);
        let requests = Requests::listen(&path).unwrap();
        let served = tokio::spawn(async move {
            let asked = requests.next().await;
            let request = asked.request;
            asked.answer(&ResetOutcome::Done { pages: 7, took_ms: 5.5 }).await;
            request
        });
        let mut nonsense = UnixStream::connect(&path).await.unwrap();
        nonsense.write_all(b"{]\n").await.unwrap();
        assert!(read_line::<ResetOutcome>(nonsense).await.is_err());
        let answer: ResetOutcome = ask(&path, Request::Reset).await.unwrap();
        assert_eq!(answer, ResetOutcome::Done { pages: 7, took_ms: 5.5 });
        assert_eq!(served.await.unwrap(), Request::Reset);
        assert!(ask::<ResetOutcome>(&path, Request::Reset).await.is_err());
    }
}
