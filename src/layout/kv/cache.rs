//! The cache that this crate owns: pages are given to sequences as they grow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::layer::{KvLayer, KvLayerMut};
use super::pages::KvPages;
use crate::device::{Buffer, Stream, Upload};
use crate::dtype::Element;
use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::shape::{MAX_ROWS, checked_product, filled};

/// The sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvShape {
    /// Hkv.
    pub num_kv_heads: usize,
    /// d.
    pub head_dim: usize,
    /// dv.
    pub value_dim: usize,
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
        KvShape {
            num_kv_heads: heads.num_kv_heads(),
            head_dim: heads.head_dim(),
            value_dim: heads.value_dim(),
            page_tokens: capacity_tokens,
            num_pages: num_sequences,
            max_pages: 1,
            num_sequences,
        }
    }

    /// With pages that the sequences share: `num_pages` of `page_tokens` tokens, of which one sequence may
    /// hold `max_pages`.
    ///
    /// ```
    /// use dropless::{HeadLayout, layout::KvShape};
    ///
    /// let heads = HeadLayout::new(48, 8, 128)?;
    /// let shape = KvShape::contiguous(heads, 32, 0).with_pages(16, 4096, 512); // 32 sequences of at most 8192 tokens
    /// assert_eq!((shape.num_sequences, shape.page_tokens * shape.max_pages), (32, 8192));
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn with_pages(self, page_tokens: usize, num_pages: usize, max_pages: usize) -> KvShape {
        KvShape { page_tokens, num_pages, max_pages, ..self }
    }

    /// The heads of the cache, for which the query heads do not matter.
    fn heads(&self) -> Result<HeadLayout, Error> {
        HeadLayout::new(self.num_kv_heads, self.num_kv_heads, self.head_dim)?.with_value_dim(self.value_dim)
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
pub(super) struct Step {
    pub(super) num_tokens: AtomicUsize,
    pub(super) max_len: AtomicUsize,
}

/// The host's mirror of what lies on the device, by which capacity is checked.
#[derive(Clone, Debug)]
pub(super) struct HostState {
    pages: Vec<Vec<u32>>,
    lens: Vec<u32>,
    offsets: Vec<u32>,
    free_pages: Vec<u32>,
}

impl HostState {
    pub(super) fn num_tokens(&self) -> usize {
        self.offsets.last().map_or(0, |&end| end as usize)
    }

    pub(super) fn max_len(&self) -> usize {
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
        let KvShape { num_kv_heads, head_dim, value_dim, page_tokens, num_pages, max_pages, num_sequences } = shape;
        let sizes = [
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("value_dim", value_dim),
            ("page_tokens", page_tokens),
            ("num_pages", num_pages),
            ("max_pages", max_pages),
            ("num_sequences", num_sequences),
        ];
        if let Some(&(arg, got)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::Value { op: Op::KvCache, arg, need: "at least 1", got: got as f64 });
        }
        checked_product(Op::KvCache, "tokens", &[num_pages, page_tokens], MAX_ROWS)?;
        shape.heads()?;
        let elements = |width| {
            let sizes = [num_pages, page_tokens, num_kv_heads, width];
            checked_product(Op::KvCache, "elements", &sizes, isize::MAX as usize)
        };
        let (key_elements, value_elements) = (elements(head_dim)?, elements(value_dim)?);
        let table = checked_product(Op::KvCache, "block table", &[num_sequences, max_pages], MAX_ROWS)?;
        let pools = || Ok((Buffer::zeros(stream, key_elements)?, Buffer::zeros(stream, value_elements)?));
        let mut free_pages = filled(Op::KvCache, num_pages, 0)?;
        free_pages.iter_mut().rev().zip(0..).for_each(|(page, number)| *page = number);
        let host = HostState {
            pages: filled(Op::KvCache, num_sequences, Vec::new())?,
            lens: filled(Op::KvCache, num_sequences, 0)?,
            offsets: filled(Op::KvCache, num_sequences + 1, 0)?,
            free_pages,
        };
        Ok(KvCache {
            pools: (0..num_layers).map(|_| pools()).collect::<Result<_, Error>>()?,
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
        let (keys, values) = pools.get(layer).ok_or(no_layer(layer, pools.len()))?;
        let (rows, heads) = (shape.num_pages * shape.page_tokens, shape.heads()?);
        let pages = KvPages::new(shape, host, step, [block_table, seq_lens, query_offsets])?;
        KvLayer::new(pages, heads, keys.rows(rows, heads.kv_cols())?, values.rows(rows, heads.v_cols())?)
    }

    /// One layer, for writing the step's tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for a layer that does not exist.
    pub fn layer_mut(&mut self, layer: usize) -> Result<KvLayerMut<'_, T>, Error> {
        let KvCache { shape, pools, block_table, seq_lens, query_offsets, host, step, .. } = self;
        let count = pools.len();
        let (keys, values) = pools.get_mut(layer).ok_or(no_layer(layer, count))?;
        let (rows, heads) = (shape.num_pages * shape.page_tokens, shape.heads()?);
        let pages = KvPages::new(shape, host, step, [block_table, seq_lens, query_offsets])?;
        KvLayerMut::new(pages, heads, keys.rows_mut(rows, heads.kv_cols())?, values.rows_mut(rows, heads.v_cols())?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn paged() -> KvShape {
        KvShape { num_kv_heads: 1, head_dim: 2, value_dim: 2, page_tokens: 4, num_pages: 5, max_pages: 3, num_sequences: 2 }
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
        let mut slots: Vec<(usize, usize)> = (0..5).map(|p| pages.slot(0, p)).chain((0..6).map(|p| pages.slot(1, p))).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), 11);
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
    fn values_may_have_a_width_of_their_own() {
        let stream = Device::cpu().stream().unwrap();
        let heads = HeadLayout::new(4, 2, 6).unwrap().with_value_dim(5).unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 3, 7)).unwrap();
        assert_eq!((cache.shape().head_dim, cache.shape().value_dim), (6, 5));
        let layer = cache.layer(0).unwrap();
        assert_eq!((layer.keys().dims(), layer.values().dims()), ([21, 12], [21, 10]));
        assert_eq!(layer.layouts().map(|layout| (layout.token_stride, layout.head_stride)), [(12, 6), (10, 5)]);
        assert!(cache.layer_mut(0).is_ok());
    }

    #[test]
    fn sizes_are_checked() {
        let stream = Device::cpu().stream().unwrap();
        assert!(KvCache::<f32>::new(&stream, 1, KvShape { value_dim: 0, ..paged() }).is_err());
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
}
