//! What this host and its QEMUs can do for saving and reverting, asked all at once, as the
//! user who asks. Nothing is changed, and no guest is touched.
//!
//! [`examine`] asks; each [`Item`] says what it found and what it means, and names the command
//! that fixes it.

mod here;
mod host;
mod libvirt;
mod qemu;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use here::check_here;
pub use qemu::QemuAbilities;

/// How an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum State {
    /// It works.
    Ok,
    /// Something works less well, or for some QEMUs only.
    Degraded,
    /// It is not there, or forbidden to this user.
    Missing,
}

/// One thing that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Item {
    /// What it is, such as `userfaultfd` or `qemu`.
    #[serde(rename = "item")]
    pub name: String,
    /// How it is.
    pub state: State,
    /// What was found, and what it means.
    pub says: String,
    /// A command, mostly root's, that fixes it. None where nothing needs it or nothing can.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub remedy: Option<String>,
    /// Of a QEMU: what it can do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub qemu: Option<QemuAbilities>,
}

impl Item {
    fn new(name: &str, state: State, says: impl Into<String>) -> Item {
        Item { name: name.into(), state, says: says.into(), remedy: None, qemu: None }
    }

    fn remedied(self, remedy: impl Into<Option<String>>) -> Item {
        Item { remedy: remedy.into(), ..self }
    }
}

/// How a guest can be brought back at best.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Reverts {
    /// Not at all: no QEMU starts.
    Never,
    /// With all its memory first.
    Eager,
    /// At once from a flat image, with all its memory first from any other.
    Mapped,
    /// At once from any image.
    Instant,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Diagnosis {
    /// All that was asked for.
    pub items: Vec<Item>,
    /// Whether a running guest can be saved by at least one QEMU.
    pub save: bool,
    /// How the best QEMU brings a guest back.
    pub revert: Reverts,
}

impl Diagnosis {
    fn of(items: Vec<Item>) -> Diagnosis {
        let qemus = || items.iter().filter_map(|item| item.qemu.as_ref());
        let save = qemus().any(|qemu| qemu.background_snapshot);
        let revert = qemus().map(QemuAbilities::reverts).max().unwrap_or(Reverts::Never);
        Diagnosis { items, save, revert }
    }
}

/// Asks the host and every QEMU that is found. It takes about 50 ms for each QEMU, which is
/// started without a guest; one that hangs is given up after ten seconds. Blocks.
pub fn examine() -> Diagnosis {
    let mut items = host::examine();
    items.extend(qemu::examine());
    items.extend(libvirt::examine());
    Diagnosis::of(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(abilities: QemuAbilities) -> Item {
        Item { qemu: Some(abilities), ..Item::new("qemu", State::Ok, "") }
    }

    #[test]
    fn the_best_qemu_says_what_can_be_done() {
        let nothing = Diagnosis::of(vec![Item::new("KVM", State::Ok, "")]);
        assert_eq!((nothing.save, nothing.revert), (false, Reverts::Never));
        let eager = QemuAbilities::default();
        let mapped = QemuAbilities { map: true, ..eager.clone() };
        let instant = QemuAbilities { postcopy: true, background_snapshot: true, ..eager.clone() };
        let diagnosis = Diagnosis::of(vec![found(eager.clone()), found(mapped)]);
        assert_eq!((diagnosis.save, diagnosis.revert), (false, Reverts::Mapped));
        let diagnosis = Diagnosis::of(vec![found(instant), found(eager)]);
        assert_eq!((diagnosis.save, diagnosis.revert), (true, Reverts::Instant));
    }

    #[test]
    fn an_item_is_told_by_its_fields() {
        let item = Item::new("KVM", State::Degraded, "no").remedied("modprobe kvm".to_owned());
        let json = serde_json::to_value(&item).unwrap();
        let expected = serde_json::json!({
            "item": "KVM", "state": "degraded", "says": "no", "remedy": "modprobe kvm",
        });
        assert_eq!(json, expected);
    }
}
