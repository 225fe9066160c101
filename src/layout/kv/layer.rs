//! One layer's keys and values: two pools, how they lie, and the pages that they are made of.
#![allow(unsafe_code)] // the raw constructors

use super::host::{HostLayerMut, HostPool, HostPoolMut};
use super::pages::KvPages;
use super::strides::{Extents, KvLayout};
use crate::device::Access;
use crate::dtype::Element;
use crate::error::{Error, Op, Place, check_shape};
use crate::layout::HeadLayout;
use crate::view::{Rows, RowsMut};

/// How the pools lie: layouts of keys and values that were checked against these extents and the pools' memory.
#[derive(Clone, Copy)]
struct Lie {
    extents: [Extents; 2],
    layouts: [KvLayout; 2],
}

/// Of keys and of values.
fn extents_of(pages: &KvPages<'_>, heads: HeadLayout) -> [Extents; 2] {
    [pages.extents(heads), pages.extents(heads.of_values())]
}

/// One layer's keys and values, for reading.
#[derive(Clone, Copy)]
pub struct KvLayer<'a, T> {
    pages: KvPages<'a>,
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
    lie: Lie,
}

/// One layer's keys and values, for writing the step's tokens.
pub struct KvLayerMut<'a, T> {
    pages: KvPages<'a>,
    keys: RowsMut<'a, T>,
    values: RowsMut<'a, T>,
    lie: Lie,
}

impl Lie {
    /// Of rows `[num_pages * page_tokens, Hkv * d]`, one for each token, with dv for d where they are values;
    /// each pool's distance between two rows.
    fn of_rows(pages: &KvPages<'_>, heads: HeadLayout, pools: [([usize; 2], usize); 2]) -> Result<Lie, Error> {
        let extents = extents_of(pages, heads);
        let page_tokens = extents[0].page_tokens;
        let rows = extents[0].num_pages * page_tokens; // within MAX_ROWS, as `KvPages` says
        let wanted = [
            ("keys", "[num_pages * page_tokens, Hkv * d]", heads.kv_cols()),
            ("values", "[num_pages * page_tokens, Hkv * dv]", heads.v_cols()),
        ];
        for ((arg, shape, want_cols), ([have, cols], _)) in wanted.into_iter().zip(pools) {
            if have < rows {
                return Err(Error::Capacity { op: Op::KvCache, what: "rows of a pool", need: rows, have });
            }
            check_shape(Op::KvCache, arg, shape, &[have, want_cols], &[have, cols])?;
        }
        let layout =
            |stride: usize, heads: HeadLayout| KvLayout::strided(page_tokens.saturating_mul(stride), stride, heads.head_dim(), heads);
        Ok(Lie { extents, layouts: [layout(pools[0].1, heads), layout(pools[1].1, heads.of_values())] })
    }

    /// Of memory that lies in one piece, and how many elements each pool needs of it.
    fn of_memory(pages: &KvPages<'_>, heads: HeadLayout, [keys, values]: [KvLayout; 2]) -> Result<(Lie, [usize; 2]), Error> {
        let extents = extents_of(pages, heads);
        let (keys, key_elements) = extents[0].check("keys", keys)?;
        let (values, value_elements) = extents[1].check("values", values)?;
        Ok((Lie { extents, layouts: [keys, values] }, [key_elements, value_elements]))
    }

    /// `of_memory`, for matrices of one row.
    fn of_rows_of_one(pages: &KvPages<'_>, heads: HeadLayout, layouts: [KvLayout; 2], memory: [[usize; 2]; 2]) -> Result<Lie, Error> {
        let (lie, elements) = Lie::of_memory(pages, heads, layouts)?;
        for ((arg, dims), need) in ["keys", "values"].into_iter().zip(memory).zip(elements) {
            check_shape(Op::KvCache, arg, "[1, elements]", &[1, dims[1].max(need)], &dims)?;
        }
        Ok(lie)
    }

    fn check_heads(&self, op: Op, heads: HeadLayout) -> Result<(), Error> {
        let [keys, values] = self.extents;
        let want = [heads.num_kv_heads(), heads.head_dim(), heads.value_dim()];
        check_shape(op, "cache", "[Hkv, d, dv]", &want, &[keys.num_kv_heads, keys.head_dim, values.head_dim])
    }
}

impl<'a, T: Element> KvLayer<'a, T> {
    /// Pools with a row for each slot of each page, as rows of a matrix: keys
    /// `[num_pages * page_tokens, Hkv * d]`, values `[num_pages * page_tokens, Hkv * dv]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a pool has other columns; [`Error::Capacity`] if it has too few rows.
    pub fn new(pages: KvPages<'a>, heads: HeadLayout, keys: Rows<'a, T>, values: Rows<'a, T>) -> Result<Self, Error> {
        let lie = Lie::of_rows(&pages, heads, [&keys, &values].map(|pool| (pool.dims(), pool.stride())))?;
        Ok(KvLayer { pages, keys, values, lie })
    }

    /// Pools that lie as their layouts say, each in a piece of memory `[1, elements]`.
    ///
    /// ```
    /// use dropless::attention::{self, Options};
    /// use dropless::layout::{KvLayer, KvLayout, KvPageSizes, KvPages};
    /// use dropless::{Device, HeadLayout, Rows, RowsMut};
    ///
    /// let stream = Device::cpu().stream()?;
    /// let heads = HeadLayout::new(4, 2, 8)?;
    /// // candle's cache: `[B, Hkv, max_len, d]`, here of two sequences with room for 16 tokens and 5 and 9 of them.
    /// let (keys, values) = (vec![0.5f32; 2 * 2 * 16 * 8], vec![1f32; 2 * 2 * 16 * 8]);
    /// let (table, lens, offsets) = ([0u32, 1], [5u32, 9], [0u32, 1, 2]);
    /// let row = |values| Rows::from_slice(values, 1, <[u32]>::len(values));
    /// let sizes = KvPageSizes::new(16, 2).with_step(2, 9);
    /// // SAFETY: each sequence has a page of its own, as long as its tokens, one of which is new.
    /// let pages = unsafe { KvPages::from_raw(sizes, Rows::from_slice(&table, 2, 1)?, row(&lens)?, row(&offsets)?)? };
    /// let layout = KvLayout::head_major(16, heads);
    /// let [keys, values] = [&keys, &values].map(|pool| Rows::from_slice(pool, 1, pool.len()));
    /// let layer = KvLayer::with_layouts(pages, heads, (keys?, layout), (values?, layout))?;
    ///
    /// let (q, mut out) = (vec![1f32; 2 * 32], vec![0f32; 2 * 32]);
    /// let out_rows = &mut RowsMut::from_slice(&mut out, 2, 32)?;
    /// attention::prefill(&stream, Rows::from_slice(&q, 2, 32)?, Options::new(heads), &layer, out_rows)?;
    /// assert_eq!(out, vec![1f32; 2 * 32]);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if chunks do not divide a head or elements could lie at one place; [`Error::Shape`] if a piece of memory is
    /// too short; [`Error::TooLarge`].
    pub fn with_layouts(
        pages: KvPages<'a>,
        heads: HeadLayout,
        (keys, key_layout): (Rows<'a, T>, KvLayout),
        (values, value_layout): (Rows<'a, T>, KvLayout),
    ) -> Result<Self, Error> {
        let lie = Lie::of_rows_of_one(&pages, heads, [key_layout, value_layout], [keys.dims(), values.dims()])?;
        Ok(KvLayer { pages, keys, values, lie })
    }

    /// Pools in memory that this crate does not own, each given by the address of its first element, on a GPU or the host.
    ///
    /// # Safety
    ///
    /// Of the elements that the layouts name for pages below `num_pages`:
    /// * they lie in an allocation at `place`, aligned for `T`;
    /// * those of the sequences' tokens are initialised, stay valid and are not written, until the work that is given this value completes.
    ///
    /// # Errors
    ///
    /// As [`with_layouts`](Self::with_layouts).
    pub unsafe fn from_raw(
        pages: KvPages<'a>,
        heads: HeadLayout,
        place: Place,
        (keys, key_layout): (u64, KvLayout),
        (values, value_layout): (u64, KvLayout),
    ) -> Result<Self, Error> {
        let (lie, [key_elements, value_elements]) = Lie::of_memory(&pages, heads, [key_layout, value_layout])?;
        // SAFETY: the caller's duty, for the elements that the layouts name. No other one is ever looked at.
        let memory = |address, elements| unsafe { Rows::from_raw(place, address, 1, elements, elements) };
        Ok(KvLayer { pages, keys: memory(keys, key_elements)?, values: memory(values, value_elements)?, lie })
    }

    /// Which token lies where.
    pub fn pages(&self) -> &KvPages<'a> {
        &self.pages
    }

    /// The memory of the keys, as it was given: `[num_pages * page_tokens, Hkv * d]` for a cache of this crate.
    pub fn keys(&self) -> Rows<'a, T> {
        self.keys
    }

    /// The memory of the values, as it was given.
    pub fn values(&self) -> Rows<'a, T> {
        self.values
    }

    /// How keys and values lie there.
    pub fn layouts(&self) -> [KvLayout; 2] {
        self.lie.layouts
    }

    /// Hkv and d.
    #[cfg(feature = "cuda")]
    pub(crate) fn heads(&self) -> [usize; 2] {
        [self.lie.extents[0].num_kv_heads, self.lie.extents[0].head_dim]
    }

    /// Refuses a layer of other heads.
    pub(crate) fn check_heads(&self, op: Op, heads: HeadLayout) -> Result<(), Error> {
        self.lie.check_heads(op, heads)
    }

    pub(crate) fn accesses(&self) -> [(&'static str, Access<'a>); 5] {
        let [table, lens, offsets] = self.pages.accesses();
        [("keys", self.keys.access()), ("values", self.values.access()), table, lens, offsets]
    }

    /// Keys and values as seen from the host. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&self) -> [HostPool<'a, T>; 2] {
        let Lie { extents: [key_extents, value_extents], layouts: [keys, values] } = self.lie;
        [HostPool::new(self.keys.host(), key_extents, keys), HostPool::new(self.values.host(), value_extents, values)]
    }
}

impl<'a, T: Element> KvLayerMut<'a, T> {
    /// As [`KvLayer::new`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn new(pages: KvPages<'a>, heads: HeadLayout, keys: RowsMut<'a, T>, values: RowsMut<'a, T>) -> Result<Self, Error> {
        let lie = Lie::of_rows(&pages, heads, [&keys, &values].map(|pool| (pool.dims(), pool.stride())))?;
        Ok(KvLayerMut { pages, keys, values, lie })
    }

    /// As [`KvLayer::with_layouts`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn with_layouts(
        pages: KvPages<'a>,
        heads: HeadLayout,
        (keys, key_layout): (RowsMut<'a, T>, KvLayout),
        (values, value_layout): (RowsMut<'a, T>, KvLayout),
    ) -> Result<Self, Error> {
        let lie = Lie::of_rows_of_one(&pages, heads, [key_layout, value_layout], [keys.dims(), values.dims()])?;
        Ok(KvLayerMut { pages, keys, values, lie })
    }

    /// As [`KvLayer::from_raw`].
    ///
    /// # Safety
    ///
    /// Of the elements that the layouts name for pages below `num_pages`:
    /// * no element of the keys is one of the values; pages of both may lie side by side;
    /// * they lie in an allocation at `place`, aligned for `T`, and on the host they are initialised;
    /// * those of the step's tokens stay valid and nobody else reads or writes them, until the work that is given this value completes.
    ///
    /// # Errors
    ///
    /// As [`KvLayer::with_layouts`].
    pub unsafe fn from_raw(
        pages: KvPages<'a>,
        heads: HeadLayout,
        place: Place,
        (keys, key_layout): (u64, KvLayout),
        (values, value_layout): (u64, KvLayout),
    ) -> Result<Self, Error> {
        let (lie, [key_elements, value_elements]) = Lie::of_memory(&pages, heads, [key_layout, value_layout])?;
        // SAFETY: the caller's duty, for the elements that the layouts name. No other one is ever looked at.
        let memory = |address, elements| unsafe { RowsMut::from_raw(place, address, 1, elements, elements) };
        Ok(KvLayerMut { pages, keys: memory(keys, key_elements)?, values: memory(values, value_elements)?, lie })
    }

    /// Which token lies where.
    pub fn pages(&self) -> &KvPages<'a> {
        &self.pages
    }

    /// How keys and values lie in their memory.
    pub fn layouts(&self) -> [KvLayout; 2] {
        self.lie.layouts
    }

    /// Refuses a layer of other heads.
    pub(crate) fn check_heads(&self, op: Op, heads: HeadLayout) -> Result<(), Error> {
        self.lie.check_heads(op, heads)
    }

    pub(crate) fn accesses(&self) -> [(&'static str, Access<'a>); 5] {
        let [table, lens, offsets] = self.pages.accesses();
        [("keys", self.keys.access()), ("values", self.values.access()), table, lens, offsets]
    }

    /// The addresses of keys and values. Only CUDA backends call this, after dispatch.
    #[cfg(feature = "cuda")]
    pub(crate) fn addresses(&self) -> [u64; 2] {
        [self.keys.address(), self.values.address()]
    }

    /// As seen from the host. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&mut self) -> HostLayerMut<'_, T> {
        let (pages, num_tokens) = (self.pages.host(), self.pages.num_tokens());
        let Lie { extents: [key_extents, value_extents], layouts: [keys, values] } = self.lie;
        let pools = [HostPoolMut::new(self.keys.host(), key_extents, keys), HostPoolMut::new(self.values.host(), value_extents, values)];
        HostLayerMut { pages, num_tokens, pools }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pages::KvPageSizes;
    use super::*;

    fn one_sequence(f: impl FnOnce(KvPages<'_>)) {
        let (table, lens, offsets) = ([0u32, 1], [1u32], [0u32, 1]);
        let sizes = KvPageSizes::new(4, 3).with_step(1, 1);
        let view = |data| Rows::from_slice(data, 1, <[u32]>::len(data)).unwrap();
        // SAFETY: page 0 holds the one token.
        f(unsafe { KvPages::from_raw(sizes, view(&table), view(&lens), view(&offsets)).unwrap() });
    }

    #[test]
    fn pools_of_rows_hold_every_page() {
        let heads = HeadLayout::new(2, 2, 1).unwrap();
        one_sequence(|pages| {
            let pool = [0f32; 3 * 13];
            let layer = |[keys, key_cols]: [usize; 2], [values, value_cols]: [usize; 2]| {
                let rows = |rows, cols| Rows::from_slice(&pool[..rows * cols], rows, cols).unwrap();
                KvLayer::new(pages, heads, rows(keys, key_cols), rows(values, value_cols)).map(drop).map_err(|error| error.to_string())
            };
            assert_eq!(layer([12, 2], [13, 2]), Ok(()));
            assert_eq!(layer([12, 2], [11, 2]), Err("kv_cache: needs 12 rows of a pool, has 11".to_owned()));
            let text = "kv_cache: `values` must be [num_pages * page_tokens, Hkv * dv] = [12, 2], got [12, 3]";
            assert_eq!(layer([12, 2], [12, 3]), Err(text.to_owned()));
            let (mut keys, mut values) = ([0f32; 22], [0f32; 22]);
            let rows = |data| RowsMut::from_slice(data, 11, 2).unwrap();
            assert!(KvLayerMut::new(pages, heads, rows(&mut keys), rows(&mut values)).is_err());
        });
    }

    #[test]
    fn pools_of_memory_hold_every_element() {
        let heads = HeadLayout::new(2, 2, 4).unwrap();
        one_sequence(|pages| {
            let pool = [0f32; 3 * 32 + 2 * 8];
            let layout = KvLayout::head_major(4, heads).with_page_stride(40);
            let layer = |elements, rows| {
                let memory = Rows::from_slice(&pool[..elements], rows, elements / rows).unwrap();
                KvLayer::with_layouts(pages, heads, (memory, layout), (memory, layout)).map(drop).map_err(|error| error.to_string())
            };
            assert_eq!(layer(112, 1), Ok(()));
            assert_eq!(layer(111, 1), Err("kv_cache: `keys` must be [1, elements] = [1, 112], got [1, 111]".to_owned()));
            assert_eq!(layer(112, 2), Err("kv_cache: `keys` must be [1, elements] = [1, 112], got [2, 56]".to_owned()));
        });
    }
}
