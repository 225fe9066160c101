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
pub use self::rope::RopeTable;
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
/// Query head `h` reads KV head `h / group()`; groups of any size are served, 6 as in DBRX included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
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
        Ok(HeadLayout { num_heads, num_kv_heads, head_dim })
    }

    /// H, the query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Hkv, the key-value heads.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// d, the elements of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Columns of a row of queries, `H * d`.
    pub fn q_cols(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of a row of keys or of values, `Hkv * d`.
    pub fn kv_cols(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Columns of a fused projection `[q | k | v]`, `(H + 2 * Hkv) * d`.
    pub fn qkv_cols(&self) -> usize {
        self.q_cols() + 2 * self.kv_cols()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dbrx_heads_come_in_groups_of_six() {
        let heads = HeadLayout::new(48, 8, 128).unwrap();
        assert_eq!((heads.group(), heads.q_cols(), heads.kv_cols(), heads.qkv_cols()), (6, 6144, 1024, 8192));
    }

    #[test]
    fn uneven_and_empty_heads_are_refused() {
        for (heads, kv, dim) in [(48, 7, 128), (0, 1, 8), (4, 0, 8), (4, 2, 0), (4, 8, 8)] {
            assert!(matches!(HeadLayout::new(heads, kv, dim), Err(Error::Value { .. })), "{heads} {kv} {dim}");
        }
    }
}
