//! Grouped matrix products: each expert's rows times that expert's weights. One expert makes a dense linear layer.
//!
//! `nt` is `Y = X * W^T` and `nn` is `Y = X * W`, row-major, as in BLAS. DBRX needs both: `w1` and `v1` lie as `[F, D]` and are
//! used transposed, `w2` lies as `[F, D]` and is used as it lies.
//!
//! Source: Gale et al. 2022, "MegaBlocks", section 4; `DbrxExpertGLU.forward` in Hugging Face transformers.
//! Kernels: `cuda/grouped_gemm.cu`, `_few.cu` for few rows per expert, `_fp8.cu` for e4m3, `_quantized.cu` for
//! tiles of 4 bits and e4m3, `_plain.cu` and `_plain_quantized.cu` for other types and shapes. Oracle: `tests/kit/src/oracle/grouped_gemm.rs`. Bench: `benches/grouped_gemm.rs`.

mod cpu;
pub(crate) use self::cpu::FEW_ROWS;
mod fp8;
pub use self::fp8::{glu_quantized, linear_quantized};
#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// The forms of the tensor-core kernels, for tests, benches and the doctor. Outside the semver promise.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use self::cuda::forms;

use crate::device::{Access, Stream};
use crate::dtype::{DType, Float};
use crate::epilogue::{Epilogue, Finish, GluEpilogue};
use crate::error::{Error, Op, Place, check_shape};
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::view::{Rows, RowsMut};

/// Writes `y[r, n] = sum_k x[input(r), k] * w[e, n, k]`, `e` being the expert that owns row `r`.
///
/// | argument | shape             | meaning                                                                         |
/// |----------|-------------------|---------------------------------------------------------------------------------|
/// | `x`      | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                  |
/// | `w`      | `[E, N, K]`       | weights, one row per output, in order [`Nk`](WeightOrder::Nk); read where they lie |
/// | `rows`   | R rows, E experts | which rows belong to which expert, and which input row each is computed from      |
/// | `y`      | `[R, N]`          | every row that an expert owns is written in full                                  |
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
/// **Quantised weights** ([`QuantizedRows`](crate::QuantizedRows)) are decoded as they are read. On the CPU,
/// calls of the class of few rows round each input row to 8 bits by blocks of 32, to the nearest multiple of
/// the block's largest magnitude divided by 127, and multiply integers. But for roundings in `f32`, the error
/// that this adds to `y[r, n]` is at most `sum_k |w[n, k]| max |x| / 254`, `max |x|` being of the block that
/// holds `k`, or `2^-119` where it is less. Sums of codes and of minima or zero points are taken apart, so
/// those roundings are relative to both. A NaN or an infinity in an input row makes that row NaN; where a
/// block's largest input times a scale of weights passes the range of `f32`, outputs may be NaN, too. This
/// holds for `Q8_0`, `Q4_0`, `Q4K`, `Q6K`, MXFP4, and INT4 whose groups are all of K or a power of two times
/// 32. Other formats, more rows, and weights [with exact inputs](crate::QuantizedRows::with_exact_inputs)
/// take inputs as they are, and the result is that of the decoded weights.
///
/// On a GPU the tensor cores multiply `bf16` rows, taken as they are, by INT4 and MXFP4 weights in tiles, as
/// [`repack`](crate::repack) writes them, and by E4M3 weights where they lie, where K and N are multiples of 8
/// (K of 16 for E4M3). INT4's groups are multiples of 32 or all of K, E4M3's blocks as wide as a multiple of
/// 128 or all of K. Scales multiply sums in `f32`. Exponents of MXFP4 are folded into `bf16` operands relative
/// to the largest of their output: a group whose power of two is smaller than that one by `2^126` and more
/// loses bits, below what the others round away.
///
/// Everything else in the order of a checkpoint is multiplied by the plain kernel: every [`Format`](crate::Format), rows of
/// `f32`, `bf16` and `f16`, any shape. It decodes weights to `f32`, with the bits that
/// [`dequantize`](crate::QuantizedRows::dequantize) gives, and adds products in `f32`. It is right, but slow:
/// INT4 and MXFP4 want to be repacked. Tiles are multiplied by `bf16` rows alone.
///
/// On a GPU the tensor cores serve `bf16` and `f16`, where K and N are multiples of 8 and rows begin on 16 bytes; everything else is
/// computed by plain kernels, right, but not fast.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes do not agree; [`Error::Mismatch`] for weights of the other order;
/// [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Unsupported`] for floats as weights of another
/// type than `x`, outputs that are neither of the type of `x` nor `f32`, tiles that the tensor cores do not
/// serve, and experts whose matrices do not lie at one distance from each other, or have scales of several
/// kinds. Nothing is written.
pub fn nt<A: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_order("w", &w, WeightOrder::Nk, "`nn` or `linear` take the other")?;
    linear(stream, x, w, rows, &Epilogue::default(), y)
}

/// Writes `y[r, n] = sum_k x[input(r), k] * w[e, k, n]`, `e` being the expert that owns row `r`.
///
/// | argument | shape             | meaning                                                                        |
/// |----------|-------------------|--------------------------------------------------------------------------------|
/// | `x`      | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                 |
/// | `w`      | `[E, K, N]`       | weights, one row per input, in order [`Kn`](WeightOrder::Kn); read where they lie |
/// | `rows`   | R rows, E experts | which rows belong to which expert, and which input row each is computed from     |
/// | `y`      | `[R, N]`          | every row that an expert owns is written in full                                 |
///
/// Numerics, edge cases and errors are those of [`nt`], but on the CPU there is one class: the number of rows does not show at all. On a
/// GPU the classes are those of [`nt`].
///
/// # Errors
///
/// As [`nt`]. Nothing is written.
pub fn nn<A: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_order("w", &w, WeightOrder::Kn, "`nt` or `linear` take the other")?;
    linear(stream, x, w, rows, &Epilogue::default(), y)
}

/// Writes `y = activation(x * W + bias)` for each expert, with weights in either order: [`nt`] or [`nn`], and what follows it.
///
/// | argument   | shape                    | meaning                                                                          |
/// |------------|--------------------------|----------------------------------------------------------------------------------|
/// | `x`        | `[input rows, K]`        | the rows in expert order, or the tokens that `rows` gathers from                  |
/// | `w`        | `[E, N, K]`, `[E, K, N]` | weights in order [`Nk`](WeightOrder::Nk) or [`Kn`](WeightOrder::Kn); read where they lie |
/// | `rows`     | R rows, E experts        | which rows belong to which expert, and which input row each is computed from      |
/// | `epilogue` | bias `[E, N]`            | added to each sum in `f32`; then the activation; neither by default          |
/// | `y`        | `[R, N]`                 | every row that an expert owns is written in full                                  |
///
/// Bias and activation are computed in `f32` on the sum, before the one rounding. Dtypes of the bias: `f32`, `bf16`, `f16`, on a GPU `f32` or
/// that of `x`. Otherwise as [`nt`].
///
/// ```
/// use dropless::activation::Activation;
/// use dropless::epilogue::{Bias, Epilogue};
/// use dropless::{Device, ExpertRows, ExpertWeights, Rows, RowsMut, grouped_gemm};
///
/// let stream = Device::cpu().stream()?;
/// let (x, w, bias, mut y) = ([1.0f32, 2.0], [3.0f32, 4.0, -3.0, -4.0], [0.5f32, 0.5], [0.0f32; 2]);
/// let w = ExpertWeights::nk(Rows::from_slice(&w, 2, 2)?, 1)?;
/// let epilogue = Epilogue::default()
///     .with_bias(Bias::new(Rows::from_slice(&bias, 1, 2)?))
///     .with_activation(Activation::ReluSquared);
/// let (x, rows) = (Rows::from_slice(&x, 1, 2)?, ExpertRows::dense(1)?);
/// grouped_gemm::linear(&stream, x, w, rows, &epilogue, &mut RowsMut::from_slice(&mut y, 1, 2)?)?;
/// assert_eq!(y, [11.5 * 11.5, 0.0]);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// As [`nt`], but weights may be of either order; [`Error::Shape`] for a bias of another shape;
/// [`Error::Value`] for an activation's factor that is not finite; on a GPU [`Error::Unsupported`] for a bias
/// that is neither `f32` nor of the type of `x`. Nothing is written.
pub fn linear<A: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    epilogue.activation.check(Op::GroupedGemm)?;
    let product = Product { x, weights: [w], rows, finish: Finish::from(*epilogue) };
    product.check(["w"], ["bias"], "y", y)?;
    product.run(stream, ["w"], ["bias"], "y", y)
}

/// Writes `h = silu(x * w1^T) * (x * v1^T)`: both products of the first half of an expert, and the activation between.
///
/// | argument   | shape             | meaning                                                                             |
/// |------------|-------------------|-------------------------------------------------------------------------------------|
/// | `x`        | `[input rows, K]` | the rows in expert order, or the tokens that `rows` gathers from                      |
/// | `w1`, `v1` | `[E, N, K]`       | gate and up weights, both in order [`Nk`](WeightOrder::Nk); read where they lie         |
/// | `rows`     | R rows, E experts | which rows belong to which expert, and which input row each is computed from          |
/// | `h`        | `[R, N]`          | every row that an expert owns is written in full                                      |
///
/// Both products and the activation stay in `f32`; the result is rounded once. `silu(x) = x / (1 + exp(-x))`; of a large
/// negative value it is `-0`, never NaN. Otherwise as [`nt`].
///
/// # Errors
///
/// As [`nt`]. Nothing is written.
pub fn glu_nt<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w1: ExpertWeights<'_>,
    v1: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    h: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check_order("w1", &w1, WeightOrder::Nk, "`glu` takes the other")?;
    check_order("v1", &v1, WeightOrder::Nk, "`glu` takes the other")?;
    let product = Product { x, weights: [w1, v1], rows, finish: Finish::from(GluEpilogue::default()) };
    let biases = ["gate_bias", "up_bias"];
    product.check(["w1", "v1"], biases, "h", h)?;
    product.run(stream, ["w1", "v1"], biases, "h", h)
}

/// Writes `h = glu(x * gate^T + gate_bias, x * up^T + up_bias)`: both products of the first half of an expert, and whichever gate is between.
///
/// | argument     | shape                   | meaning                                                                          |
/// |--------------|-------------------------|----------------------------------------------------------------------------------|
/// | `x`          | `[input rows, K]`       | the rows in expert order, or the tokens that `rows` gathers from                  |
/// | `gate`, `up` | `[E, N, K]` each        | weights, both in one order; packed and interleaved ones come from [`ExpertWeights::halves`] and [`ExpertWeights::interleaved`] |
/// | `rows`       | R rows, E experts       | which rows belong to which expert, and which input row each is computed from      |
/// | `epilogue`   | biases `[E, N]`         | added to each sum in `f32`; then [`Glu`](crate::activation::Glu), SiLU by default  |
/// | `h`          | `[R, N]`                | every row that an expert owns is written in full                                  |
///
/// Everything stays in `f32` until the one rounding. On the tensor cores a bias or another gate than SiLU
/// goes through shared memory once more, which costs nothing at up to 64 tokens of DBRX's shapes on an H100,
/// 8 % of the first half at 512, and 9 to 18 % at 8192. With the default epilogue and weights in order
/// [`Nk`](WeightOrder::Nk) the bits are those of [`glu_nt`]. On a GPU weights in order
/// [`Kn`](WeightOrder::Kn) are multiplied by the plain kernel. Otherwise as [`linear`].
///
/// # Errors
///
/// As [`linear`]; [`Error::Mismatch`] for weights of two orders; [`Error::Value`] for constants of a gate
/// that are no numbers; on a GPU [`Error::Unsupported`] for weights of two types, unless both are quantised and
/// in the order of a checkpoint. Nothing is written.
pub fn glu<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    gate: ExpertWeights<'_>,
    up: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    epilogue: &GluEpilogue<'_>,
    h: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check_order("up", &up, gate.order(), "that of `gate`")?;
    epilogue.glu.check(Op::GroupedGemm)?;
    let product = Product { x, weights: [gate, up], rows, finish: Finish::from(*epilogue) };
    let biases = ["gate_bias", "up_bias"];
    product.check(["gate", "up"], biases, "h", h)?;
    product.run(stream, ["gate", "up"], biases, "h", h)
}

/// `P` products of the same rows, and what becomes of their sums.
#[derive(Clone, Copy)]
struct Product<'a, A, const P: usize> {
    x: Rows<'a, A>,
    weights: [ExpertWeights<'a>; P],
    rows: ExpertRows<'a>,
    finish: Finish<'a, P>,
}

impl<A: Float, const P: usize> Product<'_, A, P> {
    /// Every shape against the others. `arg`s are what the caller knows the arguments by.
    fn check<O: Float>(
        &self,
        weight_args: [&'static str; P],
        bias_args: [&'static str; P],
        out_arg: &'static str,
        y: &RowsMut<'_, O>,
    ) -> Result<(), Error> {
        let (e, n, k) = (self.rows.num_experts(), y.cols(), self.x.cols());
        check_shape(Op::GroupedGemm, "x", "[input rows, K]", &[self.rows.input_rows(), k], &self.x.dims())?;
        check_shape(Op::GroupedGemm, out_arg, "[R, N]", &[self.rows.rows(), n], &y.dims())?;
        operands_agree(&self.weights, weight_args, &self.finish, bias_args, [e, n, k])
    }

    /// Admits the arguments and runs the backend of the stream's place.
    fn run<O: Float>(
        self,
        stream: &Stream,
        weight_args: [&'static str; P],
        bias_args: [&'static str; P],
        out_arg: &'static str,
        y: &mut RowsMut<'_, O>,
    ) -> Result<(), Error> {
        let run = dispatch!(stream, cpu::product, cuda::product);
        if stream.place() == Place::Host {
            let mut weights = weight_args.into_iter().zip(&self.weights);
            weights.try_for_each(|(arg, w)| w.check_rows(Op::GroupedGemm, arg))?;
        }
        kernels_need!(stream, cuda::check(&self, weight_args, bias_args, y));
        let mut arguments = vec![("x", self.x.access()), (out_arg, y.access())];
        arguments.extend(self.rows.accesses(stream.place()));
        arguments.extend(operand_accesses(&self.weights, weight_args, &self.finish, bias_args));
        stream.admit(Op::GroupedGemm, &arguments)?;
        run(stream, self, y)
    }
}

/// Weights and biases of a product against its E, N and K.
fn operands_agree<const P: usize>(
    weights: &[ExpertWeights<'_>; P],
    weight_args: [&'static str; P],
    finish: &Finish<'_, P>,
    bias_args: [&'static str; P],
    [e, n, k]: [usize; 3],
) -> Result<(), Error> {
    for (arg, w) in weight_args.into_iter().zip(weights) {
        match w.order() {
            WeightOrder::Nk => check_shape(Op::GroupedGemm, arg, "[E, N, K]", &[e, n, k], &[w.num_experts(), w.n(), w.k()])?,
            WeightOrder::Kn => check_shape(Op::GroupedGemm, arg, "[E, K, N]", &[e, k, n], &[w.num_experts(), w.k(), w.n()])?,
        }
    }
    for (arg, bias) in bias_args.into_iter().zip(&finish.biases) {
        bias.map_or(Ok(()), |bias| bias.check(Op::GroupedGemm, arg, [e, n]))?;
    }
    Ok(())
}

/// The buffers of weights and biases, by the names of their arguments.
fn operand_accesses<'a, const P: usize>(
    weights: &[ExpertWeights<'a>; P],
    weight_args: [&'static str; P],
    finish: &Finish<'a, P>,
    bias_args: [&'static str; P],
) -> impl Iterator<Item = (&'static str, Access<'a>)> {
    let weights = weight_args.into_iter().zip(*weights).flat_map(|(arg, w)| w.accesses().map(move |access| (arg, access)));
    let biases = bias_args.into_iter().zip(finish.biases).filter_map(|(arg, bias)| Some((arg, bias?.access())));
    weights.chain(biases)
}

/// What the kernels need of types and of the places of matrices, for a composition that wants to know before
/// it begins.
pub(crate) fn check_kernels<'a>(
    op: Op,
    x: DType,
    weights: impl IntoIterator<Item = (&'static str, ExpertWeights<'a>)>,
    biases: impl IntoIterator<Item = (&'static str, crate::epilogue::Bias<'a>)>,
) -> Result<(), Error> {
    #[cfg(feature = "cuda")]
    return cuda::check_types(op, x, weights, biases);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (op, x, weights.into_iter().count(), biases.into_iter().count());
        Ok(())
    }
}

/// The same of FP8 weights that inputs of FP8 are multiplied by.
pub(crate) fn check_fp8<'a>(op: Op, weights: impl IntoIterator<Item = (&'static str, ExpertWeights<'a>)>) -> Result<(), Error> {
    #[cfg(feature = "cuda")]
    return weights.into_iter().try_for_each(|(arg, w)| cuda::fp8::check_weights(op, arg, &w));
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (op, weights.into_iter().count());
        Ok(())
    }
}

/// Whether the kernels take a gate and an up of these types together.
pub(crate) fn agree(gate: &ExpertWeights<'_>, up: &ExpertWeights<'_>) -> bool {
    #[cfg(feature = "cuda")]
    return cuda::agree(gate, up);
    #[cfg(not(feature = "cuda"))]
    {
        gate.dtype() == up.dtype()
    }
}

/// Whether inputs may be quantised for these weights, in calls in which experts own up to so many rows.
pub(crate) fn takes_codes(stream: &Stream, w: &ExpertWeights<'_>, class_rows: usize) -> bool {
    #[cfg(feature = "cuda")]
    return stream.place() != Place::Host && cuda::takes_codes(w, class_rows);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (stream, w, class_rows);
        false
    }
}

fn check_order(arg: &'static str, w: &ExpertWeights<'_>, want: WeightOrder, hint: &'static str) -> Result<(), Error> {
    if w.order() == want {
        return Ok(());
    }
    Err(Error::mismatch(Op::GroupedGemm, arg, format!("in order {} ({hint})", want.name()), w.order().name()))
}
