//! The key-value cache: pages in two pools per layer, one block table for all layers.
//!
//! A pool is `[num_pages, page_tokens, Hkv, d]`. Sequence `b` keeps its token at position `p` in page
//! `block_table[b][p / page_tokens]`, slot `p % page_tokens`. A contiguous cache has one page per sequence.
//!
//! One step of a model is [`KvCache::append`], which reserves room for the step's tokens, followed by each layer's operations
//! on [`KvCache::layer_mut`]. The step's tokens are packed: sequence `b` owns the rows `query_offsets[b]..query_offsets[b + 1]`
//! of the batch, and the last of them is at position `seq_lens[b] - 1`.
#![allow(unsafe_code)] // the raw constructors

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(feature = "cuda")]
use crate::device::params::PageParams;
use crate::device::{Access, Buffer, Stream, Upload};
use crate::dtype::Element;
use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::shape::{MAX_ROWS, checked_product, filled};
use crate::view::{HostRows, HostRowsMut, RowOutputs, Rows, RowsMut};

/// The sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Hkv.
    pub num_kv_heads: usize,
    /// d.
    pub head_dim: usize,
    /// Tokens of one page.
    pub page_tokens: usize,
    /// Pages of each pool.
    pub num_pages: usize,
    /// Pages that one sequence may hold.
    pub max_pages: usize,
    /// B, the sequences.
    pub num_sequences: usize,
}

impl KvShape {
    /// One page of `capacity_tokens` for each of `num_sequences`.
    pub fn contiguous(heads: HeadLayout, num_sequences: usize, capacity_tokens: usize) -> KvShape {
        let (num_kv_heads, head_dim) = (heads.num_kv_heads(), heads.head_dim());
        KvShape { num_kv_heads, head_dim, page_tokens: capacity_tokens, num_pages: num_sequences, max_pages: 1, num_sequences }
    }

    fn row_cols(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

/// The keys and values of several sequences in all layers of a model.
pub struct KvCache<T> {
    shape: KvShape,
    pools: Vec<(Buffer<T>, Buffer<T>)>, // per layer: keys, values
    block_table: Buffer<u32>,           // [B, max_pages]
    seq_lens: Buffer<u32>,              // [1, B]
    query_offsets: Buffer<u32>,         // [1, B + 1]
    host: HostState,
    step: Arc<Step>,
    /// A step failed on its way: the device may hold parts of it.
    torn: bool,
}

/// Of the step that is open: what graphs compare before each launch with what they recorded.
#[derive(Debug, Default)]
struct Step {
    num_tokens: AtomicUsize,
    max_len: AtomicUsize,
}

/// The host's mirror of what lies on the device, by which capacity is checked.
#[derive(Clone, Debug)]
struct HostState {
    pages: Vec<Vec<u32>>,
    lens: Vec<u32>,
    offsets: Vec<u32>,
    free_pages: Vec<u32>,
}

impl HostState {
    fn num_tokens(&self) -> usize {
        self.offsets.last().map_or(0, |&end| end as usize)
    }

    fn max_len(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0) as usize
    }
}

impl<T: Element> KvCache<T> {
    /// An empty cache.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if a size is 0; [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn new(stream: &Stream, num_layers: usize, shape: KvShape) -> Result<KvCache<T>, Error> {
        let KvShape { num_kv_heads, head_dim, page_tokens, num_pages, max_pages, num_sequences } = shape;
        let sizes = [
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("page_tokens", page_tokens),
            ("num_pages", num_pages),
            ("max_pages", max_pages),
            ("num_sequences", num_sequences),
        ];
        if let Some(&(arg, got)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::Value { op: Op::KvCache, arg, need: "at least 1", got: got as f64 });
        }
        checked_product(Op::KvCache, "tokens", &[num_pages, page_tokens], MAX_ROWS)?;
        let elements = [num_pages, page_tokens, num_kv_heads, head_dim];
        let elements = checked_product(Op::KvCache, "elements", &elements, isize::MAX as usize)?;
        let table = checked_product(Op::KvCache, "block table", &[num_sequences, max_pages], MAX_ROWS)?;
        let pool = || Buffer::zeros(stream, elements);
        let mut free_pages = filled(Op::KvCache, num_pages, 0)?;
        free_pages.iter_mut().rev().zip(0..).for_each(|(page, number)| *page = number);
        let host = HostState {
            pages: filled(Op::KvCache, num_sequences, Vec::new())?,
            lens: filled(Op::KvCache, num_sequences, 0)?,
            offsets: filled(Op::KvCache, num_sequences + 1, 0)?,
            free_pages,
        };
        Ok(KvCache {
            pools: (0..num_layers).map(|_| Ok((pool()?, pool()?))).collect::<Result<_, Error>>()?,
            block_table: Buffer::zeros(stream, table)?,
            seq_lens: Buffer::zeros(stream, num_sequences)?,
            query_offsets: Buffer::zeros(stream, num_sequences + 1)?,
            shape,
            host,
            step: Arc::default(),
            torn: false,
        })
    }

    /// Its sizes.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.pools.len()
    }

    /// Tokens held for a sequence, including those of the current step; 0 for one that does not exist.
    pub fn len(&self, sequence: usize) -> usize {
        self.host.lens.get(sequence).map_or(0, |&len| len as usize)
    }

    /// True when no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.host.lens.iter().all(|&len| len == 0)
    }

    /// Begins a step that adds `new_tokens[b]` tokens to sequence `b`. The layers' operations then write them. In the stream's order:
    /// the host waits for nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless there is one count per sequence; [`Error::Capacity`] if the pages do not suffice;
    /// [`Error::NotJoined`]; [`Error::OutOfMemory`]; [`Error::Unsupported`] within a [capture](Stream::capture). The cache is
    /// unchanged then.
    pub fn append(&mut self, stream: &Stream, new_tokens: &[usize]) -> Result<(), Error> {
        check_shape(Op::KvCache, "new_tokens", "[B]", &[self.shape.num_sequences], &[new_tokens.len()])?;
        let mut host = self.host.clone();
        for (b, &count) in new_tokens.iter().enumerate() {
            let len = checked_product(Op::KvCache, "sequence tokens", &[(host.lens[b] as usize).saturating_add(count)], MAX_ROWS)?;
            let (need, max) = (len.div_ceil(self.shape.page_tokens), self.shape.max_pages);
            let have = (host.pages[b].len() + host.free_pages.len()).min(max);
            if need > have {
                return Err(Error::Capacity {
                    op: Op::KvCache,
                    what: "tokens for one sequence",
                    need: len,
                    have: have * self.shape.page_tokens,
                });
            }
            while host.pages[b].len() < need {
                let page = host.free_pages.pop().unwrap_or_else(|| unreachable!("{need} pages of {have}"));
                host.pages[b].push(page);
            }
            host.lens[b] = len as u32;
            host.offsets[b + 1] = host.offsets[b] + count as u32;
        }
        self.upload(stream, host)
    }

    /// Empties one sequence and frees its pages.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for a sequence that does not exist.
    pub fn clear(&mut self, stream: &Stream, sequence: usize) -> Result<(), Error> {
        let mut host = self.host.clone();
        let Some(pages) = host.pages.get_mut(sequence) else {
            let bound = self.shape.num_sequences as u64;
            return Err(Error::Index { op: Op::KvCache, arg: "sequence", at: 0, got: sequence as u64, bound });
        };
        host.free_pages.extend(pages.drain(..).rev());
        host.lens[sequence] = 0;
        host.offsets.fill(0); // no step is open any more
        self.upload(stream, host)
    }

    fn upload(&mut self, stream: &Stream, host: HostState) -> Result<(), Error> {
        let mut table = Vec::new();
        if host.pages != self.host.pages || self.torn {
            table.resize(self.block_table.len(), 0);
            for (row, pages) in table.chunks_exact_mut(self.shape.max_pages).zip(&host.pages) {
                row[..pages.len()].copy_from_slice(pages);
            }
        }
        // All or none: otherwise the device would be left with parts of two steps.
        let uploads = [
            ("block_table", self.block_table.upload(&table)?),
            ("seq_lens", self.seq_lens.upload(&host.lens)?),
            ("query_offsets", self.query_offsets.upload(&host.offsets)?),
        ];
        let [table, lens, offsets] = uploads.each_ref().map(|(_, upload)| upload.access());
        let torn = &mut self.torn;
        Upload::queue_or(stream, Op::KvCache, &uploads, || {
            *torn = true;
            [table, lens, offsets].into_iter().for_each(|access| stream.has_not_run(access));
        })?;
        self.torn = false;
        self.step.num_tokens.store(host.num_tokens(), Ordering::Release);
        self.step.max_len.store(host.max_len(), Ordering::Release);
        self.host = host;
        Ok(())
    }

    /// One layer, for reading.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for a layer that does not exist.
    pub fn layer(&self, layer: usize) -> Result<KvLayer<'_, T>, Error> {
        let KvCache { shape, pools, block_table, seq_lens, query_offsets, host, step, .. } = self;
        let (rows, cols) = (shape.num_pages * shape.page_tokens, shape.row_cols());
        let (keys, values) = pools.get(layer).ok_or(no_layer(layer, pools.len()))?;
        let pages = KvPages::new(shape, host, step, [block_table, seq_lens, query_offsets])?;
        Ok(KvLayer { pages, keys: keys.rows(rows, cols)?, values: values.rows(rows, cols)? })
    }

    /// One layer, for writing the step's tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for a layer that does not exist.
    pub fn layer_mut(&mut self, layer: usize) -> Result<KvLayerMut<'_, T>, Error> {
        let KvCache { shape, pools, block_table, seq_lens, query_offsets, host, step, .. } = self;
        let (rows, cols, count) = (shape.num_pages * shape.page_tokens, shape.row_cols(), pools.len());
        let (keys, values) = pools.get_mut(layer).ok_or(no_layer(layer, count))?;
        let pages = KvPages::new(shape, host, step, [block_table, seq_lens, query_offsets])?;
        Ok(KvLayerMut { pages, keys: keys.rows_mut(rows, cols)?, values: values.rows_mut(rows, cols)? })
    }
}

impl<T: Element> std::fmt::Debug for KvCache<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvCache<{}>({} layers, {:?}, lengths {:?})", T::DTYPE.name(), self.pools.len(), self.shape, self.host.lens)
    }
}

fn no_layer(layer: usize, layers: usize) -> Error {
    Error::Index { op: Op::KvCache, arg: "layer", at: 0, got: layer as u64, bound: layers as u64 }
}

/// Which page holds which tokens, and which rows of the step belong to which sequence.
#[derive(Clone, Copy)]
pub struct KvPages<'a> {
    page_tokens: usize,
    page_stride: usize, // rows from one page to the next
    num_pages: usize,
    num_tokens: usize,
    max_len: usize,
    block_table: Rows<'a, u32>,   // [B, max_pages]
    seq_lens: Rows<'a, u32>,      // [1, B]
    query_offsets: Rows<'a, u32>, // [1, B + 1]
    step: Option<&'a Arc<Step>>,  // of a cache
}

/// The sizes that go with the device arrays of [`KvPages::from_raw`].
#[derive(Clone, Copy, Debug)]
pub struct KvPageSizes {
    /// Tokens of one page.
    pub page_tokens: usize,
    /// Rows of a pool from one page to the next; at least `page_tokens`.
    pub page_stride: usize,
    /// Pages of each pool.
    pub num_pages: usize,
    /// T, the step's tokens.
    pub num_tokens: usize,
    /// No sequence is longer than this, the step's tokens included.
    pub max_len: usize,
}

impl<'a> KvPages<'a> {
    fn new(
        shape: &KvShape,
        host: &HostState,
        step: &'a Arc<Step>,
        [block_table, seq_lens, query_offsets]: [&'a Buffer<u32>; 3],
    ) -> Result<KvPages<'a>, Error> {
        let sequences = shape.num_sequences;
        Ok(KvPages {
            page_tokens: shape.page_tokens,
            page_stride: shape.page_tokens,
            num_pages: shape.num_pages,
            num_tokens: host.num_tokens(),
            max_len: host.max_len(),
            block_table: block_table.rows(sequences, shape.max_pages)?,
            seq_lens: seq_lens.rows(1, sequences)?,
            query_offsets: query_offsets.rows(1, sequences + 1)?,
            step: Some(step),
        })
    }

    /// An engine's own page arrays: `block_table [B, max_pages]`, `seq_lens [1, B]` with the step's tokens counted,
    /// `query_offsets [1, B + 1]`.
    ///
    /// # Safety
    ///
    /// When the work that is given this value runs:
    /// * every page that a sequence's length reaches is below `num_pages`, and no page is reached twice, by whichever sequence;
    /// * no length exceeds `max_len` or the sequence's pages, nor is it less than the sequence's tokens in this step;
    /// * `query_offsets` begins with 0, does not decrease and ends with `num_tokens`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the arrays disagree on B; [`Error::Layout`] if pages overlap; [`Error::TooLarge`].
    pub unsafe fn from_raw(
        sizes: KvPageSizes,
        block_table: Rows<'a, u32>,
        seq_lens: Rows<'a, u32>,
        query_offsets: Rows<'a, u32>,
    ) -> Result<KvPages<'a>, Error> {
        let KvPageSizes { page_tokens, page_stride, num_pages, num_tokens, max_len } = sizes;
        let sequences = block_table.rows();
        check_shape(Op::KvCache, "seq_lens", "[1, B]", &[1, sequences], &seq_lens.dims())?;
        check_shape(Op::KvCache, "query_offsets", "[1, B + 1]", &[1, sequences + 1], &query_offsets.dims())?;
        if page_tokens == 0 || page_stride < page_tokens {
            return Err(Error::Layout { op: Op::KvCache, arg: "page_stride", need: "at least `page_tokens` >= 1 rows", got: page_stride });
        }
        checked_product(Op::KvCache, "tokens", &[num_pages, page_stride], MAX_ROWS)?;
        checked_product(Op::KvCache, "step tokens", &[num_tokens], MAX_ROWS)?;
        checked_product(Op::KvCache, "max_len", &[max_len], MAX_ROWS)?;
        Ok(KvPages { page_tokens, page_stride, num_pages, num_tokens, max_len, block_table, seq_lens, query_offsets, step: None })
    }

    /// B.
    pub fn num_sequences(&self) -> usize {
        self.block_table.rows()
    }

    /// T, the tokens of the step, all sequences together.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// An upper bound of the sequences' lengths, the step's tokens included.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Within a capture: has each launch compare the cache's open step with this one, and its lengths with `most`, which counts `what`.
    /// Of raw pages that is the caller's duty.
    pub(crate) fn compare_at_launch(&self, stream: &Stream, op: Op, what: &'static str, most: usize) {
        let (Some(step), recorded) = (self.step, self.num_tokens) else { return };
        stream.before_launch(|| {
            let step = step.clone();
            Box::new(move || {
                let (num_tokens, max_len) = (step.num_tokens.load(Ordering::Acquire), step.max_len.load(Ordering::Acquire));
                if num_tokens != recorded {
                    return Err(Error::Recorded { op, what: "tokens in the step", recorded, now: num_tokens });
                }
                if max_len > most {
                    return Err(Error::Capacity { op, what, need: max_len, have: most });
                }
                Ok(())
            })
        });
    }

    /// Rows that a pool must have.
    fn pool_rows(&self) -> usize {
        if self.num_pages == 0 { 0 } else { (self.num_pages - 1) * self.page_stride + self.page_tokens }
    }

    fn check_pools(&self, keys: [usize; 2], values: [usize; 2]) -> Result<(), Error> {
        if keys[0] < self.pool_rows() {
            return Err(Error::Capacity { op: Op::KvCache, what: "rows of a pool", need: self.pool_rows(), have: keys[0] });
        }
        check_shape(Op::KvCache, "values", "[num_pages * page_tokens, Hkv * d]", &keys, &values)
    }

    fn accesses(&self) -> [(&'static str, Access<'a>); 3] {
        [("block_table", self.block_table.access()), ("seq_lens", self.seq_lens.access()), ("query_offsets", self.query_offsets.access())]
    }

    /// As a kernel takes them.
    #[cfg(feature = "cuda")]
    pub(crate) fn params(&self) -> PageParams {
        PageParams {
            block_table: self.block_table.address(),
            seq_lens: self.seq_lens.address(),
            query_offsets: self.query_offsets.address(),
            num_sequences: self.num_sequences() as i64,
            table_stride: self.block_table.stride() as i64,
            page_tokens: self.page_tokens as i64,
            page_stride: self.page_stride as i64,
        }
    }

    /// As seen from the host. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&self) -> HostPages<'a> {
        HostPages {
            page_tokens: self.page_tokens,
            page_stride: self.page_stride,
            block_table: self.block_table.host(),
            seq_lens: self.seq_lens.host().row(0),
            query_offsets: self.query_offsets.host().row(0),
        }
    }
}

/// One layer's keys and values, for reading.
#[derive(Clone, Copy)]
pub struct KvLayer<'a, T> {
    pages: KvPages<'a>,
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
}

/// One layer's keys and values, for writing the step's tokens.
pub struct KvLayerMut<'a, T> {
    pages: KvPages<'a>,
    keys: RowsMut<'a, T>,
    values: RowsMut<'a, T>,
}

impl<'a, T: Element> KvLayer<'a, T> {
    /// Pools of `[num_pages * page_stride, Hkv * d]` with the pages that describe them.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if a pool has too few rows; [`Error::Shape`] if the pools differ.
    pub fn new(pages: KvPages<'a>, keys: Rows<'a, T>, values: Rows<'a, T>) -> Result<Self, Error> {
        pages.check_pools(keys.dims(), values.dims())?;
        Ok(KvLayer { pages, keys, values })
    }

    /// Which token lies where.
    pub fn pages(&self) -> &KvPages<'a> {
        &self.pages
    }

    /// All keys, `[num_pages * page_stride, Hkv * d]`.
    pub fn keys(&self) -> Rows<'a, T> {
        self.keys
    }

    /// All values, `[num_pages * page_stride, Hkv * d]`.
    pub fn values(&self) -> Rows<'a, T> {
        self.values
    }

    pub(crate) fn accesses(&self) -> [(&'static str, Access<'a>); 5] {
        let [table, lens, offsets] = self.pages.accesses();
        [("keys", self.keys.access()), ("values", self.values.access()), table, lens, offsets]
    }
}

impl<'a, T: Element> KvLayerMut<'a, T> {
    /// Pools of `[num_pages * page_stride, Hkv * d]` with the pages that describe them.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if a pool has too few rows; [`Error::Shape`] if the pools differ.
    pub fn new(pages: KvPages<'a>, keys: RowsMut<'a, T>, values: RowsMut<'a, T>) -> Result<Self, Error> {
        pages.check_pools(keys.dims(), values.dims())?;
        Ok(KvLayerMut { pages, keys, values })
    }

    /// Which token lies where.
    pub fn pages(&self) -> &KvPages<'a> {
        &self.pages
    }

    /// Columns of a token's keys, `Hkv * d`.
    pub fn cols(&self) -> usize {
        self.keys.cols()
    }

    pub(crate) fn accesses(&self) -> [(&'static str, Access<'a>); 5] {
        let [table, lens, offsets] = self.pages.accesses();
        [("keys", self.keys.access()), ("values", self.values.access()), table, lens, offsets]
    }

    /// Keys and values. Only CUDA backends call this, after dispatch.
    #[cfg(feature = "cuda")]
    pub(crate) fn pools(&mut self) -> [&mut RowsMut<'a, T>; 2] {
        [&mut self.keys, &mut self.values]
    }

    /// The places of the step's tokens as seen from the host. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&mut self) -> HostSlots<'_, T> {
        HostSlots { pages: self.pages.host(), num_tokens: self.pages.num_tokens, keys: self.keys.host(), values: self.values.host() }
    }
}

/// Where the step's tokens go in the pools: row `i` of these outputs is the place of token `i`.
pub(crate) struct HostSlots<'a, T> {
    pages: HostPages<'a>,
    num_tokens: usize,
    keys: HostRowsMut<'a, T>,
    values: HostRowsMut<'a, T>,
}

/// One token's place in the pools.
pub(crate) struct HostSlot<'a, T> {
    pub(crate) position: usize,
    pub(crate) keys: &'a mut [T],   // [Hkv * d]
    pub(crate) values: &'a mut [T], // [Hkv * d]
}

impl<'a, T: Element> RowOutputs for HostSlots<'a, T> {
    type Row = HostSlot<'a, T>;
    fn num_rows(&self) -> usize {
        self.num_tokens
    }
    unsafe fn row(&self, token: usize) -> HostSlot<'a, T> {
        let (sequence, position) = self.pages.locate(token);
        let row = self.pages.pool_row(sequence, position);
        assert!(row < self.keys.rows().min(self.values.rows()), "token {token} lies in row {row} of a pool of {}", self.keys.rows());
        // SAFETY: inside the pools, as just asserted. Two tokens differ in sequence or in position, and no page is reached twice
        // (invariant of `KvPages`), so that they have different rows; each token's is alive at most once, by the caller's duty.
        let (keys, values) = unsafe { (self.keys.row(row), self.values.row(row)) };
        HostSlot { position, keys, values }
    }
}

/// [`KvPages`] with its arrays as slices.
#[derive(Clone, Copy)]
pub(crate) struct HostPages<'a> {
    page_tokens: usize,
    page_stride: usize,
    block_table: HostRows<'a, u32>,
    seq_lens: &'a [u32],
    query_offsets: &'a [u32],
}

impl<'a> HostPages<'a> {
    /// Where each sequence's rows of the step begin, and the last one's end.
    pub(crate) fn query_offsets(&self) -> &'a [u32] {
        self.query_offsets
    }

    /// The rows of the step that belong to a sequence.
    pub(crate) fn query_range(&self, sequence: usize) -> std::ops::Range<usize> {
        self.query_offsets[sequence] as usize..self.query_offsets[sequence + 1] as usize
    }

    /// Its tokens in the cache, the step's included.
    pub(crate) fn seq_len(&self, sequence: usize) -> usize {
        self.seq_lens[sequence] as usize
    }

    /// The sequence that owns a row of the step, and the position of that token.
    pub(crate) fn locate(&self, token: usize) -> (usize, usize) {
        let sequence = self.query_offsets.partition_point(|&offset| offset as usize <= token) - 1;
        (sequence, self.seq_len(sequence) - (self.query_range(sequence).end - token))
    }

    /// The row of the pools that holds a position of a sequence.
    pub(crate) fn pool_row(&self, sequence: usize, position: usize) -> usize {
        let page = self.block_table.row(sequence)[position / self.page_tokens] as usize;
        page * self.page_stride + position % self.page_tokens
    }

    /// [`pool_row`](Self::pool_row) of every position of a range, page by page.
    pub(crate) fn pool_rows(&self, sequence: usize, positions: std::ops::Range<usize>) -> impl Iterator<Item = usize> + use<'a> {
        let HostPages { page_tokens, page_stride, .. } = *self;
        let pages = self.block_table.row(sequence);
        let (first, end) = (positions.start / page_tokens, positions.end.div_ceil(page_tokens));
        (first..end).flat_map(move |page| {
            let begin = page * page_tokens;
            let inside = positions.start.max(begin) - begin..positions.end.min(begin + page_tokens) - begin;
            inside.map(move |token| pages[page] as usize * page_stride + token)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn paged() -> KvShape {
        KvShape { num_kv_heads: 1, head_dim: 2, page_tokens: 4, num_pages: 5, max_pages: 3, num_sequences: 2 }
    }

    #[test]
    fn positions_continue_over_steps_and_pages() {
        let stream = Device::cpu().stream().unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, paged()).unwrap();
        cache.append(&stream, &[3, 0]).unwrap();
        cache.append(&stream, &[2, 6]).unwrap();
        assert_eq!((cache.len(0), cache.len(1), cache.len(2)), (5, 6, 0));
        let layer = cache.layer(0).unwrap();
        let pages = layer.pages().host();
        assert_eq!((0..8).map(|token| pages.locate(token)).collect::<Vec<_>>()[..4], [(0, 3), (0, 4), (1, 0), (1, 1)]);
        let mut rows: Vec<usize> = (0..5).map(|p| pages.pool_row(0, p)).chain((0..6).map(|p| pages.pool_row(1, p))).collect();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 11);
        assert!(cache.layer(1).is_err() && cache.layer_mut(1).is_err());
    }

    #[test]
    fn a_full_cache_refuses_and_stays_as_it_was() {
        let stream = Device::cpu().stream().unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, paged()).unwrap();
        cache.append(&stream, &[12, 0]).unwrap();
        let text = cache.append(&stream, &[0, 9]).unwrap_err().to_string();
        assert_eq!(text, "kv_cache: needs 9 tokens for one sequence, has 8");
        assert!(cache.append(&stream, &[1, 0]).is_err());
        assert!(cache.append(&stream, &[usize::MAX, 0]).is_err());
        assert!(cache.append(&stream, &[1]).is_err());
        assert_eq!((cache.len(0), cache.len(1)), (12, 0));
        cache.clear(&stream, 0).unwrap();
        cache.append(&stream, &[0, 12]).unwrap();
        assert!(cache.clear(&stream, 2).is_err());
    }

    #[test]
    fn sizes_are_checked() {
        let stream = Device::cpu().stream().unwrap();
        assert!(KvCache::<f32>::new(&stream, 1, KvShape { page_tokens: 0, ..paged() }).is_err());
        assert!(KvCache::<f32>::new(&stream, 1, KvShape { num_pages: 1 << 40, ..paged() }).is_err());
        let wide = KvShape { num_kv_heads: 1 << 32, head_dim: 1 << 32, ..paged() }; // the product of these two wraps to 0
        assert!(matches!(KvCache::<f32>::new(&stream, 1, wide), Err(Error::TooLarge { .. })));
        let long = KvShape { page_tokens: 1 << 12, num_pages: 1 << 20, ..paged() };
        let error = KvCache::<f32>::new(&stream, 1, long).unwrap_err();
        assert_eq!(error.to_string(), "kv_cache: tokens is 4294967296, must be <= 2147483647");
    }

    /// The first step gets the first pages, which a test of addresses may rely on.
    #[test]
    fn pages_are_given_in_order() {
        let stream = Device::cpu().stream().unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, paged()).unwrap();
        cache.append(&stream, &[5, 3]).unwrap();
        assert_eq!(cache.host.pages, [vec![0, 1], vec![2]]);
    }

    #[test]
    fn a_cleared_sequence_closes_the_step() {
        let stream = Device::cpu().stream().unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, paged()).unwrap();
        cache.append(&stream, &[3, 2]).unwrap();
        assert_eq!(cache.layer(0).unwrap().pages().num_tokens(), 5);
        cache.clear(&stream, 0).unwrap();
        let layer = cache.layer(0).unwrap();
        assert_eq!((layer.pages().num_tokens(), layer.pages().max_len()), (0, 2));
        assert_eq!(layer.pages().host().query_offsets(), [0, 0, 0]);
    }

    #[test]
    fn raw_pages_are_checked() {
        let (table, lens, offsets) = ([0u32, 1, 2, 3], [3u32, 1], [0u32, 2, 3]);
        let sizes = KvPageSizes { page_tokens: 4, page_stride: 6, num_pages: 4, num_tokens: 3, max_len: 3 };
        let view = |data: &'static [u32], cols| Rows::from_slice(data, data.len() / cols, cols).unwrap();
        let (table, lens, offsets): (&'static [u32], &'static [u32], &'static [u32]) =
            (Box::leak(Box::new(table)), Box::leak(Box::new(lens)), Box::leak(Box::new(offsets)));
        let pages = |sizes, lens: &'static [u32], offsets: &'static [u32]| {
            // SAFETY: pages below 4, each once; lengths within them; offsets from 0 to 3. What is refused is not used.
            unsafe { KvPages::from_raw(sizes, view(table, 2), view(lens, lens.len()), view(offsets, offsets.len())) }
        };
        let refused = |sizes| pages(sizes, lens, offsets).err().map(|error| error.to_string());
        let layout = |got| Some(format!("kv_cache: `page_stride` must have at least `page_tokens` >= 1 rows, got {got}"));
        assert_eq!(refused(sizes), None);
        assert_eq!(refused(KvPageSizes { page_stride: 4, ..sizes }), None);
        assert_eq!(refused(KvPageSizes { page_stride: 3, ..sizes }), layout(3));
        assert_eq!(refused(KvPageSizes { page_tokens: 0, ..sizes }), layout(6));
        let too_large = |what, got: u64| Some(format!("kv_cache: {what} is {got}, must be <= 2147483647"));
        assert_eq!(refused(KvPageSizes { num_pages: 1 << 30, ..sizes }), too_large("tokens", 6 << 30));
        assert_eq!(refused(KvPageSizes { num_tokens: 1 << 31, ..sizes }), too_large("step tokens", 1 << 31));
        assert_eq!(refused(KvPageSizes { max_len: 1 << 31, ..sizes }), too_large("max_len", 1 << 31));
        let text = |lens, offsets| pages(sizes, lens, offsets).err().unwrap().to_string();
        assert_eq!(text(&lens[..1], offsets), "kv_cache: `seq_lens` must be [1, B] = [1, 2], got [1, 1]");
        assert_eq!(text(lens, &offsets[..2]), "kv_cache: `query_offsets` must be [1, B + 1] = [1, 3], got [1, 2]");
    }

    /// A pool ends with its last page: the gap behind that one need not be there.
    #[test]
    fn pools_hold_every_page() {
        let (table, lens, offsets) = ([0u32, 1], [1u32], [0u32, 1]);
        let sizes = KvPageSizes { page_tokens: 4, page_stride: 6, num_pages: 3, num_tokens: 1, max_len: 1 };
        let view = |data| Rows::from_slice(data, 1, <[u32]>::len(data)).unwrap();
        // SAFETY: page 0 holds the one token.
        let pages = unsafe { KvPages::from_raw(sizes, view(&table), view(&lens), view(&offsets)).unwrap() };
        let pool = [0f32; 2 * 17];
        let layer = |keys, values| {
            let rows = |rows| Rows::from_slice(&pool[..2 * rows], rows, 2).unwrap();
            KvLayer::new(pages, rows(keys), rows(values)).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(layer(16, 16), Ok(()));
        assert_eq!(layer(15, 15), Err("kv_cache: needs 16 rows of a pool, has 15".to_owned()));
        let text = "kv_cache: `values` must be [num_pages * page_tokens, Hkv * d] = [17, 2], got [16, 2]";
        assert_eq!(layer(17, 16), Err(text.to_owned()));
        let (mut keys, mut values) = ([0f32; 30], [0f32; 30]);
        let rows = |data| RowsMut::from_slice(data, 15, 2).unwrap();
        assert!(KvLayerMut::new(pages, rows(&mut keys), rows(&mut values)).is_err());
    }
}
