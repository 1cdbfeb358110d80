//! A file cut into pieces, each of which becomes an extent.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use fastcdc::v2020::FastCDC;

use crate::repository::format::pack::MAX_EXTENT;
use crate::repository::reading::repository::BLOCK;

/// How much of a file is cut at once.
const WINDOW: usize = 16 << 20;
/// Lengths of pieces that are cut by content: at least, on average. At most: [`MAX_EXTENT`].
const LEAST: usize = 16 << 10;
const AVERAGE: usize = 64 << 10;

/// How a file is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// At multiples of [`BLOCK`]: what stays in its place is found again.
    Blocks,
    /// By content: what has moved is found again.
    Content,
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the file.
    pub offset: u64,
    /// Where it lies in the window.
    pub at: usize,
    pub len: usize,
}

/// Cuts these ranges of a file; holes are left out. `take` is given one window after the other, with
/// its pieces.
pub fn cut<E: From<io::Error>>(
    file: &File,
    ranges: &[Range<u64>],
    how: How,
    mut take: impl FnMut(&[u8], &[Piece]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; WINDOW];
    for range in ranges {
        for part in data(file, range.clone(), how)? {
            let mut at = part.start;
            while at < part.end {
                let len = usize::try_from(part.end - at).unwrap_or(WINDOW).min(WINDOW);
                let window = &mut buffer[..len];
                file.read_exact_at(window, at)?;
                let is_last = at + len as u64 == part.end;
                let mut pieces = match how {
                    How::Blocks => blocks(at, len),
                    How::Content => contents(at, window),
                };
                // Where the last piece would end is not known yet.
                if !is_last && how == How::Content && pieces.len() > 1 {
                    pieces.pop();
                }
                take(window, &pieces)?;
                at = pieces.last().map_or(part.end, |last| last.offset + last.len as u64);
            }
        }
    }
    Ok(())
}

fn blocks(offset: u64, len: usize) -> Vec<Piece> {
    let block = BLOCK as usize;
    let first = block - (offset % u64::from(BLOCK)) as usize;
    let mut pieces = Vec::with_capacity(len / block + 2);
    let (mut at, mut next) = (0, first.min(len));
    while at < len {
        pieces.push(Piece { offset: offset + at as u64, at, len: next - at });
        (at, next) = (next, (next + block).min(len));
    }
    pieces
}

fn contents(offset: u64, window: &[u8]) -> Vec<Piece> {
    let piece = |chunk: fastcdc::v2020::Chunk| {
        let at = chunk.offset;
        Piece { offset: offset + at as u64, at, len: chunk.length }
    };
    FastCDC::new(window, LEAST, AVERAGE, MAX_EXTENT).map(piece).collect()
}

/// The parts of a range that are no holes. Cut in blocks, they begin and end where blocks do.
fn data(file: &File, range: Range<u64>, how: How) -> io::Result<Vec<Range<u64>>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let Some(start) = seek(file, at, libc::SEEK_DATA)? else { break };
        let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(range.end);
        let (mut start, mut end) = (start.max(range.start), end.min(range.end));
        if how == How::Blocks {
            let block = u64::from(BLOCK);
            start = (start / block * block).max(range.start);
            end = end.div_ceil(block).saturating_mul(block).min(range.end);
        }
        if start >= range.end || end <= at {
            break;
        }
        match parts.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => parts.push(start..end),
        }
        at = end;
    }
    Ok(parts)
}

/// Where data or a hole begins from there on, if anywhere.
fn seek(file: &File, from: u64, what: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(from).map_err(io::Error::other)?;
    // SAFETY: lseek(2) takes numbers; the descriptor is open, its owner is borrowed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, what) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            // It knows no holes.
            error if error.raw_os_error() == Some(libc::EINVAL) && what == libc::SEEK_DATA => {
                Ok(Some(from))
            }
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pieces(file: &File, range: Range<u64>, how: How) -> Vec<(u64, Vec<u8>)> {
        let mut all = Vec::new();
        cut(file, &[range], how, |window, pieces| {
            let piece = |p: &Piece| (p.offset, window[p.at..p.at + p.len].to_vec());
            all.extend(pieces.iter().map(piece));
            Ok::<_, io::Error>(())
        })
        .unwrap();
        all
    }

    #[test]
    fn pieces_cover_all_that_is_no_hole_and_move_with_their_content() {
        let mut random = blake3::Hasher::new().finalize_xof();
        let mut bytes = vec![0; WINDOW + (3 << 20)];
        random.fill(&mut bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let len = bytes.len() as u64;
        for how in [How::Blocks, How::Content] {
            for range in [0..len, 12_345..len - 7] {
                let mut next = range.start;
                for (offset, piece) in pieces(&file, range.clone(), how) {
                    assert_eq!(offset, next);
                    let at = offset as usize;
                    assert!(piece.len() <= MAX_EXTENT && piece == bytes[at..at + piece.len()]);
                    next += piece.len() as u64;
                }
                assert_eq!(next, range.end);
            }
        }
        // Behind the place where it starts, the same content is cut in the same places.
        let whole = pieces(&file, 0..len, How::Content);
        let moved = pieces(&file, 100_000..len, How::Content);
        let same = moved.iter().filter(|piece| whole.contains(piece)).count();
        assert!(same > moved.len() * 9 / 10, "{same} of {}", moved.len());
    }

    #[test]
    fn holes_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 << 20).unwrap();
        assert!(pieces(&file, 0..100 << 20, How::Blocks).is_empty());
        file.write_all_at(b"x", (50 << 20) + 5).unwrap();
        let found = pieces(&file, 0..100 << 20, How::Blocks);
        assert!(
            found.len() <= 64 && found.iter().any(|(at, _)| *at == 50 << 20),
            "{}",
            found.len()
        );
        assert!(found.iter().all(|(at, piece)| at % 65536 == 0 && piece.len() == 65536));
    }
}
