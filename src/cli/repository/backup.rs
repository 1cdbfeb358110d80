//! How `backup` tells of a machine that failed.

use super::events::RepositoryEvent;
use crate::backup::{BackupConfig, BackupError};
use crate::cli::failure::Failure;
use crate::cli::output::Output;

impl Output {
    /// Tells that a configuration could be understood.
    pub(in crate::cli) fn backup_config(&self, config: &BackupConfig) {
        let machines: Vec<String> = config.machines.keys().cloned().collect();
        let repository = config.repository.clone();
        let says =
            format!("{}: saves {} into {repository}", config.path.display(), machines.join(", "));
        let event = RepositoryEvent::BackupConfig { repository, machines };
        self.repository(&event, "understood", &says);
    }

    /// Tells that a machine was not backed up.
    pub(in crate::cli) fn backup_failed(&self, machine: String, failure: &Failure) {
        let message = failure.message();
        match self.is_json() {
            true => {
                let code = failure.kind().code().to_owned();
                self.print_json(&RepositoryEvent::BackupFailed { machine, code, message });
            }
            false => self.warn(format!("{machine} was not backed up: {message}")),
        }
    }
}

/// What failed, with what pushes a snapshot that is only on this host.
impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Failure {
        let (kind, details) = (error.kind(), error.details());
        let message = match &error {
            BackupError::NotPushed { machine, image, .. } => {
                let words = ["snapback", "push", &image.to_string_lossy(), "--name", machine];
                // Neither has a NUL in it.
                let command = shlex::try_join(words).unwrap_or_default();
                format!("{error}; `{command}` pushes it, with the repository's options")
            }
            error => error.to_string(),
        };
        Failure::with(kind, message, details)
    }
}
