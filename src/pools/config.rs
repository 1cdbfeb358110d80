//! What a pool is made of.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::error::PoolError;
use crate::revert::Preload;

/// The most guests of one pool, armed ones and running ones alike.
const MOST: u32 = 10_000;

/// The longest name of a pool or a guest, in bytes. Socket paths hold both, and end at 107 bytes
/// (unix(7)).
const LONGEST_NAME: usize = 32;

/// A pool with its name, as a request creates it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct PoolConfig {
    /// Its name: letters, digits, `.`, `_` and `-`, 32 at most.
    pub name: String,
    /// What it is made of.
    #[serde(flatten)]
    pub settings: PoolSettings,
}

/// What a pool is made of. In `dir`, `guest_name`, `paths`, `netdevs`, `arguments`, `agent` and
/// `agent_exec` `{n}` stands for a guest's number, `{name}` for its name and `{dir}` for its directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSettings {
    /// The image, by an absolute path.
    pub image: PathBuf,
    /// How many guests wait, armed.
    #[serde(default = "one")]
    pub armed: u32,
    /// How many guests may be taken at a time.
    #[serde(default = "sixteen")]
    pub max: u32,
    /// The most MiB of memory that the pool's guests may take together. A guest that waits is counted
    /// with what its QEMU has of its own, one that is taken with `guest_memory_mib`. No more are
    /// armed or handed out than that allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// What a guest that is taken is counted with [default: all of the machine's memory, and 64 for
    /// QEMU].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_memory_mib: Option<u64>,
    /// What of a guest's memory is in place while it waits.
    #[serde(default = "working_set")]
    pub preload: Preload,
    /// Whether a guest can be reset inside its QEMU.
    #[serde(default = "yes")]
    pub resettable: bool,
    /// Whether guests share memory that they have not written: it is mapped from a flat copy of
    /// the image, which the daemon makes and keeps.
    #[serde(default)]
    pub share: bool,
    /// The directory of each guest: a path with `{n}` or `{name}` [default: one in the daemon's
    /// own].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// The name of each guest, with `{n}` [default: the pool's name, `-` and `{n}`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_name: Option<String>,
    /// Ports of this host: the one to be bound for each recorded one. 0 is any free one, which is
    /// also what a port without a line here gets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// Paths: what replaces each recorded one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub paths: BTreeMap<String, String>,
    /// Network backends, as `-netdev` takes them, for the recorded ones by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub netdevs: BTreeMap<String, String>,
    /// Another QEMU binary than the recorded one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
    /// More arguments for QEMU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// Whether each guest gets a new generation ID.
    #[serde(default)]
    pub new_generation: bool,
    /// Whether the guest's agent gives each of its network cards a new address, by ip(8), as soon as
    /// it runs. Until then the guest finds the card's cable unplugged.
    #[serde(default)]
    pub new_macs: bool,
    /// Whether the guest's agent sets its clock to this host's time as soon as it runs.
    #[serde(default)]
    pub agent_set_time: bool,
    /// Commands that the guest's agent has its `/bin/sh` run as soon as it runs, one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agent_exec: Vec<String>,
    /// The socket of the guest's agent [default: that of the port org.qemu.guest_agent.0 on the
    /// command line].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// A command of this host's shell (sh -c) that the daemon runs as soon as a guest runs, with
    /// SNAPBACK_CLONE, SNAPBACK_DIR, SNAPBACK_PID, SNAPBACK_QMP and SNAPBACK_PORTS in its environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook_running: Option<String>,
    /// A guest is released so many seconds after it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_s: Option<u64>,
    /// The rest of a guest's memory is filled once it has asked for none for so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fill_delay_ms: Option<u64>,
    /// Memory is filled at so many bytes a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fill_rate: Option<u64>,
}

impl<'de> Deserialize<'de> for PoolConfig {
    /// As derived, but what is not known is refused: serde has no such thing for flattened fields.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PoolConfig, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        let name = fields.remove("name").ok_or_else(|| Error::missing_field("name"))?;
        Ok(PoolConfig {
            name: String::deserialize(name).map_err(Error::custom)?,
            settings: PoolSettings::deserialize(Value::Object(fields)).map_err(Error::custom)?,
        })
    }
}

/// What can be changed of a pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// How many guests wait, armed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub armed: Option<u32>,
    /// How many guests may be taken at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// The most MiB of memory that its guests may take together; 0 for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
}

impl Change {
    /// These settings with what it changes.
    pub(super) fn of(&self, settings: PoolSettings) -> PoolSettings {
        PoolSettings {
            armed: self.armed.unwrap_or(settings.armed),
            max: self.max.unwrap_or(settings.max),
            memory_mib: match self.memory_mib {
                Some(0) => None,
                changed => changed.or(settings.memory_mib),
            },
            ..settings
        }
    }
}

fn one() -> u32 {
    1
}

fn sixteen() -> u32 {
    16
}

fn yes() -> bool {
    true
}

fn working_set() -> Preload {
    Preload::WorkingSet
}

impl PoolSettings {
    /// A pool of this image's guests.
    pub fn new(image: impl Into<PathBuf>) -> PoolSettings {
        PoolSettings {
            image: image.into(),
            armed: one(),
            max: sixteen(),
            memory_mib: None,
            guest_memory_mib: None,
            preload: working_set(),
            resettable: yes(),
            share: false,
            dir: None,
            guest_name: None,
            ports: BTreeMap::new(),
            paths: BTreeMap::new(),
            netdevs: BTreeMap::new(),
            qemu: None,
            arguments: Vec::new(),
            new_generation: false,
            new_macs: false,
            agent_set_time: false,
            agent_exec: Vec::new(),
            agent: None,
            hook_running: None,
            lifetime_s: None,
            fill_delay_ms: None,
            fill_rate: None,
        }
    }

    /// How long a guest may be taken.
    pub fn lifetime(&self) -> Option<Duration> {
        self.lifetime_s.map(Duration::from_secs)
    }

    /// Checks all that can be told without touching anything.
    ///
    /// # Errors
    /// When something is out of bounds, or guests could not be told apart.
    pub fn check(&self) -> Result<(), PoolError> {
        let invalid = |what: String| Err(PoolError::Invalid(what));
        if !self.image.is_absolute() {
            return invalid(
                "image: an absolute path is needed, since the daemon's working \
                            directory is not yours"
                    .into(),
            );
        }
        if self.armed > MOST || self.max > MOST {
            return invalid(format!("armed and max are {MOST} at most"));
        }
        if self.max == 0 {
            return invalid("max: at least one guest has to be allowed".into());
        }
        if self.memory_mib == Some(0) || self.guest_memory_mib == Some(0) {
            return invalid("memory_mib and guest_memory_mib are 1 at least".into());
        }
        if let (Some(all), Some(guest)) = (self.memory_mib, self.guest_memory_mib)
            && guest > all
        {
            return invalid(format!("memory_mib: {all} MiB hold no guest of {guest}"));
        }
        let has_number = |template: &str| template.contains("{n}");
        if let Some(name) = &self.guest_name
            && (!has_number(name) || !is_name(&name.replace("{n}", "1")))
        {
            return invalid(format!(
                "guest_name: {name:?} has to hold {{n}}, and otherwise letters, digits, ., _ and \
                 - only"
            ));
        }
        if let Some(dir) = &self.dir {
            let tells_apart = has_number(dir) || dir.contains("{name}");
            if !dir.starts_with('/') || dir.split('/').any(|part| part == "..") || !tells_apart {
                return invalid(format!(
                    "dir: {dir:?} has to be an absolute path without .. that holds {{n}} or \
                     {{name}}"
                ));
            }
        }
        if let Some(port) = self.ports.keys().find(|port| port.parse::<u16>().is_err()) {
            return invalid(format!("ports: {port:?} is no port"));
        }
        if let Some(agent) = &self.agent
            && !agent.starts_with('/')
            && !agent.starts_with("{dir}/")
        {
            return invalid(format!(
                "agent: {agent:?} has to be an absolute path, or to begin with {{dir}}"
            ));
        }
        Ok(())
    }
}

/// Checks the name of a pool, or the one that whoever takes a guest gives it.
pub(super) fn check_name(name: &str) -> Result<(), PoolError> {
    match is_name(name) {
        true => Ok(()),
        false => Err(PoolError::Invalid(format!(
            "name: {name:?} is no name: letters, digits, ., _ and - are, up to {LONGEST_NAME} of them"
        ))),
    }
}

/// Whether it can be the name of a pool or a guest: one component of a path, and nothing that a
/// shell, a URL or QEMU's options would take apart.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=LONGEST_NAME).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(json: &str) -> Result<(), String> {
        let settings: PoolSettings = serde_json::from_str(json).map_err(|e| e.to_string())?;
        settings.check().map_err(|e| e.to_string())
    }

    #[test]
    fn settings_are_checked_before_anything_is_touched() {
        assert_eq!(settings(r#"{"image":"/a.snap"}"#), Ok(()));
        assert_eq!(settings(r#"{"image":"/a","dir":"/run/x/{name}","ports":{"22":0}}"#), Ok(()));
        for (wrong, named) in [
            (r#"{}"#, "image"),
            (r#"{"image":"a.snap"}"#, "absolute"),
            (r#"{"image":"/a","max":0}"#, "max"),
            (r#"{"image":"/a","armed":20000}"#, "armed"),
            (r#"{"image":"/a","memory_mib":0}"#, "memory_mib"),
            (r#"{"image":"/a","memory_mib":5,"guest_memory_mib":6}"#, "memory_mib"),
            (r#"{"image":"/a","guest_name":"x"}"#, "guest_name"),
            (r#"{"image":"/a","guest_name":"../{n}"}"#, "guest_name"),
            (r#"{"image":"/a","dir":"/run/x"}"#, "dir"),
            (r#"{"image":"/a","dir":"/run/../{n}"}"#, "dir"),
            (r#"{"image":"/a","ports":{"ssh":0}}"#, "ports"),
            (r#"{"image":"/a","agent":"agent.sock","agent_exec":["true"]}"#, "agent"),
            (r#"{"image":"/a","hook":"rm"}"#, "hook"),
        ] {
            let error = settings(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }

    #[test]
    fn names_are_one_component_of_a_path() {
        for name in ["booted", "w-1", "a.b_c", "7"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "-x", "a b", "a,b", "{n}", "é", &"x".repeat(33)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
