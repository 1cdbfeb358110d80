//! Chunks that several guests of one image read: decompressed and verified once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::page::{
    Block, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError,
};

/// A source of pages whose chunks are kept, up to a number of bytes, for all who read from it.
///
/// A fault that finds its chunk is spared the read, the decompression and the checksum. One that
/// does not pays for a copy of the chunk, in memory of its own: some microseconds of the tens that
/// decompressing takes. Nobody waits for anybody else: a part of the cache that is being changed
/// counts as one without the chunk.
pub struct CachedSource<S> {
    source: S,
    chunks: Arc<Chunks>,
}

struct Chunks {
    kept: Cache<ChunkId, Arc<[u8]>, Bytes>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What a cache of chunks has come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheFigures {
    /// Bytes that are kept.
    pub bytes: u64,
    /// The most that are.
    pub limit: u64,
    /// Chunks that were found.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
}

/// A chunk weighs what it is long.
#[derive(Clone)]
struct Bytes;

impl Weighter<ChunkId, Arc<[u8]>> for Bytes {
    fn weight(&self, _: &ChunkId, chunk: &Arc<[u8]>) -> u64 {
        chunk.len() as u64
    }
}

impl<S: PageSource> CachedSource<S> {
    /// Keeps at most so many bytes of this source's chunks.
    pub fn new(source: S, bytes: u64) -> CachedSource<S> {
        let chunk = (source.chunk_pages() * PAGE_SIZE) as u64;
        let kept = Cache::with_weighter((bytes / chunk.max(1)) as usize, bytes, Bytes);
        let chunks = Chunks { kept, hits: AtomicU64::new(0), misses: AtomicU64::new(0) };
        CachedSource { source, chunks: Arc::new(chunks) }
    }

    /// What it has come to.
    pub fn figures(&self) -> CacheFigures {
        CacheFigures {
            bytes: self.chunks.kept.weight(),
            limit: self.chunks.kept.capacity(),
            hits: self.chunks.hits.load(Ordering::Relaxed),
            misses: self.chunks.misses.load(Ordering::Relaxed),
        }
    }
}

impl Chunks {
    fn find(&self, chunk: ChunkId) -> Option<Arc<[u8]>> {
        let found = self.kept.try_get(&chunk).ok().flatten();
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    fn keep(&self, chunk: ChunkId, bytes: &[u8]) {
        // Somebody else changes this part of the cache: then it is kept the next time.
        let _ = self.kept.try_insert(chunk, bytes.into());
    }
}

impl<S: PageSource> PageSource for CachedSource<S> {
    fn blocks(&self) -> &[Block] {
        self.source.blocks()
    }

    fn chunk_pages(&self) -> usize {
        self.source.chunk_pages()
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        self.source.locate(page)
    }

    fn is_zero(&self, page: Page) -> bool {
        self.source.is_zero(page)
    }

    fn look_again(&self) {
        self.source.look_again();
    }

    fn is_far(&self) -> bool {
        self.source.is_far()
    }

    fn will_need(&self, pages: &[Page]) {
        self.source.will_need(pages);
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let (reader, chunks) = (self.source.reader()?, Arc::clone(&self.chunks));
        Ok(Box::new(CachedReader { reader, chunks, found: None }))
    }
}

struct CachedReader {
    reader: Box<dyn ChunkReader>,
    chunks: Arc<Chunks>,
    /// The chunk that was read last, where it was found.
    found: Option<Arc<[u8]>>,
}

impl ChunkReader for CachedReader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        self.found = self.chunks.find(chunk);
        match &self.found {
            Some(bytes) => Ok(bytes),
            None => {
                let bytes = self.reader.read(chunk)?;
                self.chunks.keep(chunk, bytes);
                Ok(bytes)
            }
        }
    }

    fn read_to(&mut self, chunk: ChunkId, out: &mut [u8]) -> Result<bool, SourceError> {
        match self.chunks.find(chunk) {
            Some(bytes) if bytes.len() == out.len() => {
                out.copy_from_slice(&bytes);
                Ok(true)
            }
            Some(_) => Ok(false),
            None => {
                let read = self.reader.read_to(chunk, out)?;
                if read {
                    self.chunks.keep(chunk, out);
                }
                Ok(read)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::BlockId;

    /// A source of chunks of 2 pages, each filled with its number, that counts how often it is
    /// read and fails where it is told to.
    struct Counting {
        blocks: [Block; 1],
        reads: Arc<AtomicU64>,
    }

    struct Reads(Arc<AtomicU64>, Vec<u8>);

    impl PageSource for Counting {
        fn blocks(&self) -> &[Block] {
            &self.blocks
        }

        fn chunk_pages(&self) -> usize {
            2
        }

        fn locate(&self, page: Page) -> Result<Location, SourceError> {
            let _ = page;
            Ok(Location::Zero)
        }

        fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
            Ok(Box::new(Reads(Arc::clone(&self.reads), Vec::new())))
        }
    }

    impl ChunkReader for Reads {
        fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            if number(chunk) == 7 {
                return Err("damaged".into());
            }
            self.1 = vec![number(chunk); 2 * PAGE_SIZE];
            Ok(&self.1)
        }

        fn read_to(&mut self, chunk: ChunkId, out: &mut [u8]) -> Result<bool, SourceError> {
            out.copy_from_slice(self.read(chunk)?);
            Ok(true)
        }
    }

    fn number(chunk: ChunkId) -> u8 {
        chunk.0 as u8
    }

    fn chunk(number: u64) -> ChunkId {
        ChunkId(number)
    }

    fn cached(bytes: u64) -> (CachedSource<Counting>, Arc<AtomicU64>) {
        let reads = Arc::new(AtomicU64::new(0));
        let blocks = [Block { name: "ram".into(), len: 1 << 20, page_size: 4096 }];
        (CachedSource::new(Counting { blocks, reads: Arc::clone(&reads) }, bytes), reads)
    }

    #[test]
    fn a_chunk_is_read_once_for_all_readers() {
        let (source, reads) = cached(1 << 20);
        let (mut first, mut second) = (source.reader().unwrap(), source.reader().unwrap());
        let mut out = vec![0; 2 * PAGE_SIZE];
        assert_eq!(first.read(chunk(3)).unwrap(), [3; 2 * PAGE_SIZE]);
        assert_eq!(second.read(chunk(3)).unwrap(), [3; 2 * PAGE_SIZE]);
        assert!(second.read_to(chunk(3), &mut out).unwrap());
        assert_eq!(out, [3; 2 * PAGE_SIZE]);
        assert!(first.read_to(chunk(4), &mut out).unwrap());
        assert_eq!(second.read(chunk(4)).unwrap(), [4; 2 * PAGE_SIZE]);
        assert_eq!(reads.load(Ordering::Relaxed), 2);
        // A buffer of another length is told as the source tells it.
        assert!(!second.read_to(chunk(4), &mut out[..PAGE_SIZE]).unwrap());
        let CacheFigures { bytes, hits, misses, .. } = source.figures();
        assert_eq!((bytes, hits, misses), (4 * PAGE_SIZE as u64, 4, 2));
        let zero = Page { block: BlockId(0), number: 0 };
        assert!(source.is_zero(zero) && source.chunk_pages() == 2 && source.blocks().len() == 1);
    }

    #[test]
    fn what_can_not_be_read_is_not_kept() {
        let (source, reads) = cached(1 << 20);
        let mut reader = source.reader().unwrap();
        assert!(reader.read(chunk(7)).is_err() && reader.read(chunk(7)).is_err());
        assert_eq!((reads.load(Ordering::Relaxed), source.figures().bytes), (2, 0));
    }

    #[test]
    fn it_keeps_no_more_than_it_may() {
        let limit = 16 * 2 * PAGE_SIZE as u64;
        let (source, _) = cached(limit);
        let mut reader = source.reader().unwrap();
        for number in 100..200 {
            reader.read(chunk(number)).unwrap();
            assert!(source.figures().bytes <= limit);
        }
    }
}
