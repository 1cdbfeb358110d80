//! All machines of a configuration file, one behind the other: what fails with one of them keeps no
//! other from being saved.

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::config::BackupConfig;
use super::error::BackupError;
use super::metrics::{DURATION, LAST_RUN, LAST_SUCCESS, Metrics, NEW_BYTES, SUCCESS};
use super::spool::Spool;
use crate::cancel::Cancellation;
use crate::keeper::Successor;
use crate::repository::{
    Access, ForgetOptions, Looked, Pruned, PushOptions, Pushed, Repository, RepositoryError,
    forget, prune,
};
use crate::save::{GuestAddress, SaveEvent, SaveOptions, save};

/// What a backup tells.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackupEvent {
    /// It goes on with this machine.
    Machine(String),
    /// Of the machine's save.
    Save(SaveEvent),
    /// A snapshot is in the repository: of now, or one that an earlier backup could not push.
    Pushed(Box<Pushed>),
    /// A snapshot of the machine that was looked at, and is kept or forgotten.
    Forgotten(Box<Looked>),
    /// The machine was not saved, or what is to be forgotten of it was not.
    Failed(String, BackupError),
    /// What nothing refers to was removed.
    Pruned(Pruned),
}

/// What came of a backup.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct BackupReport {
    /// How many machines there were.
    pub machines: usize,
    /// Those of them that failed.
    pub failed: Vec<String>,
    /// Why nothing was pruned, where that was wanted.
    pub not_pruned: Option<RepositoryError>,
}

/// Saves these machines of a configuration file, or all, into its repository; forgets what is not kept
/// of them; prunes; writes the metrics. `keeper` starts what cleans up behind a save that is killed.
///
/// # Errors
/// When a name is none of the file's, the repository can't be opened, or the metrics can't be written.
/// Whatever else fails is told by [`BackupEvent::Failed`] and in the report.
pub async fn back_up(
    config: &BackupConfig,
    names: &[String],
    access: &Access,
    keeper: impl Fn(&GuestAddress, &Path) -> Successor,
    cancel: Cancellation,
    mut on_event: impl FnMut(BackupEvent) + Send,
) -> Result<BackupReport, BackupError> {
    let all = || config.machines.keys().cloned().collect();
    let names: Vec<String> = if names.is_empty() { all() } else { names.to_vec() };
    // Whether all of them are known, before anything is done.
    names.iter().try_for_each(|name| config.push_options(name).map(drop))?;
    let mut metrics = config.metrics.as_deref().map(Metrics::read).unwrap_or_default();
    let mut report = BackupReport { machines: names.len(), ..BackupReport::default() };

    let (address, opened) = (config.address()?, access.clone());
    let open = move || {
        opened.check_signs()?;
        Ok(Arc::new(Repository::open(&address, &opened)?))
    };
    let opened = blocking(open).await;
    for name in &names {
        let began = Instant::now();
        let saved = match &opened {
            Ok(repository) => {
                on_event(BackupEvent::Machine(name.clone()));
                let one = Machine { config, name, repository, keeper: &keeper, cancel: &cancel };
                one.back_up(&mut on_event).await.map(Some)
            }
            // Told once, at the end.
            Err(_) => Ok(None),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics.set(LAST_RUN, name, now.as_secs_f64().round());
        metrics.set(DURATION, name, began.elapsed().as_secs_f64());
        metrics.set(SUCCESS, name, f64::from(u8::from(matches!(saved, Ok(Some(_))))));
        match saved {
            Ok(Some(pushed)) => {
                metrics.set(LAST_SUCCESS, name, now.as_secs_f64().round());
                metrics.set(NEW_BYTES, name, pushed.manifest.own as f64);
            }
            Ok(None) => report.failed.push(name.clone()),
            Err(error) => {
                report.failed.push(name.clone());
                on_event(BackupEvent::Failed(name.clone(), error));
            }
        }
        if cancel.is_requested() {
            break;
        }
    }
    if let Ok(repository) = &opened
        && let Some(options) = config.prune_options()
        && !cancel.is_requested()
    {
        let repository = Arc::clone(repository);
        match blocking(move || Ok(prune(&repository, &options))).await? {
            Ok(pruned) => on_event(BackupEvent::Pruned(pruned)),
            Err(error) => report.not_pruned = Some(error),
        }
    }
    if let Some(path) = &config.metrics {
        metrics.write(path)?;
    }
    opened?;
    Ok(report)
}

/// A machine that is saved.
struct Machine<'a, K> {
    config: &'a BackupConfig,
    name: &'a str,
    repository: &'a Arc<Repository>,
    keeper: &'a K,
    cancel: &'a Cancellation,
}

impl<K: Fn(&GuestAddress, &Path) -> Successor> Machine<'_, K> {
    async fn back_up(
        &self,
        on_event: &mut (impl FnMut(BackupEvent) + Send),
    ) -> Result<Pushed, BackupError> {
        let Machine { config, name, cancel, .. } = *self;
        let options = config.push_options(name)?;
        // What could not be pushed before. While it still can't, the spool does not grow.
        for left in Spool::left(&config.spool, name)? {
            let pushed = self.push(left, options.clone()).await?;
            on_event(BackupEvent::Pushed(Box::new(pushed)));
        }
        let spool = Spool::make(&config.spool, name)?;
        let save_options = config.save_options(name, spool.image())?;
        let keeper = Some((self.keeper)(&save_options.guest, &save_options.image));
        let save_options = SaveOptions { keeper, ..save_options };
        save(&save_options, cancel.clone(), |event| on_event(BackupEvent::Save(event))).await?;
        let pushed = self.push(spool, options).await?;
        on_event(BackupEvent::Pushed(Box::new(pushed.clone())));

        let Some(retention) = config.retention(name)? else { return Ok(pushed) };
        let mut options = ForgetOptions::default();
        (options.retention, options.machine) = (retention, Some(name.to_owned()));
        let repository = Arc::clone(self.repository);
        for looked in blocking(move || Ok(forget(&repository, &options)?)).await? {
            on_event(BackupEvent::Forgotten(Box::new(looked)));
        }
        Ok(pushed)
    }

    async fn push(&self, spool: Spool, options: PushOptions) -> Result<Pushed, BackupError> {
        let repository = Arc::clone(self.repository);
        blocking(move || spool.push(&repository, &options, |_| {})).await
    }
}

/// Runs work that blocks. It ends by itself soon after the access is cancelled.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
}
