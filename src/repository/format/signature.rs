//! Where the signature of a manifest stands, and what it is of.
//!
//! It is the last field of the manifest's JSON, so that whoever knows nothing of it reads the others. It is
//! of the JSON without that field, byte for byte: what is read is what was verified, whatever a reader of
//! JSON makes of fields that come twice.

use super::ids::{RepositoryId, from_hex, to_hex};

/// The length of a signature by Ed25519.
pub const SIGNATURE: usize = 64;

/// What is signed begins so: a signature that the same key has made of something else is none of a manifest.
const CONTEXT: &[u8] = b"snapback repository v1 manifest\0";
/// The field, behind all others.
const FIELD: &[u8] = b",\"signature\":\"";
const END: &[u8] = b"\"}";

/// What is signed: the JSON of a manifest, and its place. The object's key has machine, moment and id, and no
/// zero byte.
pub fn message(repository: RepositoryId, key: &str, json: &[u8]) -> Vec<u8> {
    [CONTEXT, &repository.0, key.as_bytes(), b"\0", json].concat()
}

/// The JSON of a manifest with its signature.
pub fn join(json: &[u8], signature: &[u8; SIGNATURE]) -> Vec<u8> {
    let open = json.strip_suffix(b"}").unwrap_or(json);
    [open, FIELD, to_hex(signature).as_bytes(), END].concat()
}

/// Takes the signature off. What has none there is not signed.
pub fn split(signed: &[u8]) -> Option<(Vec<u8>, [u8; SIGNATURE])> {
    let open = signed.strip_suffix(END)?;
    let (open, hex) = open.split_at_checked(open.len().checked_sub(2 * SIGNATURE)?)?;
    let open = open.strip_suffix(FIELD)?;
    let mut signature = [0; SIGNATURE];
    from_hex(std::str::from_utf8(hex).ok()?, &mut signature)?;
    Some(([open, b"}"].concat(), signature))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_manifest_with_its_signature_is_json_still() {
        let json = br#"{"id":1,"inner":{"signature":"x"}}"#;
        let signed = join(json, &[0xab; SIGNATURE]);
        let read: serde_json::Value = serde_json::from_slice(&signed).unwrap();
        assert_eq!(read["signature"], "ab".repeat(SIGNATURE));
        assert_eq!(split(&signed), Some((json.to_vec(), [0xab; SIGNATURE])));
        assert_eq!(split(json), None);
    }

    proptest! {
        #[test]
        fn what_is_split_was_joined_so(
            before in prop::collection::vec(any::<u8>(), 0..50),
            hex in prop::collection::vec(prop::sample::select(b"0123456789abcdefAg".to_vec()), 127..130),
            signature in prop::collection::vec(any::<u8>(), SIGNATURE),
        ) {
            let signature: [u8; SIGNATURE] = signature.try_into().unwrap();
            let json = [&before[..], b"}"].concat();
            prop_assert_eq!(split(&join(&json, &signature)), Some((json, signature)));
            // Whatever is taken for one that is signed, nobody else reads in another way.
            let hostile = [&before[..], FIELD, &hex, END].concat();
            for bytes in [&before, &hostile] {
                if let Some((json, signature)) = split(bytes) {
                    prop_assert_eq!(&join(&json, &signature), bytes);
                }
            }
        }

        #[test]
        fn two_places_never_sign_the_same(
            one in ("[a-z/=-]{0,9}", prop::collection::vec(any::<u8>(), 0..9)),
            other in ("[a-z/=-]{0,9}", prop::collection::vec(any::<u8>(), 0..9)),
        ) {
            let of = |(key, json): &(String, Vec<u8>)| message(RepositoryId([1; 16]), key, json);
            prop_assert_eq!(of(&one) == of(&other), one == other);
        }
    }
}
