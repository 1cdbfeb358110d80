//! Signatures of manifests: whose snapshot it is, where the repository's own key does not tell, since it has
//! none, or many have it.
//!
//! Ed25519, with keys in files as OpenSSL writes them. What a manifest refers to is named by hashes, so that
//! its signature is one of all maps and extents, too.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};

use super::access::Access;
use super::error::RepositoryError;
use super::format::ids::RepositoryId;
use super::format::manifest::Seal;
use super::format::signature::{join, message, split};

/// What is read of a file with keys.
const MAX_KEYS: u64 = 1 << 20;
/// What a public key begins with: SEQUENCE, the algorithm 1.3.101.112, BIT STRING (RFC 8410).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A public key.
type PublicKey = [u8; 32];

/// The key that signs, and those that are trusted.
#[derive(Default)]
pub struct Signing {
    own: Option<Ed25519KeyPair>,
    /// Those that are named. Where there is one, the own one is trusted beside them.
    trusted: Vec<PublicKey>,
}

impl Signing {
    /// Reads the files with keys.
    ///
    /// # Errors
    /// When one can't be read, or holds no key that fits.
    pub fn read(access: &Access) -> Result<Signing, RepositoryError> {
        let mut signing = Signing::default();
        if let Some(path) = &access.sign_key {
            signing.own = Some(keys_of(path, "sign", private_key)?);
        }
        for path in &access.trust_keys {
            signing.trusted.extend(keys_of(path, "be trusted", public_keys)?);
        }
        Ok(signing)
    }

    /// Who has signed what is put here.
    pub fn own_seal(&self) -> Seal {
        if self.own.is_some() { Seal::Own } else { Seal::None }
    }

    /// The JSON of a manifest, signed.
    pub fn sign(&self, repository: RepositoryId, key: &str, json: Vec<u8>) -> Vec<u8> {
        let signature = self.own.as_ref().map(|own| own.sign(&message(repository, key, &json)));
        match signature.and_then(|signature| signature.as_ref().try_into().ok()) {
            Some(signature) => join(&json, &signature),
            None => json,
        }
    }

    /// The JSON of a manifest without its signature, and who has signed it.
    pub fn open(&self, repository: RepositoryId, key: &str, json: Vec<u8>) -> (Vec<u8>, Seal) {
        let Some((json, signature)) = split(&json) else { return (json, Seal::None) };
        let message = message(repository, key, &json);
        let is_by =
            |key: &[u8]| UnparsedPublicKey::new(&ED25519, key).verify(&message, &signature).is_ok();
        let seal = match &self.own {
            Some(own) if is_by(own.public_key().as_ref()) => Seal::Own,
            _ if self.trusted.iter().any(|key| is_by(key)) => Seal::Trusted,
            _ => Seal::Unknown,
        };
        (json, seal)
    }

    /// Refuses what is signed with no key that is trusted, where one is named.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, seal: Seal) -> Result<(), &'static str> {
        match seal {
            _ if self.trusted.is_empty() => Ok(()),
            Seal::Trusted | Seal::Own => Ok(()),
            Seal::None => Err("it is not signed"),
            Seal::Unknown => {
                Err("it is signed with none of the keys that are trusted, or was altered or \
                 put in another one's place since")
            }
        }
    }

    /// Whether what is signed here may rely on what such a manifest says: it would be signed with it.
    pub fn relies_on(&self, seal: Seal) -> bool {
        match seal {
            Seal::Trusted | Seal::Own => true,
            Seal::None | Seal::Unknown => self.own.is_none(),
        }
    }
}

/// Whether a manifest may be put anew with another content, and be signed as it was.
pub fn is_renewable(seal: Seal) -> bool {
    matches!(seal, Seal::None | Seal::Own)
}

/// Reads keys from a file that is to do something.
fn keys_of<T>(
    path: &Path,
    to_do: &str,
    read: impl Fn(&[u8]) -> Result<T, &'static str>,
) -> Result<T, RepositoryError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_KEYS).read_to_end(&mut bytes))
        .map_err(|error| RepositoryError::io("reading", path, error))?;
    read(&bytes).map_err(|problem| {
        RepositoryError::KeyInvalid(format!("`{}` can't {to_do}: {problem}", path.display()))
    })
}

/// The private key of a file.
///
/// # Errors
/// What else the file holds.
fn private_key(file: &[u8]) -> Result<Ed25519KeyPair, &'static str> {
    let mut found = PrivatePkcs8KeyDer::pem_slice_iter(file);
    match (found.next(), found.next()) {
        // OpenSSL leaves the public half out.
        (Some(Ok(der)), None) => Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| "its key is none of Ed25519 (`openssl genpkey -algorithm ed25519`)"),
        (Some(Ok(_)), Some(_)) => Err("it holds several keys"),
        (Some(Err(_)), _) => Err("its PEM is damaged"),
        (None, _) if has(file, "BEGIN ENCRYPTED PRIVATE KEY") => Err(
            "its key is encrypted, and nobody is there to be asked for the passphrase: `openssl pkey -in \
             FILE -out NEW` writes it without one",
        ),
        (None, _) if has(file, "BEGIN PUBLIC KEY") => {
            Err("it holds a public key, not the private one")
        }
        (None, _) => {
            Err("it holds no private key in PEM (`openssl genpkey -algorithm ed25519` makes one)")
        }
    }
}

/// The public keys of a file, at least one.
///
/// # Errors
/// What else the file holds.
fn public_keys(file: &[u8]) -> Result<Vec<PublicKey>, &'static str> {
    let keys = SubjectPublicKeyInfoDer::pem_slice_iter(file).map(|der| {
        let der = der.map_err(|_| "its PEM is damaged")?;
        let key = der.strip_prefix(&SPKI).and_then(|key| key.try_into().ok());
        key.ok_or("a key in it is none of Ed25519")
    });
    let keys = keys.collect::<Result<Vec<PublicKey>, _>>()?;
    match keys.is_empty() {
        false => Ok(keys),
        true if has(file, "PRIVATE KEY-----") => {
            Err("it holds a private key: `openssl pkey -in FILE -pubout` prints its public one")
        }
        true => Err("it holds no public key in PEM (`openssl pkey -in FILE -pubout` prints one)"),
    }
}

fn has(file: &[u8], words: &str) -> bool {
    file.windows(words.len()).any(|window| window == words.as_bytes())
}

/// For fuzzing: reads bytes as files with keys, and as a manifest that is signed.
#[cfg(feature = "internals")]
pub fn read_hostile(data: &[u8]) {
    let _ = (private_key(data), public_keys(data));
    let signing = Signing { own: None, trusted: vec![[1; 32]] };
    let (json, seal) = signing.open(RepositoryId([1; 16]), "key", data.to_vec());
    assert!(seal != Seal::Own && (seal != Seal::None || json == data));
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RepositoryId = RepositoryId([1; 16]);
    const PRIVATE: &str = "MC4CAQAwBQYDK2VwBCIEIEbl6BeHZ2hlu/zX9PnxUIDFLTtttBOOgYHAzlKjij8s";
    const PUBLIC: &str = "MCowBQYDK2VwAyEAIfW+rF+S4GtI8SU+MTZ/7UiMpDkT/TFdA20vG0qTSrU=";
    /// Of another algorithm: X25519, whose keys have the same lengths.
    const X_PRIVATE: &str = "MC4CAQAwBQYDK2VuBCIEIEbl6BeHZ2hlu/zX9PnxUIDFLTtttBOOgYHAzlKjij8s";
    const X_PUBLIC: &str = "MCowBQYDK2VuAyEAIfW+rF+S4GtI8SU+MTZ/7UiMpDkT/TFdA20vG0qTSrU=";

    fn pem(label: &str, body: &str) -> Vec<u8> {
        format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n").into_bytes()
    }

    fn keys() -> (Ed25519KeyPair, Vec<PublicKey>) {
        let private = private_key(&pem("PRIVATE KEY", PRIVATE)).unwrap();
        (private, public_keys(&pem("PUBLIC KEY", PUBLIC)).unwrap())
    }

    #[test]
    fn a_signature_is_of_one_manifest_in_one_place() {
        let (own, trusted) = keys();
        let signing = Signing { own: Some(own), trusted: vec![] };
        let of = |trusted: &[PublicKey]| Signing { own: None, trusted: trusted.to_vec() };
        let (none, trusting, others) = (of(&[]), of(&trusted), of(&[[7; 32]]));
        let json = br#"{"id":1,"machine":"web1"}"#.to_vec();
        let signed = signing.sign(ID, "a", json.clone());
        assert_eq!(none.sign(ID, "a", json.clone()), json);

        let seal = |of: &Signing, key, json: &[u8]| of.open(ID, key, json.to_vec()).1;
        assert_eq!(signing.open(ID, "a", signed.clone()), (json.clone(), Seal::Own));
        assert_eq!(trusting.open(ID, "a", signed.clone()), (json.clone(), Seal::Trusted));
        assert_eq!(seal(&none, "a", &signed), Seal::Unknown);
        assert_eq!(seal(&others, "a", &signed), Seal::Unknown);
        assert_eq!(seal(&trusting, "b", &signed), Seal::Unknown);
        assert_eq!(trusting.open(RepositoryId([2; 16]), "a", signed.clone()).1, Seal::Unknown);
        assert_eq!(trusting.open(ID, "a", json.clone()), (json, Seal::None));
        for at in 0..signed.len() {
            let mut altered = signed.clone();
            altered[at] ^= 1;
            assert!(trusting.check(seal(&trusting, "a", &altered)).is_err(), "{at}");
            assert!(trusting.check(seal(&trusting, "a", &signed[..at])).is_err(), "{at}");
        }
    }

    #[test]
    fn what_is_read_and_relied_on_follows_from_who_has_signed() {
        let all = [Seal::None, Seal::Unknown, Seal::Trusted, Seal::Own];
        let (own, trusted) = keys();
        let neither = Signing::default();
        let trusting = Signing { own: None, trusted };
        let signs = Signing { own: Some(own), trusted: vec![] };
        let read = |of: &Signing| all.map(|seal| of.check(seal).is_ok());
        let relied_on = |of: &Signing| all.map(|seal| of.relies_on(seal));
        assert_eq!((read(&neither), relied_on(&neither)), ([true; 4], [true; 4]));
        assert_eq!(read(&trusting), [false, false, true, true]);
        assert_eq!((read(&signs), relied_on(&signs)), ([true; 4], [false, false, true, true]));
        assert_eq!(all.map(is_renewable), [true, false, false, true]);
    }

    #[test]
    fn files_that_hold_something_else_are_refused_with_what_to_do() {
        let private = |file: &[u8]| private_key(file).err().unwrap_or("taken");
        let public = |file: &[u8]| public_keys(file).err().unwrap_or("taken");
        let (own, other) = (pem("PRIVATE KEY", PRIVATE), pem("PUBLIC KEY", PUBLIC));
        let encrypted = pem("ENCRYPTED PRIVATE KEY", "MIGjMF8GCSqGSIb3DQEFDTBS");
        for (file, says) in [
            (&own, "taken"),
            (&encrypted, "-out NEW"),
            (&other, "a public key"),
            (&[&own[..], &own].concat(), "several"),
            (&pem("PRIVATE KEY", X_PRIVATE), "none of Ed25519"),
            (&pem("PRIVATE KEY", &PRIVATE[..40]), "none of Ed25519"),
            (&pem("PRIVATE KEY", "%%"), "damaged"),
            (&own[..60].to_vec(), "damaged"),
            (&b"nothing".to_vec(), "openssl genpkey"),
        ] {
            assert!(private(file).contains(says), "{says}: {}", private(file));
        }
        for (file, says) in [
            (&other, "taken"),
            (&[&other[..], &other].concat(), "taken"),
            (&own, "-pubout"),
            (&encrypted, "-pubout"),
            (&pem("PUBLIC KEY", X_PUBLIC), "none of Ed25519"),
            (&[&other[..], &pem("PUBLIC KEY", &PUBLIC[..40])].concat(), "none of Ed25519"),
            (&other[..60].to_vec(), "damaged"),
            (&Vec::new(), "-pubout"),
        ] {
            assert!(public(file).contains(says), "{says}: {}", public(file));
        }
        assert_eq!(public_keys(&[&other[..], &other].concat()).unwrap().len(), 2);
    }
}
