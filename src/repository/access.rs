//! How a repository is reached: for how long, and with which key.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::RepositoryError;
use super::remote::{Reach, StoreWait};
use crate::cancel::Cancellation;

/// How a repository is reached.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Access {
    /// The store.
    pub(super) reach: Reach,
    /// Where the key of an encrypted repository comes from.
    pub keys: Vec<KeySource>,
    /// Fingerprints of the only repositories that are opened; of any, where there is none.
    pub trusted: Vec<String>,
    /// Whether a repository that is not encrypted is opened though a key is given.
    pub plain: bool,
    /// The file of the private key that signs what is put: Ed25519, PKCS#8 in PEM.
    pub sign_key: Option<PathBuf>,
    /// Files of public keys, SPKI in PEM, one or more in each: only what is signed with one of them, or
    /// with `sign_key`, is read. Where there is none, all is read, signed or not.
    pub trust_keys: Vec<PathBuf>,
}

/// Where a key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KeySource {
    /// A file with age identities (`AGE-SECRET-KEY-1…`), as `age-keygen` writes it.
    Identities(PathBuf),
    /// A file with a passphrase in its first line.
    PassphraseFile(PathBuf),
    /// A command that prints a passphrase.
    PassphraseCommand(String),
    /// A passphrase of the environment, by the variable's name.
    Environment(String),
}

impl Access {
    /// Without a key, for two minutes.
    pub fn new() -> Access {
        Access::default()
    }

    /// How long requests are tried again before they fail.
    pub fn with_patience(mut self, patience: Duration) -> Access {
        self.reach.patience = patience;
        self
    }

    /// Tells when the store is waited for.
    pub fn with_waits(mut self, tell: impl Fn(StoreWait) + Send + Sync + 'static) -> Access {
        self.reach.on_wait = Some(Arc::new(tell));
        self
    }

    /// Tells somebody else as well when the store is waited for.
    pub(crate) fn also_tells(
        mut self,
        tell: impl Fn(&StoreWait) + Send + Sync + 'static,
    ) -> Access {
        let others = self.reach.on_wait.take();
        self.with_waits(move |wait| {
            tell(&wait);
            if let Some(others) = &others {
                others(wait);
            }
        })
    }

    /// Ends what is under way.
    pub fn with_cancel(mut self, cancel: Cancellation) -> Access {
        self.reach.cancel = cancel;
        self
    }

    /// Opens an encrypted repository with one of these.
    pub fn with_keys(mut self, keys: Vec<KeySource>) -> Access {
        self.keys = keys;
        self
    }

    /// Opens repositories with one of these fingerprints alone ([`Repository::fingerprint`]).
    ///
    /// [`Repository::fingerprint`]: super::Repository::fingerprint
    pub fn with_trusted(mut self, trusted: Vec<String>) -> Access {
        self.trusted = trusted;
        self
    }

    /// Opens a repository that is not encrypted even where a key is given.
    pub fn with_plain(mut self, plain: bool) -> Access {
        self.plain = plain;
        self
    }

    /// Signs what is put with the private key in this file.
    pub fn with_sign_key(mut self, key: Option<PathBuf>) -> Access {
        self.sign_key = key;
        self
    }

    /// Reads only what is signed with one of the keys in these files.
    pub fn with_trust_keys(mut self, keys: Vec<PathBuf>) -> Access {
        self.trust_keys = keys;
        self
    }

    /// Refuses to put what nobody who trusts these keys would read, before it is made.
    ///
    /// # Errors
    /// When keys are trusted, and none is given that signs.
    pub(crate) fn check_signs(&self) -> Result<(), RepositoryError> {
        match self.sign_key.is_none() && !self.trust_keys.is_empty() {
            true => Err(RepositoryError::Options(
                "what is pushed would not be signed, and only what is signed is read here: set \
                 `Access::sign_key`"
                    .into(),
            )),
            false => Ok(()),
        }
    }

    /// How long requests are tried again.
    pub(crate) fn patience(&self) -> Duration {
        self.reach.patience
    }

    pub(super) fn cancel(&self) -> &Cancellation {
        &self.reach.cancel
    }
}
