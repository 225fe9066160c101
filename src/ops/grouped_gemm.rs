//! Grouped matrix products: each expert's rows times that expert's weights. One expert makes a dense linear layer.
//!
//! `nt` is `Y = X * W^T` and `nn` is `Y = X * W`, row-major, as in BLAS. DBRX needs both: `w1` and `v1` lie as `[F, D]` and are
//! used transposed, `w2` lies as `[F, D]` and is used as it lies.
//!
//! Source: Gale et al. 2022, "MegaBlocks", section 4; `DbrxExpertGLU.forward` in Hugging Face transformers.
//! Kernels: `cuda/grouped_gemm.cu`, `_few.cu` for few rows per expert, `_plain.cu` for other types and shapes. Oracle: `tests/oracle/grouped_gemm.rs`. Bench: `benches/grouped_gemm.rs`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// The tile table of the tensor-core kernels, for tests and benches. Outside the semver promise.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod tiles {
    pub use super::cuda::tiled::{FORMS, Form, with_form};
}

use crate::device::Stream;
use crate::dtype::Float;
#[cfg(feature = "cuda")]
use crate::error::check_product_types;
use crate::error::{Error, Op, check_shape};
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::view::{Rows, RowsMut};

/// Writes `y[r, n] = sum_k x[input(r), k] * w[e, n, k]`, `e` being the expert that owns row `r`.
///
/// | argument | shape             | meaning                                                                         |
/// |----------|-------------------|---------------------------------------------------------------------------------|
/// | `x`      | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                  |
/// | `w`      | `[E, N, K]`       | weights, one row per output, in order [`Nk`](WeightOrder::Nk); read where they lie |
/// | `rows`   | R rows, E experts | which rows belong to which expert, and which input row each is computed from      |
/// | `y`      | `[R, N]`          | written in full; what it held before does not matter                             |
///
/// Accumulated in `f32`, rounded once to the type of `y`. Dtypes: each of `x`, `w`, `y` is `f32`, `bf16` or `f16`.
/// An expert may own no row, or all of them; `R = 0` or `N = 0` is a no-op; `K = 0` gives zeros. A NaN in an input row
/// stays in the rows computed from it.
///
/// The bits of a row depend on that row, the weights and the class of the call. On the CPU the classes are `R <= 16 * E`, where dot
/// products read the weights as they lie, and more rows, where sums run over k in blocks of fixed length. On a GPU they are
/// [`max_rows_per_expert`](ExpertRows::max_rows_per_expert) `<= 8`, `<= 32` and `<= 64`, where each weight is loaded once, and more
/// rows. Neither other rows, nor how many rows an expert got, nor the number of threads show in the bits. They
/// may differ between instruction sets.
///
/// On a GPU the tensor cores serve `bf16` and `f16`, where K and N are multiples of 8 and rows begin on 16 bytes; everything else is
/// computed by plain kernels, right, but not fast.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes do not agree; [`Error::Unsupported`] for weights of the other order, and on a GPU for
/// weights of another type than `x` or outputs that are neither of that type nor `f32`; [`Error::Place`], [`Error::NotJoined`].
/// Nothing is written.
pub fn nt<A: Float, W: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_, W>,
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_rows(&x, &rows, "y", "[R, N]", y)?;
    check_weights("w", WeightOrder::Nk, &w, &x, &rows, y)?;
    let run = dispatch!(stream, Op::GroupedGemm, cpu::product, cuda::product);
    kernels_need!(stream, check_product_types::<A, W, O>(Op::GroupedGemm, "weights of type"));
    admit(stream, &x, &[("w", &w)], &rows, ("y", y))?;
    run(stream, x, [w], rows, y)
}

/// Writes `y[r, n] = sum_k x[input(r), k] * w[e, k, n]`, `e` being the expert that owns row `r`.
///
/// | argument | shape             | meaning                                                                        |
/// |----------|-------------------|--------------------------------------------------------------------------------|
/// | `x`      | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                 |
/// | `w`      | `[E, K, N]`       | weights, one row per input, in order [`Kn`](WeightOrder::Kn); read where they lie |
/// | `rows`   | R rows, E experts | which rows belong to which expert, and which input row each is computed from     |
/// | `y`      | `[R, N]`          | written in full; what it held before does not matter                            |
///
/// Numerics, edge cases and errors are those of [`nt`], but on the CPU there is one class: the number of rows does not show at all. On a
/// GPU the classes are those of [`nt`].
///
/// # Errors
///
/// As [`nt`]. Nothing is written.
pub fn nn<A: Float, W: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_, W>,
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_rows(&x, &rows, "y", "[R, N]", y)?;
    check_weights("w", WeightOrder::Kn, &w, &x, &rows, y)?;
    let run = dispatch!(stream, Op::GroupedGemm, cpu::product, cuda::product);
    kernels_need!(stream, check_product_types::<A, W, O>(Op::GroupedGemm, "weights of type"));
    admit(stream, &x, &[("w", &w)], &rows, ("y", y))?;
    run(stream, x, [w], rows, y)
}

/// Writes `h = silu(x * w1^T) * (x * v1^T)`: both products of the first half of an expert, and the activation between.
///
/// | argument   | shape             | meaning                                                                             |
/// |------------|-------------------|-------------------------------------------------------------------------------------|
/// | `x`        | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                      |
/// | `w1`, `v1` | `[E, N, K]`       | gate and up weights, both in order [`Nk`](WeightOrder::Nk); read where they lie         |
/// | `rows`     | R rows, E experts | which rows belong to which expert, and which input row each is computed from          |
/// | `h`        | `[R, N]`          | written in full; what it held before does not matter                                 |
///
/// Both products and the activation stay in `f32`; the result is rounded once. `silu(x) = x / (1 + exp(-x))`; of a large
/// negative value it is `-0`, never NaN. Otherwise as [`nt`].
///
/// # Errors
///
/// As [`nt`]. Nothing is written.
pub fn glu_nt<A: Float, W: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w1: ExpertWeights<'_, W>,
    v1: ExpertWeights<'_, W>,
    rows: ExpertRows<'_>,
    h: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check_rows(&x, &rows, "h", "[R, N]", h)?;
    check_weights("w1", WeightOrder::Nk, &w1, &x, &rows, h)?;
    check_weights("v1", WeightOrder::Nk, &v1, &x, &rows, h)?;
    let run = dispatch!(stream, Op::GroupedGemm, cpu::product, cuda::product);
    kernels_need!(stream, check_product_types::<A, W, A>(Op::GroupedGemm, "weights of type"));
    admit(stream, &x, &[("w1", &w1), ("v1", &v1)], &rows, ("h", h))?;
    run(stream, x, [w1, v1], rows, h)
}

/// The number of input and output rows.
fn check_rows<A: Float, O: Float>(
    x: &Rows<'_, A>,
    rows: &ExpertRows<'_>,
    arg: &'static str,
    want: &'static str,
    y: &RowsMut<'_, O>,
) -> Result<(), Error> {
    check_shape(Op::GroupedGemm, "x", "[input rows, K]", &[rows.input_rows(), x.cols()], &x.dims())?;
    check_shape(Op::GroupedGemm, arg, want, &[rows.rows(), y.cols()], &y.dims())
}

/// One weight argument against the input, the output and the experts.
fn check_weights<A: Float, W: Float, O: Float>(
    arg: &'static str,
    order: WeightOrder,
    w: &ExpertWeights<'_, W>,
    x: &Rows<'_, A>,
    rows: &ExpertRows<'_>,
    y: &RowsMut<'_, O>,
) -> Result<(), Error> {
    let (e, n, k) = (rows.num_experts(), y.cols(), x.cols());
    let name = |order| if order == WeightOrder::Nk { "Nk" } else { "Kn" };
    if w.order() != order {
        return Err(Error::Unsupported { op: Op::GroupedGemm, what: "weight order", got: name(w.order()), supported: name(order) });
    }
    match order {
        WeightOrder::Nk => check_shape(Op::GroupedGemm, arg, "[E, N, K]", &[e, n, k], &[w.num_experts(), w.n(), w.k()]),
        WeightOrder::Kn => check_shape(Op::GroupedGemm, arg, "[E, K, N]", &[e, k, n], &[w.num_experts(), w.k(), w.n()]),
    }
}

fn admit<A: Float, W: Float, O: Float>(
    stream: &Stream,
    x: &Rows<'_, A>,
    weights: &[(&'static str, &ExpertWeights<'_, W>)],
    rows: &ExpertRows<'_>,
    (arg, y): (&'static str, &RowsMut<'_, O>),
) -> Result<(), Error> {
    let [offsets, row_to_slot] = rows.accesses(stream.place());
    let (first, last) = (weights[0], weights[weights.len() - 1]);
    let weights = [(first.0, first.1.access()), (last.0, last.1.access())];
    stream.admit(Op::GroupedGemm, &[("x", x.access()), weights[0], weights[1], offsets, row_to_slot, (arg, y.access())])
}
