//! The config of a repository: what has to be known before anything else can be read.

use serde::{Deserialize, Serialize};

use super::ids::RepositoryId;

/// The longest config.
pub const MAX_CONFIG: u64 = 1 << 20;
/// The version of the format.
pub const VERSION: u32 = 1;

/// The config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// What the file is: always `snapback repository`.
    pub what: String,
    /// The version of the format.
    pub version: u32,
    /// The repository.
    pub id: RepositoryId,
    /// Length of the extents of disks.
    pub block: u32,
    /// How it is encrypted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
}

/// How a repository is encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// The repository's key, encrypted by age (age-encryption.org/v1) and in hexadecimal.
    pub key: String,
    /// An object that opens with the right key, in hexadecimal.
    pub proof: String,
}

/// What the file is.
pub const WHAT: &str = "snapback repository";
