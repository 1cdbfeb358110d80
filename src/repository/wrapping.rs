//! The key of an encrypted repository: made once, and wrapped by age so that those who may read it
//! can open it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use age::EncryptError;
use age::secrecy::{ExposeSecret, SecretString};

use super::access::{Access, KeySource};
use super::error::RepositoryError;
use super::format::config::Encryption;
use super::format::envelope::Kind;
use super::format::ids::{from_hex, random, to_hex};
use super::keys::{KEY, Keys};

/// What is read of a file with keys, and of what a command prints.
const MAX_KEYS: u64 = 1 << 20;
/// The work of opening a passphrase: 2^17 rounds of scrypt, half a second and 128 MiB.
const WORK: u8 = 17;
/// The most work that a repository may ask for.
const MAX_WORK: u8 = 20;

/// The body of the proof.
const PROOF: &[u8] = b"the key is right";
/// The name that it is bound to.
const PROOF_NAME: &str = "config";

/// Whom a new repository is encrypted to: nobody, these, or a passphrase.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recipients {
    /// Recipients of age, such as `age1…`.
    pub to: Vec<String>,
    /// Whether it is encrypted with the passphrase among [`Access::keys`].
    pub passphrase: bool,
}

impl Recipients {
    /// Of a repository that is not encrypted.
    pub fn nobody() -> Recipients {
        Recipients::default()
    }

    fn is_nobody(&self) -> bool {
        self.to.is_empty() && !self.passphrase
    }

    /// Refuses a new repository that is not encrypted where a key is given: it would not be opened with
    /// that, and may be meant to be encrypted.
    pub(super) fn check(&self, access: &Access) -> Result<(), RepositoryError> {
        match self.is_nobody() && !access.keys.is_empty() && !access.plain {
            true => Err(RepositoryError::Options(
                "a key is given, and nobody to encrypt to: set `Recipients::to`, or, if all is meant \
                 to be readable by everybody, `Access::with_plain`"
                    .into(),
            )),
            false => Ok(()),
        }
    }
}

/// Makes the keys of a new repository. That they can be opened with a key that `access` gives is
/// proved at once: who has lost theirs learns it before anything depends on it.
pub fn new_keys(
    recipients: &Recipients,
    access: &Access,
) -> Result<(Keys, Option<Encryption>), RepositoryError> {
    if recipients.is_nobody() {
        return Ok((Keys::none(), None));
    }
    let mut key = [0; KEY];
    key[..16].copy_from_slice(&random());
    key[16..].copy_from_slice(&random());
    // Two random UUIDs have a few bits that are not random: a hash of four has 256 that are.
    let seed = [key.as_slice(), &random(), &random()].concat();
    let key = blake3::derive_key("snapback repository v1 key", &seed);
    let wrapped = wrap(&key, recipients, access)?;
    let keys = Keys::of(&key);
    let proof = to_hex(&keys.close(Kind::Proof, PROOF_NAME, PROOF, false));
    let encryption = Encryption { key: to_hex(&wrapped), proof };
    open_keys(&encryption, access, "").map_err(|error| match error {
        RepositoryError::Key { problem, .. } => RepositoryError::KeyInvalid(format!(
            "the new repository could not be opened again: {problem}"
        )),
        error => error,
    })?;
    Ok((keys, Some(encryption)))
}

fn wrap(
    key: &[u8; KEY],
    recipients: &Recipients,
    access: &Access,
) -> Result<Vec<u8>, RepositoryError> {
    let invalid = |problem: String| RepositoryError::KeyInvalid(problem);
    let mut all: Vec<Box<dyn age::Recipient>> = Vec::new();
    if recipients.passphrase {
        if !recipients.to.is_empty() {
            let problem = "a repository is encrypted to recipients or with a passphrase, not both";
            return Err(RepositoryError::Options(problem.into()));
        }
        let source = access.keys.iter().find(|source| source.is_passphrase());
        let source = source.ok_or_else(|| invalid("no passphrase is given".into()))?;
        let passphrase = source.passphrase()?;
        if passphrase.expose_secret().is_empty() {
            return Err(invalid("the passphrase is empty".into()));
        }
        let mut recipient = age::scrypt::Recipient::new(passphrase);
        recipient.set_work_factor(WORK);
        all.push(Box::new(recipient));
    }
    for to in &recipients.to {
        let recipient: age::x25519::Recipient =
            to.parse().map_err(|_| invalid(format!("`{to}` is no recipient such as age1…")))?;
        all.push(Box::new(recipient));
    }
    let failed = |e: &dyn std::fmt::Display| invalid(format!("encrypting the key failed: {e}"));
    let encryptor = age::Encryptor::with_recipients(all.iter().map(AsRef::as_ref));
    // Not in the library's words: a macro puts their arguments into another order with each build, and a
    // package is to be the same, byte for byte, whoever builds it.
    let encryptor = encryptor.map_err(|error| match error {
        EncryptError::Io(error) => failed(&error),
        EncryptError::MissingRecipients => invalid("there is nobody to encrypt it to".into()),
        _ => invalid("what it is to be encrypted to does not go together".into()),
    })?;
    let mut wrapped = Vec::new();
    let mut to = encryptor.wrap_output(&mut wrapped).map_err(|e| failed(&e))?;
    to.write_all(key).and_then(|()| to.finish().map(drop)).map_err(|e| failed(&e))?;
    Ok(wrapped)
}

/// Opens the keys of a repository.
pub fn open_keys(
    encryption: &Encryption,
    access: &Access,
    repository: &str,
) -> Result<Keys, RepositoryError> {
    let closed =
        |problem: String| RepositoryError::Key { repository: repository.to_owned(), problem };
    let damaged = |problem: &str| RepositoryError::Damaged {
        repository: repository.to_owned(),
        object: "config".into(),
        problem: problem.into(),
    };
    let bytes = |text: &str| {
        let mut bytes = vec![0; text.len() / 2];
        from_hex(text, &mut bytes).map(|()| bytes)
    };
    let (Some(wrapped), Some(proof)) = (bytes(&encryption.key), bytes(&encryption.proof)) else {
        return Err(damaged("its keys are no hexadecimal"));
    };
    if access.keys.is_empty() {
        return Err(closed(
            "give the identity or the passphrase that opens it (`Access::keys`)".into(),
        ));
    }
    let mut tried = Vec::new();
    for source in &access.keys {
        let identities = source.identities()?;
        let decryptor = age::Decryptor::new(&wrapped[..])
            .map_err(|_| damaged("its key is not encrypted by age"))?;
        let key = decryptor.decrypt(identities.iter().map(AsRef::as_ref)).map(|from| {
            let mut key = Vec::new();
            from.take(KEY as u64 + 1).read_to_end(&mut key).map(|_| key)
        });
        match key {
            Ok(Ok(key)) => {
                let key = key.try_into().map_err(|_| damaged("its key has another length"))?;
                let keys = Keys::of(&key);
                let proved = keys.open(Kind::Proof, PROOF_NAME, &proof, PROOF.len() as u64);
                return match proved {
                    Ok(_) => Ok(keys),
                    Err(_) => Err(damaged("its key does not open what it should")),
                };
            }
            Ok(Err(_)) => return Err(damaged("its key was altered")),
            Err(_) => tried.push(source.describe()),
        }
    }
    Err(closed(format!("{} does not open it", tried.join(", nor does "))))
}

impl KeySource {
    fn is_passphrase(&self) -> bool {
        !matches!(self, KeySource::Identities(_))
    }

    fn describe(&self) -> String {
        match self {
            KeySource::Identities(path) => format!("the identity in `{}`", path.display()),
            KeySource::PassphraseFile(path) => format!("the passphrase in `{}`", path.display()),
            KeySource::PassphraseCommand(_) => "the passphrase that the command prints".into(),
            KeySource::Environment(name) => format!("the passphrase in {name}"),
        }
    }

    /// What may open a key.
    fn identities(&self) -> Result<Vec<Box<dyn age::Identity>>, RepositoryError> {
        let KeySource::Identities(path) = self else {
            let mut identity = age::scrypt::Identity::new(self.passphrase()?);
            identity.set_max_work_factor(MAX_WORK);
            return Ok(vec![Box::new(identity)]);
        };
        let text = read(path)?;
        let lines = text.lines().map(str::trim).filter(|line| line.starts_with("AGE-SECRET-KEY-"));
        let identities = lines.map(|line| {
            line.parse::<age::x25519::Identity>()
                .map(|identity| Box::new(identity) as Box<dyn age::Identity>)
        });
        let identities: Result<Vec<_>, _> = identities.collect();
        identities.ok().filter(|found| !found.is_empty()).ok_or_else(|| {
            let path = path.display();
            RepositoryError::KeyInvalid(format!("`{path}` holds no identity of age (age-keygen)"))
        })
    }

    /// The passphrase: the first line.
    fn passphrase(&self) -> Result<SecretString, RepositoryError> {
        let text = match self {
            KeySource::Identities(path) | KeySource::PassphraseFile(path) => read(path)?,
            KeySource::Environment(name) => std::env::var(name).map_err(|_| {
                RepositoryError::KeyInvalid(format!("the variable {name} is not set"))
            })?,
            KeySource::PassphraseCommand(command) => {
                let failed = |why: String| {
                    RepositoryError::KeyInvalid(format!("the command for the passphrase {why}"))
                };
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(command).stdin(Stdio::null()).stderr(Stdio::inherit());
                let output = shell.output().map_err(|e| failed(format!("can't be run: {e}")))?;
                if !output.status.success() {
                    return Err(failed(format!("failed: {}", output.status)));
                }
                String::from_utf8(output.stdout).map_err(|_| failed("printed no text".into()))?
            }
        };
        Ok(SecretString::from(text.lines().next().unwrap_or_default().to_owned()))
    }
}

fn read(path: &Path) -> Result<String, RepositoryError> {
    let mut text = String::new();
    let file = File::open(path).and_then(|file| file.take(MAX_KEYS).read_to_string(&mut text));
    file.map(|_| text).map_err(|e| RepositoryError::io("reading", path, e))
}
