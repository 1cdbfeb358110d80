//! A repository that is open, and its objects.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::repository::access::Access;
use crate::repository::error::{RepositoryError, StoreError, StoreFailure};
use crate::repository::format::config::{Config, MAX_CONFIG, VERSION, WHAT};
use crate::repository::format::draft::Draft;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{
    Fingerprint, MapId, ObjectId, PackId, RepositoryId, SnapshotId, random,
};
use crate::repository::format::manifest::{FileRef, MAX_MANIFEST, Seal, SnapshotManifest, is_name};
use crate::repository::format::map::{Extent, FileMap, MAX_MAP};
use crate::repository::format::time::{read_stamp, stamp};
use crate::repository::keys::Keys;
use crate::repository::remote::{Address, Listing, Remote};
use crate::repository::signing::Signing;
use crate::repository::wrapping;

/// Length of the extents of disks.
pub const BLOCK: u32 = 64 << 10;
/// How far apart two extents of a pack may lie and still be fetched in one request.
const GAP: u64 = 256 << 10;
/// The longest single request for extents.
const MAX_RANGE: u64 = 8 << 20;

/// The manifests that are there.
pub struct Manifests {
    /// One of each snapshot: the oldest of each machine first.
    pub snapshots: Vec<Snapshot>,
    /// Those in whose places others were put: they stay for a while.
    pub replaced: Vec<Snapshot>,
    /// Those that are to count in the place of others, and don't yet.
    pub unfinished: Vec<Snapshot>,
    /// What makes them drafts, or will.
    pub drafts: Vec<Draft>,
}

/// An open repository.
pub struct Repository {
    pub(in crate::repository) remote: Remote,
    pub(in crate::repository) keys: Keys,
    pub(in crate::repository) access: Access,
    pub(in crate::repository) signing: Signing,
    config: Config,
}

/// A snapshot, as the names of objects tell of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Snapshot {
    /// The moment, in microseconds since 1970 (UTC).
    pub unix_us: u64,
    /// Its id.
    pub id: SnapshotId,
    /// The key of its manifest.
    pub key: String,
}

impl Snapshot {
    /// The moment, in seconds since 1970 (UTC).
    pub fn seconds(&self) -> i64 {
        (self.unix_us / 1_000_000) as i64
    }

    /// Where the manifests of its machine lie.
    pub fn folder(&self) -> &str {
        self.key.rsplit_once('/').map_or("", |(folder, _)| folder)
    }
}

impl Repository {
    /// Makes a repository. With `recipients` it is encrypted to these.
    ///
    /// # Errors
    /// When there is one, or the store refuses; when it would not be encrypted though a key is given.
    pub fn init(
        address: &Address,
        access: &Access,
        recipients: &wrapping::Recipients,
    ) -> Result<Repository, RepositoryError> {
        recipients.check(access)?;
        let signing = Signing::read(access)?;
        let remote = Remote::connect(address, &access.reach, true)?;
        Repository::init_on(remote, access, signing, recipients)
    }

    pub(in crate::repository) fn init_on(
        remote: Remote,
        access: &Access,
        signing: Signing,
        recipients: &wrapping::Recipients,
    ) -> Result<Repository, RepositoryError> {
        let (keys, encryption) = wrapping::new_keys(recipients, access)?;
        let config = Config {
            what: WHAT.into(),
            version: VERSION,
            id: RepositoryId(random()),
            block: BLOCK,
            encryption,
        };
        // Plain data, which always can be written.
        let bytes = serde_json::to_vec_pretty(&config).unwrap_or_default();
        match remote.create("config", bytes)? {
            true => Ok(Repository { remote, keys, access: access.clone(), signing, config }),
            false => Err(RepositoryError::Exists(remote.name().to_owned())),
        }
    }

    /// Opens a repository.
    ///
    /// # Errors
    /// When there is none, the store does not answer, no key opens it, or it is not trusted.
    pub fn open(address: &Address, access: &Access) -> Result<Repository, RepositoryError> {
        let signing = Signing::read(access)?;
        let remote = Remote::connect(address, &access.reach, false)?;
        let bytes = match remote.get("config") {
            Err(StoreError { failure: StoreFailure::NotFound, .. }) => {
                return Err(RepositoryError::NoRepository(remote.name().to_owned()));
            }
            bytes => bytes?,
        };
        let damaged = |problem: String| RepositoryError::Damaged {
            repository: remote.name().to_owned(),
            object: "config".into(),
            problem,
        };
        if bytes.len() as u64 > MAX_CONFIG {
            return Err(damaged("it is too long".into()));
        }
        let config: Config = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if config.what != WHAT {
            return Err(RepositoryError::NoRepository(remote.name().to_owned()));
        }
        if config.version != VERSION {
            return Err(RepositoryError::TooNew(remote.name().to_owned(), config.version));
        }
        if config.block != BLOCK {
            return Err(damaged(format!("its extents have {} bytes", config.block)));
        }
        let keys = match &config.encryption {
            None => Keys::none(),
            Some(encryption) => wrapping::open_keys(encryption, access, remote.name())?,
        };
        is_trusted(keys.fingerprint(), access).map_err(|problem| RepositoryError::Untrusted {
            repository: remote.name().to_owned(),
            problem,
        })?;
        Ok(Repository { remote, keys, access: access.clone(), signing, config })
    }

    /// Finds out whether its store minds the condition that nothing is there when an object is put. One that
    /// does not lets two who push the same snapshot at once, or make a repository at the same place, put theirs
    /// both; the last one stands.
    ///
    /// # Errors
    /// When the store fails.
    pub fn minds_conditions(&self) -> Result<bool, RepositoryError> {
        Ok(self.remote.minds_conditions(&format!("probes/{}", ObjectId(random())))?)
    }

    /// Its address, without credentials.
    pub fn name(&self) -> &str {
        self.remote.name()
    }

    /// What tells it apart.
    pub fn id(&self) -> RepositoryId {
        self.config.id
    }

    /// What it is known by. An object store's owner can make no other repository with the same.
    /// One that is not encrypted has none: its id is no secret, and authenticates nothing.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.keys.fingerprint()
    }

    /// Reads what a file consists of, and the part of it that lies there.
    ///
    /// # Errors
    /// When it can't be read, or is damaged.
    pub fn map(&self, file: &FileRef) -> Result<FileMap, RepositoryError> {
        self.map_in(file, &self.fetch_map(file.map)?)
    }

    /// The same of a map that was fetched.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn map_in(&self, file: &FileRef, stored: &[u8]) -> Result<FileMap, RepositoryError> {
        let map = self.open_map(file.map, stored)?;
        match map.len == file.len {
            true => Ok(map),
            false => {
                let problem = format!("it is of {} bytes, the file has {}", map.len, file.len);
                Err(self.damaged(&map_key(file.map), problem))
            }
        }
    }

    pub(in crate::repository) fn map_of(&self, id: MapId) -> Result<FileMap, RepositoryError> {
        self.open_map(id, &self.fetch_map(id)?)
    }

    /// Fetches a map as it is stored.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn fetch_map(&self, id: MapId) -> Result<Bytes, RepositoryError> {
        Ok(self.remote.get(&map_key(id))?)
    }

    /// Opens a map by its key.
    pub(in crate::repository) fn open_map_at(
        &self,
        key: &str,
        stored: &[u8],
    ) -> Result<FileMap, RepositoryError> {
        match map_of_key(key) {
            Some(id) => self.open_map(id, stored),
            None => Err(self.damaged(key, "it is no map".into())),
        }
    }

    fn open_map(&self, id: MapId, stored: &[u8]) -> Result<FileMap, RepositoryError> {
        let key = map_key(id);
        let damaged = |problem| self.damaged(&key, problem);
        let body = self.keys.open(Kind::Map, &key, stored, MAX_MAP).map_err(damaged)?;
        if self.keys.map_id(&body) != id {
            return Err(damaged("its bytes are not those that its name says".into()));
        }
        FileMap::decode(&body).map_err(damaged)
    }

    /// Reads extents: the bytes of each, decompressed and verified, in the order in which they were
    /// asked for. Those that lie near each other are fetched together.
    ///
    /// # Errors
    /// When one can't be read, or is damaged.
    pub fn read_extents(&self, extents: &[Extent]) -> Result<Vec<Bytes>, RepositoryError> {
        self.fetch_extents(extents)?.into_iter().map(|fetched| fetched.bytes).collect()
    }

    /// The same, with each extent as it is stored.
    ///
    /// # Errors
    /// When one can't be read. One that is damaged, at the second try too, is told beside the others.
    pub fn fetch_extents(&self, extents: &[Extent]) -> Result<Vec<Fetched>, RepositoryError> {
        let ranges = together(extents);
        let wanted = ranges.iter().map(|range| (pack_key(range.pack), range.bytes.clone()));
        let fetched = self.remote.get_ranges(wanted.collect())?;
        let mut stored = vec![Bytes::new(); extents.len()];
        for (range, bytes) in ranges.iter().zip(fetched) {
            for &number in &range.extents {
                let Extent { at, stored: len, .. } = extents[number];
                let from = (u64::from(at) - range.bytes.start) as usize;
                stored[number] = bytes.slice(from..from + len as usize);
            }
        }
        let open = |(extent, stored): (&Extent, Bytes)| {
            if let Ok(bytes) = self.open_extent(extent, &stored) {
                return Ok(Fetched { stored, bytes: Ok(bytes) });
            }
            // It may have been altered on its way.
            let at = u64::from(extent.at);
            let again = (pack_key(extent.pack), at..at + u64::from(extent.stored));
            let stored = Bytes::from(self.remote.get_ranges(vec![again])?.concat());
            Ok(Fetched { bytes: self.open_extent(extent, &stored), stored })
        };
        extents.iter().zip(stored).map(open).collect()
    }

    /// The bytes of an extent that was fetched, decompressed and verified.
    ///
    /// # Errors
    /// When they are not what they should be.
    pub fn open_extent(&self, extent: &Extent, stored: &[u8]) -> Result<Bytes, RepositoryError> {
        let Extent { id, at, raw, pack, .. } = *extent;
        self.keys.open_extent(&id, stored, raw as usize).map(Bytes::from).map_err(|problem| {
            self.damaged(&pack_key(pack), format!("extent {id} at {at}: {problem}"))
        })
    }

    /// All snapshots, by the names of their objects: the oldest of each machine first.
    pub(in crate::repository) fn snapshots(&self) -> Result<Vec<Snapshot>, RepositoryError> {
        Ok(self.all_manifests()?.snapshots)
    }

    /// All manifests, by the names of their objects.
    pub(in crate::repository) fn all_manifests(&self) -> Result<Manifests, RepositoryError> {
        self.listed_under("snapshots")
    }

    /// The snapshots of a machine, the oldest first.
    pub(in crate::repository) fn snapshots_of(
        &self,
        machine: &str,
    ) -> Result<Vec<Snapshot>, RepositoryError> {
        Ok(self.listed_under(&self.manifests_under(machine))?.snapshots)
    }

    fn listed_under(&self, under: &str) -> Result<Manifests, RepositoryError> {
        let listed = self.remote.list(under)?;
        let found = listed.iter().filter_map(|listing| parse_key(&listing.key)).collect();
        let drafts = listed.iter().filter_map(|one| Draft::read(&one.key, one.put_ms));
        let drafts: Vec<Draft> = drafts.filter(|draft| parse_key(&draft.of).is_some()).collect();
        let (found, unfinished) = self.take_drafts(found, &drafts)?;
        let (snapshots, replaced) = take_replaced(found);
        Ok(Manifests { snapshots, replaced, unfinished, drafts })
    }

    /// The snapshot that a manifest is of, if it is there.
    pub(in crate::repository) fn find(
        &self,
        manifest: &SnapshotManifest,
    ) -> Result<Option<Snapshot>, RepositoryError> {
        let of_machine = self.snapshots_of(&manifest.machine)?;
        Ok(of_machine.into_iter().find(|snapshot| snapshot.id == manifest.id))
    }

    /// Reads the manifest of a snapshot.
    pub(in crate::repository) fn manifest(
        &self,
        snapshot: &Snapshot,
    ) -> Result<SnapshotManifest, RepositoryError> {
        self.manifest_at(&snapshot.key)
    }

    /// Reads the manifest of this key.
    pub(in crate::repository) fn manifest_at(
        &self,
        key: &str,
    ) -> Result<SnapshotManifest, RepositoryError> {
        let manifest = self.manifest_by_anybody(key)?;
        self.check_seal(&manifest)?;
        Ok(manifest)
    }

    /// The same, whoever has signed it: whoever asks looks at the seal, or needs none, as of a draft.
    pub(super) fn manifest_by_anybody(
        &self,
        key: &str,
    ) -> Result<SnapshotManifest, RepositoryError> {
        self.open_manifest(key, &self.remote.get(key)?)
    }

    /// Reads the manifests of snapshots, in their order. What has been removed meanwhile is left out.
    pub fn manifests(&self) -> Result<Vec<SnapshotManifest>, RepositoryError> {
        let snapshots = self.snapshots()?;
        self.manifests_of(&snapshots)
    }

    pub(in crate::repository) fn manifests_of(
        &self,
        snapshots: &[Snapshot],
    ) -> Result<Vec<SnapshotManifest>, RepositoryError> {
        let read = self.manifests_by_anybody(snapshots)?;
        read.iter().try_for_each(|manifest| self.check_seal(manifest))?;
        Ok(read)
    }

    /// The same, whoever has signed them: whoever asks looks at the seal.
    pub(in crate::repository) fn manifests_by_anybody(
        &self,
        snapshots: &[Snapshot],
    ) -> Result<Vec<SnapshotManifest>, RepositoryError> {
        let keys = snapshots.iter().map(|snapshot| snapshot.key.clone()).collect();
        let mut found = Vec::with_capacity(snapshots.len());
        self.remote.get_each(keys, |key, bytes| {
            found.push((key.to_owned(), self.open_manifest(key, &bytes)?));
            Ok(())
        })?;
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found.into_iter().map(|(_, manifest)| manifest).collect())
    }

    fn open_manifest(&self, key: &str, bytes: &[u8]) -> Result<SnapshotManifest, RepositoryError> {
        let damaged = |problem| self.damaged(key, problem);
        let json = self.keys.open(Kind::Manifest, key, bytes, MAX_MANIFEST).map_err(damaged)?;
        let (json, seal) = self.signing.open(self.id(), key, json);
        let manifest = serde_json::from_slice(&json).map_err(|e| damaged(e.to_string()))?;
        let manifest = SnapshotManifest { seal, ..manifest };
        match self.manifest_key(&manifest) == key && is_name(&manifest.machine) {
            true => Ok(manifest),
            false => Err(self.damaged(key, "it is the manifest of another snapshot".into())),
        }
    }

    /// Refuses a manifest that is not signed with a key that is trusted, where one is.
    fn check_seal(&self, manifest: &SnapshotManifest) -> Result<(), RepositoryError> {
        let problem = self.signing.check(manifest.seal);
        problem.map_err(|problem| self.untrusted(manifest, problem))
    }

    fn untrusted(&self, manifest: &SnapshotManifest, problem: &'static str) -> RepositoryError {
        let (repository, snapshot) = (self.name().to_owned(), self.manifest_key(manifest));
        RepositoryError::SnapshotUntrusted { repository, snapshot, problem }
    }

    /// A manifest as it is put, signed if its seal says so.
    pub(in crate::repository) fn close_manifest(
        &self,
        key: &str,
        manifest: &SnapshotManifest,
    ) -> Vec<u8> {
        // Plain data, which always can be written.
        let json = serde_json::to_vec(manifest).unwrap_or_default();
        let json = match manifest.seal {
            Seal::Own => self.signing.sign(self.id(), key, json),
            Seal::None | Seal::Unknown | Seal::Trusted => json,
        };
        self.keys.close(Kind::Manifest, key, &json, false)
    }

    /// A manifest that was found where one was to be put: it stands for that only if it is signed as well,
    /// where that would have been.
    pub(in crate::repository) fn was_there(
        &self,
        found: SnapshotManifest,
    ) -> Result<SnapshotManifest, RepositoryError> {
        match self.signing.relies_on(found.seal) {
            true => Ok(found),
            false => Err(self.untrusted(
                &found,
                "it is there already, and signed neither with this key nor with one that is trusted: \
                 forget it, and put it again",
            )),
        }
    }

    /// Reads an object that holds JSON, at most so long.
    pub(in crate::repository) fn open_json<T: DeserializeOwned>(
        &self,
        kind: Kind,
        key: &str,
        bytes: &[u8],
        most: u64,
    ) -> Result<T, RepositoryError> {
        let damaged = |problem| self.damaged(key, problem);
        let body = self.keys.open(kind, key, bytes, most).map_err(damaged)?;
        serde_json::from_slice(&body).map_err(|e| damaged(e.to_string()))
    }

    /// An object that holds JSON, as it is put.
    pub(in crate::repository) fn close_json(
        &self,
        kind: Kind,
        key: &str,
        body: &impl Serialize,
        compress: bool,
    ) -> Vec<u8> {
        // Plain data, which always can be written.
        let body = serde_json::to_vec(body).unwrap_or_default();
        self.keys.close(kind, key, &body, compress)
    }

    /// The key of a manifest.
    pub(in crate::repository) fn manifest_key(&self, manifest: &SnapshotManifest) -> String {
        let folder = self.manifests_under(&manifest.machine);
        let time = stamp(manifest.moment_unix_us);
        format!("{folder}/{time}-{}", manifest.id)
    }

    /// Where the manifests of a machine lie.
    pub(in crate::repository) fn manifests_under(&self, machine: &str) -> String {
        format!("snapshots/{}", self.keys.hidden_name(machine))
    }

    /// The tags of a snapshot that were added since it was put here.
    pub(in crate::repository) fn tags_of(
        &self,
        id: SnapshotId,
    ) -> Result<BTreeSet<String>, RepositoryError> {
        let listed = self.remote.list(&format!("tags/{id}"))?;
        Ok(listed.iter().filter_map(|listing| self.tag(listing)).map(|(_, tag)| tag).collect())
    }

    /// The snapshot and the tag that an object stands for.
    pub(in crate::repository) fn tag(&self, listing: &Listing) -> Option<(SnapshotId, String)> {
        let (id, tag) = listing.key.strip_prefix("tags/")?.split_once('/')?;
        Some((id.parse().ok()?, self.keys.opened_name(id, tag)?))
    }

    /// The key of a tag.
    pub(in crate::repository) fn tag_key(&self, id: SnapshotId, tag: &str) -> String {
        let id = id.to_string();
        format!("tags/{id}/{}", self.keys.closed_name(&id, tag))
    }

    pub(in crate::repository) fn damaged(&self, object: &str, problem: String) -> RepositoryError {
        let repository = self.name().to_owned();
        RepositoryError::Damaged { repository, object: object.to_owned(), problem }
    }
}

/// Whether a repository with this fingerprint is one that is meant. Who can write to the store can put
/// another in its place: a plain one, or one encrypted to the same recipients, who are public.
fn is_trusted(fingerprint: Option<Fingerprint>, access: &Access) -> Result<(), String> {
    let trusted = &access.trusted;
    match fingerprint {
        None if !trusted.is_empty() => {
            Err("it is not encrypted, and so has no fingerprint; somebody may have replaced it"
                .into())
        }
        None if !access.keys.is_empty() && !access.plain => Err(
            "it is not encrypted, though a key is given; somebody may have replaced it. If it is \
             meant to be plain, give no key, or `Access::with_plain`"
                .into(),
        ),
        Some(found) if !trusted.is_empty() && !trusted.contains(&found.to_string()) => {
            Err(format!(
                "its fingerprint is {found}, not {}; somebody may have replaced it",
                trusted.join(" or ")
            ))
        }
        _ => Ok(()),
    }
}

/// The key of a pack.
pub fn pack_key(pack: PackId) -> String {
    let id = pack.to_string();
    format!("packs/{}/{id}", &id[..2])
}

/// The key of a map.
pub fn map_key(map: MapId) -> String {
    format!("maps/{map}")
}

/// The map that an object is.
pub fn map_of_key(key: &str) -> Option<MapId> {
    key.strip_prefix("maps/")?.parse().ok()
}

/// Reads the key of a manifest.
pub fn parse_key(key: &str) -> Option<Snapshot> {
    let (_machine, name) = key.strip_prefix("snapshots/")?.split_once('/')?;
    let (time, id) = name.split_once('-')?;
    let (unix_us, id) = (read_stamp(time)?, id.parse().ok()?);
    Some(Snapshot { unix_us, id, key: key.to_owned() })
}

/// Takes manifests apart in whose places a prune has put others: of the same snapshot, and later.
fn take_replaced(found: Vec<Snapshot>) -> (Vec<Snapshot>, Vec<Snapshot>) {
    let mut last: HashMap<(&str, SnapshotId), u64> = HashMap::new();
    for one in &found {
        let last = last.entry((one.folder(), one.id)).or_default();
        *last = one.unix_us.max(*last);
    }
    let is_last: Vec<bool> =
        found.iter().map(|one| last[&(one.folder(), one.id)] == one.unix_us).collect();
    let mut is_last = is_last.into_iter();
    found.into_iter().partition(|_| is_last.next().unwrap_or(true))
}

/// An extent that was fetched.
pub struct Fetched {
    /// As it is stored.
    pub stored: Bytes,
    /// Its bytes, or what is wrong with them.
    pub bytes: Result<Bytes, RepositoryError>,
}

/// Extents of a pack that are fetched in one request.
struct Together {
    pack: PackId,
    bytes: Range<u64>,
    /// Their places in what was asked for.
    extents: Vec<usize>,
}

/// Puts extents together that lie near each other.
fn together(extents: &[Extent]) -> Vec<Together> {
    let mut order: Vec<usize> = (0..extents.len()).collect();
    order.sort_by_key(|&number| (extents[number].pack, extents[number].at));
    let mut ranges: Vec<Together> = Vec::new();
    for number in order {
        let Extent { pack, at, stored, .. } = extents[number];
        let (start, end) = (u64::from(at), u64::from(at) + u64::from(stored));
        match ranges.last_mut() {
            Some(last)
                if last.pack == pack
                    && start <= last.bytes.end + GAP
                    && end.max(last.bytes.end) - last.bytes.start <= MAX_RANGE =>
            {
                last.bytes.end = last.bytes.end.max(end);
                last.extents.push(number);
            }
            _ => ranges.push(Together { pack, bytes: start..end, extents: vec![number] }),
        }
    }
    ranges
}
