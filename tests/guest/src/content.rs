//! What each page should hold, computed anew whenever somebody asks.
//!
//! A page's words follow from its number, its generation and the nonce of this
//! boot, so a page from another place, another time or another guest is told
//! from the right one. Generating is a few shifts a word: the guest is meant to
//! run under TCG, where a multiplication-heavy generator would dominate boot.

/// 64-bit words in a page of 4096 bytes.
pub const PAGE_WORDS: usize = 512;

/// The words of one page.
pub type Words = [u64; PAGE_WORDS];

/// Set in a generation whose page was made zero by request; the next generation
/// clears it.
const ZEROED: u32 = 1 << 31;

/// Marks the first word of a page ("snapback" in ASCII, big-endian).
const TAG: u64 = 0x736e_6170_6261_636b;

/// Words at the start of a page that name it: tag and number, generation, nonce.
const HEADER_WORDS: usize = 4;

/// How often a page has been rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Generation(u32);

impl Generation {
    /// The generation that follows; never a zeroed one.
    pub fn next(self) -> Generation {
        Generation((self.count() + 1) & !ZEROED)
    }

    /// The same count, for a page that holds zeros whatever its kind would be.
    pub fn zeroed(self) -> Generation {
        Generation(self.0 | ZEROED)
    }

    /// How often the page has been rewritten.
    pub fn count(self) -> u32 {
        self.0 & !ZEROED
    }

    fn is_zeroed(self) -> bool {
        self.0 & ZEROED != 0
    }

    /// All 32 bits, the zeroed mark included.
    pub fn bits(self) -> u32 {
        self.0
    }
}

/// What sort of content a page has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pseudo random words: does not compress.
    Random,
    /// Words out of a small dictionary: compresses well.
    Text,
    /// Nothing but zeros.
    Zero,
}

/// The first place where a page differs from what it should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Number of the 64-bit word within the page.
    pub word: usize,
    pub expected: u64,
    pub found: u64,
}

/// How to compute every page of this boot.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub nonce: [u64; 2],
    /// Share of pages that are [`Kind::Random`], in percent.
    pub random_percent: u64,
    /// Share of pages that are [`Kind::Zero`], in percent.
    pub zero_percent: u64,
}

/// Eight-byte words of the compressible pages.
const DICTIONARY: [u64; 16] = {
    let text = b"memory  snapshotrevert  machine block   page    of the  and the \
                 is read written zeroed  faulted waiting running stopped ";
    let mut words = [0; 16];
    let mut word = 0;
    while word < 16 {
        let mut byte = 0;
        while byte < 8 {
            let at = word * 8 + byte;
            let letter = if at < text.len() { text[at] } else { b' ' };
            words[word] |= (letter as u64) << (8 * byte);
            byte += 1;
        }
        word += 1;
    }
    words
};

impl Recipe {
    /// The sort of content which a page has in this generation. It changes from
    /// generation to generation, so pages turn to zeros and back.
    pub fn kind(&self, page: u64, generation: Generation) -> Kind {
        if generation.is_zeroed() {
            return Kind::Zero;
        }
        let lot = (self.seed(page, generation) >> 32) % 100;
        if lot < self.random_percent {
            Kind::Random
        } else if lot < self.random_percent + self.zero_percent {
            Kind::Zero
        } else {
            Kind::Text
        }
    }

    /// Writes the page's content.
    pub fn fill(&self, page: u64, generation: Generation, words: &mut Words) {
        self.tell(page, generation, |at, word| words[at] = word);
    }

    /// Compares a page with what it should hold.
    pub fn difference(
        &self,
        page: u64,
        generation: Generation,
        found: &Words,
    ) -> Option<Difference> {
        // Most pages are right, and under TCG each access to memory costs more than a word's computation:
        // nothing is stored, and where a page is wrong is looked for only then.
        let mut wrong = 0;
        self.tell(page, generation, |at, word| wrong |= found[at] ^ word);
        if wrong == 0 {
            return None;
        }
        let mut first = None;
        self.tell(page, generation, |at, expected| {
            if first.is_none() && found[at] != expected {
                first = Some(Difference { word: at, expected, found: found[at] });
            }
        });
        first
    }

    /// Tells the page's words one after the other, each with its number.
    #[inline]
    fn tell(&self, page: u64, generation: Generation, mut tell: impl FnMut(usize, u64)) {
        let kind = self.kind(page, generation);
        if kind == Kind::Zero {
            return (0..PAGE_WORDS).for_each(|at| tell(at, 0));
        }
        let header = self.header(page, generation);
        header.into_iter().enumerate().for_each(|(at, word)| tell(at, word));
        let mut state = self.seed(page, generation);
        for at in HEADER_WORDS..PAGE_WORDS {
            state = xorshift(state);
            let text = || DICTIONARY[(state >> 60) as usize];
            tell(at, if kind == Kind::Random { state } else { text() });
        }
    }

    fn header(&self, page: u64, generation: Generation) -> [u64; HEADER_WORDS] {
        [TAG ^ page, u64::from(generation.bits()), self.nonce[0], self.nonce[1]]
    }

    /// The generator's start for one page; never 0, which xorshift can't leave.
    fn seed(&self, page: u64, generation: Generation) -> u64 {
        let place = (page << 32) ^ u64::from(generation.bits());
        mix(mix(place ^ self.nonce[0]) ^ self.nonce[1]) | 1
    }
}

/// One step of Marsaglia's xorshift64 (13, 7, 17).
pub fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}

/// Spreads a number's bits over the whole word (the finalizer of splitmix64).
pub fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(random_percent: u64, zero_percent: u64) -> Recipe {
        Recipe { nonce: [7, 9], random_percent, zero_percent }
    }

    fn content(recipe: &Recipe, page: u64, generation: Generation) -> Words {
        let mut words = [0xff; PAGE_WORDS];
        recipe.fill(page, generation, &mut words);
        words
    }

    #[test]
    fn a_page_is_told_from_its_neighbour_its_past_and_another_guest() {
        for random_percent in [0, 100] {
            let recipe = recipe(random_percent, 0);
            let first = Generation::default();
            let page = content(&recipe, 3, first);
            assert_eq!(recipe.difference(3, first, &page), None);
            assert!(recipe.difference(4, first, &page).is_some());
            assert!(recipe.difference(3, first.next(), &page).is_some());
            let other = Recipe { nonce: [7, 10], ..recipe };
            assert!(other.difference(3, first, &page).is_some());
        }
    }

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        let recipe = recipe(50, 20);
        for page in 0..16 {
            let mut words = content(&recipe, page, Generation::default());
            for word in 0..PAGE_WORDS {
                words[word] ^= 1 << 63;
                let difference = recipe.difference(page, Generation::default(), &words);
                assert_eq!(difference.map(|d| d.word), Some(word));
                words[word] ^= 1 << 63;
            }
        }
    }

    #[test]
    fn kinds_come_in_the_shares_asked_for() {
        let recipe = recipe(60, 10);
        let kinds: Vec<Kind> =
            (0..10_000).map(|page| recipe.kind(page, Generation::default())).collect();
        let share = |kind| kinds.iter().filter(|&&k| k == kind).count();
        assert!((5_500..6_500).contains(&share(Kind::Random)));
        assert!((700..1_300).contains(&share(Kind::Zero)));
    }

    #[test]
    fn a_zeroed_page_is_zero_until_its_next_generation() {
        let recipe = recipe(100, 0);
        let zeroed = Generation::default().next().zeroed();
        assert_eq!(content(&recipe, 5, zeroed), [0; PAGE_WORDS]);
        assert_eq!(recipe.kind(5, zeroed.next()), Kind::Random);
        assert_eq!((zeroed.count(), zeroed.next().count()), (1, 2));
    }
}
