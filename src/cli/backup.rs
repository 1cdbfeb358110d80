//! `snapback backup`: saves what a configuration file names into a repository, untended.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::failure::Failure;
use super::output::Output;
use super::repository::AccessArgs;
use super::settings::Settings;
use super::{cancellation, keeper};
use crate::backup::{BackupConfig, BackupEvent, back_up};
use crate::kind::ErrorKind;
use crate::repository::KeySource;

/// Its file, unless another one is named.
pub(super) const CONFIG: &str = "/etc/snapback/backup.toml";

#[derive(Args)]
#[command(after_help = HELP)]
pub(super) struct BackupArgs {
    /// The machines of the file [default: all]
    names: Vec<String>,
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
    /// Only look whether the file can be understood
    #[arg(long, conflicts_with = "names")]
    check_config: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// What it does.
const HELP: &str = "\
Each machine is saved into the spool and pushed from there; then what the file does not keep of it is \
forgotten. What fails with one machine keeps no other from being saved: the last message names all that \
failed. What could not be pushed stays in the spool, and is pushed by the next backup, before anything \
new is saved of that machine. At the end what nothing refers to is pruned.";

/// Runs the command.
pub(super) async fn run(args: BackupArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let config = BackupConfig::read(&args.config)?;
    if args.check_config {
        output.backup_config(&config);
        return Ok(());
    }
    let mut keys: Vec<KeySource> =
        config.identity.iter().cloned().map(KeySource::Identities).collect();
    keys.extend(config.passphrase_file.clone().map(KeySource::PassphraseFile));
    keys.extend(config.passphrase_command.clone().map(KeySource::PassphraseCommand));
    let cancel = cancellation()?;
    let access = AccessArgs::access_with(keys, config.store_timeout(), &output);
    let mut access = access.with_cancel(cancel.clone());
    // Wrong ones have ended the program by now.
    let settings = Settings::of_host(&[]).unwrap_or_default();
    // An empty fingerprint is nobody's: what is set so trusts nothing, as elsewhere.
    let set = |(value, _): &(String, _)| {
        value.split(',').map(|fingerprint| fingerprint.trim().to_owned()).collect()
    };
    access.trusted = match &config.trust[..] {
        [] => settings.get("trust").map(set).unwrap_or_default(),
        trusted => trusted.to_vec(),
    };
    access.plain = config.allow_plain || settings.is_true("allow_plain");
    let set = |key: &str| settings.get(key).map(|(path, _)| PathBuf::from(path));
    access.sign_key = config.sign_key.clone().or_else(|| set("sign_key"));
    access.trust_keys = match &config.trust_key[..] {
        [] => set("trust_key").into_iter().collect(),
        trusted => trusted.to_vec(),
    };
    let json = args.json;
    let cleaner = move |guest: &_, image: &_| keeper::cleaner(guest, image, json);
    let backed_up = back_up(&config, &args.names, &access, cleaner, cancel.clone(), |event| {
        output.backup(event);
    });
    let report = backed_up.await?;
    if cancel.is_requested() {
        return Err(Failure::said(ErrorKind::Interrupted, "interrupted".into()));
    }
    if !report.failed.is_empty() {
        let message = format!(
            "{} of {} machines were not backed up: {}",
            report.failed.len(),
            report.machines,
            report.failed.join(", ")
        );
        return Err(Failure::said(ErrorKind::BackupFailed, message));
    }
    report.not_pruned.map_or(Ok(()), |error| Err(error.into()))
}

impl Output {
    fn backup(&self, event: BackupEvent) {
        match event {
            BackupEvent::Machine(name) if !self.is_json() => self.say("machine", &name),
            BackupEvent::Machine(_) => {}
            BackupEvent::Save(event) => self.save(&event),
            BackupEvent::Pushed(pushed) => self.pushed(&pushed),
            BackupEvent::Forgotten(looked) => self.looked(*looked, false),
            BackupEvent::Pruned(pruned) => self.pruned(pruned, false),
            BackupEvent::Failed(machine, error) => self.backup_failed(machine, &error.into()),
        }
    }
}
