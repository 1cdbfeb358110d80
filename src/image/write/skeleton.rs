//! An image without memory: the machine, its devices and the list of its blocks.

use std::path::Path;
use std::sync::Arc;

use crate::cancel::Cancellation;
use crate::host::shared_memory;
use crate::identity::Identity;
use crate::image::format::error::ImageError;
use crate::image::format::layout::SUPERBLOCK_BYTES;
use crate::image::format::manifest::{Details, Manifest, Sections, check_blocks};
use crate::image::read::image::Image;
use crate::image::write::options::CacheUse;
use crate::image::write::sink::Sink;
use crate::image::write::tail::{self, Index, Parts};
use crate::page::Block;

/// An image in memory of a guest whose pages are read by something else. It takes as long to make whatever
/// the guest's size: its index of pages is a hole, and whoever asks it for a page gets an error. `path` is
/// what errors call it.
///
/// # Errors
/// Blocks that the format does not allow, sections that are too large, a lack of memory.
pub fn skeleton(
    path: &Path,
    identity: Identity,
    blocks: &[Block],
    details: Details,
    sections: &Sections,
) -> Result<Arc<Image>, ImageError> {
    let pages = check_blocks(blocks).map_err(ImageError::Blocks)?;
    let manifest = Manifest {
        identity,
        created_by: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
        machine: details.machine,
        moment_unix_us: details.moment_unix_us,
        pause_us: details.pause_us,
        blocks: blocks.to_vec(),
        data_pages: 0,
        zero_pages: 0,
        layers: Vec::new(),
        flat: Vec::new(),
    };
    let io = |error| ImageError::io("write", path, error);
    let file = shared_memory::file(c"snapback-skeleton").map_err(io)?;
    let start = SUPERBLOCK_BYTES as u64;
    let ours = file.try_clone().map_err(io)?;
    let sink = Sink::new(ours, start, None, CacheUse::Keep, Cancellation::new());
    let index = Index::Absent(pages);
    let parts = Parts { manifest: &manifest, sections, chunks: &[], index, chunk_pages: 1 };
    tail::write(&file, path, sink, parts)?;
    Image::open_file(file, path)
}

#[cfg(test)]
mod tests {
    use std::os::linux::fs::MetadataExt;

    use super::*;
    use crate::page::{BlockId, Page};

    #[test]
    fn a_large_one_takes_no_more_room_and_has_no_pages() {
        // 1 TiB, whose index would take 2 GiB.
        let blocks = [Block { name: "pc.ram".into(), len: 1 << 40, page_size: 4096 }];
        let sections = Sections { devices: b"devices".to_vec(), ..Sections::default() };
        let details = Details { moment_unix_us: 7, ..Details::default() };
        let path = Path::new("a guest");
        let image = skeleton(path, Identity::random(), &blocks, details, &sections).unwrap();
        assert_eq!(image.manifest().blocks, blocks);
        assert_eq!(image.sections().unwrap().devices, b"devices");
        let (_, file) = image.files().next().unwrap();
        assert!(file.metadata().unwrap().st_blocks() * 512 < 1 << 20);
        for number in [0, (1 << 28) - 1] {
            let error = image.find(Page { block: BlockId(0), number }).unwrap_err();
            assert!(error.to_string().contains("damaged"), "{error}");
        }
    }
}
