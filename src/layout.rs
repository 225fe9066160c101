//! Invariants as types: each is established once, by code that checked it, and trusted from then on.
//!
//! | type | invariant |
//! |---|---|
//! | [`HeadLayout`] | at least one KV head, and every KV head serves the same number of query heads |
//! | [`TokenIds`] | every id is below a bound |
//! | [`ExpertWeights`] | E matrices of one shape, one type and one row stride |
//! | [`ExpertRows`] | offsets begin at 0, do not decrease, end at the number of rows or below |
//! | [`Routing`] | distinct experts per token; the row maps are inverse permutations that agree with the offsets |
//! | [`RopeTable`] | cosines and sines for every position below its length |
//! | [`KvCache`] | no sequence is longer than its pages |
//! | [`Topology`] | blocks lie inside the matrix, each place at most once; both orders of the index agree |

mod expert_rows;
mod expert_weights;
mod kv;
mod rope;
mod routing;
mod tokens;
mod topology;

pub use self::expert_rows::ExpertRows;
pub use self::expert_weights::{ExpertWeights, WeightOrder};
pub(crate) use self::kv::{HostPages, HostPool};
pub use self::kv::{KvCache, KvLayer, KvLayerMut, KvLayout, KvPageSizes, KvPages, KvShape};
pub use self::rope::{RopeScaling, RopeTable};
pub use self::routing::{MAX_EXPERTS, NOWHERE, Routing, RoutingBuffers};
pub(crate) use self::routing::{RoutingParts, index_slots};
pub use self::tokens::TokenIds;
#[cfg(feature = "cuda")]
pub(crate) use self::topology::Axis;
pub use self::topology::Topology;

use crate::error::{Error, Op};
use crate::shape::checked_product;

/// How attention heads share a row: `num_heads` query heads of `head_dim` elements over `num_kv_heads` key-value heads.
///
/// Query head `h` reads KV head `h / group()`; groups of any size are served, 6 as in DBRX included. Values
/// have as many elements as keys, unless [`with_value_dim`](Self::with_value_dim) says otherwise, as for
/// DeepSeek-V3:
///
/// ```
/// use dropless::HeadLayout;
///
/// let heads = HeadLayout::new(128, 128, 192)?.with_value_dim(128)?;
/// assert_eq!((heads.q_cols(), heads.kv_cols(), heads.v_cols(), heads.context_cols()), (24576, 24576, 16384, 16384));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
}

impl HeadLayout {
    /// # Errors
    ///
    /// [`Error::Value`] if a count is 0 or `num_heads` is not a multiple of `num_kv_heads`; [`Error::TooLarge`].
    pub fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Result<HeadLayout, Error> {
        let refuse = |arg, need, got| Err(Error::Value { op: Op::HeadLayout, arg, need, got: got as f64 });
        if num_kv_heads == 0 {
            return refuse("num_kv_heads", "at least 1", num_kv_heads);
        }
        if head_dim == 0 {
            return refuse("head_dim", "at least 1", head_dim);
        }
        if num_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return refuse("num_heads", "a positive multiple of num_kv_heads", num_heads);
        }
        checked_product(Op::HeadLayout, "columns", &[num_heads, head_dim, 3], u32::MAX as usize)?;
        Ok(HeadLayout { num_heads, num_kv_heads, head_dim, value_dim: head_dim })
    }

    /// With values of `value_dim` elements a head.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for 0; [`Error::TooLarge`].
    pub fn with_value_dim(self, value_dim: usize) -> Result<HeadLayout, Error> {
        if value_dim == 0 {
            return Err(Error::Value { op: Op::HeadLayout, arg: "value_dim", need: "at least 1", got: 0.0 });
        }
        checked_product(Op::HeadLayout, "columns", &[self.num_heads, value_dim, 3], u32::MAX as usize)?;
        Ok(HeadLayout { value_dim, ..self })
    }

    /// The same heads, with keys as wide as the values: what describes a pool of values, as in
    /// [`KvLayout::token_major`].
    pub fn of_values(self) -> HeadLayout {
        HeadLayout { head_dim: self.value_dim, ..self }
    }

    /// H, the query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Hkv, the key-value heads.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// d, the elements of one head of a query or a key.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// dv, the elements of one head of a value, and of what attention gives; d unless said otherwise.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Columns of a row of queries, `H * d`.
    pub fn q_cols(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of a row of keys, `Hkv * d`; of values, too, where dv is d.
    pub fn kv_cols(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Columns of a row of values, `Hkv * dv`.
    pub fn v_cols(&self) -> usize {
        self.num_kv_heads * self.value_dim
    }

    /// Columns of a row of what attention gives, `H * dv`.
    pub fn context_cols(&self) -> usize {
        self.num_heads * self.value_dim
    }

    /// Columns of a fused projection `[q | k | v]`, `H * d + Hkv * (d + dv)`.
    pub fn qkv_cols(&self) -> usize {
        self.q_cols() + self.kv_cols() + self.v_cols()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dbrx_heads_come_in_groups_of_six() {
        let heads = HeadLayout::new(48, 8, 128).unwrap();
        assert_eq!((heads.group(), heads.q_cols(), heads.kv_cols(), heads.qkv_cols()), (6, 6144, 1024, 8192));
        assert_eq!((heads.value_dim(), heads.v_cols(), heads.context_cols()), (128, 1024, 6144));
    }

    #[test]
    fn values_may_have_a_width_of_their_own() {
        let heads = HeadLayout::new(6, 2, 24).unwrap().with_value_dim(16).unwrap();
        assert_eq!((heads.q_cols(), heads.kv_cols(), heads.v_cols(), heads.context_cols()), (144, 48, 32, 96));
        assert_eq!(heads.qkv_cols(), 144 + 48 + 32);
        assert_eq!(heads.of_values(), HeadLayout::new(6, 2, 16).unwrap());
        assert!(matches!(heads.with_value_dim(0), Err(Error::Value { .. })));
        assert!(matches!(heads.with_value_dim(1 << 32), Err(Error::TooLarge { .. })));
        assert_eq!(heads.with_value_dim(24), HeadLayout::new(6, 2, 24));
    }

    #[test]
    fn uneven_and_empty_heads_are_refused() {
        for (heads, kv, dim) in [(48, 7, 128), (0, 1, 8), (4, 0, 8), (4, 2, 0), (4, 8, 8)] {
            assert!(matches!(HeadLayout::new(heads, kv, dim), Err(Error::Value { .. })), "{heads} {kv} {dim}");
        }
    }
}
