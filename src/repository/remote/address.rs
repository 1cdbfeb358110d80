//! Where a repository is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::repository::error::RepositoryError;

/// The schemes of stores, and what they are called.
const SCHEMES: &[&str] = &["s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https"];

/// Where a repository is: a directory, or an address such as `s3://bucket/prefix`.
#[derive(Clone, PartialEq, Eq)]
pub enum Address {
    /// A directory.
    Directory(PathBuf),
    /// A store, by its URL.
    Store(String),
}

impl FromStr for Address {
    type Err = RepositoryError;

    fn from_str(text: &str) -> Result<Address, RepositoryError> {
        let refused = |problem: &str| {
            let (address, problem) = (redacted(text), problem.to_owned());
            Err(RepositoryError::Address { address, problem })
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            return match text {
                "" => refused("it is empty"),
                _ => Ok(Address::Directory(text.into())),
            };
        };
        match scheme {
            "file" if rest.starts_with('/') => Ok(Address::Directory(Path::new(rest).into())),
            _ if !SCHEMES.contains(&scheme) => {
                refused("it begins as none of file://, s3://, gs://, az://, http:// and https://")
            }
            _ if rest.trim_start_matches('/').is_empty() => refused("it names no bucket or host"),
            _ if rest.contains('@') && matches!(scheme, "http" | "https") => {
                refused("credentials don't belong there, where everybody on this host sees them")
            }
            _ => Ok(Address::Store(text.trim_end_matches('/').to_owned())),
        }
    }
}

impl Address {
    /// Whether it is of a server that speaks WebDAV.
    pub(super) fn is_http(&self) -> bool {
        let is = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        matches!(self, Address::Store(url) if is(url))
    }

    /// All of it, secrets that its query may have included: for nobody's eyes.
    pub(crate) fn full(&self) -> String {
        match self {
            Address::Directory(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                path.display().to_string()
            }
            Address::Store(url) => url.clone(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Directory(path) => path.display().fmt(f),
            Address::Store(url) => f.write_str(&redacted(url)),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An address without what may be a secret: a query, and what stands before an `@` of HTTP.
fn redacted(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://{host}"),
            None => url.to_owned(),
        },
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_hide_what_may_be_secret() {
        let read = |text: &str| text.parse::<Address>();
        assert_eq!(read("/var/backups").unwrap(), Address::Directory("/var/backups".into()));
        assert_eq!(read("file:///var/b").unwrap(), Address::Directory("/var/b".into()));
        assert_eq!(read("s3://b/p/").unwrap(), Address::Store("s3://b/p".into()));
        for wrong in ["", "ftp://x", "s3://", "https://me:secret@host/x"] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        assert_eq!(read("https://h/x?sig=secret").unwrap().to_string(), "https://h/x");
    }
}
