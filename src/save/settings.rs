//! QEMU's migration settings: changed for a save, and put back.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::SaveError;
use super::checks::refused;
use crate::qmp::{Qmp, QmpError};

/// Capabilities that don't change what is migrated or how, and may stay on.
const HARMLESS: [&str; 1] = ["events"];

/// The highest value that `max-bandwidth` takes (`MAX_MIGRATE_BANDWIDTH` is SIZE_MAX;
/// QMP's integers have 63 bits).
const UNLIMITED: u64 = i64::MAX as u64;

/// The settings that a save has changed, as they were before.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Value,
}

impl Settings {
    /// Sets QEMU up for a save, in the `background` or not. QEMU checks here whether it can take a background
    /// snapshot of this guest; the guest is not touched.
    ///
    /// # Errors
    /// When QEMU refuses. Its settings are then as they were.
    pub async fn apply(qmp: &Qmp, background: bool) -> Result<Settings, SaveError> {
        const BACKGROUND: &str = "background-snapshot";
        // Nearly every other capability is refused together with a background
        // snapshot, or changes the form of the stream.
        let wanted = |name: &str| name == BACKGROUND && background;
        let mut capabilities = qmp.migration_capabilities().await?;
        capabilities.retain(|(name, on)| *on != wanted(name) && !HARMLESS.contains(&name.as_str()));
        let changed: Vec<_> = capabilities.iter().map(|(name, on)| (name.as_str(), !on)).collect();
        qmp.set_migration_capabilities(&changed).await.map_err(|e| refused(qmp, e))?;
        let mut settings = Settings { capabilities, parameters: json!({}) };
        if let Err(error) = settings.apply_parameters(qmp).await {
            let _ = settings.restore(qmp).await;
            return Err(error.into());
        }
        Ok(settings)
    }

    /// A background snapshot ignores `max-bandwidth`, an ordinary migration doesn't;
    /// TLS would encrypt a stream that never leaves this host.
    async fn apply_parameters(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        let before = qmp.execute("query-migrate-parameters", ()).await?;
        let mut wanted = json!({});
        for (name, value) in [("max-bandwidth", json!(UNLIMITED)), ("tls-creds", json!(""))] {
            match before.get(name) {
                Some(old) if *old != value && !old.is_null() => {
                    wanted[name] = value;
                    self.parameters[name] = old.clone();
                }
                _ => {}
            }
        }
        qmp.execute("migrate-set-parameters", wanted).await.map(drop)
    }

    /// Puts everything back.
    ///
    /// # Errors
    /// When QEMU refuses or is gone.
    pub async fn restore(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let capabilities: Vec<_> =
            self.capabilities.iter().map(|(name, on)| (name.as_str(), *on)).collect();
        let parameters = qmp.execute("migrate-set-parameters", self.parameters.clone()).await;
        qmp.set_migration_capabilities(&capabilities).await?;
        parameters.map(drop)
    }
}
