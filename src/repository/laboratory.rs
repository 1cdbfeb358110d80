//! For tests alone: what fuzzing gives to the readers of formats and what it begins with, and what no
//! push would leave.

use super::error::RepositoryError;
use super::format::bytes::as_u32;
use super::format::config::Config;
use super::format::envelope::Kind;
use super::format::ids::{ExtentId, MapId, ObjectId, PackId, SnapshotId, random};
use super::format::manifest::{FileRef, Role, SnapshotManifest};
use super::format::map::{Extent, FileMap, Inline};
use super::format::pack::{
    Entry, Listed, footer, footer_len, index, join_index, read_footer, read_index, read_index_head,
    split_index, trailer,
};
use super::format::packed::{Directory, TAIL, directory, directory_place, read_directory};
use super::format::signature;
use super::keys::Keys;
use super::lease::{Held, Lease};
use super::reading::repository::Repository;
use super::writing::known::{close_index, index_key};

/// Longer bodies are refused here: what bounds memory is that a body says how long it is.
const MOST: u64 = 1 << 20;
/// A private key and its public one, as OpenSSL writes them.
const SIGNING_KEYS: &[u8] = b"-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIEbl6BeHZ2hlu/zX9PnxUIDFLTtttBOOgYHAzlKjij8s
-----END PRIVATE KEY-----
-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAIfW+rF+S4GtI8SU+MTZ/7UiMpDkT/TFdA20vG0qTSrU=
-----END PUBLIC KEY-----
";

/// Reads bytes as one of the formats; the first byte says which.
pub fn read_hostile(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let keys = if which & 0x80 == 0 { Keys::none() } else { Keys::of(&[1; 32]) };
    match which & 0x7f {
        0 => {
            if let Ok(map) = FileMap::decode(data) {
                let _ = (map.packs(), map.stored(), map.extents_in(0..map.len).len());
                assert_eq!(FileMap::decode(&map.encode()).as_ref(), Ok(&map));
            }
        }
        1 => {
            if let Ok((head, body)) = split_index(data) {
                let _ = read_index_head(head).and_then(|packs| read_index(packs, body));
            }
        }
        2 => {
            let _ = (read_footer(data), footer_len(data, data.len() as u64));
        }
        3 => {
            for kind in [Kind::Manifest, Kind::Map, Kind::Index, Kind::Footer] {
                let _ = keys.open(kind, "name", data, MOST);
            }
        }
        4 => {
            let len = data.len() as u64;
            if let Some((_, tail)) = data.split_last_chunk::<TAIL>()
                && let Ok(place) = directory_place(tail, len)
            {
                let bytes = &data[place.start as usize..place.end as usize];
                let _ = read_directory(bytes, place.start);
            }
        }
        5 => {
            let _ = serde_json::from_slice::<SnapshotManifest>(data).map(|m| m.image().is_some());
            let _ = serde_json::from_slice::<Config>(data);
        }
        8 => super::signing::read_hostile(data),
        9 => {
            if let Some((json, signature)) = signature::split(data) {
                assert_eq!(signature::join(&json, &signature), data);
            }
        }
        6 => {
            let _ = keys.open_extent(&ExtentId([0; 32]), data, data.len().min(1 << 16) + 1);
        }
        _ => {
            let text = String::from_utf8_lossy(data);
            let _ = text.parse::<super::SnapshotName>();
            let _ = text.parse::<super::Address>();
            let _ = keys.opened_name("to", &text);
            let _ = super::format::time::read_stamp(&text);
        }
    }
}

/// One of each format, whole.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let pack = PackId([7; 16]);
    let entry =
        |n: u8| Entry { id: ExtentId([n; 32]), at: u32::from(n) * 100, stored: 90, raw: 4096 };
    let entries = vec![entry(0), entry(1)];
    let extent = |n: u8| {
        let Entry { id, at, stored, raw } = entry(n);
        Extent { offset: u64::from(n) << 16, raw, pack, at, stored, id }
    };
    let inline = vec![Inline { offset: 5000, bytes: b"inline".to_vec() }];
    let map = FileMap { salt: [3; 16], len: 1 << 20, extents: vec![extent(0), extent(1)], inline };
    let (head, body) = index(&[Listed { pack, len: 300, entries: entries.clone() }]);
    let mut footer = footer(&entries);
    footer.extend(trailer(as_u32(footer.len()) as usize));
    let packed = [vec![0; 16], directory(&Directory::from([("config".to_owned(), 16..16)]), 16)];
    let object = Keys::none().close(Kind::Manifest, "name", &b"body ".repeat(20), true);
    let all: [(&str, u8, Vec<u8>); 8] = [
        ("map", 0, map.encode()),
        ("index", 1, join_index(&head, &body)),
        ("footer", 2, footer),
        ("object", 3, object),
        ("packed", 4, packed.concat()),
        ("name", 7, b"web1@2026-11-25T10:30".to_vec()),
        ("key", 8, SIGNING_KEYS.to_vec()),
        ("signed", 9, signature::join(br#"{"id":1}"#, &[0xab; signature::SIGNATURE])),
    ];
    all.map(|(name, which, bytes)| (name, [&[which][..], &bytes].concat())).into()
}

/// Puts a lease of a push that is never taken back, as a killed one leaves it. Returns its key.
///
/// # Errors
/// When the store fails.
pub fn left_lease(repository: &Repository) -> Result<String, RepositoryError> {
    let held = Held::put(repository, &Lease::new(true))?;
    let key = held.key().to_owned();
    std::mem::forget(held);
    Ok(key)
}

/// Puts a snapshot of a machine of 4 GiB that refers to these packs, and an index whose head alone is
/// what it should be. Nobody can revert it. Returns the key of the index.
///
/// # Errors
/// When the store fails.
pub fn put_synthetic(
    repository: &Repository,
    moment_unix_us: u64,
    packs: &[PackId],
) -> Result<String, RepositoryError> {
    let (len, map) = (4 << 30, MapId([0; 32]));
    let manifest = SnapshotManifest {
        id: SnapshotId(random()),
        machine: "synthetic".into(),
        moment_unix_us,
        pushed_unix_us: moment_unix_us,
        tags: Default::default(),
        host: "nowhere".into(),
        created_by: "a test".into(),
        parents: Vec::new(),
        memory: len,
        bytes: len,
        stored: len,
        own: len,
        profile: Default::default(),
        files: vec![FileRef::new(Role::Image, "/vm.snap".into(), len, map, None)],
        packs: packs.iter().copied().collect(),
        used: vec![32 << 20; packs.len()],
        draft: None,
        seal: Default::default(),
    };
    let key = repository.manifest_key(&manifest);
    let body = serde_json::to_vec(&manifest).unwrap_or_default();
    repository.remote.put(&key, repository.keys.close(Kind::Manifest, &key, &body, false))?;
    let key = index_key(ObjectId(random()));
    let listed = |pack: &PackId| Listed { pack: *pack, len: 32 << 20, entries: Vec::new() };
    let packs: Vec<Listed> = packs.iter().map(listed).collect();
    repository.remote.put(&key, close_index(repository, &key, &packs))?;
    Ok(key)
}
