//! What objects and extents are called.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Makes a name of so many bytes, written in hexadecimal.
macro_rules! ids {
    ($($(#[doc = $doc:literal])* $name:ident: $bytes:literal,)*) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $bytes]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ();

            fn from_str(text: &str) -> Result<$name, ()> {
                let mut id = [0; $bytes];
                from_hex(text, &mut id).map(|()| $name(id)).ok_or(())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<$name, D::Error> {
                let text = String::deserialize(from)?;
                text.parse().map_err(|()| D::Error::custom(format!("{text:?} is no name")))
            }
        }
    )*};
}

ids! {
    /// A pack: random.
    PackId: 16,
    /// An extent: a hash of its bytes, keyed in an encrypted repository.
    ExtentId: 32,
    /// A map: a hash of its bytes, keyed in an encrypted repository.
    MapId: 32,
    /// A snapshot: the identity of its image.
    SnapshotId: 16,
    /// A repository: random.
    RepositoryId: 16,
    /// What an encrypted repository is known by: derived from its key, so that no other one has it.
    Fingerprint: 16,
    /// An index, a mark or a lease: random.
    ObjectId: 16,
}

/// A random name.
pub fn random() -> [u8; 16] {
    *uuid::Uuid::new_v4().as_bytes()
}

/// Reads lower-case hexadecimal that fills `bytes`.
pub fn from_hex(text: &str, bytes: &mut [u8]) -> Option<()> {
    let text = text.as_bytes();
    if text.len() != bytes.len() * 2 {
        return None;
    }
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(())
}

/// Bytes in hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
