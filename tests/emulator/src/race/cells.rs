//! The cells of a stretch of memory: one granule per word, shared by the words of a chunk as long as their past is the same.

use super::{Access, Cell, Conflict, Granule, Watch, check};

/// Bytes whose cells come into being together.
pub(crate) const SPAN: usize = 1024;
/// Bytes of a chunk: the widest access of a thread, and the unit of the asynchronous engines.
const CHUNK: usize = 16;
const WORDS: usize = CHUNK / 4;

/// The cells of [`SPAN`] bytes.
///
/// The words of a chunk share one granule while every access took the whole chunk. The first that takes less gives each word a granule
/// of its own, with that same past, so that nothing is less exact; once their pasts are alike again they share one again.
#[derive(Clone, Debug)]
pub(crate) struct Cells {
    chunks: [Granule; SPAN / CHUNK],
    /// By chunk: its words have granules of their own.
    split: u64,
    words: Option<Box<[Granule]>>,
}

impl Default for Cells {
    fn default() -> Self {
        Self { chunks: [Granule::default(); SPAN / CHUNK], split: 0, words: None }
    }
}

/// Where a conflict lies (its first byte in the span), and what it is.
pub(crate) type Found = (usize, Conflict);

/// Which bytes of word `word` lie in `start..end`.
#[inline(always)]
fn mask(word: usize, start: usize, end: usize) -> u8 {
    let first = start.saturating_sub(4 * word);
    let last = (end - 4 * word).min(4);
    ((1u32 << last) - (1u32 << first)) as u8
}

impl Cells {
    /// Forgets all accesses.
    pub fn clear(&mut self) {
        self.chunks.fill(Granule::default());
        self.split = 0;
    }

    /// Checks an access to `len` bytes from `start` on, which do not leave the span, and remembers it.
    #[inline]
    pub fn check(&mut self, start: usize, len: usize, a: &Access<'_>, watch: Watch, dice: &mut u32) -> Option<Found> {
        let end = start + len;
        if start / 4 == (end - 1) / 4 {
            // Most accesses of threads.
            let words = self.words_of(start / CHUNK);
            return check(&mut words[start / 4 % WORDS], a, mask(start / 4, start, end), watch, dice).map(|c| (start, c));
        }
        let mut at = start;
        while at < end {
            let chunk = at / CHUNK;
            let stop = end.min((chunk + 1) * CHUNK);
            let whole = stop - at == CHUNK;
            if whole && self.split >> chunk & 1 == 0 {
                if let Some(c) = check(&mut self.chunks[chunk], a, 0xf, watch, dice) {
                    return Some((at, c));
                }
            } else {
                let words = self.words_of(chunk);
                for word in at / 4..stop.div_ceil(4) {
                    if let Some(c) = check(&mut words[word % WORDS], a, mask(word, at, stop), watch, dice) {
                        return Some((at.max(4 * word), c));
                    }
                }
                if whole {
                    self.unite(chunk);
                }
            }
            at = stop;
        }
        None
    }

    /// [`Cells::check`] for many chunks, most of which have the same past: what became of one goes for the next like it.
    #[inline]
    pub fn sweep(&mut self, start: usize, len: usize, sweep: &mut Sweep<'_>) -> Option<Found> {
        let end = start + len;
        let mut at = start;
        while at < end {
            let chunk = at / CHUNK;
            let stop = end.min((chunk + 1) * CHUNK);
            if stop - at < CHUNK || self.split >> chunk & 1 != 0 {
                let found = self.check(at, stop - at, &sweep.access, sweep.watch, &mut sweep.dice);
                if found.is_some() {
                    return found;
                }
            } else if alike(&self.chunks[chunk], &sweep.before) {
                self.chunks[chunk] = sweep.after;
            } else {
                let before = self.chunks[chunk];
                if let Some(c) = check(&mut self.chunks[chunk], &sweep.access, 0xf, sweep.watch, &mut sweep.dice) {
                    return Some((at, c));
                }
                (sweep.before, sweep.after) = (before, self.chunks[chunk]);
            }
            at = stop;
        }
        None
    }

    /// The words of a chunk, which have granules of their own from now on.
    #[inline]
    fn words_of(&mut self, chunk: usize) -> &mut [Granule] {
        let words = self.words.get_or_insert_with(|| vec![Granule::default(); SPAN / 4].into_boxed_slice());
        let words = &mut words[chunk * WORDS..(chunk + 1) * WORDS];
        if self.split >> chunk & 1 == 0 {
            self.split |= 1 << chunk;
            words.fill(self.chunks[chunk]);
        }
        words
    }

    /// Gives the words of a chunk one granule again, if they have the same past.
    fn unite(&mut self, chunk: usize) {
        let words = self.words_of(chunk);
        words.iter_mut().for_each(compact);
        let first = words[0];
        if words.iter().all(|word| alike(word, &first)) {
            self.split &= !(1 << chunk);
            self.chunks[chunk] = first;
        }
    }
}

/// Whether two granules are equal: all of both is compared, because they mostly are.
#[inline(always)]
fn alike(a: &Granule, b: &Granule) -> bool {
    let mut differ = 0;
    for (a, b) in a.iter().zip(b) {
        let ([a0, a1], [b0, b1]) = (a.bits(), b.bits());
        differ |= (a0 ^ b0) | (a1 ^ b1);
    }
    differ == 0
}

/// Moves the empty cells behind the others.
fn compact(granule: &mut Granule) {
    let mut n = 0;
    for i in 0..granule.len() {
        if granule[i].kind != 0 {
            granule.swap(n, i);
            n += 1;
        }
    }
    granule[n..].fill(Cell::default());
}

/// One access to much memory.
pub(crate) struct Sweep<'c> {
    access: Access<'c>,
    watch: Watch,
    dice: u32,
    /// A chunk's past, and what the access made of it.
    before: Granule,
    after: Granule,
}

impl<'c> Sweep<'c> {
    pub fn new(access: Access<'c>, watch: Watch, mut dice: u32) -> Self {
        let (before, mut after) = (Granule::default(), Granule::default());
        // Nothing conflicts with an empty past.
        let _ = check(&mut after, &access, 0xf, watch, &mut dice);
        Self { access, watch, dice, before, after }
    }

    /// READ, WRITE, ATOMIC, ASYNC bits.
    pub fn kind(&self) -> u8 {
        self.access.kind
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::Clock;
    use super::super::{ASYNC, ATOMIC, READ, WRITE};
    use super::*;
    use crate::machine::rng::Rng;

    const ALL: Watch = Watch { race: true, equal: true, proxy: true };

    #[test]
    fn masks() {
        assert_eq!((mask(0, 0, 4), mask(1, 4, 16), mask(3, 14, 16), mask(2, 9, 10)), (0xf, 0xf, 0xc, 0x2));
    }

    /// Against granules per word, which share nothing: the same verdict on every access of random histories, whole chunks or not.
    #[test]
    fn shared_granules_are_as_exact_as_one_per_word() {
        let (mut rng, mut compared) = (Rng::new(5), 0);
        for _ in 0..2000 {
            let mut cells = Cells::default();
            let mut plain = vec![Granule::default(); SPAN / 4];
            let mut known = Clock::new(6, true);
            for clock in 1..40 {
                let actor = rng.below(6) as u16;
                let kind = [READ, WRITE, READ | ASYNC, WRITE | ASYNC, READ | WRITE | ATOMIC][rng.below(5)];
                for other in 0..6 {
                    if rng.below(8) != 0 {
                        known.hb[other] = clock;
                        known.px[other] = known.px[other].max(if rng.below(8) != 0 { clock } else { 0 });
                    }
                }
                let a = Access { actor, clock, cluster: 0, kind, site: clock, known: &known, repeats: false };
                let len = [1, 2, 4, 8, 16, 16, 16, 16, 32, 12][rng.below(10)];
                let start = if len == 12 { 4 * rng.below(13) } else { rng.below(64 / len) * len };
                let mut twin = cells.clone();
                let found = cells.check(start, len, &a, ALL, &mut 1);
                let wanted = (start / 4..(start + len).div_ceil(4)).find_map(|word| {
                    let found = check(&mut plain[word], &a, mask(word, start, start + len), ALL, &mut 1);
                    found.map(|c| (start.max(4 * word), c))
                });
                // Which of several earlier accesses is named may differ.
                let place = |found: Option<Found>| found.map(|(at, _)| at);
                assert_eq!(place(found), place(wanted));
                let swept = twin.sweep(start, len, &mut Sweep::new(a, ALL, 1));
                assert_eq!(place(swept), place(wanted));
                if rng.below(2) == 0 {
                    cells = twin;
                }
                // A full granule may give up any read.
                if found.is_some() || plain.iter().any(|granule| granule.iter().all(|cell| cell.kind != 0)) {
                    break;
                }
                compared += 1;
            }
        }
        assert!(compared > 10_000, "only {compared} accesses");
    }
}
