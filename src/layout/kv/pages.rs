//! Which page holds which tokens, and which rows of a step belong to which sequence.
#![allow(unsafe_code)] // the raw constructor

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::{HostState, KvShape, Step};
use super::host::HostPages;
use super::strides::Extents;
#[cfg(feature = "cuda")]
use crate::device::params::PageParams;
use crate::device::{Access, Buffer, Stream};
use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::Rows;

/// Which page holds which tokens, and which rows of the step belong to which sequence.
#[derive(Clone, Copy)]
pub struct KvPages<'a> {
    page_tokens: usize,
    num_pages: usize,
    num_tokens: usize,
    max_len: usize,
    block_table: Rows<'a, u32>,   // [B, max_pages]
    seq_lens: Rows<'a, u32>,      // [1, B]
    query_offsets: Rows<'a, u32>, // [1, B + 1]
    step: Option<&'a Arc<Step>>,  // of a cache
}

/// The sizes that go with the device arrays of [`KvPages::from_raw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvPageSizes {
    /// Tokens of one page.
    pub page_tokens: usize,
    /// Pages of each pool.
    pub num_pages: usize,
    /// T, the step's tokens.
    pub num_tokens: usize,
    /// No sequence is longer than this, the step's tokens included.
    pub max_len: usize,
}

impl KvPageSizes {
    /// Of pools, and no step yet.
    pub fn new(page_tokens: usize, num_pages: usize) -> KvPageSizes {
        KvPageSizes { page_tokens, num_pages, num_tokens: 0, max_len: 0 }
    }

    /// With a step of `num_tokens` tokens, after which no sequence is longer than `max_len`.
    pub fn with_step(self, num_tokens: usize, max_len: usize) -> KvPageSizes {
        KvPageSizes { num_tokens, max_len, ..self }
    }
}

impl<'a> KvPages<'a> {
    pub(super) fn new(
        shape: &KvShape,
        host: &HostState,
        step: &'a Arc<Step>,
        [block_table, seq_lens, query_offsets]: [&'a Buffer<u32>; 3],
    ) -> Result<KvPages<'a>, Error> {
        let sequences = shape.num_sequences;
        Ok(KvPages {
            page_tokens: shape.page_tokens,
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
    /// A table of `i32` has the same bits: its address does for [`Rows::from_raw`], its bytes for [`Rows::from_bytes`]. What it
    /// holds for pages that no length reaches is not looked at, be it -1; nor is it for pages of positions that a
    /// [window](crate::attention::Options::with_window) hides from every query of the step.
    ///
    /// # Safety
    ///
    /// When the work that is given this value runs:
    /// * every page that is looked at is below `num_pages`;
    /// * a page that the step writes, one that holds a position of the step's tokens, is reached by one sequence only, and there once. Pages
    ///   that are only read may be shared, as those of a common prefix are;
    /// * no length exceeds `max_len` or the sequence's pages, nor is it less than the sequence's tokens in this step;
    /// * `query_offsets` begins with 0, does not decrease and ends with `num_tokens`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the arrays disagree on B; [`Error::Value`] if `page_tokens` is 0; [`Error::TooLarge`].
    pub unsafe fn from_raw(
        sizes: KvPageSizes,
        block_table: Rows<'a, u32>,
        seq_lens: Rows<'a, u32>,
        query_offsets: Rows<'a, u32>,
    ) -> Result<KvPages<'a>, Error> {
        let KvPageSizes { page_tokens, num_pages, num_tokens, max_len } = sizes;
        let sequences = block_table.rows();
        check_shape(Op::KvCache, "seq_lens", "[1, B]", &[1, sequences], &seq_lens.dims())?;
        check_shape(Op::KvCache, "query_offsets", "[1, B + 1]", &[1, sequences + 1], &query_offsets.dims())?;
        if page_tokens == 0 {
            return Err(Error::Value { op: Op::KvCache, arg: "page_tokens", need: "at least 1", got: 0.0 });
        }
        checked_product(Op::KvCache, "tokens", &[num_pages, page_tokens], MAX_ROWS)?;
        checked_product(Op::KvCache, "step tokens", &[num_tokens], MAX_ROWS)?;
        checked_product(Op::KvCache, "max_len", &[max_len], MAX_ROWS)?;
        Ok(KvPages { page_tokens, num_pages, num_tokens, max_len, block_table, seq_lens, query_offsets, step: None })
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

    /// What pools of these pages hold.
    pub(super) fn extents(&self, heads: HeadLayout) -> Extents {
        let (num_kv_heads, head_dim) = (heads.num_kv_heads(), heads.head_dim());
        Extents { num_pages: self.num_pages, page_tokens: self.page_tokens, num_kv_heads, head_dim }
    }

    pub(super) fn accesses(&self) -> [(&'static str, Access<'a>); 3] {
        [("block_table", self.block_table.access()), ("seq_lens", self.seq_lens.access()), ("query_offsets", self.query_offsets.access())]
    }

    /// Tokens of a page.
    #[cfg(feature = "cuda")]
    pub(crate) fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages of a pool.
    #[cfg(feature = "cuda")]
    pub(crate) fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// How long a sequence may become: in a cache as long as its pages hold, in raw pages `max_len`.
    pub(crate) fn longest(&self) -> usize {
        let held = self.page_tokens.saturating_mul(self.block_table.cols());
        if self.step.is_some() { held.max(self.max_len) } else { self.max_len }
    }

    /// Pages of a sequence at most.
    #[cfg(feature = "cuda")]
    pub(crate) fn max_pages(&self) -> usize {
        self.block_table.cols()
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
        }
    }

    /// As seen from the host. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&self) -> HostPages<'a> {
        HostPages {
            page_tokens: self.page_tokens,
            block_table: self.block_table.host(),
            seq_lens: self.seq_lens.host().row(0),
            query_offsets: self.query_offsets.host().row(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_pages_are_checked() {
        let (table, lens, offsets) = ([0u32, 1, 2, 3], [3u32, 1], [0u32, 2, 3]);
        let sizes = KvPageSizes::new(4, 4).with_step(3, 3);
        let view = |data: &'static [u32], cols| Rows::from_slice(data, data.len() / cols, cols).unwrap();
        let (table, lens, offsets): (&'static [u32], &'static [u32], &'static [u32]) =
            (Box::leak(Box::new(table)), Box::leak(Box::new(lens)), Box::leak(Box::new(offsets)));
        let pages = |sizes, lens: &'static [u32], offsets: &'static [u32]| {
            // SAFETY: pages below 4, each once; lengths within them; offsets from 0 to 3. What is refused is not used.
            unsafe { KvPages::from_raw(sizes, view(table, 2), view(lens, lens.len()), view(offsets, offsets.len())) }
        };
        let refused = |sizes| pages(sizes, lens, offsets).err().map(|error| error.to_string());
        assert_eq!(refused(sizes), None);
        let zero = refused(KvPageSizes { page_tokens: 0, ..sizes });
        assert_eq!(zero, Some("kv_cache: `page_tokens` must be at least 1, got 0".to_owned()));
        let too_large = |what, got: u64| Some(format!("kv_cache: {what} is {got}, must be <= 2147483647"));
        assert_eq!(refused(KvPageSizes { num_pages: 1 << 30, ..sizes }), too_large("tokens", 4 << 30));
        assert_eq!(refused(KvPageSizes { num_tokens: 1 << 31, ..sizes }), too_large("step tokens", 1 << 31));
        assert_eq!(refused(KvPageSizes { max_len: 1 << 31, ..sizes }), too_large("max_len", 1 << 31));
        let text = |lens, offsets| pages(sizes, lens, offsets).err().unwrap().to_string();
        assert_eq!(text(&lens[..1], offsets), "kv_cache: `seq_lens` must be [1, B] = [1, 2], got [1, 1]");
        assert_eq!(text(lens, &offsets[..2]), "kv_cache: `query_offsets` must be [1, B + 1] = [1, 3], got [1, 2]");
    }
}
