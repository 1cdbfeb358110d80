//! A run of pages made ready to be installed: looked up, read, and put in order.

use super::{Content, Memory, MemoryError};
use crate::page::{BlockId, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, Run};

/// Buffers for neighbouring pages of one block, which are reused.
pub(super) struct Window {
    run: Run,
    /// The pages' bytes, one after the other.
    bytes: Box<[u8]>,
    /// What is known of each page.
    slots: Vec<Slot>,
    /// Chunks that are read next, each with its length in bytes.
    whole: Vec<(ChunkId, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Not wanted: it is claimed or present.
    Skip,
    /// All zeros.
    Zero,
    /// To be read from there.
    Stored(Location),
    /// Its bytes are in the buffer.
    Ready,
}

impl Window {
    /// A window of `pages` pages at most.
    pub fn new(pages: usize) -> Window {
        let run = Run { block: BlockId(0), first: 0, count: 0 };
        let bytes = vec![0; pages * PAGE_SIZE].into_boxed_slice();
        Window { run, bytes, slots: Vec::with_capacity(pages), whole: Vec::with_capacity(pages) }
    }

    /// The most pages it takes.
    pub fn capacity(&self) -> u64 {
        (self.bytes.len() / PAGE_SIZE) as u64
    }

    /// Reads those pages of `run` for which `absent` and `suits` hold, each chunk once. `pause`
    /// is called before each read, so that prefetch can stand aside.
    pub fn load(
        &mut self,
        memory: &Memory,
        reader: &mut dyn ChunkReader,
        run: Run,
        absent: impl Fn(Page) -> bool,
        suits: impl Fn(Page, Location) -> bool,
        pause: impl Fn(),
    ) -> Result<(), MemoryError> {
        self.run = run;
        self.slots.clear();
        for page in run.pages() {
            if !absent(page) {
                self.slots.push(Slot::Skip);
                continue;
            }
            let located = memory.source.locate(page);
            let location = located.map_err(|e| memory.source_error(Run::single(page), e))?;
            self.slots.push(match location {
                location if !suits(page, location) => Slot::Skip,
                Location::Zero => Slot::Zero,
                location => Slot::Stored(location),
            });
        }
        for at in 0..self.slots.len() {
            if matches!(self.slots[at], Slot::Stored(_)) {
                pause();
                self.read_chunks_of(at, memory, reader)?;
            }
        }
        self.make_host_pages_whole(memory.block(run.block).pages_per_host_page());
        Ok(())
    }

    /// Reads the chunk of one page, with the chunks behind it where all of them are wanted as a
    /// whole, and takes from it all pages of the window.
    fn read_chunks_of(
        &mut self,
        at: usize,
        memory: &Memory,
        reader: &mut dyn ChunkReader,
    ) -> Result<(), MemoryError> {
        let Slot::Stored(Location::Stored { chunk, .. }) = self.slots[at] else { return Ok(()) };
        let page = Page { block: self.run.block, number: self.run.first + at as u64 };
        let failed = |e| memory.source_error(Run::single(page), e);
        // Mostly the pages from here on are whole chunks, in their order.
        self.find_whole_chunks(at);
        if !self.whole.is_empty() {
            let len: usize = self.whole.iter().map(|(_, len)| len).sum();
            let bytes = &mut self.bytes[at * PAGE_SIZE..][..len];
            let read = reader.read_run(&self.whole, bytes).map_err(failed)?;
            if read > 0 {
                let len: usize = self.whole[..read].iter().map(|(_, len)| len).sum();
                self.slots[at..][..len / PAGE_SIZE].fill(Slot::Ready);
                return Ok(());
            }
        }
        let read = reader.read(chunk).map_err(failed)?;
        let near = (at + memory.source.chunk_pages()).min(self.slots.len());
        for (slot, bytes) in self.slots[at..near]
            .iter_mut()
            .zip(self.bytes[at * PAGE_SIZE..].chunks_exact_mut(PAGE_SIZE))
        {
            if let Slot::Stored(Location::Stored { chunk: other, slot: place }) = *slot
                && other == chunk
            {
                let from =
                    read.get(place * PAGE_SIZE..(place + 1) * PAGE_SIZE).ok_or_else(|| {
                        let what = format!("chunk {} has no page {place}", chunk.0);
                        memory.source_error(Run::single(page), what.into())
                    })?;
                bytes.copy_from_slice(from);
                *slot = Slot::Ready;
            }
        }
        Ok(())
    }

    /// Lists the chunks that the slots from `at` on hold as a whole and in order, each with the
    /// bytes of it that the window shows.
    fn find_whole_chunks(&mut self, at: usize) {
        self.whole.clear();
        for slot in &self.slots[at..] {
            let Slot::Stored(Location::Stored { chunk, slot }) = *slot else { return };
            let has_room = self.whole.len() < self.whole.capacity();
            match self.whole.last_mut() {
                Some((last, len)) if *last == chunk && *len == slot * PAGE_SIZE => {
                    *len += PAGE_SIZE;
                }
                _ if slot == 0 && has_room => self.whole.push((chunk, PAGE_SIZE)),
                _ => return,
            }
        }
    }

    /// A host page is installed as a whole: where only some of its target pages
    /// are zero, their zeros are written out; where only some are wanted, none is.
    fn make_host_pages_whole(&mut self, unit: u64) {
        if unit == 1 {
            return;
        }
        let unit = unit as usize;
        let bytes = self.bytes.chunks_mut(unit * PAGE_SIZE);
        for (slots, bytes) in self.slots.chunks_mut(unit).zip(bytes) {
            if slots.contains(&Slot::Skip) {
                slots.fill(Slot::Skip);
                continue;
            }
            if slots.iter().all(|slot| *slot != Slot::Ready) {
                continue;
            }
            for (slot, bytes) in slots.iter_mut().zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                if *slot == Slot::Zero {
                    bytes.fill(0);
                    *slot = Slot::Ready;
                }
            }
        }
    }

    /// The runs of pages that are ready, each with its content.
    pub fn pieces(&self) -> impl Iterator<Item = (Run, Content<'_>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            at += self.slots[at..].iter().take_while(|slot| **slot == Slot::Skip).count();
            let kind = *self.slots.get(at)?;
            let count = self.slots[at..].iter().take_while(|slot| **slot == kind).count();
            let first = self.run.first + at as u64;
            let run = Run { block: self.run.block, first, count: count as u64 };
            let content = self.content(run, kind);
            at += count;
            Some((run, content))
        })
    }

    /// The content of one host page that was wanted and has been loaded.
    pub fn host_page(&self, run: Run) -> Content<'_> {
        self.content(run, self.slots[(run.first - self.run.first) as usize])
    }

    fn content(&self, run: Run, kind: Slot) -> Content<'_> {
        match kind {
            Slot::Zero => Content::Zero,
            _ => {
                let start = (run.offset() - self.run.offset()) as usize;
                Content::Bytes(&self.bytes[start..start + run.bytes() as usize])
            }
        }
    }
}
