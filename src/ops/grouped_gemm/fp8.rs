//! Products of FP8 inputs and FP8 weights: what [`quantize`](crate::quantize) wrote, multiplied as it is.

use std::ops::Range;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, operand_accesses, operands_agree};
use crate::device::Stream;
use crate::dtype::{DType, Float};
use crate::epilogue::{Epilogue, Finish, GluEpilogue};
use crate::error::{Error, Op, check_shape};
use crate::format::Format;
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::quantized::inputs::{INPUT_BLOCK, QuantizedInputs};
use crate::simd::{decode, prefetch};
use crate::view::{HostRows, RowsMut};

/// Writes `y = activation(x * W^T + bias)` for each expert, of inputs and weights of e4m3.
///
/// | argument   | shape             | meaning                                                                           |
/// |------------|-------------------|-----------------------------------------------------------------------------------|
/// | `x`        | `[R, K]`          | the rows in expert order, as [`quantize::e4m3`](crate::quantize::e4m3) or [`gather_e4m3`](crate::quantize::gather_e4m3) writes them |
/// | `w`        | `[E, N, K]`       | weights of [`Format::E4m3`], in order [`Nk`](WeightOrder::Nk)                        |
/// | `rows`     | R rows, E experts | which rows belong to which expert; none is gathered                               |
/// | `epilogue` | bias `[E, N]`     | added to each sum in `f32`; then the activation; neither by default          |
/// | `y`        | `[R, N]`          | `f32`, `bf16` or `f16`; every row that an expert owns is written in full          |
///
/// `x[r, k] = fp8(codes[r, k]) * scales[k / 128, r]`. On a GPU the products of 128 of k are summed on the
/// tensor cores, which keep about 14 bits: each product is cut at `2^-13` of the largest product or partial
/// sum among its 128, so that numbers of both signs lose about `2^-10 * sum_k |x w|`. That sum is multiplied
/// by the scales of the row and of the weights and added in `f32`; scales of single outputs multiply the
/// finished sum. On the CPU everything is `f32`. A row's bits depend on that row and the weights alone.
///
/// On a GPU it is the product of many rows, at any number of them: where an expert owns up to 64, weights are
/// read several times. K must be a multiple of 16, N of 8; each 128 outputs must share their scales, or have
/// one each (block rows a multiple of 128, all of N, or 1), and each 128 of K, too (block columns a multiple
/// of 128, or all of K).
///
/// ```
/// use dropless::epilogue::Epilogue;
/// use dropless::quantize::QuantizedInputs;
/// use dropless::{Device, ExpertRows, ExpertWeights, QuantizedRows, Rows, RowsMut, grouped_gemm};
///
/// let stream = Device::cpu().stream()?;
/// // (1, 2) times 0.5, and one output of weights (2, 4) times 3.
/// let (codes, scales, weights, weight_scales) = ([0x38u8, 0x40], [0.5f32], [0x40u8, 0x48], [3.0f32]);
/// let x = QuantizedInputs::new(Rows::from_slice(&codes, 1, 2)?, Rows::from_slice(&scales, 1, 1)?)?;
/// let w = QuantizedRows::e4m3(Rows::from_slice(&weights, 1, 2)?, Rows::from_slice(&weight_scales, 1, 1)?, [128, 128])?;
/// let (w, rows, mut y) = (ExpertWeights::nk(w, 1)?, ExpertRows::dense(1)?, [0.0f32]);
/// grouped_gemm::linear_quantized(&stream, x, w, rows, &Epilogue::default(), &mut RowsMut::from_slice(&mut y, 1, 1)?)?;
/// assert_eq!(y, [15.0]);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`] if the shapes do not agree; [`Error::Unsupported`] for weights that are not of e4m3 and
/// for rows that are gathered; [`Error::Value`] for an activation's factor that is not finite;
/// [`Error::Place`], [`Error::NotJoined`]; on a GPU
/// [`Error::Layout`] for rows that do not begin on 16 bytes, [`Error::Unsupported`] for widths and blocks of
/// scales other than the above, for experts whose matrices or scales do not lie at one distance from each
/// other, and for a bias that is neither `f32` nor of the type of `y`. Nothing is written.
pub fn linear_quantized<O: Float>(
    stream: &Stream,
    x: QuantizedInputs<'_>,
    w: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    epilogue.activation.check(Op::GroupedGemm)?;
    Fp8Product { x, weights: [w], rows, finish: Finish::from(*epilogue) }.run(stream, ["w"], ["bias"], "y", y)
}

/// Writes `h = glu(x * gate^T + gate_bias, x * up^T + up_bias)` of inputs and weights of e4m3.
///
/// `gate` and `up` are `[E, N, K]`, `h` is `[R, N]`; the epilogue is SiLU without biases by default.
/// Otherwise as
/// [`linear_quantized`].
///
/// # Errors
///
/// As [`linear_quantized`]; [`Error::Value`] for constants of a gate that are no numbers. Nothing is written.
pub fn glu_quantized<O: Float>(
    stream: &Stream,
    x: QuantizedInputs<'_>,
    gate: ExpertWeights<'_>,
    up: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    epilogue: &GluEpilogue<'_>,
    h: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    epilogue.glu.check(Op::GroupedGemm)?;
    let product = Fp8Product { x, weights: [gate, up], rows, finish: Finish::from(*epilogue) };
    product.run(stream, ["gate", "up"], ["gate_bias", "up_bias"], "h", h)
}

/// `P` products of the same rows, and what becomes of their sums.
#[derive(Clone, Copy)]
pub(super) struct Fp8Product<'a, const P: usize> {
    pub(super) x: QuantizedInputs<'a>,
    pub(super) weights: [ExpertWeights<'a>; P],
    pub(super) rows: ExpertRows<'a>,
    pub(super) finish: Finish<'a, P>,
}

impl<const P: usize> Fp8Product<'_, P> {
    fn run<O: Float>(
        self,
        stream: &Stream,
        weight_args: [&'static str; P],
        bias_args: [&'static str; P],
        out_arg: &'static str,
        y: &mut RowsMut<'_, O>,
    ) -> Result<(), Error> {
        self.check(weight_args, bias_args, out_arg, y)?;
        kernels_need!(stream, cuda::fp8::check(&self, weight_args, bias_args, out_arg, y));
        let run = dispatch!(stream, Self::on_cpu, cuda::fp8::product);
        let [codes, scales] = self.x.accesses();
        let mut arguments = vec![("x", codes), ("x", scales), (out_arg, y.access())];
        arguments.extend(self.rows.accesses(stream.place()));
        arguments.extend(operand_accesses(&self.weights, weight_args, &self.finish, bias_args));
        stream.admit(Op::GroupedGemm, &arguments)?;
        run(stream, self, y)
    }

    fn check<O: Float>(
        &self,
        weight_args: [&'static str; P],
        bias_args: [&'static str; P],
        out_arg: &'static str,
        y: &RowsMut<'_, O>,
    ) -> Result<(), Error> {
        let ([num_rows, k], op) = (self.x.dims(), Op::GroupedGemm);
        check_shape(op, "x", "[R, K]", &[self.rows.rows(), k], &[num_rows, k])?;
        check_shape(op, out_arg, "[R, N]", &[num_rows, y.cols()], &y.dims())?;
        for (arg, w) in weight_args.into_iter().zip(&self.weights) {
            if w.dtype() != DType::Quantized(Format::E4m3) {
                return Err(Error::unsupported(op, format!("`{arg}` of type"), w.dtype().name(), Format::E4m3.name()));
            }
            debug_assert_eq!(w.order(), WeightOrder::Nk, "quantised weights have one order");
        }
        if self.rows.is_gathered() {
            return Err(Error::unsupported(op, "`rows` that are", "gathered", "rows in expert order (`quantize::gather_e4m3`)"));
        }
        operands_agree(&self.weights, weight_args, &self.finish, bias_args, [self.rows.num_experts(), y.cols(), k])
    }

    /// In the class of many rows, where inputs are taken as they are.
    fn on_cpu<O: Float>(stream: &Stream, product: Self, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
        let Fp8Product { x, weights, rows, finish } = product;
        let x = HostInputs { codes: x.codes().host(), scales: x.scales().host() };
        cpu::product_of(stream, x, weights, rows.in_class(usize::MAX), finish, y)
    }
}

/// Codes and scales in host memory.
#[derive(Clone, Copy)]
struct HostInputs<'a> {
    codes: HostRows<'a, u8>,
    scales: HostRows<'a, f32>,
}

impl cpu::Inputs for HostInputs<'_> {
    fn cols(&self) -> usize {
        self.codes.cols()
    }

    fn widen(&self, row: usize, k: Range<usize>, to: &mut [f32]) {
        let blocks = to.chunks_mut(INPUT_BLOCK).zip(self.codes.row(row)[k.clone()].chunks(INPUT_BLOCK));
        for (block, (to, codes)) in blocks.enumerate() {
            let scale = self.scales.row(k.start / INPUT_BLOCK + block)[row];
            to.iter_mut().zip(codes).for_each(|(x, code)| *x = decode::e4m3(*code) * scale);
        }
    }

    fn prefetch(&self, row: usize, k: Range<usize>) {
        prefetch(&self.codes.row(row)[k]);
    }
}
