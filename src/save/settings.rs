//! QEMU's migration settings: changed for a save, and put back.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::check::error::CheckError;
use super::error::SaveError;
use crate::guest::userfaultfd_lack;
use crate::host::uffd;
use crate::qmp::{Qmp, QmpError};

/// Capabilities that don't change what is migrated or how, and may stay on.
const HARMLESS: [&str; 1] = ["events"];

/// The highest value that `max-bandwidth` takes (`MAX_MIGRATE_BANDWIDTH` is SIZE_MAX;
/// QMP's integers have 63 bits).
const UNLIMITED: u64 = i64::MAX as u64;

/// The settings that a save changes, as they were before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Value,
}

impl Settings {
    /// Asks QEMU for the settings that have to be changed for a save, by a `background`
    /// snapshot or by an ordinary migration. Nothing is changed yet.
    pub async fn ask(qmp: &Qmp, background: bool) -> Result<Settings, QmpError> {
        const BACKGROUND: &str = "background-snapshot";
        // Nearly every other capability is refused together with a background
        // snapshot, or changes the form of the stream.
        let wanted = |name: &str| name == BACKGROUND && background;
        let mut capabilities = qmp.migration_capabilities().await?;
        capabilities.retain(|(name, on)| *on != wanted(name) && !HARMLESS.contains(&name.as_str()));
        let now = qmp.execute("query-migrate-parameters", ()).await?;
        let mut parameters = json!({});
        for (name, wanted) in parameters_wanted() {
            match now.get(name) {
                Some(old) if *old != wanted && !old.is_null() => parameters[name] = old.clone(),
                _ => {}
            }
        }
        Ok(Settings { capabilities, parameters })
    }

    /// Sets QEMU up for a save. QEMU checks here whether it can take a background snapshot
    /// of this guest; the guest is not touched.
    ///
    /// # Errors
    /// When QEMU refuses. Some settings may be changed then.
    pub async fn apply(&self, qmp: &Qmp) -> Result<(), SaveError> {
        let changed: Vec<_> =
            self.capabilities.iter().map(|(name, on)| (name.as_str(), !on)).collect();
        qmp.set_migration_capabilities(&changed).await.map_err(|e| refused(qmp, e))?;
        let mut parameters = json!({});
        for (name, wanted) in parameters_wanted() {
            if self.parameters.get(name).is_some() {
                parameters[name] = wanted;
            }
        }
        qmp.execute("migrate-set-parameters", parameters).await?;
        Ok(())
    }

    /// Puts everything back. Nothing is left to put back then.
    ///
    /// # Errors
    /// When QEMU refuses or is gone. Then everything can be put back again.
    pub async fn restore(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        let none = Settings { capabilities: Vec::new(), parameters: json!({}) };
        if *self == none {
            return Ok(());
        }
        let capabilities: Vec<_> =
            self.capabilities.iter().map(|(name, on)| (name.as_str(), *on)).collect();
        let parameters = qmp.execute("migrate-set-parameters", self.parameters.clone()).await;
        qmp.set_migration_capabilities(&capabilities).await?;
        parameters?;
        *self = none;
        Ok(())
    }
}

/// A background snapshot ignores `max-bandwidth`, an ordinary migration doesn't; TLS would
/// encrypt a stream that never leaves this host.
fn parameters_wanted() -> [(&'static str, Value); 2] {
    [("max-bandwidth", json!(UNLIMITED)), ("tls-creds", json!(""))]
}

/// The error for QEMU's refusal of `background-snapshot`, with what the host says.
fn refused(qmp: &Qmp, error: QmpError) -> SaveError {
    let QmpError::Command { desc: refusal, .. } = error else { return error.into() };
    let lack = userfaultfd_lack(qmp.peer_pid(), qmp.version()).map(|lack| lack.to_string());
    // With every right, it may still be the kernel that lacks it.
    let lack = lack.or_else(|| Some(uffd::write_protect_supported().err()?.to_string()));
    CheckError::NoBackgroundSnapshot { refusal, lack }.into()
}
