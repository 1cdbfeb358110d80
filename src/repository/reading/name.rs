//! Names of snapshots as people say them: `web1@latest`, `web1@2026-11-25`, an id's beginning.

use std::fmt;
use std::str::FromStr;

use super::repository::{Repository, Snapshot};
use crate::repository::error::RepositoryError;
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::time::{read_time, readable};

/// The shortest beginning of an id that is taken for one.
const SHORTEST: usize = 4;
/// How many snapshots an error lists.
const LISTED: usize = 5;

/// What a snapshot is called by.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotName {
    /// The beginning of an id.
    Id(String),
    /// One of a machine.
    Of {
        /// The machine.
        machine: String,
        /// Which.
        moment: Moment,
    },
}

/// Which snapshot of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Moment {
    /// The last.
    Latest,
    /// The last of those made in this time: seconds since 1970 (UTC), from and to.
    In(i64, i64),
    /// The last one with this tag, or the one with this beginning of its id.
    Word(String),
}

impl FromStr for SnapshotName {
    type Err = RepositoryError;

    fn from_str(text: &str) -> Result<SnapshotName, RepositoryError> {
        let wrong = |problem: &str| {
            Err(RepositoryError::Options(format!("`{text}` is no name of a snapshot: {problem}")))
        };
        let Some((machine, moment)) = text.rsplit_once('@') else {
            let is_id =
                text.len() >= SHORTEST && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
            return match is_id {
                true => Ok(SnapshotName::Id(text.replace('-', "").to_ascii_lowercase())),
                false if text.is_empty() => wrong("it is empty"),
                // Of a machine, the last one.
                false => Ok(SnapshotName::Of { machine: text.into(), moment: Moment::Latest }),
            };
        };
        if machine.is_empty() {
            return wrong("it begins with the machine, as in web1@latest");
        }
        let moment = match moment {
            "latest" => Moment::Latest,
            "" => return wrong("it ends with a time, a tag or an id, as in web1@latest"),
            moment => match read_time(moment) {
                Some((from, to)) => Moment::In(from, to),
                None => Moment::Word(moment.into()),
            },
        };
        Ok(SnapshotName::Of { machine: machine.into(), moment })
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotName::Id(id) => f.write_str(id),
            SnapshotName::Of { machine, moment: Moment::Latest } => write!(f, "{machine}@latest"),
            SnapshotName::Of { machine, moment: Moment::In(from, _) } => {
                write!(f, "{machine}@{}", readable(*from))
            }
            SnapshotName::Of { machine, moment: Moment::Word(word) } => {
                write!(f, "{machine}@{word}")
            }
        }
    }
}

impl Repository {
    /// Finds the snapshot that a name means.
    ///
    /// # Errors
    /// When there is none, or there are several.
    pub fn resolve(&self, name: &SnapshotName) -> Result<SnapshotManifest, RepositoryError> {
        resolve(self, name)
    }
}

fn resolve(
    repository: &Repository,
    name: &SnapshotName,
) -> Result<SnapshotManifest, RepositoryError> {
    let (found, there): (Vec<Snapshot>, Vec<Snapshot>) = match name {
        SnapshotName::Id(begins) => {
            let all = repository.snapshots()?;
            let is_meant = |snapshot: &Snapshot| snapshot.id.to_string().starts_with(begins);
            let found: Vec<Snapshot> = all.iter().filter(|s| is_meant(s)).cloned().collect();
            // What looks like an id may be a machine.
            match found.is_empty() {
                true => (repository.snapshots_of(begins)?.pop().into_iter().collect(), Vec::new()),
                false => (one(name, found)?, Vec::new()),
            }
        }
        SnapshotName::Of { machine, moment } => {
            let mut of = repository.snapshots_of(machine)?;
            let found = match moment {
                Moment::Latest => of.pop(),
                Moment::In(from, to) => {
                    of.iter().rfind(|s| (*from..*to).contains(&s.seconds())).cloned()
                }
                Moment::Word(word) => word_of(repository, name, &of, word)?,
            };
            (found.into_iter().collect(), of)
        }
    };
    match found.first() {
        Some(snapshot) => repository.manifest(snapshot),
        None => {
            let hint = match there.as_slice() {
                [] => " (`snapback list` shows what there is)".to_owned(),
                there => {
                    let last = there.iter().rev().take(LISTED).map(|s| readable(s.seconds()));
                    format!("; of this machine there are {}", last.collect::<Vec<_>>().join(", "))
                }
            };
            let repository = repository.name().to_owned();
            Err(RepositoryError::NoSuchSnapshot { name: name.to_string(), repository, hint })
        }
    }
}

/// The last one with a tag, or the one whose id begins so.
fn word_of(
    repository: &Repository,
    name: &SnapshotName,
    of: &[Snapshot],
    word: &str,
) -> Result<Option<Snapshot>, RepositoryError> {
    for snapshot in of.iter().rev() {
        if repository.tags_of(snapshot.id)?.contains(word) {
            return Ok(Some(snapshot.clone()));
        }
    }
    let begins = word.replace('-', "").to_ascii_lowercase();
    let found = of.iter().filter(|s| s.id.to_string().starts_with(&begins)).cloned().collect();
    Ok(one(name, found)?.pop())
}

/// No more than one.
fn one(name: &SnapshotName, found: Vec<Snapshot>) -> Result<Vec<Snapshot>, RepositoryError> {
    if found.len() <= 1 {
        return Ok(found);
    }
    let said = |s: &Snapshot| format!("{} ({})", s.id, readable(s.seconds()));
    let candidates = found.iter().take(LISTED).map(said).collect();
    Err(RepositoryError::Ambiguous { name: name.to_string(), candidates })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_people_say_them() {
        let read = |text: &str| text.parse::<SnapshotName>();
        let of = |moment| SnapshotName::Of { machine: "web1".into(), moment };
        assert_eq!(read("web1@latest").unwrap(), of(Moment::Latest));
        assert_eq!(read("web1").unwrap(), of(Moment::Latest));
        assert_eq!(read("web1@2026-11-25").unwrap(), of(Moment::In(1_795_564_800, 1_795_651_200)));
        assert_eq!(read("web1@golden").unwrap(), of(Moment::Word("golden".into())));
        assert_eq!(read("67E5-5044").unwrap(), SnapshotName::Id("67e55044".into()));
        for wrong in ["", "@latest", "web1@"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
