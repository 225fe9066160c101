//! A step over a key-value cache whose pages are scattered over the pools, with pages nobody owns, and how those pools may lie.

use dropless::layout::{KvLayout, KvPageSizes, KvPages};
use dropless::{Buffer, HeadLayout, Stream};

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
    pub fn new(stream: &Stream, sequences: &[(usize, usize)], page_tokens: usize, seed: u64) -> Step {
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
        let sizes = KvPageSizes::new(page_tokens, num_pages).with_step(num_tokens, max_len);
        let (histories, new_tokens) = sequences.iter().copied().unzip();
        Step { sizes, max_pages, histories, new_tokens, table, buffers }
    }

    /// The same, whose second sequence has the first one's pages in front, `pages` of them.
    #[must_use]
    pub fn sharing(mut self, stream: &Stream, pages: usize) -> Step {
        assert!(self.histories[..2].iter().all(|history| *history >= pages * self.sizes.page_tokens), "the step writes to them");
        let (first, rest) = self.table.split_at_mut(self.max_pages);
        rest[..pages].copy_from_slice(&first[..pages]);
        self.upload(stream)
    }

    /// The same, without the pages that hold only positions that a window of so many keys hides from every token of the step.
    #[must_use]
    pub fn windowed(mut self, stream: &Stream, window: usize) -> Step {
        for b in 0..self.num_sequences() {
            let hidden = self.first_seen(b, Some(window)) / self.sizes.page_tokens;
            self.table[b * self.max_pages..][..hidden].fill(u32::MAX);
        }
        self.upload(stream)
    }

    fn upload(mut self, stream: &Stream) -> Step {
        self.buffers[0] = Buffer::from_slice(stream, &self.table).expect("memory for a test");
        self
    }

    /// The first position that the step sees of a sequence; its length if the step has no token of it.
    pub fn first_seen(&self, sequence: usize, window: Option<usize>) -> usize {
        match (self.new_tokens[sequence], window) {
            (0, _) => self.len(sequence),
            (_, None) => 0,
            (_, Some(window)) => (self.histories[sequence] + 1).saturating_sub(window),
        }
    }

    /// What an operation is given.
    pub fn pages(&self) -> KvPages<'_> {
        let (sequences, [table, lens, offsets]) = (self.new_tokens.len(), &self.buffers);
        let table = table.rows(sequences, self.max_pages).expect("a page table");
        let lens = lens.rows(1, sequences).expect("one length per sequence");
        let offsets = offsets.rows(1, sequences + 1).expect("offsets");
        // SAFETY: `new` takes each page once and all from below `num_pages`, gives every length its pages, and sums the offsets;
        // `sharing` shares none that the step writes, `windowed` takes away none that the step looks at.
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

    /// Tokens of a page.
    pub fn page_tokens(&self) -> usize {
        self.sizes.page_tokens
    }

    /// Rows of each pool that has a row for each slot.
    pub fn pool_rows(&self) -> usize {
        self.sizes.num_pages * self.sizes.page_tokens
    }

    /// The row of such a pool that holds a position of a sequence.
    pub fn row(&self, sequence: usize, position: usize) -> usize {
        let page = self.table[sequence * self.max_pages + position / self.sizes.page_tokens] as usize;
        page * self.sizes.page_tokens + position % self.sizes.page_tokens
    }

    /// Elements of a pool of that layout, of heads of d elements; for values see [`HeadLayout::of_values`].
    pub fn elements(&self, heads: HeadLayout, layout: KvLayout) -> usize {
        let last = [
            (layout.page_stride, self.sizes.num_pages),
            (layout.token_stride, self.sizes.page_tokens),
            (layout.head_stride, heads.num_kv_heads()),
            (layout.chunk_stride, heads.head_dim() / layout.chunk),
            (1, layout.chunk),
        ];
        last.iter().map(|(stride, extent)| stride * (extent - 1)).sum::<usize>() + 1
    }

    /// Where a pool of that layout holds a position's `Hkv * d` elements, head after head; for values see
    /// [`HeadLayout::of_values`].
    pub fn places(&self, heads: HeadLayout, layout: KvLayout, sequence: usize, position: usize) -> Vec<usize> {
        let (row, page_tokens) = (self.row(sequence, position), self.sizes.page_tokens);
        let first = row / page_tokens * layout.page_stride + row % page_tokens * layout.token_stride;
        let element = |j: usize| j / layout.chunk * layout.chunk_stride + j % layout.chunk;
        let of_head = |h: usize| (0..heads.head_dim()).map(move |j| first + h * layout.head_stride + element(j));
        (0..heads.num_kv_heads()).flat_map(of_head).collect()
    }
}

/// Rows of 8 elements more than they need, pages of one row more.
pub fn roomy(page_tokens: usize, heads: HeadLayout) -> KvLayout {
    let stride = heads.kv_cols() + 8;
    KvLayout::strided((page_tokens + 1) * stride, stride, heads.head_dim(), heads)
}

/// Layouts of keys and of values as engines have them, and some that none has.
pub fn layouts(page_tokens: usize, heads: HeadLayout) -> Vec<[KvLayout; 2]> {
    let of_both = |layout: &dyn Fn(HeadLayout) -> KvLayout| [heads, heads.of_values()].map(layout);
    let rows = |heads| KvLayout::token_major(page_tokens, heads);
    let by_head = |heads| KvLayout::head_major(page_tokens, heads);
    let wider = |layout: KvLayout, factor: usize, more: usize| layout.with_page_stride(factor * layout.page_stride + more);
    let mut layouts = vec![
        of_both(&rows),
        of_both(&|heads| wider(rows(heads), 2, 0)),
        of_both(&by_head),
        [wider(by_head(heads), 1, 8), rows(heads.of_values())],
        of_both(&|heads| roomy(page_tokens, heads)),
    ];
    for chunk in [8, 4, 1].into_iter().filter(|chunk| heads.head_dim().is_multiple_of(*chunk)) {
        layouts.push([KvLayout::split_keys(page_tokens, heads, chunk), KvLayout::split_values(page_tokens, heads)]);
    }
    layouts
}
