//! CUDA backend of `grouped_gemm`: the table of its kernels, and which of them takes which call. Callers have checked the shapes.
//!
//! | form | rows of a tile | serves calls in which no expert owns more than | file |
//! |---|---|---|---|
//! | `few8`, `few32`, `few64` | as many | 8, 32, 64 rows | `cuda/grouped_gemm_few.cu` |
//! | `few8`, .. | as many | the same, weights of 4 and 8 bits | `cuda/grouped_gemm_quantized.cu` |
//! | `many128` | 128 | any, weights of 4 and 8 bits | `cuda/grouped_gemm_quantized.cu` |
//! | `256x2` | 128, two blocks together | any | `cuda/grouped_gemm.cu` |
//! | `256x2` of e4m3 | 128, two blocks together | any; inputs are quantised | `cuda/grouped_gemm_fp8.cu` |
//! | `plain` | 32 | any, of any width and alignment | `cuda/grouped_gemm_plain.cu` |
//! | `plain` | 32 | the same, weights of every format in the order of a checkpoint | `cuda/grouped_gemm_plain_quantized.cu` |
//!
//! Few rows: the weights are the wide operand and each of their bytes is loaded once. Many: a pair of blocks halves the traffic of weights from
//! the L2 cache; where few rows of an expert are left, the blocks take two columns of them, each with weights of its own.

pub(super) mod fp8;
mod plain;
mod quantized;
mod tiled;

use super::Product;
use crate::device::kernel::{Kernel, Types, count_with_formats, find, with_formats};
use crate::device::params::{
    FEW_COLS, FEW_SHARED_BYTES, FEW_THREADS, FP8_SHARED_BYTES, PLAIN_THREADS, PLAIN_TILE, QUANTIZED_FEW_THREADS, QUANTIZED_MANY_THREADS,
    QUANTIZED_MANY_TOKENS, QUANTIZED_SHARED_BYTES, TILED_CLUSTER, TILED_COLS, TILED_ROWS, TILED_SHARED_BYTES, TILED_THREADS,
};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::epilogue::Bias;
use crate::error::{Error, Op};
use crate::format::Format;
use crate::layout::{ExpertWeights, WeightOrder};
use crate::view::RowsMut;

/// What a kernel of this table computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// How the weights lie.
    pub order: WeightOrder,
    /// Products of one row: 1, or 2 for gate and up.
    pub products: usize,
    /// Of k, that share a scale: a kernel serves multiples, too. 0 for floats.
    pub group: usize,
}

const NT: Key = Key { order: WeightOrder::Nk, products: 1, group: 0 };
const NN: Key = Key { order: WeightOrder::Kn, ..NT };
const GLU_NT: Key = Key { products: 2, ..NT };
const GLU_NN: Key = Key { products: 2, ..NN };

const F32: Types = Types::all(DType::F32);
const BF16: Types = Types::all(DType::Bf16);
const F16: Types = Types::all(DType::F16);
const BF16_TO_F32: Types = Types::to_f32(DType::Bf16);
const F16_TO_F32: Types = Types::to_f32(DType::F16);
const E4M3: DType = DType::Quantized(Format::E4m3);

/// The most rows of an expert in the calls that the forms for few rows serve.
pub(crate) const MOST_FEW: usize = 64;

const BF16_INT4: Types = Types { w: DType::Quantized(Format::Int4), ..BF16 };
const BF16_MXFP4: Types = Types { w: DType::Quantized(Format::Mxfp4), ..BF16 };
const BF16_E4M3: Types = Types { w: E4M3, ..BF16 };
const BF16_INT4_TO_F32: Types = Types { y: DType::F32, ..BF16_INT4 };
const BF16_MXFP4_TO_F32: Types = Types { y: DType::F32, ..BF16_MXFP4 };
const BF16_E4M3_TO_F32: Types = Types { y: DType::F32, ..BF16_E4M3 };

/// The table. A call takes the first row of its key and types that serves it.
pub static KERNELS: &[Kernel<Key>] = &with_formats::<Key, { count_with_formats(ROWS, OF_ANY_FORMAT) }>(ROWS, OF_ANY_FORMAT);

/// The plain form for quantised weights.
const OF_ANY_FORMAT: &[Kernel<Key>] = &[
    plain_quantized("grouped_gemm_nt_quantized", NT, F32),
    plain_quantized("grouped_gemm_nt_quantized", NT, BF16),
    plain_quantized("grouped_gemm_nt_quantized", NT, F16),
    plain_quantized("grouped_gemm_nt_quantized", NT, BF16_TO_F32),
    plain_quantized("grouped_gemm_nt_quantized", NT, F16_TO_F32),
    plain_quantized("grouped_gemm_glu_nt_quantized", GLU_NT, F32),
    plain_quantized("grouped_gemm_glu_nt_quantized", GLU_NT, BF16),
    plain_quantized("grouped_gemm_glu_nt_quantized", GLU_NT, F16),
];

const ROWS: &[Kernel<Key>] = &[
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
    fp8("grouped_gemm_nt_e4m3_to_bf16_256x2", NT, DType::Bf16),
    fp8("grouped_gemm_nt_e4m3_to_f16_256x2", NT, DType::F16),
    fp8("grouped_gemm_nt_e4m3_to_f32_256x2", NT, DType::F32),
    fp8("grouped_gemm_glu_nt_e4m3_to_bf16_256x2", GLU_NT, DType::Bf16),
    fp8("grouped_gemm_glu_nt_e4m3_to_f16_256x2", GLU_NT, DType::F16),
    fp8("grouped_gemm_glu_nt_e4m3_to_f32_256x2", GLU_NT, DType::F32),
    quantized(8, "grouped_gemm_nt_bf16_int4_few8", NT, 128, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_int4_few8", NT, 128, BF16_INT4_TO_F32),
    quantized(32, "grouped_gemm_nt_bf16_int4_few32", NT, 128, BF16_INT4),
    quantized(32, "grouped_gemm_nt_bf16_int4_few32", NT, 128, BF16_INT4_TO_F32),
    quantized(64, "grouped_gemm_nt_bf16_int4_few64", NT, 128, BF16_INT4),
    quantized(64, "grouped_gemm_nt_bf16_int4_few64", NT, 128, BF16_INT4_TO_F32),
    quantized(128, "grouped_gemm_nt_bf16_int4_many128", NT, 128, BF16_INT4),
    quantized(128, "grouped_gemm_nt_bf16_int4_many128", NT, 128, BF16_INT4_TO_F32),
    quantized(8, "grouped_gemm_glu_nt_bf16_int4_few8", GLU_NT, 128, BF16_INT4),
    quantized(32, "grouped_gemm_glu_nt_bf16_int4_few32", GLU_NT, 128, BF16_INT4),
    quantized(64, "grouped_gemm_glu_nt_bf16_int4_few64", GLU_NT, 128, BF16_INT4),
    quantized(128, "grouped_gemm_glu_nt_bf16_int4_many128", GLU_NT, 128, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_int4_64_few8", NT, 64, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_int4_64_few8", NT, 64, BF16_INT4_TO_F32),
    quantized(32, "grouped_gemm_nt_bf16_int4_64_few32", NT, 64, BF16_INT4),
    quantized(32, "grouped_gemm_nt_bf16_int4_64_few32", NT, 64, BF16_INT4_TO_F32),
    quantized(64, "grouped_gemm_nt_bf16_int4_64_few64", NT, 64, BF16_INT4),
    quantized(64, "grouped_gemm_nt_bf16_int4_64_few64", NT, 64, BF16_INT4_TO_F32),
    quantized(128, "grouped_gemm_nt_bf16_int4_64_many128", NT, 64, BF16_INT4),
    quantized(128, "grouped_gemm_nt_bf16_int4_64_many128", NT, 64, BF16_INT4_TO_F32),
    quantized(8, "grouped_gemm_glu_nt_bf16_int4_64_few8", GLU_NT, 64, BF16_INT4),
    quantized(32, "grouped_gemm_glu_nt_bf16_int4_64_few32", GLU_NT, 64, BF16_INT4),
    quantized(64, "grouped_gemm_glu_nt_bf16_int4_64_few64", GLU_NT, 64, BF16_INT4),
    quantized(128, "grouped_gemm_glu_nt_bf16_int4_64_many128", GLU_NT, 64, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_int4_32_few8", NT, 32, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_int4_32_few8", NT, 32, BF16_INT4_TO_F32),
    quantized(32, "grouped_gemm_nt_bf16_int4_32_few32", NT, 32, BF16_INT4),
    quantized(32, "grouped_gemm_nt_bf16_int4_32_few32", NT, 32, BF16_INT4_TO_F32),
    quantized(64, "grouped_gemm_nt_bf16_int4_32_few64", NT, 32, BF16_INT4),
    quantized(64, "grouped_gemm_nt_bf16_int4_32_few64", NT, 32, BF16_INT4_TO_F32),
    quantized(128, "grouped_gemm_nt_bf16_int4_32_many128", NT, 32, BF16_INT4),
    quantized(128, "grouped_gemm_nt_bf16_int4_32_many128", NT, 32, BF16_INT4_TO_F32),
    quantized(8, "grouped_gemm_glu_nt_bf16_int4_32_few8", GLU_NT, 32, BF16_INT4),
    quantized(32, "grouped_gemm_glu_nt_bf16_int4_32_few32", GLU_NT, 32, BF16_INT4),
    quantized(64, "grouped_gemm_glu_nt_bf16_int4_32_few64", GLU_NT, 32, BF16_INT4),
    quantized(128, "grouped_gemm_glu_nt_bf16_int4_32_many128", GLU_NT, 32, BF16_INT4),
    quantized(8, "grouped_gemm_nt_bf16_mxfp4_few8", NT, 32, BF16_MXFP4),
    quantized(8, "grouped_gemm_nt_bf16_mxfp4_few8", NT, 32, BF16_MXFP4_TO_F32),
    quantized(32, "grouped_gemm_nt_bf16_mxfp4_few32", NT, 32, BF16_MXFP4),
    quantized(32, "grouped_gemm_nt_bf16_mxfp4_few32", NT, 32, BF16_MXFP4_TO_F32),
    quantized(64, "grouped_gemm_nt_bf16_mxfp4_few64", NT, 32, BF16_MXFP4),
    quantized(64, "grouped_gemm_nt_bf16_mxfp4_few64", NT, 32, BF16_MXFP4_TO_F32),
    quantized(128, "grouped_gemm_nt_bf16_mxfp4_many128", NT, 32, BF16_MXFP4),
    quantized(128, "grouped_gemm_nt_bf16_mxfp4_many128", NT, 32, BF16_MXFP4_TO_F32),
    quantized(8, "grouped_gemm_glu_nt_bf16_mxfp4_few8", GLU_NT, 32, BF16_MXFP4),
    quantized(32, "grouped_gemm_glu_nt_bf16_mxfp4_few32", GLU_NT, 32, BF16_MXFP4),
    quantized(64, "grouped_gemm_glu_nt_bf16_mxfp4_few64", GLU_NT, 32, BF16_MXFP4),
    quantized(128, "grouped_gemm_glu_nt_bf16_mxfp4_many128", GLU_NT, 32, BF16_MXFP4),
    quantized(8, "grouped_gemm_nt_bf16_e4m3_few8", NT, 128, BF16_E4M3),
    quantized(8, "grouped_gemm_nt_bf16_e4m3_few8", NT, 128, BF16_E4M3_TO_F32),
    quantized(32, "grouped_gemm_nt_bf16_e4m3_few32", NT, 128, BF16_E4M3),
    quantized(32, "grouped_gemm_nt_bf16_e4m3_few32", NT, 128, BF16_E4M3_TO_F32),
    quantized(64, "grouped_gemm_nt_bf16_e4m3_few64", NT, 128, BF16_E4M3),
    quantized(64, "grouped_gemm_nt_bf16_e4m3_few64", NT, 128, BF16_E4M3_TO_F32),
    quantized(128, "grouped_gemm_nt_bf16_e4m3_many128", NT, 128, BF16_E4M3),
    quantized(128, "grouped_gemm_nt_bf16_e4m3_many128", NT, 128, BF16_E4M3_TO_F32),
    quantized(8, "grouped_gemm_glu_nt_bf16_e4m3_few8", GLU_NT, 128, BF16_E4M3),
    quantized(32, "grouped_gemm_glu_nt_bf16_e4m3_few32", GLU_NT, 128, BF16_E4M3),
    quantized(64, "grouped_gemm_glu_nt_bf16_e4m3_few64", GLU_NT, 128, BF16_E4M3),
    quantized(128, "grouped_gemm_glu_nt_bf16_e4m3_many128", GLU_NT, 128, BF16_E4M3),
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

/// As `tiled`, of inputs and weights of e4m3.
const fn fp8(entry: &'static str, key: Key, y: DType) -> Kernel<Key> {
    let types = Types { x: E4M3, w: E4M3, y };
    Kernel { image: &image::GROUPED_GEMM_FP8, shared_bytes: FP8_SHARED_BYTES, ..tiled(entry, key, types) }
}

const fn quantized(rows: u32, entry: &'static str, key: Key, group: usize, types: Types) -> Kernel<Key> {
    let is_many = rows == QUANTIZED_MANY_TOKENS;
    let (form, cols) = match rows {
        8 => ("few8", 64),
        32 => ("few32", 256),
        64 => ("few64", 256),
        _ => ("many128", 256),
    };
    Kernel {
        form,
        max_rows: if is_many { usize::MAX } else { rows as usize },
        tile: [rows, cols / key.products as u32],
        threads: if is_many { QUANTIZED_MANY_THREADS } else { QUANTIZED_FEW_THREADS },
        shared_bytes: QUANTIZED_SHARED_BYTES,
        needs_vectors: true,
        ..Kernel::new(&image::GROUPED_GEMM_QUANTIZED, entry, Key { group, ..key }, types)
    }
}

const fn plain(entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    let tile = [PLAIN_TILE, PLAIN_TILE];
    Kernel { tile, threads: PLAIN_THREADS, ..Kernel::new(&image::GROUPED_GEMM_PLAIN, entry, key, types) }
}

/// Its groups are of any length.
const fn plain_quantized(entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    Kernel { image: &image::GROUPED_GEMM_PLAIN_QUANTIZED, ..plain(entry, Key { group: 1, ..key }, types) }
}

/// The tensor-core forms by name, each with the class of calls that it serves: for tests and benches, which ask for a class by
/// `ExpertRows::in_class`.
pub fn forms() -> Vec<(&'static str, usize)> {
    let mut forms: Vec<_> =
        KERNELS.iter().filter(|row| row.needs_vectors && row.key.group == 0).map(|row| (row.form, row.max_rows)).collect();
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
        let first = &product.weights[0];
        if !agree(first, w) {
            return Err(Error::unsupported(Op::GroupedGemm, "two types of weights,", quantized::name(w), quantized::name(first)));
        }
        check_place_of(Op::GroupedGemm, arg, A::DTYPE, w)?;
    }
    for (arg, bias) in bias_args.into_iter().zip(&product.finish.biases) {
        bias.map_or(Ok(()), |bias| check_bias(Op::GroupedGemm, A::DTYPE, arg, &bias))?;
    }
    choose(product, y).map(|_| ())
}

/// Whether inputs may be quantised for these weights, in calls in which experts own up to so many rows: where
/// there are few, reading weights takes longer than any product.
pub(crate) fn takes_codes(w: &ExpertWeights<'_>, class_rows: usize) -> bool {
    w.dtype() == E4M3 && !w.expert(0).has_exact_inputs() && class_rows > MOST_FEW
}

/// The same of some products with outputs of the type of their input, before there are rows. The plain kernels serve every shape.
pub(super) fn check_types<'a>(
    op: Op,
    x: DType,
    weights: impl IntoIterator<Item = (&'static str, ExpertWeights<'a>)>,
    biases: impl IntoIterator<Item = (&'static str, Bias<'a>)>,
) -> Result<(), Error> {
    for (arg, w) in weights {
        check_place_of(op, arg, x, &w)?;
        let key = key_of(&w, 1, quantized::in_tiles(&w));
        find(op, KERNELS, key, Types { w: w.dtype(), ..Types::all(x) }, |_| true).map_err(|error| error.about(arg))?;
    }
    biases.into_iter().try_for_each(|(arg, bias)| check_bias(op, x, arg, &bias))
}

/// Whether one product takes both: floats of one type, quantised weights in the order of a checkpoint, or tiles
/// of one kind.
pub(super) fn agree(gate: &ExpertWeights<'_>, up: &ExpertWeights<'_>) -> bool {
    let is_quantized = |w: &ExpertWeights<'_>| matches!(w.dtype(), DType::Quantized(_));
    if is_quantized(gate) && is_quantized(up) { quantized::agree(gate, up) } else { gate.dtype() == up.dtype() }
}

/// What kernels of weights like these have as their key: those of the tensor cores, or the plain ones.
fn key_of(w: &ExpertWeights<'_>, products: usize, on_tensor_cores: bool) -> Key {
    Key { order: w.order(), products, group: quantized::group_of(w, on_tensor_cores) }
}

/// Matrices at one distance, in an order that kernels read.
fn check_place_of(op: Op, arg: &'static str, x: DType, w: &ExpertWeights<'_>) -> Result<(), Error> {
    if let DType::Quantized(_) = w.dtype() { quantized::check(op, arg, x, w) } else { w.expert_stride(op, arg).map(|_| ()) }
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
    let types = Types { x: A::DTYPE, w: product.weights[0].dtype(), y: O::DTYPE };
    let is_quantized = matches!(types.w, DType::Quantized(_));
    let fits_vectors = if is_quantized { quantized::fits(product, y)? } else { tiled::fits(product, y) };
    let key = key_of(&product.weights[0], P, fits_vectors);
    let class_rows = product.rows.class_rows();
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
    match (kernel.needs_vectors, kernel.key.group) {
        (false, _) => plain::launch(stream, kernel, &product, y),
        (true, 0) => tiled::launch(stream, kernel, &product, y),
        (true, _) => quantized::launch(stream, kernel, &product, y),
    }
}
