//! What tells images apart.

use std::fmt;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// An image's identity: random, different for every image that is written, the same in every
/// copy. As text and as JSON it is a UUID (RFC 9562), such as
/// `67e55044-10b1-426f-9247-bb680e5fe0c8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(Uuid);

impl Identity {
    /// A new one.
    pub(crate) fn random() -> Identity {
        Identity(Uuid::new_v4())
    }

    /// The identity that these bytes stand for.
    pub fn from_bytes(bytes: [u8; 16]) -> Identity {
        Identity(Uuid::from_bytes(bytes))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Identity, D::Error> {
        let text = String::deserialize(deserializer)?;
        Uuid::parse_str(&text).map(Identity).map_err(D::Error::custom)
    }
}
