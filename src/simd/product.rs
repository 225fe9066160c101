//! What the micro-kernel of matrix products is given: the one thing that an instruction set knows of `gemm`.

use super::ahead::Ahead;

/// Length of the blocks into which sums are cut. Part of every result's bits.
pub(crate) const KC: usize = 256;
/// Columns of a panel of packed weights.
pub(crate) const NR: usize = 32;
/// Elements from one row of widened input to the next. Not a power of two, lest the rows share a few sets of the cache.
pub(crate) const A_STRIDE: usize = KC + 16;

/// The arguments of `gemm::add_product`.
pub(crate) struct AddProduct<'a> {
    pub(super) a: &'a [[f32; A_STRIDE]],
    pub(super) panel: &'a [[f32; NR]],
    pub(super) sums: &'a mut [f32],
    pub(super) sum_stride: usize,
    pub(super) ahead: &'a mut Ahead,
}
