//! A step over a key-value cache whose pages are scattered over the pools, with gaps between them and pages nobody owns.

use dropless::layout::{KvPageSizes, KvPages};
use dropless::{Buffer, Stream};

use crate::fill::Random;

/// Sequences, their tokens so far, and the tokens that a step adds.
pub struct Step {
    sizes: KvPageSizes,
    max_pages: usize,
    histories: Vec<usize>,
    new_tokens: Vec<usize>,
    table: Vec<u32>,
    buffers: [Buffer<u32>; 3], // block table, lengths, query offsets
}

impl Step {
    /// For each sequence how many tokens it has and how many it gets. The order of the pages follows from `seed`.
    pub fn new(stream: &Stream, sequences: &[(usize, usize)], page_tokens: usize, page_gap: usize, seed: u64) -> Step {
        let lens: Vec<usize> = sequences.iter().map(|(history, new)| history + new).collect();
        let max_len = lens.iter().copied().max().unwrap_or(0);
        let max_pages = max_len.div_ceil(page_tokens).max(1);
        let owned: usize = lens.iter().map(|len| len.div_ceil(page_tokens)).sum();
        let num_pages = owned + 2;
        let mut free: Vec<u32> = (0..num_pages as u32).collect();
        let mut random = Random::new(seed);
        (1..free.len()).rev().for_each(|i| free.swap(i, random.below(i + 1)));
        let mut table = vec![u32::MAX; sequences.len() * max_pages]; // what no length reaches is never looked up
        for (row, len) in table.chunks_mut(max_pages).zip(&lens) {
            row[..len.div_ceil(page_tokens)].fill_with(|| free.pop().expect("as many pages as are owned"));
        }
        let mut offsets = vec![0u32];
        sequences.iter().for_each(|(_, new)| offsets.push(offsets[offsets.len() - 1] + *new as u32));
        let num_tokens = offsets[sequences.len()] as usize;
        let lens: Vec<u32> = lens.iter().map(|len| *len as u32).collect();
        let buffers = [&table, &lens, &offsets].map(|values| Buffer::from_slice(stream, values).expect("memory for a test"));
        let sizes = KvPageSizes { page_tokens, page_stride: page_tokens + page_gap, num_pages, num_tokens, max_len };
        let (histories, new_tokens) = sequences.iter().copied().unzip();
        Step { sizes, max_pages, histories, new_tokens, table, buffers }
    }

    /// What an operation is given.
    pub fn pages(&self) -> KvPages<'_> {
        let (sequences, [table, lens, offsets]) = (self.new_tokens.len(), &self.buffers);
        let table = table.rows(sequences, self.max_pages).expect("a page table");
        let lens = lens.rows(1, sequences).expect("one length per sequence");
        let offsets = offsets.rows(1, sequences + 1).expect("offsets");
        // SAFETY: `new` takes each page once and all from below `num_pages`, gives every length its pages, and sums the offsets.
        unsafe { KvPages::from_raw(self.sizes, table, lens, offsets) }.expect("pages that agree")
    }

    /// B.
    pub fn num_sequences(&self) -> usize {
        self.new_tokens.len()
    }

    /// Tokens that a sequence has, those of the step included.
    pub fn len(&self, sequence: usize) -> usize {
        self.histories[sequence] + self.new_tokens[sequence]
    }

    /// True if no sequence has any.
    pub fn is_empty(&self) -> bool {
        self.sizes.max_len == 0
    }

    /// The step's tokens in their order: the sequence and the position of each.
    pub fn tokens(&self) -> Vec<(usize, usize)> {
        let of = |b: usize| (self.histories[b]..self.len(b)).map(move |position| (b, position));
        (0..self.num_sequences()).flat_map(of).collect()
    }

    /// Rows of each pool.
    pub fn pool_rows(&self) -> usize {
        self.sizes.num_pages * self.sizes.page_stride
    }

    /// The row of a pool that holds a position of a sequence.
    pub fn row(&self, sequence: usize, position: usize) -> usize {
        let page = self.table[sequence * self.max_pages + position / self.sizes.page_tokens] as usize;
        page * self.sizes.page_stride + position % self.sizes.page_tokens
    }
}
