//! Commands on repositories: snapshots that leave the host, and come back.

mod archive;
mod backup;
mod completion;
mod drill;
pub(super) mod events;
mod far;
mod keeping;
mod save;
mod transfer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, Args};

pub(super) use self::archive::{PackArgs, UnpackArgs, pack, unpack};
pub(super) use self::completion::{machine_candidates, snapshot_candidates};
pub(super) use self::drill::{DrillArgs, drill};
use self::events::RepositoryEvent;
pub(super) use self::far::FarArgs;
pub(super) use self::keeping::{
    CopyArgs, DiffArgs, ForgetArgs, PruneArgs, TagArgs, check, copy, diff, forget, prune, tag,
};
pub(super) use self::save::SaveToArgs;
pub(super) use self::transfer::{InitArgs, ListArgs, PullArgs, PushArgs, init, list, pull, push};
use super::cancellation;
use super::failure::Failure;
use super::output::Output;
use super::parse_seconds;
use crate::kind::ErrorKind;
use crate::repository::{
    Access, Address, KeySource, Moved, Repository, RepositoryError, SnapshotName, StoreWait,
};

/// Where the repository is, how long its store is waited for, and what opens it.
#[derive(Args, Clone)]
pub(super) struct RepositoryArgs {
    /// The repository: a directory, s3://BUCKET/PREFIX, gs://…, az://…, https://…
    /// [default: the setting `repository`]
    #[arg(long, value_name = "ADDRESS")]
    pub repo: Option<String>,
    #[command(flatten)]
    pub access: AccessArgs,
}

#[derive(Args, Clone)]
pub(in crate::cli) struct AccessArgs {
    /// Try a store that does not answer again for so long
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = parse_seconds)]
    store_timeout: Duration,
    /// A file with age identities that open an encrypted repository
    /// [default: the variable SNAPBACK_IDENTITY]
    #[arg(long, value_name = "FILE")]
    identity: Vec<PathBuf>,
    /// A file with the passphrase of an encrypted repository
    /// [default: the variable SNAPBACK_PASSPHRASE_FILE, or the passphrase in SNAPBACK_PASSPHRASE]
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// A command that prints the passphrase [default: the variable SNAPBACK_PASSPHRASE_COMMAND]
    #[arg(long, value_name = "COMMAND")]
    passphrase_command: Option<String>,
    /// Open only a repository with this fingerprint, as `init` printed it; several by commas
    /// [default: the setting `trust`]
    #[arg(long, value_name = "FINGERPRINT", value_delimiter = ',')]
    trust: Vec<String>,
    /// Read only snapshots that are signed with a key of this file, public keys of Ed25519 in PEM; can be
    /// given several times [default: the setting `trust_key`]
    #[arg(long, value_name = "FILE")]
    trust_key: Vec<PathBuf>,
    /// From [`SignArgs`], of commands that put snapshots.
    #[arg(skip)]
    sign_key: Option<PathBuf>,
    /// Open or make a repository that is not encrypted though a key is given
    #[arg(
        long,
        value_name = "TRUTH",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_default_value = true,
        hide_possible_values = true
    )]
    allow_plain: bool,
}

/// With what the snapshots are signed that a command puts.
#[derive(Args, Clone)]
pub(super) struct SignArgs {
    /// Sign what is put with this private key: a file of Ed25519 in PEM, as `openssl genpkey -algorithm
    /// ed25519` makes it [default: the setting `sign_key`]
    #[arg(long, value_name = "FILE")]
    sign_key: Option<PathBuf>,
}

impl RepositoryArgs {
    /// The same, and what is put there is signed.
    fn signing(mut self, sign: SignArgs) -> RepositoryArgs {
        self.access.sign_key = sign.sign_key;
        self
    }

    pub fn address(&self) -> Result<Address, Failure> {
        match &self.repo {
            Some(named) => Ok(named.parse()?),
            None => Err(Failure::said(
                ErrorKind::OptionsInvalid,
                "no repository is named: give --repo, or set SNAPBACK_REPOSITORY, or the setting \
                 `repository`"
                    .into(),
            )),
        }
    }
}

impl AccessArgs {
    /// What of a passphrase's or an identity's place was given, or is set in the environment.
    fn keys(&self) -> Vec<KeySource> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let mut keys: Vec<KeySource> =
            self.identity.iter().cloned().map(KeySource::Identities).collect();
        keys.extend(self.passphrase_file.clone().map(KeySource::PassphraseFile));
        keys.extend(self.passphrase_command.clone().map(KeySource::PassphraseCommand));
        if keys.is_empty() {
            keys.extend(set("SNAPBACK_IDENTITY").map(|path| KeySource::Identities(path.into())));
            let file = set("SNAPBACK_PASSPHRASE_FILE");
            keys.extend(file.map(|path| KeySource::PassphraseFile(path.into())));
            keys.extend(set("SNAPBACK_PASSPHRASE_COMMAND").map(KeySource::PassphraseCommand));
            let variable = "SNAPBACK_PASSPHRASE";
            keys.extend(set(variable).map(|_| KeySource::Environment(variable.into())));
        }
        keys
    }

    /// With these keys, or, if there are none, with what the environment has. What is trusted is for the caller to say.
    pub fn access_with(keys: Vec<KeySource>, patience: Duration, output: &Arc<Output>) -> Access {
        let args = AccessArgs {
            store_timeout: patience,
            identity: Vec::new(),
            passphrase_file: None,
            passphrase_command: None,
            trust: Vec::new(),
            trust_key: Vec::new(),
            sign_key: None,
            allow_plain: false,
        };
        let access = args.uninterrupted(output);
        if keys.is_empty() { access } else { access.with_keys(keys) }
    }

    pub fn access(&self, output: &Arc<Output>) -> Result<Access, Failure> {
        Ok(self.uninterrupted(output).with_cancel(cancellation()?))
    }

    /// For a guest that runs: an interrupt does not keep it from its memory.
    fn uninterrupted(&self, output: &Arc<Output>) -> Access {
        let tell = Arc::clone(output);
        let access = Access::new()
            .with_patience(self.store_timeout)
            .with_waits(move |wait| tell.store_wait(&wait));
        let trusted = self.trust.iter().map(|one| one.trim().to_owned()).collect();
        let access = access.with_keys(self.keys()).with_trusted(trusted);
        let access = access.with_trust_keys(self.trust_key.clone());
        access.with_sign_key(self.sign_key.clone()).with_plain(self.allow_plain)
    }
}

/// Runs work on a repository, in a thread that may block.
async fn on_repository<T: Send + 'static>(
    args: &RepositoryArgs,
    output: &Arc<Output>,
    work: impl FnOnce(&Repository, &Output) -> Result<T, RepositoryError> + Send + 'static,
) -> Result<T, Failure> {
    let (address, access) = (args.address()?, args.access.access(output)?);
    let output = Arc::clone(output);
    blocking(move || work(&Repository::open(&address, &access)?, &output)).await
}

/// The same for work of which no progress is known: tells meanwhile what it is.
async fn waiting_for<T: Send + 'static>(
    what: &'static str,
    args: &RepositoryArgs,
    output: &Arc<Output>,
    work: impl FnOnce(&Repository, &Output) -> Result<T, RepositoryError> + Send + 'static,
) -> Result<T, Failure> {
    let _shown = output.waiting(what);
    on_repository(args, output, work).await
}

/// Runs work that blocks. It ends by itself soon after an interrupt.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RepositoryError> + Send + 'static,
) -> Result<T, Failure> {
    let ended = tokio::task::spawn_blocking(work).await;
    Ok(ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?)
}

fn parse_name(text: &str) -> Result<SnapshotName, String> {
    text.parse().map_err(|error: RepositoryError| error.to_string())
}

impl Output {
    fn store_wait(&self, wait: &StoreWait) {
        if self.is_json() {
            return self.print_json(wait);
        }
        match wait {
            StoreWait::StoreWaiting { why, patience_s, .. } => {
                let says = format!("for the store ({why}); it is tried for {patience_s} s");
                self.say("waiting", &says);
            }
            StoreWait::StoreBack { .. } => self.say("goes on", "the store answers again"),
        }
    }

    pub(super) fn moved(&self, moved: Moved) {
        match self.is_json() {
            true => self.print_json(&RepositoryEvent::Moved(moved)),
            false => self.advance_bytes(moved.done, moved.total),
        }
    }

    fn repository(&self, event: &RepositoryEvent, what: &str, details: &str) {
        self.finish_bar();
        match self.is_json() {
            true => self.print_json(event),
            false => self.say(what, details),
        }
    }
}
