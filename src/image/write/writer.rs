//! Writing an image in one pass, pages in any order.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::identity::Identity;

use crate::cancel::Cancellation;
use crate::image::format::error::ImageError;
use crate::image::format::layout::{MAX_CHUNKS, PageEntry};
use crate::image::format::manifest::{Details, Manifest, Sections, check_blocks};
use crate::image::read::image::Image;
use crate::image::write::delta::{Base, Inherited, ParentPages};
use crate::image::write::index::{check_index, empty_index, pending, renumber_layers, resolve};
use crate::image::write::options::{Saved, WriterOptions, WriterStats};
use crate::image::write::pack::{Buffer, Job, Packing};
use crate::image::write::pipeline::Pipeline;
use crate::image::write::tail::{self, Index, Parts};
use crate::image::write::target::Target;
use crate::page::{Block, PAGE_SIZE, Page, PageBytes, Run};

/// Writes an image.
///
/// Pages are collected in aligned groups of as many pages as a chunk holds. A
/// group whose pages are all known is sent to the threads as one chunk; when too
/// many are open, the oldest is sent incomplete, and its other pages make another chunk
/// later. A chunk that is known already is not stored again.
///
/// Memory in addition to the buffers: 8 bytes per target page, 24 bytes per chunk, up to 48
/// more per chunk to find duplicates (168 MiB at most in all: see `dedupe`), and per worker
/// a chunk and zstd's own memory (1 to 3 MiB).
///
/// Dropped before [`ImageWriter::finish`], it leaves nothing behind.
pub struct ImageWriter {
    // Dropped before `target`, so that its threads end while the file still exists.
    pipeline: Pipeline,
    target: Target,
    identity: Identity,
    blocks: Vec<Block>,
    base: Option<Arc<Base>>,
    /// For each block: its first entry in `index`, and the key of its first group.
    starts: Vec<(u64, u64)>,
    chunk_pages: usize,
    /// The page index. The pages of an open group are entered as [`pending`] when it is sent,
    /// and with their chunk when its buffer has come back.
    index: Vec<u64>,
    /// Open groups by key, without the current one.
    open: HashMap<u64, Group>,
    /// The group of the last page: most pages come in ascending order.
    current: Option<Group>,
    /// Keys of all open groups, the oldest first.
    ages: BTreeMap<u64, u64>,
    next_age: u64,
    max_open: usize,
    next_job: u64,
    data_pages: u64,
    zero_pages: u64,
    repeated_pages: u64,
}

/// An aligned group of pages that is being collected.
struct Group {
    key: u64,
    /// Its key in `ages`.
    age: u64,
    /// Its first page, and that page's entry in the index.
    page: Page,
    first: usize,
    /// Pages of it that are not known yet.
    missing: u32,
    /// Pages whose bytes are in the buffer, each in its place.
    mask: u64,
    buffer: Buffer,
}

/// Where a page belongs.
struct Place {
    /// Its group's key.
    key: u64,
    /// Its group's first page, that page's entry in the index, and how many there are.
    page: Page,
    first: usize,
    count: usize,
    /// Its place in the group.
    slot: usize,
}

impl ImageWriter {
    /// Starts an image that will be called `path`, of a machine with these
    /// blocks.
    ///
    /// # Errors
    /// Options or blocks that the format does not allow, a file that exists, a
    /// directory that can't be written to, an index that takes more than a quarter of this
    /// host's memory.
    pub fn create(
        path: &Path,
        options: WriterOptions,
        blocks: Vec<Block>,
    ) -> Result<ImageWriter, ImageError> {
        ImageWriter::start(path, options, blocks, None)
    }

    /// Starts an image on top of another: pages that `parent` holds at the same place
    /// of a block of the same name, be it in its own file or in another, are referred
    /// to and not stored again. Takes as much memory in addition as `parent` does when all of
    /// it is read.
    ///
    /// # Errors
    /// As [`ImageWriter::create`]; and where the new image would replace one that it
    /// refers to, or where these are too many.
    pub fn create_on(
        path: &Path,
        options: WriterOptions,
        blocks: Vec<Block>,
        parent: &Arc<Image>,
    ) -> Result<ImageWriter, ImageError> {
        let base = Base::new(parent, path, &blocks)?;
        ImageWriter::start(path, options, blocks, Some(Arc::new(base)))
    }

    fn start(
        path: &Path,
        options: WriterOptions,
        blocks: Vec<Block>,
        base: Option<Arc<Base>>,
    ) -> Result<ImageWriter, ImageError> {
        let WriterOptions { compression, chunk_pages, force, memory, workers, .. } = options;
        options.check()?;
        let pages = check_blocks(&blocks).map_err(ImageError::Blocks)?;
        check_index(path, pages)?;
        let index = empty_index(pages)?;
        let target = Target::create(path, force)?;
        let chunk_bytes = chunk_pages * PAGE_SIZE;
        let buffers = (memory / chunk_bytes).max(4 + 2 * workers);
        let packing = Packing::new(compression, chunk_bytes, base.as_ref());
        let pipeline = Pipeline::start(
            target.file(),
            path,
            packing,
            workers,
            buffers,
            (options.bandwidth, options.cache),
        )?;
        let mut starts = Vec::with_capacity(blocks.len());
        let (mut first_entry, mut first_group) = (0, 0);
        for block in &blocks {
            starts.push((first_entry, first_group));
            first_entry += block.pages();
            first_group += block.pages().div_ceil(chunk_pages as u64);
        }
        Ok(ImageWriter {
            pipeline,
            target,
            identity: Identity::random(),
            blocks,
            base,
            starts,
            chunk_pages,
            index,
            open: HashMap::new(),
            current: None,
            ages: BTreeMap::new(),
            next_age: 0,
            // The threads have the other half: a wait for a buffer ends when they are done.
            max_open: buffers / 2,
            next_job: 0,
            data_pages: 0,
            zero_pages: 0,
            repeated_pages: 0,
        })
    }

    /// Adds a page. When a page is added again, the last one counts. Copies the bytes and
    /// returns, unless all buffers are full: then it waits for the disk.
    ///
    /// # Errors
    /// A page that does not exist; or what the threads have met since the last call, after
    /// which the writer can't be used any more.
    pub fn page(&mut self, page: Page, bytes: &PageBytes) -> Result<(), ImageError> {
        const ZEROS: PageBytes = [0; PAGE_SIZE];
        if *bytes == ZEROS {
            return self.zero(page);
        }
        self.pipeline.check()?;
        let place = self.place(page)?;
        let mut group = self.take_group(&place)?;
        self.count(&mut group, place.slot, true);
        group.mask |= 1 << place.slot;
        let at = place.slot * PAGE_SIZE;
        group.buffer[at..at + PAGE_SIZE].copy_from_slice(bytes);
        self.keep_or_send(group)
    }

    /// Adds a page that is all zeros. When a page is added again, the last one counts.
    ///
    /// # Errors
    /// As [`ImageWriter::page`].
    pub fn zero(&mut self, page: Page) -> Result<(), ImageError> {
        self.pipeline.check()?;
        self.enter(page, PageEntry::ZERO)
    }

    /// Adds pages that are all zeros.
    ///
    /// # Errors
    /// As [`ImageWriter::page`].
    pub fn zeros(&mut self, run: Run) -> Result<(), ImageError> {
        self.pipeline.check()?;
        let mut number = run.first;
        while number < run.end() {
            let place = self.place(Page { block: run.block, number })?;
            let end = run.end().min(place.page.number + place.count as u64);
            match self.is_open(&place) {
                true => (number..end)
                    .try_for_each(|number| self.zero(Page { block: run.block, number }))?,
                false => self.enter_zeros(place.first + place.slot, (end - number) as usize),
            }
            number = end;
        }
        Ok(())
    }

    /// What the parent has, for [`ImageWriter::inherit`]; none without a parent.
    pub(crate) fn parent_pages(&self) -> Option<ParentPages> {
        self.base.as_ref().map(ParentPages::of)
    }

    /// Adds the pages of a run, which are the parent's: they take no room of their own. When a page is
    /// added again, the last one counts.
    ///
    /// # Errors
    /// As [`ImageWriter::page`].
    pub(crate) fn inherit(&mut self, run: Run, pages: &[Inherited]) -> Result<(), ImageError> {
        self.pipeline.check()?;
        let mut pages = run.pages().zip(pages);
        pages.try_for_each(|(page, inherited)| self.enter(page, inherited.0.encode()))
    }

    /// Whether `pages` can be added at once with half of all buffers still free behind them.
    pub fn has_room(&self, pages: u64) -> bool {
        let groups = (pages as usize).div_ceil(self.chunk_pages);
        self.pipeline.free_buffers() >= groups + self.max_open
    }

    /// The identity that the image will have.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// How far it has come.
    pub fn stats(&self) -> WriterStats {
        WriterStats {
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            written_bytes: self.pipeline.written_bytes(),
            buffered_bytes: self.pipeline.buffered_bytes(),
            stalled: self.pipeline.stalled(),
        }
    }

    /// Cancels writing from another thread, even within [`ImageWriter::finish`]: the call that
    /// is under way, or else the next one, fails with [`ImageError::Interrupted`].
    pub fn cancellation(&self) -> Cancellation {
        self.pipeline.cancellation()
    }

    /// Writes what is left, makes the file durable (fsync(2)) and gives it its
    /// name.
    ///
    /// # Errors
    /// A page that was never added, sections or a manifest that are too large, an error of
    /// the disk, or a file of that name that has appeared meanwhile. Nothing is left behind
    /// then.
    pub fn finish(mut self, details: Details, sections: Sections) -> Result<Saved, ImageError> {
        // Before pages are counted: a writer that has failed also lacks some.
        self.pipeline.check()?;
        if let Some(group) = self.current.take() {
            self.open.insert(group.key, group);
        }
        while self.send_oldest()? {}
        let missing = self.index.len() as u64 - self.data_pages - self.zero_pages;
        if missing != 0 {
            return Err(self.pages_missing(missing));
        }
        let ImageWriter { pipeline, target, identity, mut index, .. } = self;
        let ImageWriter { data_pages, zero_pages, mut repeated_pages, .. } = self;
        let stop = pipeline.cancellation();
        let (table, sink) =
            pipeline.finish(|stored| repeated_pages += resolve(&mut index, &stored))?;
        let layers = self.base.map(|base| base.layers.clone()).unwrap_or_default();
        let layers = renumber_layers(layers, &mut index);
        let parent_pages = layers.iter().map(|layer| layer.pages).sum();
        let manifest = Manifest {
            identity,
            created_by: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
            machine: details.machine,
            moment_unix_us: details.moment_unix_us,
            pause_us: details.pause_us,
            blocks: self.blocks,
            data_pages,
            zero_pages,
            layers,
            flat: Vec::new(),
        };
        let chunk_pages = self.chunk_pages as u32;
        let path = target.path().to_owned();
        let (manifest, sections) = (&manifest, &sections);
        let parts = Parts {
            manifest,
            sections,
            chunks: &table,
            index: Index::Entries(&index),
            chunk_pages,
        };
        let written = tail::finish(target, sink, parts);
        let image_bytes = written.map_err(|error| match stop.is_requested() {
            true => ImageError::Interrupted(path),
            false => error,
        })?;
        Ok(Saved { identity, data_pages, zero_pages, repeated_pages, parent_pages, image_bytes })
    }

    /// Where a page belongs.
    fn place(&self, page: Page) -> Result<Place, ImageError> {
        let number = page.block.index();
        let found = self.blocks.get(number).zip(self.starts.get(number));
        let Some((block, (first_entry, first_group))) =
            found.filter(|(block, _)| page.number < block.pages())
        else {
            return Err(ImageError::no_such_page(&self.blocks, page));
        };
        let per_chunk = self.chunk_pages as u64;
        let group = page.number / per_chunk;
        Ok(Place {
            key: first_group + group,
            page: Page { number: group * per_chunk, ..page },
            first: (first_entry + group * per_chunk) as usize,
            count: per_chunk.min(block.pages() - group * per_chunk) as usize,
            slot: (page.number % per_chunk) as usize,
        })
    }

    /// Whether a page's group is being collected.
    fn is_open(&self, place: &Place) -> bool {
        let is_current = self.current.as_ref().is_some_and(|group| group.key == place.key);
        is_current || self.open.contains_key(&place.key)
    }

    /// Enters a page that takes no room of its own: zeros, or one of the parent's.
    fn enter(&mut self, page: Page, raw: u64) -> Result<(), ImageError> {
        let place = self.place(page)?;
        let entry = place.first + place.slot;
        let is_data = raw != PageEntry::ZERO;
        if self.is_open(&place) {
            let mut group = self.take_group(&place)?;
            self.count(&mut group, place.slot, is_data);
            group.mask &= !(1 << place.slot);
            self.index[entry] = raw;
            return self.keep_or_send(group);
        }
        match std::mem::replace(&mut self.index[entry], raw) {
            PageEntry::MISSING => {}
            PageEntry::ZERO => self.zero_pages -= 1,
            _ => self.data_pages -= 1,
        }
        *(if is_data { &mut self.data_pages } else { &mut self.zero_pages }) += 1;
        Ok(())
    }

    /// Enters pages that are all zeros, whose group is not open.
    fn enter_zeros(&mut self, first: usize, count: usize) {
        for entry in &mut self.index[first..first + count] {
            match std::mem::replace(entry, PageEntry::ZERO) {
                PageEntry::ZERO => continue,
                PageEntry::MISSING => {}
                _ => self.data_pages -= 1,
            }
            self.zero_pages += 1;
        }
    }

    /// Takes the open group of a page out of the others, or opens one.
    fn take_group(&mut self, place: &Place) -> Result<Group, ImageError> {
        if let Some(group) = self.current.take() {
            if group.key == place.key {
                return Ok(group);
            }
            self.open.insert(group.key, group);
        }
        if let Some(group) = self.open.remove(&place.key) {
            return Ok(group);
        }
        while self.ages.len() >= self.max_open {
            self.send_oldest()?;
        }
        let (buffer, stored) = self.pipeline.buffer()?;
        if let Some(stored) = stored {
            self.repeated_pages += resolve(&mut self.index, &stored);
        }
        let age = self.next_age;
        self.next_age += 1;
        self.ages.insert(age, place.key);
        let entries = &self.index[place.first..place.first + place.count];
        let missing = entries.iter().filter(|raw| **raw == PageEntry::MISSING).count() as u32;
        let Place { key, page, first, .. } = *place;
        Ok(Group { key, age, page, first, missing, mask: 0, buffer })
    }

    /// Counts a page of a group that now has data or is all zeros.
    fn count(&mut self, group: &mut Group, slot: usize, data: bool) {
        if group.mask & 1 << slot != 0 {
            self.data_pages -= 1;
        } else {
            match self.index[group.first + slot] {
                PageEntry::MISSING => group.missing -= 1,
                PageEntry::ZERO => self.zero_pages -= 1,
                _ => self.data_pages -= 1,
            }
        }
        *(if data { &mut self.data_pages } else { &mut self.zero_pages }) += 1;
    }

    /// Sends a group whose pages are all known; keeps it otherwise.
    fn keep_or_send(&mut self, group: Group) -> Result<(), ImageError> {
        if group.missing == 0 {
            return self.send(group);
        }
        self.current = Some(group);
        Ok(())
    }

    /// Sends the oldest group. False if there is none.
    fn send_oldest(&mut self) -> Result<bool, ImageError> {
        let Some((_, key)) = self.ages.pop_first() else { return Ok(false) };
        if let Some(group) = self.open.remove(&key) {
            self.send(group)?;
        }
        Ok(true)
    }

    /// Sends a group's pages to become a chunk.
    fn send(&mut self, group: Group) -> Result<(), ImageError> {
        self.ages.remove(&group.age);
        if group.mask == 0 {
            self.pipeline.give_back(group.buffer);
            return Ok(());
        }
        let job = self.next_job;
        if job >= MAX_CHUNKS {
            return Err(ImageError::Options(format!("more than {MAX_CHUNKS} chunks")));
        }
        self.next_job += 1;
        let Group { page, first, mask, buffer, .. } = group;
        for place in (0..self.chunk_pages).filter(|place| mask & 1 << place != 0) {
            self.index[first + place] = pending(job);
        }
        self.pipeline.submit(Job { number: job, page, first, mask, buffer })
    }

    fn pages_missing(&self, missing: u64) -> ImageError {
        let first =
            self.index.iter().position(|raw| *raw == PageEntry::MISSING).unwrap_or(0) as u64;
        // The last block that starts at or before the page; empty blocks before
        // it start there too.
        let number = self.starts.partition_point(|(start, _)| *start <= first).saturating_sub(1);
        ImageError::PagesMissing {
            path: self.target.path().to_owned(),
            block: self.blocks[number].name.clone(),
            offset: (first - self.starts[number].0) * PAGE_SIZE as u64,
            missing,
        }
    }
}
