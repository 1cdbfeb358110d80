//! A daemon's configuration file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::options::DaemonOptions;
use crate::kind::{Details, ErrorKind};
use crate::pools::PoolSettings;

/// A daemon's configuration file, in TOML. What it leaves out is as without a file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct DaemonConfig {
    /// The directory of all that outlives the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// The Unix socket on which it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<PathBuf>,
    /// The group whose members may use pools by the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The address on which it listens for HTTP by TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    /// The file of the token that whoever comes by TCP has to show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The most MiB of decompressed chunks that are kept of each image, for all its guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_mib: Option<u64>,
    /// How many guests are armed at a time, of all pools together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arming: Option<usize>,
    /// Pools, by name.
    #[serde(default)]
    pub pools: BTreeMap<String, PoolSettings>,
}

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file can't be read.
    #[error("reading `{}` failed: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says what can't be understood.
    #[error("`{}`: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        source: Box<toml::de::Error>,
    },
    /// A token is no secret, or none.
    #[error("the token in `{}` {problem}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: &'static str,
    },
}

impl ConfigError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ConfigError::Read { source, .. } => ErrorKind::of_io(source),
            ConfigError::Parse { .. } | ConfigError::Token { .. } => ErrorKind::OptionsInvalid,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let (ConfigError::Read { path, .. }
        | ConfigError::Parse { path, .. }
        | ConfigError::Token { path, .. }) = self;
        Details::new(&self.to_string(), Some(path), None)
    }
}

impl DaemonConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// When it can't be read or understood.
    pub fn read(path: &Path) -> Result<DaemonConfig, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: source.into() })
    }

    /// It as a daemon's options; what it leaves out is as in [`DaemonOptions::new`].
    ///
    /// # Errors
    /// When there is a token that can't be used.
    pub fn options(self) -> Result<DaemonOptions, ConfigError> {
        let new = DaemonOptions::new();
        Ok(DaemonOptions {
            state: self.state.unwrap_or(new.state),
            listen: self.listen.unwrap_or(new.listen),
            group: self.group,
            http: self.http,
            token: self.token_file.as_deref().map(read_token).transpose()?,
            pools: self.pools,
            cache: self.cache_mib.map_or(new.cache, |mib| mib.saturating_mul(1 << 20)),
            arming: self.arming.unwrap_or(new.arming),
            keeper: new.keeper,
        })
    }
}

/// The token in a file that nobody else can read.
fn read_token(path: &Path) -> Result<String, ConfigError> {
    use std::os::unix::fs::PermissionsExt;
    let of_io = |source| ConfigError::Read { path: path.to_owned(), source };
    let wrong = |problem| Err(ConfigError::Token { path: path.to_owned(), problem });
    let mode = std::fs::metadata(path).map_err(of_io)?.permissions().mode();
    if mode & 0o077 != 0 {
        return wrong("is no secret: take the rights of others away from the file (chmod 600)");
    }
    let token = std::fs::read_to_string(path).map_err(of_io)?.trim().to_owned();
    if token.len() < 16 || !token.chars().all(|c| c.is_ascii_graphic()) {
        return wrong("has to be 16 printable characters or more, without blanks");
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_says_what_the_daemon_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let token = folder.path().join("token");
        std::fs::write(&token, "0123456789abcdef\n").unwrap();
        std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).unwrap();
        let text = format!(
            "state = \"/s\"\nhttp = \"127.0.0.1:8080\"\ntoken_file = {token:?}\n\
             [pools.booted]\nimage = \"/a.snap\"\narmed = 3\npreload = \"all\"\n"
        );
        std::fs::write(&path, text).unwrap();
        let options = DaemonConfig::read(&path).unwrap().options().unwrap();
        assert_eq!((options.state, options.token), ("/s".into(), Some("0123456789abcdef".into())));
        assert_eq!(options.pools["booted"].armed, 3);

        std::fs::set_permissions(&token, PermissionsExt::from_mode(0o640)).unwrap();
        let error = DaemonConfig::read(&path).unwrap().options().unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        std::fs::write(&path, "[pools.a]\nimage = \"/a\"\nhook = \"x\"\n").unwrap();
        let error = DaemonConfig::read(&path).unwrap_err();
        assert!(error.to_string().contains("hook") && error.to_string().contains("line 3"));
    }
}
