//! CUDA backend of `grouped_gemm`: the table of its kernels, and which of them takes which call. Callers have checked the shapes.
//!
//! | form | rows of a tile | serves calls in which no expert owns more than | file |
//! |---|---|---|---|
//! | `few8`, `few32`, `few64` | as many | 8, 32, 64 rows | `cuda/grouped_gemm_few.cu` |
//! | `256x2` | 128, two blocks together | any | `cuda/grouped_gemm.cu` |
//! | `plain` | 32 | any, of any width and alignment | `cuda/grouped_gemm_plain.cu` |
//!
//! Few rows: the weights are the wide operand and each of their bytes is loaded once. Many: a pair of blocks halves the traffic of weights from
//! the L2 cache; where few rows of an expert are left, the blocks take two columns of them, each with weights of its own.

mod plain;
mod tiled;

use super::Product;
use crate::device::kernel::{Kernel, Types, check_one_type, find};
use crate::device::params::{
    FEW_COLS, FEW_SHARED_BYTES, FEW_THREADS, PLAIN_THREADS, PLAIN_TILE, TILED_CLUSTER, TILED_COLS, TILED_ROWS, TILED_SHARED_BYTES,
    TILED_THREADS,
};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::epilogue::Bias;
use crate::error::{Error, Op};
use crate::layout::{ExpertWeights, WeightOrder};
use crate::view::RowsMut;

/// What a kernel of this table computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// How the weights lie.
    pub order: WeightOrder,
    /// Products of one row: 1, or 2 for gate and up.
    pub products: usize,
}

const NT: Key = Key { order: WeightOrder::Nk, products: 1 };
const NN: Key = Key { order: WeightOrder::Kn, products: 1 };
const GLU_NT: Key = Key { products: 2, ..NT };
const GLU_NN: Key = Key { products: 2, ..NN };

const F32: Types = Types::all(DType::F32);
const BF16: Types = Types::all(DType::Bf16);
const F16: Types = Types::all(DType::F16);
const BF16_TO_F32: Types = Types::to_f32(DType::Bf16);
const F16_TO_F32: Types = Types::to_f32(DType::F16);

/// The table. A call takes the first row of its key and types that serves it.
pub static KERNELS: &[Kernel<Key>] = &[
    few(8, "grouped_gemm_nt_bf16_few8", NT, BF16),
    few(32, "grouped_gemm_nt_bf16_few32", NT, BF16),
    few(64, "grouped_gemm_nt_bf16_few64", NT, BF16),
    tiled("grouped_gemm_nt_bf16_256x2", NT, BF16),
    few(8, "grouped_gemm_nt_bf16_to_f32_few8", NT, BF16_TO_F32),
    few(32, "grouped_gemm_nt_bf16_to_f32_few32", NT, BF16_TO_F32),
    few(64, "grouped_gemm_nt_bf16_to_f32_few64", NT, BF16_TO_F32),
    tiled("grouped_gemm_nt_bf16_to_f32_256x2", NT, BF16_TO_F32),
    few(8, "grouped_gemm_nt_f16_few8", NT, F16),
    few(32, "grouped_gemm_nt_f16_few32", NT, F16),
    few(64, "grouped_gemm_nt_f16_few64", NT, F16),
    tiled("grouped_gemm_nt_f16_256x2", NT, F16),
    few(8, "grouped_gemm_nt_f16_to_f32_few8", NT, F16_TO_F32),
    few(32, "grouped_gemm_nt_f16_to_f32_few32", NT, F16_TO_F32),
    few(64, "grouped_gemm_nt_f16_to_f32_few64", NT, F16_TO_F32),
    tiled("grouped_gemm_nt_f16_to_f32_256x2", NT, F16_TO_F32),
    few(8, "grouped_gemm_nn_bf16_few8", NN, BF16),
    few(32, "grouped_gemm_nn_bf16_few32", NN, BF16),
    few(64, "grouped_gemm_nn_bf16_few64", NN, BF16),
    tiled("grouped_gemm_nn_bf16_256x2", NN, BF16),
    few(8, "grouped_gemm_nn_bf16_to_f32_few8", NN, BF16_TO_F32),
    few(32, "grouped_gemm_nn_bf16_to_f32_few32", NN, BF16_TO_F32),
    few(64, "grouped_gemm_nn_bf16_to_f32_few64", NN, BF16_TO_F32),
    tiled("grouped_gemm_nn_bf16_to_f32_256x2", NN, BF16_TO_F32),
    few(8, "grouped_gemm_nn_f16_few8", NN, F16),
    few(32, "grouped_gemm_nn_f16_few32", NN, F16),
    few(64, "grouped_gemm_nn_f16_few64", NN, F16),
    tiled("grouped_gemm_nn_f16_256x2", NN, F16),
    few(8, "grouped_gemm_nn_f16_to_f32_few8", NN, F16_TO_F32),
    few(32, "grouped_gemm_nn_f16_to_f32_few32", NN, F16_TO_F32),
    few(64, "grouped_gemm_nn_f16_to_f32_few64", NN, F16_TO_F32),
    tiled("grouped_gemm_nn_f16_to_f32_256x2", NN, F16_TO_F32),
    few(8, "grouped_gemm_glu_nt_bf16_few8", GLU_NT, BF16),
    few(32, "grouped_gemm_glu_nt_bf16_few32", GLU_NT, BF16),
    few(64, "grouped_gemm_glu_nt_bf16_few64", GLU_NT, BF16),
    tiled("grouped_gemm_glu_nt_bf16_256x2", GLU_NT, BF16),
    few(8, "grouped_gemm_glu_nt_f16_few8", GLU_NT, F16),
    few(32, "grouped_gemm_glu_nt_f16_few32", GLU_NT, F16),
    few(64, "grouped_gemm_glu_nt_f16_few64", GLU_NT, F16),
    tiled("grouped_gemm_glu_nt_f16_256x2", GLU_NT, F16),
    plain("grouped_gemm_nt_f32", NT, F32),
    plain("grouped_gemm_nt_bf16", NT, BF16),
    plain("grouped_gemm_nt_f16", NT, F16),
    plain("grouped_gemm_nt_bf16_to_f32", NT, BF16_TO_F32),
    plain("grouped_gemm_nt_f16_to_f32", NT, F16_TO_F32),
    plain("grouped_gemm_nn_f32", NN, F32),
    plain("grouped_gemm_nn_bf16", NN, BF16),
    plain("grouped_gemm_nn_f16", NN, F16),
    plain("grouped_gemm_nn_bf16_to_f32", NN, BF16_TO_F32),
    plain("grouped_gemm_nn_f16_to_f32", NN, F16_TO_F32),
    plain("grouped_gemm_glu_nt_f32", GLU_NT, F32),
    plain("grouped_gemm_glu_nt_bf16", GLU_NT, BF16),
    plain("grouped_gemm_glu_nt_f16", GLU_NT, F16),
    plain("grouped_gemm_glu_nn_f32", GLU_NN, F32),
    plain("grouped_gemm_glu_nn_bf16", GLU_NN, BF16),
    plain("grouped_gemm_glu_nn_f16", GLU_NN, F16),
];

const fn few(rows: u32, entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    Kernel {
        form: match rows {
            8 => "few8",
            32 => "few32",
            _ => "few64",
        },
        max_rows: rows as usize,
        tile: [rows, FEW_COLS],
        threads: FEW_THREADS,
        shared_bytes: FEW_SHARED_BYTES,
        needs_vectors: true,
        ..Kernel::new(&image::GROUPED_GEMM_FEW, entry, key, types)
    }
}

const fn tiled(entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    Kernel {
        form: "256x2",
        tile: [TILED_ROWS, TILED_COLS / key.products as u32],
        threads: TILED_THREADS,
        shared_bytes: TILED_SHARED_BYTES,
        cluster: TILED_CLUSTER,
        needs_vectors: true,
        ..Kernel::new(&image::GROUPED_GEMM, entry, key, types)
    }
}

const fn plain(entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    let tile = [PLAIN_TILE, PLAIN_TILE];
    Kernel { tile, threads: PLAIN_THREADS, ..Kernel::new(&image::GROUPED_GEMM_PLAIN, entry, key, types) }
}

/// The tensor-core forms by name, each with the class of calls that it serves: for tests and benches, which ask for a class by
/// `ExpertRows::in_class`.
pub fn forms() -> Vec<(&'static str, usize)> {
    let mut forms: Vec<_> = KERNELS.iter().filter(|row| row.needs_vectors).map(|row| (row.form, row.max_rows)).collect();
    forms.sort_by_key(|form| form.1);
    forms.dedup();
    forms
}

/// What the kernels need beyond the contract: one of the table's rows, matrices at one distance, biases of a type that they read.
pub(super) fn check<A: Float, O: Float, const P: usize>(
    product: &Product<'_, A, P>,
    weight_args: [&'static str; P],
    bias_args: [&'static str; P],
    y: &RowsMut<'_, O>,
) -> Result<(), Error> {
    for (arg, w) in weight_args.into_iter().zip(&product.weights) {
        check_one_type(Op::GroupedGemm, "two types of weights,", product.weights[0].dtype(), w.dtype())?;
        w.expert_stride(Op::GroupedGemm, arg)?;
    }
    for (arg, bias) in bias_args.into_iter().zip(&product.finish.biases) {
        bias.map_or(Ok(()), |bias| check_bias(Op::GroupedGemm, A::DTYPE, arg, &bias))?;
    }
    choose(product, y).map(|_| ())
}

/// The same of some products with outputs of the type of their input, before there are rows. The plain kernels serve every shape.
pub(super) fn check_types<'a>(
    op: Op,
    x: DType,
    weights: impl IntoIterator<Item = (&'static str, ExpertWeights<'a>)>,
    biases: impl IntoIterator<Item = (&'static str, Bias<'a>)>,
) -> Result<(), Error> {
    for (arg, w) in weights {
        find(op, KERNELS, Key { order: w.order(), products: 1 }, Types { w: w.dtype(), ..Types::all(x) }, |_| true)
            .map_err(|error| error.about(arg))?;
        w.expert_stride(op, arg)?;
    }
    biases.into_iter().try_for_each(|(arg, bias)| check_bias(op, x, arg, &bias))
}

/// Kernels read biases of `f32` and of the type of `x`.
fn check_bias(op: Op, x: DType, arg: &'static str, bias: &Bias<'_>) -> Result<(), Error> {
    if bias.dtype() == DType::F32 || bias.dtype() == x {
        return Ok(());
    }
    let supported = if x == DType::F32 { "f32".to_owned() } else { format!("{}, f32", x.name()) };
    Err(Error::unsupported(op, format!("`{arg}` of type"), bias.dtype().name(), supported))
}

/// Static shape, layout and the class of the call alone decide.
fn choose<A: Float, O: Float, const P: usize>(product: &Product<'_, A, P>, y: &RowsMut<'_, O>) -> Result<&'static Kernel<Key>, Error> {
    let key = Key { order: product.weights[0].order(), products: P };
    let types = Types { x: A::DTYPE, w: product.weights[0].dtype(), y: O::DTYPE };
    let (class_rows, fits_vectors) = (product.rows.class_rows(), tiled::fits(product, y));
    find(Op::GroupedGemm, KERNELS, key, types, |kernel| class_rows <= kernel.max_rows && (fits_vectors || !kernel.needs_vectors))
}

pub(super) fn product<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    product: Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    const { assert!(P == 1 || P == 2) };
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    let kernel = choose(&product, y)?;
    if kernel.needs_vectors { tiled::launch(stream, kernel, &product, y) } else { plain::launch(stream, kernel, &product, y) }
}
