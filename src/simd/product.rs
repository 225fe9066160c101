//! The arguments of the micro-kernel of matrix products, which each instruction set implements.

use super::ahead::Ahead;

/// Length of the blocks into which sums are cut. Part of every result's bits.
pub(crate) const KC: usize = 256;
/// Columns of a panel of packed weights.
pub(crate) const NR: usize = 32;
/// Elements from one row of widened input to the next. It is not a power of two, so that the rows do not fall
/// into the same few sets of the cache.
pub(crate) const A_STRIDE: usize = KC + 16;

/// The arguments of `gemm::add_product`.
pub(crate) struct AddProduct<'a> {
    pub(super) a: &'a [[f32; A_STRIDE]],
    pub(super) panel: &'a [[f32; NR]],
    pub(super) sums: &'a mut [f32],
    pub(super) sum_stride: usize,
    pub(super) ahead: &'a mut Ahead,
}
