//! What every object but a pack begins with.

/// Length of the header.
pub const HEADER: usize = 20;
/// Length of the checksum that ends an object of a repository that is not encrypted.
pub const CHECKSUM: usize = 32;

const MAGIC: [u8; 8] = *b"SNAPREPO";
const VERSION: u8 = 1;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The manifest of a snapshot.
    Manifest = 1,
    /// What a file consists of.
    Map = 2,
    /// What lies in packs.
    Index = 3,
    /// Which packs an index is of.
    IndexHead = 8,
    /// What lies in the pack that it ends.
    Footer = 4,
    /// Packs and maps that nothing refers to.
    Mark = 5,
    /// Somebody who is at work.
    Lease = 6,
    /// A word that shows whether a key is the right one.
    Proof = 7,
}

/// How the body is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags {
    pub compressed: bool,
    pub encrypted: bool,
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub flags: Flags,
    /// Length of the body.
    pub len: u64,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = VERSION;
        bytes[9] = self.kind as u8;
        bytes[10] = u8::from(self.flags.compressed) | u8::from(self.flags.encrypted) << 1;
        bytes[12..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads the header of an object of this kind.
    pub fn decode(bytes: &[u8], kind: Kind) -> Result<Header, String> {
        let bytes: &[u8; HEADER] = bytes.try_into().map_err(|_| "it is too short")?;
        if bytes[..8] != MAGIC {
            return Err("it does not begin as an object of a repository does".into());
        }
        if bytes[8] != VERSION {
            return Err(format!("its version is {}, not {VERSION}", bytes[8]));
        }
        if bytes[9] != kind as u8 || bytes[10] > 3 || bytes[11] != 0 {
            return Err(format!("it is no {kind:?}, or of a later version"));
        }
        let flags = Flags { compressed: bytes[10] & 1 != 0, encrypted: bytes[10] & 2 != 0 };
        let mut len = [0; 8];
        len.copy_from_slice(&bytes[12..]);
        Ok(Header { kind, flags, len: u64::from_le_bytes(len) })
    }
}
