//! Guesses which pages a guest writes next.

/// The most pages that are let be written at once: setting them aside takes as long as one fault.
pub(super) const MOST_AHEAD: u64 = 32;

/// Streams of writes that are told apart: about one for each vCPU that fills something.
const STREAMS: usize = 4;

/// A stream of writes, one page behind the other.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The address at which it goes on.
    next: u64,
    /// How many pages it was given last.
    pages: u64,
    /// When that was, counted in calls.
    given: u64,
}

/// The streams that were seen last. A guest that writes one page behind the other is given more and
/// more at once; one that writes here and there is given what it asks for.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    calls: u64,
}

impl Streams {
    /// How many pages from this address on are let be written.
    pub fn ahead(&mut self, address: u64) -> u64 {
        let page = crate::page::PAGE_SIZE as u64;
        self.calls += 1;
        let known = self.streams.iter().position(|stream| stream.next == address);
        let at = known.unwrap_or_else(|| {
            // The one that has not gone on for longest gives way.
            let oldest = (0..STREAMS).min_by_key(|at| self.streams[*at].given).unwrap_or(0);
            self.streams[oldest].pages = 0;
            oldest
        });
        let stream = &mut self.streams[at];
        stream.given = self.calls;
        stream.pages = (stream.pages * 2).clamp(1, MOST_AHEAD);
        stream.next = address + stream.pages * page;
        stream.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_writes_one_behind_the_other_is_given_more() {
        let mut streams = Streams::default();
        let (mut first, mut second) = (0x1000_0000, 0x2000_0000);
        for pages in [1, 2, 4, 8, 16, 32, 32] {
            for at in [&mut first, &mut second] {
                assert_eq!(streams.ahead(*at), pages);
                *at += pages * 4096;
            }
            // Writes here and there in between.
            assert_eq!(streams.ahead(first ^ 0x4000_0000), 1);
        }
    }
}
