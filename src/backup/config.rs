//! The configuration file of `snapback backup`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::error::BackupError;
use super::spool::io;
use crate::guest::{Profile, RewriteOptions};
use crate::image::Compression;
use crate::libvirt::DomainAddress;
use crate::repository::{Address, PruneOptions, PushOptions, Retention, check_words};
use crate::save::{DiskChoice, GuestAddress, Quiesce, SaveOptions};

/// Which machines are saved, where to, and what is kept of them. In TOML.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct BackupConfig {
    /// The repository's address.
    pub repository: String,
    /// Where saves lie on their way.
    #[serde(default = "default_spool")]
    pub spool: PathBuf,
    /// A file for Prometheus' textfile collector.
    pub metrics: Option<PathBuf>,
    /// Files with age identities that open an encrypted repository.
    #[serde(default)]
    pub identity: Vec<PathBuf>,
    /// A file with its passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// A command that prints its passphrase.
    pub passphrase_command: Option<String>,
    /// Fingerprints of the only repositories that are opened; of any, where there is none.
    #[serde(default)]
    pub trust: Vec<String>,
    /// Whether the repository is opened though it is not encrypted and a key is given.
    #[serde(default)]
    pub allow_plain: bool,
    /// The file of the private key that signs snapshots.
    pub sign_key: Option<PathBuf>,
    /// Files of public keys: only snapshots that are signed with one of these are read.
    #[serde(default)]
    pub trust_key: Vec<PathBuf>,
    /// How long a store that does not answer is tried again, in seconds.
    #[serde(default = "default_store_timeout")]
    pub store_timeout_s: u64,
    /// Whether what nothing refers to is removed at the end, a day after it was found.
    #[serde(default = "yes")]
    pub prune: bool,
    /// How many percent of the repository may be unused parts of packs before these are repacked.
    #[serde(default = "default_max_unused")]
    pub max_unused_percent: f64,
    /// What is kept of machines that don't say it themselves. Without, everything.
    #[serde(default)]
    pub keep: KeepConfig,
    /// The machines, by the names of their snapshots.
    pub machines: BTreeMap<String, MachineConfig>,
    /// The file that it was read from.
    #[serde(skip)]
    pub path: PathBuf,
}

/// Which snapshots of a machine are kept. All are if nothing is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct KeepConfig {
    /// The last so many.
    pub last: usize,
    /// The last one of each of the last so many hours in which there is one.
    pub hourly: usize,
    /// The same of days.
    pub daily: usize,
    /// The same of weeks.
    pub weekly: usize,
    /// The same of months.
    pub monthly: usize,
}

/// A machine, and how it is saved.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct MachineConfig {
    /// Its QMP socket.
    pub qmp: Option<PathBuf>,
    /// Or the name of its domain of libvirt's.
    pub domain: Option<String>,
    /// libvirt's connection URI.
    pub connect: Option<String>,
    /// The socket of its agent, which freezes file systems around the moment; `auto` for a domain's.
    pub quiesce: Option<String>,
    /// What becomes of writable disks: `copy`, which is the default, `reflink` or `none`.
    pub disks: Option<String>,
    /// Writable disks that are left out.
    pub exclude_disks: Vec<String>,
    /// Devices that a revert may leave out.
    pub allow_missing_devices: Vec<String>,
    /// The level of zstd, from -7 to 19, or 1.
    pub compress_level: Option<i32>,
    /// The most bytes a second that are written to the spool.
    pub bandwidth: Option<u64>,
    /// Tags of its snapshots.
    pub tags: BTreeSet<String>,
    /// The profile for another site: paths there by paths here.
    pub paths: BTreeMap<String, String>,
    /// The same of ports: a number, or `auto`.
    pub ports: BTreeMap<String, String>,
    /// The same of networks, by their ids.
    pub netdevs: BTreeMap<String, String>,
    /// What is kept of it.
    pub keep: Option<KeepConfig>,
}

fn default_spool() -> PathBuf {
    "/var/lib/snapback/spool".into()
}

fn default_store_timeout() -> u64 {
    120
}

fn default_max_unused() -> f64 {
    PruneOptions::default().max_unused * 100.0
}

fn yes() -> bool {
    true
}

impl BackupConfig {
    /// Reads a file, and looks whether what it says can be.
    ///
    /// # Errors
    /// When it can't be read or understood.
    pub fn read(path: &Path) -> Result<BackupConfig, BackupError> {
        let text = std::fs::read_to_string(path).map_err(|e| io("reading", path, e))?;
        BackupConfig::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<BackupConfig, BackupError> {
        let parsed = toml::from_str(text);
        let mut config: BackupConfig = parsed.map_err(|source| BackupError::Parse {
            path: path.to_owned(),
            source: source.into(),
        })?;
        config.path = path.to_owned();
        config.address()?;
        if !(0.0..=100.0).contains(&config.max_unused_percent) {
            return Err(config.wrong("`max_unused_percent` is from 0 to 100"));
        }
        if config.machines.is_empty() {
            return Err(config.wrong("it names no machine: add a table [machines.NAME]"));
        }
        for (name, machine) in &config.machines {
            let of = |problem: String| config.wrong(format!("[machines.{name:?}]: {problem}"));
            check_words(name, &machine.tags).map_err(|error| of(error.to_string()))?;
            config.save_options(name, PathBuf::new())?;
            let mut options = RewriteOptions::default();
            options.add_profile(&machine.profile()).map_err(|error| of(error.to_string()))?;
        }
        Ok(config)
    }

    /// The repository.
    ///
    /// # Errors
    /// When the address can't be used.
    pub fn address(&self) -> Result<Address, BackupError> {
        self.repository.parse().map_err(BackupError::from)
    }

    /// How the repository is pruned, if it is.
    pub fn prune_options(&self) -> Option<PruneOptions> {
        let max_unused = self.max_unused_percent / 100.0;
        self.prune.then(|| PruneOptions { max_unused, ..PruneOptions::default() })
    }

    /// How long the store is tried again.
    pub fn store_timeout(&self) -> Duration {
        Duration::from_secs(self.store_timeout_s)
    }

    /// How a machine of this file is saved, to this image.
    ///
    /// # Errors
    /// When there is none of that name, or what it says can't be.
    pub fn save_options(&self, name: &str, image: PathBuf) -> Result<SaveOptions, BackupError> {
        let machine = self.machine(name)?;
        let wrong = |problem: &str| self.wrong(format!("[machines.{name:?}]: {problem}"));
        let guest: GuestAddress = match (&machine.qmp, &machine.domain) {
            (Some(socket), None) if machine.connect.is_none() => socket.clone().into(),
            (None, Some(domain)) => {
                let mut address = DomainAddress::new(domain);
                address.uri = machine.connect.clone();
                address.into()
            }
            (Some(_), None) => return Err(wrong("`connect` is for a domain")),
            _ => return Err(wrong("it needs either `qmp` or `domain`")),
        };
        let mut options = SaveOptions::new(guest, image);
        options.disks = match machine.disks.as_deref() {
            None | Some("copy") => DiskChoice::Copy,
            Some("reflink") => DiskChoice::Reflink,
            Some("none") => DiskChoice::None,
            // Every backup would add an overlay to the guest's disks, which nobody takes away.
            Some(_) => return Err(wrong("`disks` is copy, reflink or none")),
        };
        options.quiesce = match machine.quiesce.as_deref() {
            None => None,
            Some("auto") if machine.domain.is_some() => Some(Quiesce::Libvirt),
            Some("auto") => {
                return Err(wrong("`quiesce = \"auto\"` is for a domain: name a socket"));
            }
            Some(socket) => Some(Quiesce::Socket(socket.into())),
        };
        match machine.compress_level {
            None => {}
            Some(level @ -7..=19) => options.compression = Compression::Zstd(level),
            Some(_) => return Err(wrong("`compress_level` is from -7 to 19")),
        }
        if machine.bandwidth == Some(0) {
            return Err(wrong("`bandwidth` is a number of bytes a second"));
        }
        options.bandwidth = machine.bandwidth;
        options.exclude_disks = machine.exclude_disks.clone();
        options.allow_missing_devices = machine.allow_missing_devices.clone();
        Ok(options)
    }

    /// How a machine of this file is pushed.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn push_options(&self, name: &str) -> Result<PushOptions, BackupError> {
        let machine = self.machine(name)?;
        let mut options = PushOptions::new("");
        (options.tags, options.profile) = (machine.tags.clone(), machine.profile());
        Ok(options)
    }

    /// What is kept of a machine of this file; none if everything is.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn retention(&self, name: &str) -> Result<Option<Retention>, BackupError> {
        let keep = self.machine(name)?.keep.unwrap_or(self.keep);
        let mut retention = Retention::default();
        (retention.last, retention.hourly, retention.daily) = (keep.last, keep.hourly, keep.daily);
        (retention.weekly, retention.monthly) = (keep.weekly, keep.monthly);
        Ok((keep != KeepConfig::default()).then_some(retention))
    }

    fn machine(&self, name: &str) -> Result<&MachineConfig, BackupError> {
        self.machines.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.machines.keys().map(String::as_str).collect();
            self.wrong(format!("it has no machine `{name}`; there are {}", known.join(", ")))
        })
    }

    fn wrong(&self, problem: impl Into<String>) -> BackupError {
        BackupError::Config { path: self.path.clone(), problem: problem.into() }
    }
}

impl MachineConfig {
    fn profile(&self) -> Profile {
        let all = [("path", &self.paths), ("port", &self.ports), ("netdev", &self.netdevs)];
        let given = all.into_iter().filter(|(_, pairs)| !pairs.is_empty());
        let values = |pairs: &BTreeMap<String, String>| {
            pairs.iter().map(|(here, there)| format!("{here}={there}")).collect()
        };
        given.map(|(name, pairs)| (name.to_owned(), values(pairs))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<BackupConfig, String> {
        BackupConfig::parse(text, Path::new("/b.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_of_the_packages_is_understood() {
        let text = include_str!("../../packaging/backup.toml");
        // Its machines are examples, in comments.
        assert!(parse(text).unwrap_err().contains("machines"), "{text}");
        let examples = text.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
        let examples = examples.skip_while(|line| !line.starts_with('['));
        let head = "repository = \"/backups\"\n".to_owned();
        let config = parse(&examples.fold(head, |text, line| text + line + "\n")).unwrap();
        assert_eq!(config.machines.keys().collect::<Vec<_>>(), ["db1", "web1"]);
        assert_eq!(config.retention("web1").unwrap().unwrap().daily, 7);
        let profile = config.push_options("web1").unwrap().profile;
        assert_eq!(profile["path"], ["/var/lib/vm=/srv/vm"]);
    }

    #[test]
    fn what_can_not_be_is_refused_by_name() {
        let machine = |text: &str| format!("repository = \"/r\"\n[machines.web1]\n{text}\n");
        for (text, says) in [
            ("repository = \"/r\"\n[machines]".to_owned(), "no machine"),
            ("repository = \"ftp://x/y\"\n[machines.a]\nqmp = \"/q\"".to_owned(), "ftp"),
            (machine(""), "`qmp` or `domain`"),
            (machine("qmp = \"/q\"\ndomain = \"d\""), "`qmp` or `domain`"),
            (machine("qmp = \"/q\"\nconnect = \"x\""), "`connect`"),
            (machine("qmp = \"/q\"\ndisks = \"overlay\""), "`disks`"),
            (machine("qmp = \"/q\"\nquiesce = \"auto\""), "`quiesce"),
            (machine("qmp = \"/q\"\ncompress_level = 20"), "`compress_level`"),
            (machine("qmp = \"/q\"\nbandwidth = 0"), "`bandwidth`"),
            (machine("qmp = \"/q\"\ntags = [\"latest\"]"), "latest"),
            (machine("qmp = \"/q\"\nports = { a = \"1\" }"), "a=1"),
            (machine("qmp = \"/q\"\nwhatever = 1"), "whatever"),
            ("max_unused_percent = 101\n".to_owned() + &machine("qmp = \"/q\""), "from 0 to 100"),
            (machine("qmp = \"/q\"\n[keep]\nyearly = 1"), "yearly"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.starts_with("`/b.toml`") || error.contains("ftp"), "{error}");
            assert!(error.contains(says), "{text}: {error}");
        }
        let config = parse(&machine("qmp = \"/q\"")).unwrap();
        assert!(
            config.save_options("db1", PathBuf::new()).unwrap_err().to_string().contains("web1")
        );
        assert_eq!(config.retention("web1").unwrap(), None);
        assert!(config.trust.is_empty() && !config.allow_plain);
        assert!(config.sign_key.is_none() && config.trust_key.is_empty());
        assert_eq!(config.prune_options(), Some(PruneOptions::default()));
        let more = "trust = [\"a\", \"b\"]\nallow_plain = true\nprune = false\n\
                    sign_key = \"/s.pem\"\ntrust_key = [\"/s.pub\", \"/t.pub\"]\n";
        let config = parse(&(more.to_owned() + &machine("qmp = \"/q\""))).unwrap();
        assert!(config.trust == ["a", "b"] && config.allow_plain);
        assert_eq!(config.sign_key, Some(PathBuf::from("/s.pem")));
        assert_eq!(config.trust_key, ["/s.pub", "/t.pub"].map(PathBuf::from));
        assert_eq!(config.prune_options(), None);
    }
}
