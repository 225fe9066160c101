//! Launch of the tensor-core form of e4m3: `cuda/grouped_gemm_fp8.cu`.
#![allow(unsafe_code)] // the launch

use super::{E4M3, GLU_NT, KERNELS, Key, NT, check_bias};
use crate::device::Stream;
use crate::device::driver::TensorMapDesc;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{FP8_DEPTH, FP8_SCALE_ROWS, Fp8ProductParams, TILED_COLS, TILED_ROWS, TiledProductParams, WeightScaleParams};
use crate::dtype::{DType, Float};
use crate::epilogue;
use crate::error::{Error, Op};
use crate::layout::ExpertWeights;
use crate::ops::grouped_gemm::fp8::Fp8Product;
use crate::quantized::device::type_number;
use crate::quantized::{QuantizedRows, ScaleRows};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

const DEPTH: usize = FP8_DEPTH as usize;
const _: () = assert!(DEPTH == crate::quantized::inputs::INPUT_BLOCK);

/// What the kernel needs beyond the contract.
pub(in crate::ops::grouped_gemm) fn check<O: Float, const P: usize>(
    product: &Fp8Product<'_, P>,
    weight_args: [&'static str; P],
    bias_args: [&'static str; P],
    out_arg: &'static str,
    y: &RowsMut<'_, O>,
) -> Result<(), Error> {
    let (op, [num_rows, k], n) = (Op::GroupedGemm, product.x.dims(), y.cols());
    if num_rows == 0 || n == 0 {
        return Ok(());
    }
    check_widths(op, n, k)?;
    within_32_bits(op, "rows", num_rows, TILED_ROWS as usize)?;
    product.x.codes().vectors(op, "x")?;
    product.x.scales().vectors(op, "x")?;
    y.vectors(op, out_arg)?;
    for (arg, w) in weight_args.into_iter().zip(&product.weights) {
        check_weights(op, arg, w)?;
    }
    for (arg, bias) in bias_args.into_iter().zip(&product.finish.biases) {
        bias.map_or(Ok(()), |bias| check_bias(op, O::DTYPE, arg, &bias))?;
    }
    choose::<O, P>().map(|_| ())
}

/// What the kernel needs of a matrix.
pub(in crate::ops::grouped_gemm) fn check_weights(op: Op, arg: &'static str, w: &ExpertWeights<'_>) -> Result<(), Error> {
    check_widths(op, w.n(), w.k())?;
    w.expert(0).vectors(op, arg)?;
    let (stride, farthest) = (w.expert_stride(op, arg)?, 1 << 40);
    if !(1..farthest).contains(&stride) || stride % 16 != 0 {
        let what = format!("`{arg}` with a distance between experts of");
        return Err(Error::unsupported(op, what, format!("{stride} bytes"), "multiples of 16 below 2^40"));
    }
    scales_of(op, arg, w).map(|_| ())
}

fn check_widths(op: Op, n: usize, k: usize) -> Result<(), Error> {
    let refuse = |what, got: usize, supported| Err(Error::unsupported(op, what, got.to_string(), supported));
    if k == 0 || !k.is_multiple_of(16) {
        return refuse("FP8 weights with a K of", k, "multiples of 16");
    }
    if !n.is_multiple_of(8) {
        return refuse("FP8 weights with an N of", n, "multiples of 8");
    }
    within_32_bits(op, "columns", k.max(n), TILED_COLS as usize)
}

/// Coordinates are 32 bits, also in the tile after the last.
fn within_32_bits(op: Op, what: &'static str, got: usize, tile: usize) -> Result<(), Error> {
    let limit = i32::MAX as usize - 2 * tile;
    if got <= limit { Ok(()) } else { Err(Error::TooLarge { op, what, got: got as u128, limit: limit as u128 }) }
}

fn choose<O: Float, const P: usize>() -> Result<&'static Kernel<Key>, Error> {
    let key = if P == 1 { NT } else { GLU_NT };
    find(Op::GroupedGemm, KERNELS, key, Types { x: E4M3, w: E4M3, y: O::DTYPE }, |_| true)
}

pub(in crate::ops::grouped_gemm) fn product<O: Float, const P: usize>(
    stream: &Stream,
    product: Fp8Product<'_, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (op, [num_rows, n]) = (Op::GroupedGemm, y.dims());
    if num_rows == 0 || n == 0 {
        return Ok(());
    }
    let (kernel, cuda) = (choose::<O, P>()?, stream.cuda());
    let Fp8Product { x, weights, rows, finish } = &product;
    let Kernel { tile: [tile_rows, tile_cols], cluster, .. } = *kernel;
    let (offsets, _, _) = rows.addresses();
    let map = |desc: &TensorMapDesc| cuda.tensor_map(op, desc);
    let [first, last] = [0, P - 1].map(|i| &weights[i]);
    let w = map(&weights_map(first, tile_cols / cluster)?)?;
    let [w_scales, v_scales] = [scales_of(op, "w", first)?, scales_of(op, "v", last)?];
    let mut epilogue = epilogue::params::of(finish);
    // Scales of single outputs multiply finished sums, as a bias is added to them.
    epilogue.is_general |= u32::from(w_scales.block_rows == 1 || v_scales.block_rows == 1);
    let params = Fp8ProductParams {
        x_scales: map(&scales_map(&x.scales()))?,
        product: TiledProductParams {
            x_map: map(&codes_map(&x.codes(), tile_rows))?,
            w,
            v: if P == 1 { w } else { map(&weights_map(last, tile_cols / cluster)?)? },
            x: 0,
            offsets,
            row_to_slot: 0,
            y: y.address(),
            taken: cuda.scratch(),
            rows: num_rows as i64,
            num_experts: rows.num_experts() as i64,
            n: n as i64,
            k: x.dims()[1] as i64,
            top_k: 1,
            x_stride: 0,
            y_stride: y.as_rows().pitch() as i64,
            epilogue,
            unused: [0; 3],
        },
        w_scales,
        v_scales,
        unused: [0; 4],
    };
    let grid = super::tiled::grid(cuda, kernel, num_rows, rows.num_experts(), n);
    // SAFETY: `Fp8ProductParams` is the struct of these entries; the codes, the weights, the scales of both,
    // the biases and `y` have these extents, `rows` the invariants of its type; all are on this stream's
    // device and stay valid until the work completes: buffers are freed in stream order, raw views promise
    // it.
    unsafe { cuda.launch_kernel(op, kernel, grid, &params) }
}

/// Input rows: a box is the rows of a tile, 128 of k wide.
fn codes_map(codes: &Rows<'_, u8>, rows: u32) -> TensorMapDesc {
    TensorMapDesc::swizzled(DType::U8, codes.address(), [codes.cols(), codes.rows()], [1, codes.pitch()], [FP8_DEPTH, rows])
}

/// Their scales for 128 of k.
fn scales_map(scales: &Rows<'_, f32>) -> TensorMapDesc {
    TensorMapDesc::plain(DType::F32, scales.address(), [scales.cols(), scales.rows()], [1, scales.pitch()], [FP8_SCALE_ROWS, 1])
}

/// Weights, with a dimension for the expert, so that what lies outside a matrix reads as zeros and not as the
/// next expert's.
fn weights_map(w: &ExpertWeights<'_>, cols: u32) -> Result<TensorMapDesc, Error> {
    let (matrix, expert_stride) = (w.expert(0), w.expert_stride(Op::GroupedGemm, "w")? as usize);
    let (dims, strides) = ([w.k(), w.n(), w.num_experts()], [1, matrix.stride(), expert_stride]);
    Ok(TensorMapDesc::swizzled(E4M3, matrix.address(), dims, strides, [FP8_DEPTH, cols, 1]))
}

/// Where the scales of an expert's first output lie, and which type they have.
struct Scales {
    address: u64,
    stride: usize,
    dtype: DType,
    block: [usize; 2],
    /// Of the block of rows in which the expert's first output is: which row of it that is, and the distance
    /// to the next output's.
    first: usize,
    step: usize,
}

impl Scales {
    fn of(op: Op, arg: &'static str, matrix: &WeightRows<'_>) -> Result<Scales, Error> {
        let refuse = |what: &'static str, got: String| Err(Error::unsupported(op, format!("`{arg}` with {what}"), got, "f32, bf16, f16"));
        let scales = if let WeightRows::Quantized(rows) = matrix { rows.scales().map(|scales| (rows, scales)) } else { None };
        let Some((rows, (values, block))) = scales else { return refuse("scales of", matrix.dtype().name().to_owned()) };
        let (address, stride) = match values {
            ScaleRows::F32(rows) => (rows.address(), rows.stride()),
            ScaleRows::Bf16(rows) => (rows.address(), rows.stride()),
            ScaleRows::F16(rows) => (rows.address(), rows.stride()),
            _ => return refuse("scales of type", values.dtype().name().to_owned()),
        };
        Ok(Scales::within(rows, address, stride, values.dtype(), block))
    }

    fn within(rows: &QuantizedRows<'_>, address: u64, stride: usize, dtype: DType, block: [usize; 2]) -> Scales {
        let (first, step) = rows.rows_of_scales();
        let bytes = (first / block[0] * stride * dtype.size_bytes()) as u64;
        Scales { address: address + bytes, stride, dtype, block, first: first % block[0], step }
    }

    /// Whether it lies as the first expert's does.
    fn is_like(&self, other: &Scales) -> bool {
        let layout = |of: &Scales| (of.stride, of.dtype, of.block, of.first, of.step);
        layout(self) == layout(other)
    }
}

/// The scales of all experts, as the kernel finds them.
fn scales_of(op: Op, arg: &'static str, w: &ExpertWeights<'_>) -> Result<WeightScaleParams, Error> {
    let first = Scales::of(op, arg, &w.expert(0))?;
    check_blocks(op, arg, &first, w.n(), w.k())?;
    let (size, mut expert_stride, mut before) = (first.dtype.size_bytes() as i64, 0, first.address);
    for expert in 1..w.experts_to_measure() {
        let scales = Scales::of(op, arg, &w.expert(expert))?;
        let step = scales.address.wrapping_sub(before) as i64;
        if !scales.is_like(&first) || step % size != 0 || expert > 1 && step / size != expert_stride {
            let what = format!("`{arg}` with other scales, or another distance to them, at");
            return Err(Error::unsupported(op, what, format!("matrix {expert}"), "one distance from each expert's scales to the next"));
        }
        (expert_stride, before) = (step / size, scales.address);
    }
    let [block_rows, block_cols] = first.block;
    Ok(WeightScaleParams {
        at: first.address,
        expert_stride,
        row_stride: first.stride as i64,
        first: first.first as u32,
        step: first.step as u32,
        block_rows: block_rows.min(u32::MAX as usize) as u32,
        k_blocks: if block_cols >= w.k() { u32::MAX } else { (block_cols / DEPTH) as u32 },
        kind: type_number(first.dtype),
        unused: 0,
    })
}

/// 128 outputs share their scales, or each has one; 128 of k share theirs.
fn check_blocks(op: Op, arg: &'static str, scales: &Scales, n: usize, k: usize) -> Result<(), Error> {
    let ([rows, cols], span) = (scales.block, DEPTH * scales.step);
    let of_all = scales.first + n.saturating_sub(1) * scales.step < rows;
    let of_tiles = rows.is_multiple_of(span) && scales.first.is_multiple_of(span);
    let by_output = rows == 1 && cols >= k;
    if by_output || (of_all || of_tiles) && (cols >= k || cols.is_multiple_of(DEPTH)) {
        return Ok(());
    }
    let got = match (scales.first, scales.step) {
        (0, 1) => format!("{rows} x {cols}"),
        (first, step) => format!("{rows} x {cols}, of every {step}th row from row {first} of a block on"),
    };
    let supported = "rows that are all of N, a multiple of 128 or 1, columns that are all of K or a multiple of 128";
    Err(Error::unsupported(op, format!("`{arg}` with a scale for each block of"), got, supported))
}
