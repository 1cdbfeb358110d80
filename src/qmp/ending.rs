//! Why a connection ended.

use std::sync::{Arc, OnceLock};

use super::error::QmpError;

/// Why a connection ended, once it has.
#[derive(Debug, Clone, Default)]
pub(super) struct Ending(Arc<OnceLock<String>>);

impl Ending {
    /// Sets the reason. The first one stays.
    pub fn set(&self, reason: String) {
        let _ = self.0.set(reason);
    }

    pub fn reason(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    pub fn gone(&self) -> QmpError {
        let reason = self.reason().unwrap_or("it was closed by us");
        QmpError::Gone { reason: reason.to_owned() }
    }
}
