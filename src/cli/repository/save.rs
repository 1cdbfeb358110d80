//! A save whose image goes to a repository.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::{RepositoryArgs, SignArgs};
use crate::backup::{BackupError, Spool};
use crate::cli::failure::Failure;
use crate::cli::host::SiteArgs;
use crate::cli::output::Output;
use crate::daemon::DaemonOptions;
use crate::kind::ErrorKind;
use crate::repository::{Address, PushOptions, Repository};

/// Which repository a save goes to, and how.
#[derive(Args)]
pub(in crate::cli) struct SaveToArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// With a repository: the directory in which the save lies until it has been pushed
    /// [default: /var/lib/snapback/spool of root, ~/.local/state/snapback/spool of others]
    #[arg(long, value_name = "DIR")]
    spool: Option<PathBuf>,
    /// With a repository: tag the snapshot; can be given several times
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    #[command(flatten)]
    sign: SignArgs,
    #[command(flatten)]
    site: SiteArgs,
}

/// A repository that is open, and a place for the save on its way there.
pub(in crate::cli) struct SaveTo {
    repository: Repository,
    spool: Spool,
    options: PushOptions,
}

impl SaveToArgs {
    /// The repository, where the argument names a machine of one: behind the repository's address, or by
    /// itself where `--repo` is given. It is opened, so that nothing is saved that can't get there.
    pub async fn open(self, image: &Path, output: &Arc<Output>) -> Result<Option<SaveTo>, Failure> {
        let text = image.to_string_lossy().into_owned();
        let (address, machine): (Address, String) = match text.rsplit_once('/') {
            Some((address, machine)) if text.contains("://") => {
                (address.parse()?, machine.to_owned())
            }
            _ if self.repository.repo.is_some() => (self.repository.address()?, text),
            _ if self.spool.is_some() || !self.tag.is_empty() => {
                let message = "--spool and --tag are for a save into a repository: give --repo";
                return Err(Failure::said(ErrorKind::OptionsInvalid, message.into()));
            }
            _ => return Ok(None),
        };
        let mut options = PushOptions::new("");
        options.tags = self.tag.into_iter().collect();
        options.profile = self.site.profile();
        let spool = self.spool.unwrap_or_else(|| DaemonOptions::new().state.join("spool"));
        let access = self.repository.signing(self.sign).access.access(output)?;
        access.check_signs()?;
        let opened = tokio::task::spawn_blocking(move || {
            let repository = Repository::open(&address, &access)?;
            let spool = Spool::make(&spool, &machine)?;
            Ok::<_, BackupError>(SaveTo { repository, spool, options })
        });
        let opened = opened.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
        Ok(Some(opened?))
    }
}

impl SaveTo {
    /// The image that is to be written.
    pub fn image(&self) -> PathBuf {
        self.spool.image()
    }

    /// Pushes it.
    pub async fn push(self, output: &Arc<Output>) -> Result<(), Failure> {
        let SaveTo { repository, spool, options } = self;
        let told = Arc::clone(output);
        let pushed = tokio::task::spawn_blocking(move || {
            spool.push(&repository, &options, |moved| told.moved(moved))
        });
        let pushed = pushed.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
        output.pushed(&pushed?);
        Ok(())
    }
}
