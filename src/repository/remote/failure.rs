//! What an answer of a store's means.

use std::error::Error as _;
use std::io;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

use super::http::Answered;
use crate::repository::error::{StoreError, StoreFailure};

/// What is done about a request that failed.
pub struct Verdict {
    pub failure: StoreFailure,
    /// Whether it may succeed a moment later.
    pub passes: bool,
    /// What to tell, without credentials: neither headers nor the query of an address.
    pub problem: String,
}

/// What stores that can't put on conditions are known by.
const UNSUPPORTED: &str = "the store can't do that";

/// Whether a store has refused because it can't put on conditions.
pub fn is_unsupported(error: &StoreError) -> bool {
    error.problem.starts_with(UNSUPPORTED)
}

/// Whether a store has refused by status 403.
pub fn is_forbidden(error: &Error) -> bool {
    find::<Answered>(error).is_some_and(|answered| answered.status == 403)
}

/// An object that came in part.
pub fn cut_short(found: u64, due: u64) -> Error {
    let problem = format!("{found} bytes came of {due}");
    let source = Box::new(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
    Error::Generic { store: "object", source }
}

/// Finds out why a request failed.
pub fn judge(error: &Error) -> Verdict {
    let permanent = |failure, problem: String| Verdict { failure, passes: false, problem };
    if let Some(answered) = find::<Answered>(error) {
        return judge_answer(answered);
    }
    match error {
        Error::NotFound { .. } => permanent(StoreFailure::NotFound, "it is not there".into()),
        Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotModified { .. } => {
            permanent(StoreFailure::Exists, "it is there already, or has changed".into())
        }
        Error::PermissionDenied { .. } => {
            permanent(StoreFailure::Denied, "the credentials don't suffice".into())
        }
        Error::Unauthenticated { .. } => {
            permanent(StoreFailure::Denied, "no credentials, or wrong ones".into())
        }
        Error::NotImplemented { .. } | Error::NotSupported { .. } => {
            permanent(StoreFailure::Refused, format!("{UNSUPPORTED}: {error}"))
        }
        _ => {
            if let Some(http) = find::<HttpError>(error) {
                return judge_connection(http);
            }
            match find::<io::Error>(error) {
                Some(io) => judge_system(io),
                None => permanent(StoreFailure::Refused, deepest(error)),
            }
        }
    }
}

fn judge_answer(Answered { status, code }: &Answered) -> Verdict {
    let (failure, passes) = match (status, code.as_str()) {
        (_, "SlowDown" | "ServerBusy" | "TooManyRequests") | (429 | 503, _) => {
            (StoreFailure::Throttled, true)
        }
        // A request that was signed too long ago is signed anew; a token is not renewed by us.
        (_, "RequestTimeTooSkewed" | "RequestTimeout") | (408, _) => {
            (StoreFailure::Unreachable, true)
        }
        (_, "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken") | (401 | 403, _) => {
            (StoreFailure::Denied, false)
        }
        (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull") => (StoreFailure::Full, false),
        (501, _) | (_, "NotImplemented") => (StoreFailure::Refused, false),
        (500.., _) => (StoreFailure::Unreachable, true),
        _ => (StoreFailure::Refused, false),
    };
    let code = if code.is_empty() { String::new() } else { format!(" ({code})") };
    let says = match failure {
        StoreFailure::Throttled => "the store asks for fewer requests",
        StoreFailure::Denied if code.contains("Expired") => "the credentials have expired",
        StoreFailure::Denied => "the credentials are not accepted, or don't suffice",
        StoreFailure::Full => "the store has no room",
        _ if *status == 501 || code.contains("NotImplemented") => UNSUPPORTED,
        _ => "the store answered with an error",
    };
    Verdict { failure, passes, problem: format!("{says}: status {status}{code}") }
}

fn judge_connection(error: &HttpError) -> Verdict {
    let says = match error.kind() {
        HttpErrorKind::Connect => "no connection",
        HttpErrorKind::Timeout => "no answer in time",
        _ => "the connection broke",
    };
    let problem = format!("{says} ({})", error.source().map_or_else(String::new, deepest));
    Verdict { failure: StoreFailure::Unreachable, passes: true, problem }
}

fn judge_system(error: &io::Error) -> Verdict {
    use io::ErrorKind::*;
    let (failure, passes) = match error.kind() {
        PermissionDenied | ReadOnlyFilesystem => (StoreFailure::Denied, false),
        StorageFull | QuotaExceeded => (StoreFailure::Full, false),
        NotFound => (StoreFailure::NotFound, false),
        // The file may be read whole another time; those of a network's file system, too.
        UnexpectedEof | TimedOut | Interrupted | StaleNetworkFileHandle => {
            (StoreFailure::Unreachable, true)
        }
        _ => (StoreFailure::Refused, false),
    };
    Verdict { failure, passes, problem: error.to_string() }
}

/// The first error of this type among the causes.
fn find<T: std::error::Error + 'static>(error: &Error) -> Option<&T> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The last cause, which names no address.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
