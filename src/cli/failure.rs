//! Why a command failed: words for people, and what a program needs to act.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::flags::with_flags;
use crate::bench::{BenchError, CompareError};
use crate::daemon::{ClientError, ConfigError, DaemonError};
use crate::exchange::ExchangeError;
use crate::fork::ForkError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::memory::WorkingSetError;
use crate::pools::PoolError;
use crate::repository::RepositoryError;
use crate::reset::ResetError;
use crate::revert::RevertError;
use crate::runs::RunsError;
use crate::save::SaveError;

/// Why a command failed.
pub(super) struct Failure {
    message: String,
    kind: ErrorKind,
    details: Details,
}

/// A failure as an event.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename = "error")]
pub(super) struct ErrorEvent {
    /// The kind of error, by [`ErrorKind::code`].
    code: String,
    /// What failed, why, and what to do.
    message: String,
    /// Whether the same may succeed later with nothing changed by hand.
    retryable: bool,
    /// The file, directory or socket that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// The process that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    /// The option to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    option: Option<String>,
}

impl Failure {
    /// A failure of an operation, named as in "starting the server failed".
    pub fn new(kind: ErrorKind, doing: &str, error: &dyn fmt::Display) -> Failure {
        Failure::said(kind, format!("{doing}: {error}"))
    }

    /// A failure of an operation that the operating system refused.
    pub fn io(doing: &str, error: &std::io::Error) -> Failure {
        Failure::new(ErrorKind::of_io(error), doing, error)
    }

    /// A failure with a message that says everything.
    pub fn said(kind: ErrorKind, message: String) -> Failure {
        let details = Details::new(&message, None::<String>, None);
        Failure { message, kind, details }
    }

    /// A failure whose message says everything, and what it is about.
    pub fn with(kind: ErrorKind, message: String, details: Details) -> Failure {
        Failure { message, kind, details }
    }

    /// The same failure in other words.
    pub fn in_words(self, message: String) -> Failure {
        Failure { message, ..self }
    }

    /// The message, with flags for the fields that it names.
    pub fn message(&self) -> String {
        with_flags(&self.message)
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The exit code of a program that ends with it (docs/events.md).
    pub fn exit_code(&self) -> u8 {
        use ErrorKind::*;
        match self.kind {
            // All of these are found out before QEMU or a guest is touched.
            CommandLineInvalid
            | DeviceNotReplayable
            | DiskChanged
            | DiskMissing
            | DiskUnsupported
            | DaemonRunning
            | DaemonUnreachable
            | DomainRuns
            | FileExists
            | FileInUse
            | Forbidden
            | GuestState
            | GuestUnsupported
            | HostUnsupported
            | ImageTooNew
            | InputInvalid
            | KeyInvalid
            | LibvirtUnreachable
            | MemoryIncomplete
            | MigrationActive
            | NoRepository
            | NoSuchDevice
            | NoSuchDisk
            | NoSuchDomain
            | NoSuchGuest
            | NoSuchPool
            | NoSuchSnapshot
            | NotAnImage
            | NotFollowed
            | NotFound
            | NotQemu
            | NotResettable
            | OptionsInvalid
            | ParentMissing
            | PoolExists
            | PortInUse
            | QemuTooOld
            | QemuUnreachable
            | RepositoryExists
            | RepositoryTooNew
            | RepositoryUntrusted
            | RequestInvalid
            | SaveUnfinished
            | SnapshotUntrusted
            | SocketInUse
            | StoreDenied
            | TapInUse
            | Unauthorized
            | UserfaultfdUnavailable
            | VsockInUse
            | WorkingSetMissing => 3,
            ImageDamaged | RepositoryDamaged => 4,
            Interrupted => 130,
            _ => 1,
        }
    }

    /// The failure as an event.
    pub fn event(&self) -> ErrorEvent {
        let Details { path, pid, option } = &self.details;
        let flag = |option: &String| {
            let said = with_flags(&format!("`{option}`"));
            said.starts_with("--").then_some(said)
        };
        ErrorEvent {
            code: self.kind.code().to_owned(),
            message: self.message(),
            retryable: self.kind.retryable(),
            path: path.as_ref().map(|path| path.display().to_string()),
            pid: *pid,
            option: option.as_ref().and_then(flag),
        }
    }
}

impl From<ErrorEvent> for Failure {
    /// What another process of this program has told.
    fn from(event: ErrorEvent) -> Failure {
        let kind = ErrorKind::ALL.iter().copied().find(|kind| kind.code() == event.code);
        let option = event.option.and_then(|flag| super::flags::field_of(&flag));
        let mut details = Details::new("", event.path, event.pid);
        details.option = option;
        Failure { message: event.message, kind: kind.unwrap_or(ErrorKind::Internal), details }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::said(ErrorKind::of_io(&error), error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Failure {
        Failure::said(ErrorKind::Internal, error.to_string())
    }
}

macro_rules! failure_from {
    ($($error:ty)*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                let (kind, details) = (error.kind(), error.details());
                Failure { message: error.to_string(), kind, details }
            }
        })*
    };
}

failure_from! { BenchError ClientError CompareError ConfigError DaemonError ExchangeError ForkError ImageError PoolError RepositoryError ResetError RevertError RunsError SaveError WorkingSetError }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestError;

    #[test]
    fn a_program_can_act_on_a_failure_and_pass_it_on() {
        let error = GuestError::SocketInUse { option: "-qmp x".into(), path: "/q".into() };
        let failure = Failure::from(RevertError::Vm(error));
        let line = serde_json::to_value(failure.event()).unwrap();
        assert_eq!((&line["event"], &line["code"]), (&"error".into(), &"socket_in_use".into()));
        assert_eq!((&line["path"], &line["option"]), (&"/q".into(), &"--path".into()));
        assert_eq!((&line["retryable"], failure.exit_code()), (&true.into(), 3));

        let passed_on = Failure::from(serde_json::from_value::<ErrorEvent>(line.clone()).unwrap());
        assert_eq!(serde_json::to_value(passed_on.event()).unwrap(), line);
        assert_eq!(passed_on.exit_code(), 3);
    }

    #[test]
    fn exit_codes_tell_damage_and_interrupts() {
        let damaged = ImageError::Unfinished("a.snap".into());
        assert_eq!(Failure::from(damaged).exit_code(), 4);
        assert_eq!(Failure::from(SaveError::Interrupted).exit_code(), 130);
        assert_eq!(Failure::from(SaveError::Held(Default::default())).exit_code(), 1);
    }
}
