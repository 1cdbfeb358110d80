//! The working set: which pages a guest asked for soon after a revert, in order.
//!
//! A guest that is reverted again and again touches much the same pages first. What one
//! revert saw being demanded, the next one brings before it is asked for. It is a hint
//! and nothing more: a record that is damaged, of another image, or too large is ignored,
//! and costs at most the reading of a small file.
//!
//! Pages that were brought ahead are not demanded any more, so a new record alone would
//! forget them. A record therefore keeps what the one before it held, adds what was
//! demanded all the same, and stops growing at a quarter of the machine's memory.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::host::sandbox;
use crate::identity::Identity;
use crate::kind::{Details, ErrorKind};
use crate::page::{Block, BlockId, Page};

/// How long after the start of a revert demands are recorded, by default.
pub const RECORD_WINDOW: Duration = Duration::from_secs(30);

/// The share of a machine's pages that a record holds at most: one in so many.
const SHARE: u64 = 4;

/// Pages that a record holds at most, whatever the machine's size: 4 GiB.
pub const MAX_PAGES: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"SNAPWSET";
const VERSION: u32 = 1;
const MAGIC_OFFSET: usize = 0;
const VERSION_OFFSET: usize = 8;
const COUNT_OFFSET: usize = 12;
const IDENTITY_OFFSET: usize = 16;
const RECORDED_OFFSET: usize = 32;
const ENTRIES_OFFSET: usize = 40;
const ENTRY_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 8;

/// A recorded working set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    /// The image that it belongs to.
    pub identity: Identity,
    /// When it was last added to, in seconds since 1970.
    pub recorded_unix: u64,
    /// The pages, in the order in which they were first asked for.
    pub pages: Vec<Page>,
}

/// Why a record can't be used. Nothing is lost: the revert goes without.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// There is none.
    #[error("no working set has been recorded yet at `{0}`")]
    None(PathBuf),
    /// It can't be read or written.
    #[error("the working set `{path}` can't be {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("the working set `{path}` is of no use: {problem}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
}

impl WorkingSetError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            WorkingSetError::None(_) | WorkingSetError::Unusable { .. } => {
                ErrorKind::WorkingSetMissing
            }
            WorkingSetError::Io { source, .. } => ErrorKind::of_io(source),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let (WorkingSetError::None(path)
        | WorkingSetError::Io { path, .. }
        | WorkingSetError::Unusable { path, .. }) = self;
        Details::new(&self.to_string(), Some(path), None)
    }
}

/// Where an image's working set is: beside it.
pub fn path_for(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".ws");
    name.into()
}

/// The most pages that a record of this machine holds.
fn limit(blocks: &[Block]) -> usize {
    let pages: u64 = blocks.iter().map(Block::pages).sum();
    usize::try_from(pages / SHARE).unwrap_or(MAX_PAGES).min(MAX_PAGES)
}

impl WorkingSet {
    /// Reads the record of an image.
    ///
    /// # Errors
    /// When there is none, or it is damaged, of another image, or does not fit its
    /// machine.
    pub fn load(
        path: &Path,
        identity: Identity,
        blocks: &[Block],
    ) -> Result<WorkingSet, WorkingSetError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => WorkingSetError::None(path.to_owned()),
            _ => WorkingSetError::Io { path: path.to_owned(), doing: "read", source },
        };
        let file = sandbox::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            let problem = "it is not a regular file";
            return Err(WorkingSetError::Unusable { path: path.to_owned(), problem });
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        let set = WorkingSet::decode(&bytes)
            .map_err(|problem| WorkingSetError::Unusable { path: path.to_owned(), problem })?;
        let problem = match set {
            _ if set.identity != identity => "it belongs to another image",
            _ if set.pages.len() > limit(blocks) => "it is larger than this machine allows",
            _ if !set.pages.iter().all(|page| fits(page, blocks)) => {
                "it names memory that this machine does not have"
            }
            _ => return Ok(set),
        };
        Err(WorkingSetError::Unusable { path: path.to_owned(), problem })
    }

    /// The record that follows `before`: what it held, and what was demanded all the
    /// same. Nothing when that adds too little to be worth writing.
    pub fn following(
        before: Option<&WorkingSet>,
        identity: Identity,
        demanded: impl IntoIterator<Item = Page>,
        blocks: &[Block],
    ) -> Option<WorkingSet> {
        let mut pages = before.map(|set| set.pages.clone()).unwrap_or_default();
        let old = pages.len();
        let mut known: HashSet<Page> = pages.iter().copied().collect();
        for page in demanded {
            if pages.len() >= limit(blocks) {
                break;
            }
            if known.insert(page) {
                pages.push(page);
            }
        }
        // A hundredth more is not worth a write for every one of a thousand reverts.
        let worth_writing = pages.len() - old > old / 100;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        worth_writing.then_some(WorkingSet { identity, recorded_unix: now.as_secs(), pages })
    }

    /// Writes the record, replacing an older one in one step.
    ///
    /// # Errors
    /// When it can't be written; an older one is then still there, and nothing else.
    pub fn store(&self, path: &Path) -> Result<(), WorkingSetError> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", Uuid::new_v4().simple()));
        let temporary = PathBuf::from(temporary);
        let written = (|| {
            let mut options = File::options();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&self.encode())?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        })();
        written.map_err(|source| {
            let _ = fs::remove_file(&temporary);
            WorkingSetError::Io { path: path.to_owned(), doing: "written", source }
        })
    }

    /// The record as the bytes of its file.
    pub fn encode(&self) -> Vec<u8> {
        let pages = &self.pages[..self.pages.len().min(MAX_PAGES)];
        let mut bytes =
            Vec::with_capacity(ENTRIES_OFFSET + pages.len() * ENTRY_BYTES + CHECKSUM_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(pages.len() as u32).to_le_bytes());
        bytes.extend_from_slice(self.identity.as_bytes());
        bytes.extend_from_slice(&self.recorded_unix.to_le_bytes());
        for page in pages {
            let entry = u64::from(page.block.0) << 48 | page.number & (u64::MAX >> 16);
            bytes.extend_from_slice(&entry.to_le_bytes());
        }
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// Reads the bytes of a record's file.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<WorkingSet, &'static str> {
        let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let half = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        if bytes.get(MAGIC_OFFSET..MAGIC.len()) != Some(&MAGIC[..]) {
            return Err("it is not a working set");
        }
        if half(VERSION_OFFSET) != Some(VERSION) {
            return Err("it is of another version");
        }
        let count = half(COUNT_OFFSET).ok_or("it is truncated")? as usize;
        let end = ENTRIES_OFFSET + count.min(MAX_PAGES) * ENTRY_BYTES;
        if count > MAX_PAGES || bytes.len() != end + CHECKSUM_BYTES {
            return Err("its length is wrong");
        }
        if word(end) != Some(xxh3_64(&bytes[..end])) {
            return Err("its checksum does not match");
        }
        let identity = bytes.get(IDENTITY_OFFSET..RECORDED_OFFSET).and_then(|b| b.try_into().ok());
        let entries = bytes[ENTRIES_OFFSET..end].as_chunks::<ENTRY_BYTES>().0.iter();
        let page = |entry: &[u8; ENTRY_BYTES]| {
            let entry = u64::from_le_bytes(*entry);
            Page { block: BlockId((entry >> 48) as u16), number: entry & (u64::MAX >> 16) }
        };
        Ok(WorkingSet {
            identity: Identity::from_bytes(identity.ok_or("it is truncated")?),
            recorded_unix: word(RECORDED_OFFSET).ok_or("it is truncated")?,
            pages: entries.map(page).collect(),
        })
    }
}

/// Bytes of a record's file at most.
pub const MAX_BYTES: usize = ENTRIES_OFFSET + MAX_PAGES * ENTRY_BYTES + CHECKSUM_BYTES;

fn fits(page: &Page, blocks: &[Block]) -> bool {
    blocks.get(page.block.index()).is_some_and(|block| page.number < block.pages())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks() -> Vec<Block> {
        let block =
            |name: &str, pages: u64| Block { name: name.into(), len: pages << 12, page_size: 4096 };
        vec![block("pc.ram", 4000), block("pc.bios", 64)]
    }

    fn set(numbers: &[u64]) -> WorkingSet {
        let page = |number: &u64| Page { block: BlockId(0), number: *number };
        let identity = Identity::from_bytes([7; 16]);
        WorkingSet { identity, recorded_unix: 1, pages: numbers.iter().map(page).collect() }
    }

    #[test]
    fn a_record_is_kept_and_replaced_in_one_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_for(&folder.path().join("vm.snap"));
        for numbers in [&[3, 1, 2][..], &[9]] {
            let set = set(numbers);
            set.store(&path).unwrap();
            assert_eq!(WorkingSet::load(&path, set.identity, &blocks()).unwrap(), set);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ws");
        let load = |identity| WorkingSet::load(&path, identity, &blocks()).unwrap_err().to_string();
        let identity = set(&[]).identity;
        assert!(load(identity).contains("no working set has been recorded"));
        set(&[4000]).store(&path).unwrap();
        assert!(load(identity).contains("memory that this machine does not have"));
        set(&[1]).store(&path).unwrap();
        assert!(load(Identity::from_bytes([0; 16])).contains("another image"));
        set(&(0..1017).collect::<Vec<u64>>()).store(&path).unwrap();
        assert!(load(identity).contains("larger than this machine allows"));
    }

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ws");
        let load = || {
            WorkingSet::load(&path, Identity::from_bytes([0; 16]), &blocks())
                .unwrap_err()
                .to_string()
        };
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(load().contains("not a regular file"), "{}", load());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(load().contains("not a regular file"), "{}", load());
    }

    #[test]
    fn a_record_does_not_forget_and_does_not_grow_without_bound() {
        let before = set(&[5, 6]);
        let next = |demanded: Vec<u64>| {
            let pages = set(&demanded).pages;
            WorkingSet::following(Some(&before), before.identity, pages, &blocks())
        };
        assert_eq!(next(vec![6, 7, 7]).unwrap().pages, set(&[5, 6, 7]).pages);
        assert_eq!(next(vec![5]), None);
        assert_eq!(next((0..4000).collect()).unwrap().pages.len(), 4064 / 4);
    }

    proptest! {
        #[test]
        fn any_damage_is_found(numbers in prop::collection::vec(0u64..4000, 0..50),
                               at in any::<prop::sample::Index>(), flip in 1u8..,
                               cut in any::<prop::sample::Index>()) {
            let bytes = set(&numbers).encode();
            prop_assert_eq!(WorkingSet::decode(&bytes).unwrap(), set(&numbers));
            prop_assert!(WorkingSet::decode(&bytes[..cut.index(bytes.len())]).is_err());
            let mut flipped = bytes.clone();
            flipped[at.index(bytes.len())] ^= flip;
            prop_assert!(WorkingSet::decode(&flipped).is_err());
        }
    }
}
