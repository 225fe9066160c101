//! Where the elements of a page lie in its pool.

#[cfg(feature = "cuda")]
use crate::device::params::PoolParams;
use crate::error::{Error, Op};
use crate::layout::HeadLayout;

/// Where the elements of a pool lie, all distances in elements.
///
/// Element `j` of KV head `h` of the token in slot `t` of page `p` lies at
///
/// ```text
/// p * page_stride + t * token_stride + h * head_stride + j / chunk * chunk_stride + j % chunk
/// ```
///
/// A head is in one piece where `chunk = d`. The layouts of engines:
///
/// | engine | pool, or where it lies | constructor |
/// |---|---|---|
/// | this crate; FlashAttention | `[pages, page_tokens, Hkv, d]` | [`token_major`](Self::token_major) |
/// | vLLM with FlashAttention | `[2, pages, page_tokens, Hkv, d]`, keys then values | [`token_major`](Self::token_major), values at half of the tensor |
/// | FlashInfer, NHD | `[pages, 2, page_tokens, Hkv, d]` | [`token_major`](Self::token_major), page stride doubled, values one half page on |
/// | FlashInfer, HND | `[pages, 2, Hkv, page_tokens, d]` | [`head_major`](Self::head_major), page stride doubled, values one half page on |
/// | candle | `[B, Hkv, max_len, d]` | [`head_major`](Self::head_major), a page of `max_len` tokens per sequence |
/// | vLLM's `paged_attention`, mistral.rs: keys | `[pages, Hkv, d / x, page_tokens, x]` | [`split_keys`](Self::split_keys) |
/// | vLLM's `paged_attention`, mistral.rs: values | `[pages, Hkv, d, page_tokens]` | [`split_values`](Self::split_values) |
///
/// Each stride must exceed what the smaller ones span, so that no element lies twice; a page may have room behind it.
///
/// ```
/// use dropless::HeadLayout;
/// use dropless::layout::KvLayout;
/// let heads = HeadLayout::new(48, 8, 128)?;
/// let packed = KvLayout::token_major(16, heads);
/// assert_eq!((packed.token_stride, packed.page_stride), (1024, 16384));
/// let flashinfer = packed.with_page_stride(2 * packed.page_stride); // keys and values of a page side by side
/// assert_eq!(flashinfer.page_stride, 32768);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// Where values have another width than keys, a pool of values is described by
/// [`HeadLayout::of_values`]: its d is dv.
///
/// ```
/// use dropless::HeadLayout;
/// use dropless::layout::KvLayout;
/// let heads = HeadLayout::new(16, 16, 192)?.with_value_dim(128)?;
/// let (keys, values) = (KvLayout::token_major(16, heads), KvLayout::token_major(16, heads.of_values()));
/// assert_eq!((keys.token_stride, values.token_stride), (16 * 192, 16 * 128));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvLayout {
    /// From one page to the next.
    pub page_stride: usize,
    /// From one token of a page to the next.
    pub token_stride: usize,
    /// From one KV head of a token to the next.
    pub head_stride: usize,
    /// Elements of a head that lie side by side; a divisor of d.
    pub chunk: usize,
    /// From one chunk of a head to the next.
    pub chunk_stride: usize,
}

impl KvLayout {
    /// `[pages, page_tokens, Hkv, d]`, packed.
    pub fn token_major(page_tokens: usize, heads: HeadLayout) -> KvLayout {
        let (token_stride, head_stride) = (heads.kv_cols(), heads.head_dim());
        KvLayout::strided(page_tokens.saturating_mul(token_stride), token_stride, head_stride, heads)
    }

    /// `[pages, Hkv, page_tokens, d]`, packed.
    pub fn head_major(page_tokens: usize, heads: HeadLayout) -> KvLayout {
        let head_stride = page_tokens.saturating_mul(heads.head_dim());
        KvLayout::strided(head_stride.saturating_mul(heads.num_kv_heads()), heads.head_dim(), head_stride, heads)
    }

    /// Heads in one piece at any distances.
    pub fn strided(page_stride: usize, token_stride: usize, head_stride: usize, heads: HeadLayout) -> KvLayout {
        KvLayout { page_stride, token_stride, head_stride, chunk: heads.head_dim(), chunk_stride: heads.head_dim() }
    }

    /// `[pages, Hkv, d / chunk, page_tokens, chunk]`, packed: how vLLM's `paged_attention` and mistral.rs keep keys, with a chunk of 16 bytes.
    pub fn split_keys(page_tokens: usize, heads: HeadLayout, chunk: usize) -> KvLayout {
        let chunk_stride = page_tokens.saturating_mul(chunk);
        KvLayout { token_stride: chunk, chunk, chunk_stride, ..KvLayout::head_major(page_tokens, heads) }
    }

    /// `[pages, Hkv, dv, page_tokens]`, packed: how vLLM's `paged_attention` and mistral.rs keep values.
    pub fn split_values(page_tokens: usize, heads: HeadLayout) -> KvLayout {
        KvLayout::split_keys(page_tokens, heads.of_values(), 1)
    }

    /// Another distance between pages.
    pub fn with_page_stride(self, page_stride: usize) -> KvLayout {
        KvLayout { page_stride, ..self }
    }

    /// Where a head begins.
    pub(crate) fn head(&self, page: usize, slot: usize, head: usize) -> usize {
        page * self.page_stride + slot * self.token_stride + head * self.head_stride
    }

    /// As kernels take it.
    #[cfg(feature = "cuda")]
    pub(crate) fn params(&self) -> PoolParams {
        PoolParams {
            page_stride: self.page_stride as i64,
            token_stride: self.token_stride as i64,
            head_stride: self.head_stride as i64,
            chunk: self.chunk as i64,
            chunk_stride: self.chunk_stride as i64,
        }
    }
}

/// What a pool of a layer holds: of keys, or of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extents {
    pub(super) num_pages: usize,
    pub(super) page_tokens: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Extents {
    /// Elements from a pool's first to its last. Refuses a layout in which two elements could lie at one place. With it, what it
    /// gives is in one chunk if it can be.
    pub(super) fn check(&self, arg: &'static str, layout: KvLayout) -> Result<(KvLayout, usize), Error> {
        let KvLayout { page_stride, token_stride, head_stride, chunk, chunk_stride } = layout;
        let refuse = |need, got| Err(Error::Layout { op: Op::KvCache, arg, need, got });
        if chunk == 0 || !self.head_dim.is_multiple_of(chunk) {
            return refuse("a chunk that divides `head_dim`", chunk);
        }
        let mut axes = [
            (1, chunk),
            (chunk_stride, self.head_dim / chunk),
            (head_stride, self.num_kv_heads),
            (token_stride, self.page_tokens),
            (page_stride, self.num_pages),
        ];
        axes.sort_unstable();
        let mut last = 0u128; // the furthest element that the axes so far reach
        for (stride, extent) in axes.into_iter().filter(|(_, extent)| *extent > 1) {
            if stride as u128 <= last {
                return refuse("strides that each exceed what the smaller ones span", stride);
            }
            last = last.saturating_add((stride as u128).saturating_mul(extent as u128 - 1));
        }
        let limit = isize::MAX as u128;
        if last >= limit {
            return Err(Error::TooLarge { op: Op::KvCache, what: "elements of a pool", got: last.saturating_add(1), limit });
        }
        let in_one_piece = chunk == self.head_dim || chunk_stride == chunk;
        let layout = if in_one_piece { KvLayout { chunk: self.head_dim, chunk_stride: self.head_dim, ..layout } } else { layout };
        Ok((layout, if self.num_pages == 0 { 0 } else { last as usize + 1 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENTS: Extents = Extents { num_pages: 3, page_tokens: 4, num_kv_heads: 2, head_dim: 8 };

    fn heads() -> HeadLayout {
        HeadLayout::new(4, 2, 8).unwrap()
    }

    /// Every element of a layout, in the order of page, token, head, element.
    fn places(layout: KvLayout) -> Vec<usize> {
        let Extents { num_pages, page_tokens, num_kv_heads, head_dim } = EXTENTS;
        let element = |first: usize, j: usize| first + j / layout.chunk * layout.chunk_stride + j % layout.chunk;
        let mut places = Vec::new();
        for (page, slot) in (0..num_pages).flat_map(|page| (0..page_tokens).map(move |slot| (page, slot))) {
            for head in 0..num_kv_heads {
                places.extend((0..head_dim).map(|j| element(layout.head(page, slot, head), j)));
            }
        }
        places
    }

    #[test]
    fn packed_layouts_fill_their_pools() {
        let split = [1, 2, 4, 8].map(|chunk| KvLayout::split_keys(4, heads(), chunk));
        let whole = [KvLayout::token_major(4, heads()), KvLayout::head_major(4, heads()), KvLayout::split_values(4, heads())];
        for layout in split.into_iter().chain(whole) {
            let (_, elements) = EXTENTS.check("keys", layout).unwrap();
            let mut places = places(layout);
            places.sort_unstable();
            assert!(elements == 3 * 4 * 2 * 8 && places.into_iter().eq(0..elements), "{layout:?}");
        }
    }

    #[test]
    fn elements_do_not_lie_twice() {
        let layout = KvLayout::token_major(4, heads());
        let text = |layout| EXTENTS.check("keys", layout).err().map(|error| error.to_string());
        let overlap = |got| Some(format!("kv_cache: `keys` must have strides that each exceed what the smaller ones span, got {got}"));
        assert_eq!(text(layout), None);
        assert_eq!(text(layout.with_page_stride(63)), overlap(63));
        assert_eq!(text(layout.with_page_stride(100)), None);
        assert_eq!(text(KvLayout { token_stride: 0, ..layout }), overlap(0));
        assert_eq!(text(KvLayout { head_stride: 7, ..layout }), overlap(7));
        assert_eq!(text(KvLayout { chunk: 4, chunk_stride: 3, ..layout }), overlap(3));
        let chunk = |chunk| text(KvLayout { chunk, ..layout });
        assert_eq!(chunk(3), Some("kv_cache: `keys` must have a chunk that divides `head_dim`, got 3".to_owned()));
        assert!(chunk(0).is_some() && chunk(16).is_some());
        let huge = text(layout.with_page_stride(usize::MAX)).unwrap();
        assert!(huge.starts_with("kv_cache: elements of a pool is "), "{huge}");
    }

    /// A pool ends with its last page: the room behind that one need not be there.
    #[test]
    fn nothing_is_asked_for_behind_the_last_page() {
        let (_, elements) = EXTENTS.check("keys", KvLayout::token_major(4, heads()).with_page_stride(100)).unwrap();
        assert_eq!(elements, 2 * 100 + 64);
        let none = Extents { num_pages: 0, ..EXTENTS };
        assert_eq!(none.check("keys", KvLayout::token_major(4, heads())).unwrap().1, 0);
    }

    #[test]
    fn chunks_side_by_side_are_one() {
        let layout = KvLayout { chunk: 2, chunk_stride: 2, ..KvLayout::token_major(4, heads()) };
        assert_eq!(EXTENTS.check("keys", layout).unwrap().0, KvLayout::token_major(4, heads()));
    }
}
