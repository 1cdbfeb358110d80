//! What a repository's keys do: they name extents, and close and open what is stored.
//!
//! Without encryption the same calls name by plain hashes and close by checksums: nobody else in
//! this room asks whether a repository is encrypted.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};

use super::format::envelope::{CHECKSUM, Flags, HEADER, Header, Kind};
use super::format::ids::{ExtentId, Fingerprint, MapId, to_hex};
use super::format::pack::MAX_EXTENT;

/// Length of the key from which all others are derived.
pub const KEY: usize = 32;
const NONCE: usize = 24;
const TAG: usize = 16;
/// By how much an encrypted extent is longer.
const SEAL: usize = NONCE + TAG;

/// The level at which what is stored is compressed.
const LEVEL: i32 = 1;

/// The keys of a repository.
pub struct Keys(Option<Sealed>);

struct Sealed {
    extents: XChaCha20Poly1305,
    objects: XChaCha20Poly1305,
    names: XChaCha20Poly1305,
    ids: [u8; KEY],
    hidden: [u8; KEY],
    fingerprint: Fingerprint,
}

impl Keys {
    /// Of a repository that is not encrypted.
    pub fn none() -> Keys {
        Keys(None)
    }

    /// Of a repository with this key.
    pub fn of(key: &[u8; KEY]) -> Keys {
        let derived =
            |what: &str| blake3::derive_key(&format!("snapback repository v1 {what}"), key);
        let cipher = |what| XChaCha20Poly1305::new(Key::from_slice(&derived(what)));
        let mut fingerprint = Fingerprint([0; 16]);
        fingerprint.0.copy_from_slice(&derived("fingerprint")[..16]);
        Keys(Some(Sealed {
            fingerprint,
            extents: cipher("extents"),
            objects: cipher("objects"),
            names: cipher("names"),
            ids: derived("ids"),
            hidden: derived("hidden names"),
        }))
    }

    /// Whether what is stored is encrypted.
    pub fn encrypt(&self) -> bool {
        self.0.is_some()
    }

    /// What tells this key from all others, and nothing of it. Without encryption there is none.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.0.as_ref().map(|keys| keys.fingerprint)
    }

    fn hash(&self, bytes: &[u8]) -> [u8; 32] {
        match &self.0 {
            None => *blake3::hash(bytes).as_bytes(),
            Some(keys) => *blake3::keyed_hash(&keys.ids, bytes).as_bytes(),
        }
    }

    /// The name of an extent with these bytes.
    pub fn extent_id(&self, raw: &[u8]) -> ExtentId {
        ExtentId(self.hash(raw))
    }

    /// The name of a map with this body.
    pub fn map_id(&self, body: &[u8]) -> MapId {
        MapId(self.hash(body))
    }

    /// A name as it stands in objects' keys: readable, or a keyed hash, which tells only that two
    /// are the same.
    pub fn hidden_name(&self, name: &str) -> String {
        match &self.0 {
            None => escape(name),
            Some(keys) => {
                to_hex(&blake3::keyed_hash(&keys.hidden, name.as_bytes()).as_bytes()[..16])
            }
        }
    }

    /// A name as it stands in objects' keys and can be read again: the same each time, of whatever
    /// it belongs `to`.
    pub fn closed_name(&self, to: &str, name: &str) -> String {
        let Some(keys) = &self.0 else { return escape(name) };
        let text = [to.as_bytes(), b"\0", name.as_bytes()].concat();
        // The same nonce comes again for the same text only.
        let nonce = blake3::keyed_hash(&keys.hidden, &text);
        let nonce = &nonce.as_bytes()[..NONCE];
        let payload = Payload { msg: name.as_bytes(), aad: to.as_bytes() };
        // It fails for messages of many GiB alone.
        let closed = keys.names.encrypt(XNonce::from_slice(nonce), payload).unwrap_or_default();
        to_hex(&[nonce, &closed].concat())
    }

    /// Reads what [`Keys::closed_name`] made.
    pub fn opened_name(&self, to: &str, closed: &str) -> Option<String> {
        let Some(keys) = &self.0 else { return unescape(closed) };
        let mut bytes = vec![0; closed.len() / 2];
        super::format::ids::from_hex(closed, &mut bytes)?;
        let (nonce, closed) = bytes.split_at_checked(NONCE)?;
        let payload = Payload { msg: closed, aad: to.as_bytes() };
        let name = keys.names.decrypt(XNonce::from_slice(nonce), payload).ok()?;
        String::from_utf8(name).ok()
    }

    /// An extent as it is stored: compressed where that makes it shorter and is to be tried,
    /// encrypted if the repository is.
    pub fn close_extent(&self, id: &ExtentId, raw: &[u8], compress: bool) -> Vec<u8> {
        let packed = compress.then(|| zstd::bulk::compress(raw, LEVEL).ok()).flatten();
        let packed = packed.filter(|packed| packed.len() < raw.len());
        let bytes = packed.as_deref().unwrap_or(raw);
        match &self.0 {
            None => bytes.to_vec(),
            Some(keys) => seal(&keys.extents, &id.0, bytes),
        }
    }

    /// The bytes of an extent, of this length, from what is stored of it: verified.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open_extent(&self, id: &ExtentId, stored: &[u8], raw: usize) -> Result<Vec<u8>, String> {
        if raw > MAX_EXTENT {
            return Err(format!("it is longer than {MAX_EXTENT} bytes"));
        }
        let opened = match &self.0 {
            None => None,
            Some(keys) => Some(open(&keys.extents, &id.0, stored)?),
        };
        let bytes = opened.as_deref().unwrap_or(stored);
        let bytes = match bytes.len() == raw {
            true => bytes.to_vec(),
            false => zstd::bulk::decompress(bytes, raw)
                .ok()
                .filter(|bytes| bytes.len() == raw)
                .ok_or("it can't be decompressed")?,
        };
        // Where it is encrypted, too: who has the key but not that of a signature could give other bytes its
        // name.
        match self.extent_id(&bytes) == *id {
            true => Ok(bytes),
            false => Err("its bytes are not those that its name says".into()),
        }
    }

    /// By how much an extent is longer where it is stored uncompressed.
    pub fn overhead(&self) -> usize {
        if self.encrypt() { SEAL } else { 0 }
    }

    /// An object: a header, and its body closed so that it passes for no other object.
    pub fn close(&self, kind: Kind, name: &str, body: &[u8], compress: bool) -> Vec<u8> {
        let packed = compress.then(|| zstd::bulk::compress(body, LEVEL).ok()).flatten();
        let flags = Flags { compressed: packed.is_some(), encrypted: self.encrypt() };
        let header = Header { kind, flags, len: body.len() as u64 }.encode();
        let bytes = packed.as_deref().unwrap_or(body);
        let bound = [&header[..], name.as_bytes()].concat();
        let mut object = header.to_vec();
        match &self.0 {
            None => {
                object.extend(bytes);
                object.extend(checksum(&bound, bytes));
            }
            Some(keys) => object.extend(seal(&keys.objects, &bound, bytes)),
        }
        object
    }

    /// The body of an object of this kind and name, which takes `most` bytes at most.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(
        &self,
        kind: Kind,
        name: &str,
        object: &[u8],
        most: u64,
    ) -> Result<Vec<u8>, String> {
        let (header, rest) = object.split_at_checked(HEADER).ok_or("it is too short")?;
        let Header { flags, len, .. } = Header::decode(header, kind)?;
        if len > most {
            return Err(format!("it has {len} bytes, more than {most}"));
        }
        let bound = [header, name.as_bytes()].concat();
        let opened;
        let bytes = match &self.0 {
            None if flags.encrypted => return Err("it is encrypted, the repository is not".into()),
            None => {
                let at = rest.len().checked_sub(CHECKSUM).ok_or("it is too short")?;
                let (bytes, sum) = rest.split_at(at);
                if checksum(&bound, bytes) != sum {
                    return Err("its checksum does not match".into());
                }
                bytes
            }
            Some(_) if !flags.encrypted => {
                return Err("it is not encrypted, the repository is".into());
            }
            Some(keys) => {
                opened = open(&keys.objects, &bound, rest)?;
                &opened
            }
        };
        let body = match flags.compressed {
            false => bytes.to_vec(),
            true => zstd::bulk::decompress(bytes, len as usize)
                .map_err(|_| "it can't be decompressed")?,
        };
        match body.len() as u64 == len {
            true => Ok(body),
            false => Err(format!("it has {} bytes where {len} belong to it", body.len())),
        }
    }
}

fn checksum(bound: &[u8], bytes: &[u8]) -> [u8; CHECKSUM] {
    *blake3::Hasher::new().update(bound).update(bytes).finalize().as_bytes()
}

/// Encrypts, bound to what it belongs to. The nonce is random: 24 bytes of it never come twice.
fn seal(cipher: &XChaCha20Poly1305, bound: &[u8], bytes: &[u8]) -> Vec<u8> {
    let nonce = [super::format::ids::random(), super::format::ids::random()].concat();
    let nonce = &nonce[..NONCE];
    let payload = Payload { msg: bytes, aad: bound };
    // It fails for messages of many GiB alone, and then can't be opened.
    let closed = cipher.encrypt(XNonce::from_slice(nonce), payload).unwrap_or_default();
    [nonce, &closed].concat()
}

fn open(cipher: &XChaCha20Poly1305, bound: &[u8], sealed: &[u8]) -> Result<Vec<u8>, String> {
    let (nonce, closed) = sealed.split_at_checked(NONCE).ok_or("it is too short")?;
    let payload = Payload { msg: closed, aad: bound };
    let opened = cipher.decrypt(XNonce::from_slice(nonce), payload);
    opened.map_err(|_| "it was altered, or encrypted with another key".to_owned())
}

/// A name in which nothing can be taken for a separator, and none is empty.
fn escape(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
            byte => text.push_str(&format!("={byte:02x}")),
        }
    }
    if text.is_empty() { "=".into() } else { text }
}

fn unescape(text: &str) -> Option<String> {
    let mut name = Vec::new();
    let mut rest = text.strip_prefix('=').filter(|rest| rest.is_empty()).unwrap_or(text).as_bytes();
    while let [byte, behind @ ..] = rest {
        rest = behind;
        if *byte != b'=' {
            name.push(*byte);
            continue;
        }
        let (digits, behind) = rest.split_at_checked(2)?;
        let mut escaped = [0];
        super::format::ids::from_hex(std::str::from_utf8(digits).ok()?, &mut escaped)?;
        name.push(escaped[0]);
        rest = behind;
    }
    String::from_utf8(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_closed_opens_as_what_it_was_alone() {
        for keys in [Keys::none(), Keys::of(&[7; KEY])] {
            let body = b"a manifest ".repeat(50);
            for compress in [false, true] {
                let object = keys.close(Kind::Manifest, "a", &body, compress);
                let open = |kind, name, object: &[u8]| keys.open(kind, name, object, 1 << 20);
                assert_eq!(open(Kind::Manifest, "a", &object).unwrap(), body);
                assert!(open(Kind::Manifest, "b", &object).is_err());
                assert!(open(Kind::Map, "a", &object).is_err());
                assert!(keys.open(Kind::Manifest, "a", &object, 100).is_err());
                for at in 0..object.len() {
                    let mut altered = object.clone();
                    altered[at] ^= 1;
                    assert!(open(Kind::Manifest, "a", &altered).is_err(), "{at}");
                    assert!(open(Kind::Manifest, "a", &object[..at]).is_err());
                }
            }
            let raw = vec![3; 5000];
            let id = keys.extent_id(&raw);
            for compress in [false, true] {
                let stored = keys.close_extent(&id, &raw, compress);
                assert_eq!(stored.len() < raw.len(), compress);
                assert_eq!(keys.open_extent(&id, &stored, raw.len()).unwrap(), raw);
                let mut altered = stored.clone();
                *altered.last_mut().unwrap() ^= 1;
                assert!(keys.open_extent(&id, &altered, raw.len()).is_err());
                assert!(keys.open_extent(&ExtentId([0; 32]), &stored, raw.len()).is_err());
                // Closed with the right key, under the name of others.
                let other = keys.close_extent(&id, &[4; 5000], compress);
                assert!(keys.open_extent(&id, &other, raw.len()).is_err());
            }
        }
    }

    #[test]
    fn one_repository_opens_nothing_of_another_ones() {
        let all = [Keys::none(), Keys::of(&[7; KEY]), Keys::of(&[8; KEY])];
        for (n, keys) in all.iter().enumerate() {
            let object = keys.close(Kind::Map, "a", b"body", false);
            for (m, other) in all.iter().enumerate() {
                assert_eq!(other.open(Kind::Map, "a", &object, 9).is_ok(), n == m);
            }
        }
    }

    #[test]
    fn names_are_read_again_where_they_can_be() {
        for keys in [Keys::none(), Keys::of(&[7; KEY])] {
            for name in ["web1", "", "..", "a/b c", "=", "große Maschine", "="] {
                let closed = keys.closed_name("x", name);
                assert_eq!(keys.opened_name("x", &closed).as_deref(), Some(name));
                assert_eq!(closed, keys.closed_name("x", name));
                assert!(!closed.is_empty() && !closed.contains(['/', '.']));
                let hidden = keys.hidden_name(name);
                assert!(!hidden.is_empty() && !hidden.contains(['/', '.']));
            }
            let _ = keys.opened_name("x", "=z");
        }
        let keys = Keys::of(&[7; KEY]);
        assert_eq!(keys.opened_name("y", &keys.closed_name("x", "web1")), None);
    }
}
