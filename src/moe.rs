//! The mixture-of-experts layer: route, first half of every expert, second half, combine. The only composition in the library.
//!
//! ```text
//! x [T, D] -> router::logits [T, E] -> router::route      ids, weights, offsets, row maps      route
//!          -> grouped_gemm::glu     [R, F]                 h = silu(x gate^T) * (x up^T), rows gathered as they are read     experts
//!             (gate and up interleaved: grouped_gemm::linear [R, 2F], then glu::gated_interleaved)
//!          -> grouped_gemm::linear  [R, D]                 h down
//!          -> permute::combine      [T, D]                 each token's rows, weighted, in the order of its choices          combine
//! ```
//!
//! [`forward`] is all of it. An engine that routes elsewhere, or that exchanges rows between devices, calls
//! the steps: [`route`], [`experts`], [`combine`], or [`forward_routed`], which is the last two; a shared
//! expert's rows are a step of their own, [`shared`].
//!
//! Source: Gale et al. 2022, "MegaBlocks"; `DbrxFFN.forward` in Hugging Face transformers.
//! Oracle: `tests/kit/src/oracle/moe.rs`. Bench: `benches/moe.rs`.

use std::marker::PhantomData;

use crate::activation::{Activation, Glu};
use crate::device::{Access, Stream, Workspace};
use crate::dtype::Float;
use crate::epilogue::{Bias, Epilogue, GluEpilogue};
use crate::error::{Error, Op, Place, check_shape};
use crate::layout::{ExpertRows, ExpertWeights, MAX_EXPERTS, Routing, RoutingBuffers};
pub use crate::ops::permute::{Base, combine, combine_onto};
use crate::ops::quantize::QuantizedInputs;
use crate::ops::router::Choice;
use crate::ops::{glu, grouped_gemm, permute, quantize, router};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Carver, Rows, RowsMut};
use crate::weights::WeightRows;

/// What the layer's sizes are.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Shape {
    /// D, the columns of a token.
    pub d_model: usize,
    /// F, the columns between the two halves of an expert.
    pub d_ffn: usize,
    /// E, the experts that are here: of those spread over devices, this one's.
    pub num_experts: usize,
    /// k, the experts of one token, wherever they are.
    pub top_k: usize,
    /// Columns between the two halves of a shared expert, which every token goes to; 0 for none.
    pub shared_d_ffn: usize,
    /// Whether there is room for first halves of the form [`Hidden::Interleaved`].
    pub interleaved: bool,
    /// Whether there is room for rows as FP8, which products of FP8 weights take.
    pub fp8_inputs: bool,
}

impl Shape {
    /// Of a layer in which each token goes to `top_k` of `num_experts`.
    pub const fn new(d_model: usize, d_ffn: usize, num_experts: usize, top_k: usize) -> Shape {
        Shape { d_model, d_ffn, num_experts, top_k, shared_d_ffn: 0, interleaved: false, fp8_inputs: false }
    }

    /// With a shared expert of this width.
    #[must_use]
    pub const fn with_shared(self, shared_d_ffn: usize) -> Shape {
        Shape { shared_d_ffn, ..self }
    }

    /// With room for [`Hidden::Interleaved`], whose product of 2F columns is stored before the gate is
    /// applied: the workspace holds `max_tokens * top_k` rows of 2F elements more, and with a shared expert
    /// `max_tokens` rows of twice its width.
    #[must_use]
    pub const fn with_interleaved(self) -> Shape {
        Shape { interleaved: true, ..self }
    }

    /// With room for rows as FP8. On a GPU, in calls of the class of more than 64 tokens, rows are then
    /// rounded to FP8 ([`quantize`]) before they are multiplied by weights of
    /// [`Format::E4m3`](crate::Format::E4m3), but not for weights
    /// [with exact inputs](crate::QuantizedRows::with_exact_inputs). The workspace holds `max_tokens * top_k`
    /// rows of a byte for each element of the wider of D and F, and a scale for each 128 of them; with a
    /// shared expert `max_tokens` rows more, of the wider of D and its width.
    #[must_use]
    pub const fn with_fp8_inputs(self) -> Shape {
        Shape { fp8_inputs: true, ..self }
    }

    /// Columns of rows as FP8: of the routed experts, and of the shared one.
    fn code_cols(&self) -> [usize; 2] {
        let widest = |d_ffn: usize| if self.fp8_inputs { self.d_model.max(d_ffn) } else { 0 };
        [widest(self.d_ffn), widest(self.shared_d_ffn)]
    }

    /// Columns of the products that are stored before the gate is applied: of the routed experts, and of the
    /// shared one.
    fn interleaved_cols(&self) -> [usize; 2] {
        if self.interleaved { [2 * self.d_ffn, 2 * self.shared_d_ffn] } else { [0, 0] }
    }
}

/// The layer for batches of up to `max_tokens` tokens of type `A`: the memory it needs is known before anything runs.
#[derive(Clone, Copy, Debug)]
pub struct Plan<A> {
    shape: Shape,
    max_tokens: usize,
    workspace_bytes: usize,
    class_rows: Option<usize>,
    _activations: PhantomData<fn() -> A>,
}

impl<A: Float> Plan<A> {
    /// # Errors
    ///
    /// [`Error::Value`] if `top_k` is 0 (it may pass the number of experts where a routing is given);
    /// [`Error::TooLarge`] beyond 1024 experts, 2^31 - 1 rows or the address space.
    pub fn new(shape: Shape, max_tokens: usize) -> Result<Plan<A>, Error> {
        let Shape { d_model, d_ffn, num_experts, top_k, shared_d_ffn, interleaved, fp8_inputs: _ } = shape;
        checked_product(Op::Moe, "num_experts", &[num_experts], MAX_EXPERTS)?;
        // So that they can be rounded up; no matrix is as wide.
        checked_product(Op::Moe, "d_model", &[d_model], isize::MAX as usize)?;
        checked_product(Op::Moe, "d_ffn", &[d_ffn], isize::MAX as usize)?;
        checked_product(Op::Moe, "shared_d_ffn", &[shared_d_ffn], isize::MAX as usize)?;
        if interleaved {
            checked_product(Op::Moe, "2 * d_ffn", &[2, d_ffn], isize::MAX as usize)?;
            checked_product(Op::Moe, "2 * shared_d_ffn", &[2, shared_d_ffn], isize::MAX as usize)?;
        }
        if top_k == 0 {
            return Err(Error::Value { op: Op::Moe, arg: "top_k", need: "at least 1", got: 0.0 });
        }
        checked_product(Op::Moe, "top_k", &[top_k], MAX_ROWS)?; // of no tokens, too
        let rows = checked_product(Op::Moe, "max_tokens * top_k", &[max_tokens, top_k], MAX_ROWS)?;
        let shared_tokens = if shared_d_ffn == 0 { 0 } else { max_tokens };
        let [interleaved_cols, shared_interleaved_cols] = shape.interleaved_cols();
        let [code_cols, shared_code_cols] = shape.code_cols();
        let parts = [
            Workspace::bytes_for::<f32>(Op::Moe, max_tokens, num_experts)?,
            Workspace::bytes_for::<A>(Op::Moe, rows, aligned::<A>(interleaved_cols))?,
            Workspace::bytes_for::<A>(Op::Moe, rows, aligned::<A>(d_ffn))?,
            Workspace::bytes_for::<A>(Op::Moe, rows, aligned::<A>(d_model))?,
            Workspace::bytes_for::<A>(Op::Moe, shared_tokens, aligned::<A>(shared_interleaved_cols))?,
            Workspace::bytes_for::<A>(Op::Moe, shared_tokens, aligned::<A>(shared_d_ffn))?,
            Workspace::bytes_for::<A>(Op::Moe, shared_tokens, aligned::<A>(d_model))?,
            Workspace::bytes_for::<f32>(Op::Moe, shared_tokens, 1)?,
        ];
        let codes = [Codes::bytes(rows, code_cols)?, Codes::bytes(shared_tokens, shared_code_cols)?];
        let total = parts.iter().chain(codes.as_flattened()).map(|bytes| *bytes as u128).sum::<u128>();
        let limit = isize::MAX as u128;
        if total > limit {
            return Err(Error::TooLarge { op: Op::Moe, what: "workspace bytes", got: total, limit });
        }
        Ok(Plan { shape, max_tokens, workspace_bytes: total as usize, class_rows: None, _activations: PhantomData })
    }

    /// The layer in one class for every batch size, as if an expert could own `max_rows` rows: a token's bits then depend on the token and the
    /// weights alone, and not on how many others there are.
    ///
    /// Without it classes follow the batch (see [`forward`]). `usize::MAX` is the class of large batches,
    /// right for any batch. What it costs small ones, as the time of a batch over that of its own class:
    ///
    /// | | T = 1 | 8 | 64 |
    /// |---|--:|--:|--:|
    /// | H100, both products of DBRX's experts | 1.02 | | 1.00 |
    /// | CPU, two cores with AVX-512, bf16 weights, E = 8, k = 2 | 2.3 to 3.6 | 1.8 to 2.2 | 1.1 to 1.2 |
    ///
    /// `8` is the class of decode steps, of at most 8 rows for each expert: larger batches are right in it,
    /// and read weights several times. On an H100 all classes gave the same bits; that is not promised.
    ///
    /// ```
    /// use dropless::moe::{Plan, Shape};
    ///
    /// let plan = Plan::<f32>::new(Shape::new(64, 128, 8, 2), 512)?.in_class(usize::MAX);
    /// # let _ = plan;
    /// # Ok::<(), dropless::Error>(())
    /// ```
    #[must_use]
    pub fn in_class(self, max_rows: usize) -> Plan<A> {
        Plan { class_rows: Some(max_rows), ..self }
    }

    /// The sizes it was made from.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The largest batch.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// What a [`Workspace`] for this plan must hold: router logits, the rows between the halves (of a shape
    /// [`with_interleaved`](Shape::with_interleaved) before the gate is applied, too), the experts' output
    /// rows; of a shape [`with_fp8_inputs`](Shape::with_fp8_inputs) rows as FP8.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }
}

/// The experts' weights, borrowed where they lie: the first half of each, and the second.
///
/// | family | gate, up | down |
/// |---|---|---|
/// | DBRX | `nk(w1)`, `nk(v1)`, each `[E F, D]` | `kn(w2)`, `[E F, D]` |
/// | Mixtral | `nk_each` of `w1`, of `w3`, each `[F, D]` | `nk_each` of `w2`, `[D, F]` |
/// | Qwen3-MoE, DeepSeek-V3 | `nk_each` of `gate_proj`, of `up_proj` | `nk_each` of `down_proj` |
/// | packed `[E, 2F, D]`, as vLLM and candle hold them | `nk(..)?.halves()?` | `nk`, `[E D, F]` |
/// | Llama-4, `gate_up_proj [E, D, 2F]` | `kn(..)?.halves()?` | `kn`, `[E F, D]` |
/// | gpt-oss as OpenAI stores it, `[E, 2F, D]` interleaved | `nk(..)?.interleaved()?` | `nk`, `[E D, F]` |
/// | gpt-oss in transformers, `[E, D, 2F]` interleaved | [`Experts::interleaved`] of `kn(..)` | `kn`, `[E F, D]` |
///
/// On a GPU the matrices of `nk_each` must lie at one distance from each other, and `kn` gates run in the
/// plain kernel. The gate and the up of [`Experts::interleaved`] are one product of 2F columns, which is
/// stored, and [`glu::gated_interleaved`] follows; the tensor cores serve both orders.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Experts<'a> {
    /// What makes a token's row of F columns.
    pub hidden: Hidden<'a>,
    /// Down, `[E, D, F]` in order [`Nk`](crate::layout::WeightOrder::Nk), as Mixtral's, or `[E, F, D]` in
    /// order [`Kn`](crate::layout::WeightOrder::Kn), as DBRX's.
    pub down: ExpertWeights<'a>,
    /// `[E, D]`, added to each output row.
    pub down_bias: Option<Bias<'a>>,
    /// An expert that every token goes to besides; its width is [`Shape::shared_d_ffn`].
    pub shared: Option<Shared<'a>>,
}

/// An expert that every token goes to: a dense layer, added to the sum of the others.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Shared<'a> {
    /// Its first half, matrices `[1, Fs, D]`.
    pub hidden: Hidden<'a>,
    /// Its second half, `[1, D, Fs]` in order [`Nk`](crate::layout::WeightOrder::Nk), or `[1, Fs, D]` in
    /// order [`Kn`](crate::layout::WeightOrder::Kn).
    pub down: ExpertWeights<'a>,
    /// `[1, D]`: a token's row is multiplied by `sigmoid(gate . x)`, as Qwen2-MoE does; without, by 1.
    pub gate: Option<WeightRows<'a>>,
}

impl<'a> Shared<'a> {
    /// `silu(x gate^T) * (x up^T)`, then `down`, each of one expert.
    pub fn gated(gate: ExpertWeights<'a>, up: ExpertWeights<'a>, down: ExpertWeights<'a>) -> Shared<'a> {
        let epilogue = GluEpilogue::default();
        Shared { hidden: Hidden::Gated { gate, up, epilogue }, down, gate: None }
    }

    /// With another first half, as one that has biases.
    pub fn new(hidden: Hidden<'a>, down: ExpertWeights<'a>) -> Shared<'a> {
        Shared { hidden, down, gate: None }
    }

    /// With a factor `sigmoid(gate . x)` for each token.
    #[must_use]
    pub fn with_gate(self, gate: impl Into<WeightRows<'a>>) -> Shared<'a> {
        Shared { gate: Some(gate.into()), ..self }
    }

    /// Its halves as experts, of which there is one.
    fn halves(&self) -> Experts<'a> {
        Experts { hidden: self.hidden, down: self.down, down_bias: None, shared: None }
    }

    fn accesses(&self) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a> {
        self.halves().halves_accesses(&SHARED).chain(self.gate.map(|gate| ("shared gate", gate.access())))
    }
}

/// The first half of an expert.
#[derive(Clone, Copy)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant)] // a view is `Copy`, which a box is not
pub enum Hidden<'a> {
    /// `glu(x gate^T, x up^T)`.
    Gated {
        /// `[E, F, D]`.
        gate: ExpertWeights<'a>,
        /// `[E, F, D]`.
        up: ExpertWeights<'a>,
        /// Biases, and which gate; SiLU by default.
        epilogue: GluEpilogue<'a>,
    },
    /// `activation(x up^T)`, without a gate.
    Plain {
        /// `[E, F, D]`.
        up: ExpertWeights<'a>,
        /// A bias, and which activation.
        epilogue: Epilogue<'a>,
    },
    /// `glu(u[0, 2, ..], u[1, 3, ..])` of the even and the odd columns of `u = x gate_up^T + bias`, of which
    /// there are 2F. `u` is rounded to the type of `x`. The plan's shape must be
    /// [`with_interleaved`](Shape::with_interleaved).
    Interleaved {
        /// `[E, 2F, D]` in order [`Nk`](crate::layout::WeightOrder::Nk), or `[E, D, 2F]` in order
        /// [`Kn`](crate::layout::WeightOrder::Kn).
        gate_up: ExpertWeights<'a>,
        /// `[E, 2F]`, interleaved as well.
        bias: Option<Bias<'a>>,
        /// What gate and up become.
        glu: Glu,
    },
}

impl<'a> Experts<'a> {
    /// Any first half, then `down`.
    pub fn new(hidden: Hidden<'a>, down: ExpertWeights<'a>) -> Experts<'a> {
        Experts { hidden, down, down_bias: None, shared: None }
    }

    /// `silu(x gate^T) * (x up^T)`, then `down`. Packed and interleaved gates and ups come from [`ExpertWeights::halves`] and
    /// [`ExpertWeights::interleaved`].
    pub fn gated(gate: ExpertWeights<'a>, up: ExpertWeights<'a>, down: ExpertWeights<'a>) -> Experts<'a> {
        let epilogue = GluEpilogue::default();
        Experts { hidden: Hidden::Gated { gate, up, epilogue }, down, down_bias: None, shared: None }
    }

    /// The same with biases or another gate.
    pub fn gated_with(gate: ExpertWeights<'a>, up: ExpertWeights<'a>, epilogue: GluEpilogue<'a>, down: ExpertWeights<'a>) -> Experts<'a> {
        Experts { hidden: Hidden::Gated { gate, up, epilogue }, ..Experts::gated(gate, up, down) }
    }

    /// `activation(x up^T + bias)`, then `down`: experts without a gate.
    pub fn plain_with(up: ExpertWeights<'a>, epilogue: Epilogue<'a>, down: ExpertWeights<'a>) -> Experts<'a> {
        Experts { hidden: Hidden::Plain { up, epilogue }, down, down_bias: None, shared: None }
    }

    /// `activation(x up^T)`, then `down`.
    pub fn plain(up: ExpertWeights<'a>, activation: Activation, down: ExpertWeights<'a>) -> Experts<'a> {
        let epilogue = Epilogue::default().with_activation(activation);
        Experts { hidden: Hidden::Plain { up, epilogue }, down, down_bias: None, shared: None }
    }

    /// `glu` of an interleaved gate and up, as gpt-oss has them in Hugging Face transformers, then
    /// `down`.
    ///
    /// ```
    /// use dropless::activation::Glu;
    /// use dropless::epilogue::Bias;
    /// use dropless::layout::ExpertWeights;
    /// use dropless::moe::{Experts, Plan, Shape};
    /// use dropless::Rows;
    ///
    /// // E = 2, D = 3, F = 4: gate_up_proj [E, D, 2F] and its bias [E, 2F]; down_proj [E, F, D] and its [E, D].
    /// let (gate_up, gate_up_bias) = ([0.0f32; 48], [0.0f32; 16]);
    /// let (down, down_bias) = ([0.0f32; 24], [0.0f32; 6]);
    /// let gate_up = ExpertWeights::kn(Rows::from_slice(&gate_up, 2 * 3, 8)?, 2)?;
    /// let down = ExpertWeights::kn(Rows::from_slice(&down, 2 * 4, 3)?, 2)?;
    /// let bias = Bias::new(Rows::from_slice(&gate_up_bias, 2, 8)?);
    /// let experts = Experts::interleaved(gate_up, Some(bias), Glu::GPT_OSS, down)
    ///     .with_down_bias(Bias::new(Rows::from_slice(&down_bias, 2, 3)?));
    /// let plan = Plan::<f32>::new(Shape::new(3, 4, 2, 1).with_interleaved(), 16)?;
    /// # let _ = (experts, plan);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn interleaved(gate_up: ExpertWeights<'a>, bias: Option<Bias<'a>>, glu: Glu, down: ExpertWeights<'a>) -> Experts<'a> {
        Experts { hidden: Hidden::Interleaved { gate_up, bias, glu }, down, down_bias: None, shared: None }
    }

    /// With a bias of the second half, `[E, D]`.
    #[must_use]
    pub fn with_down_bias(self, bias: Bias<'a>) -> Experts<'a> {
        Experts { down_bias: Some(bias), ..self }
    }

    /// With an expert that every token goes to; the plan's shape has its width ([`Shape::with_shared`]).
    #[must_use]
    pub fn with_shared(self, shared: Shared<'a>) -> Experts<'a> {
        Experts { shared: Some(shared), ..self }
    }

    /// The matrix of the first half, or the second of its two.
    fn up(&self) -> ExpertWeights<'a> {
        let (Hidden::Gated { up, .. } | Hidden::Plain { up, .. } | Hidden::Interleaved { gate_up: up, .. }) = self.hidden;
        up
    }

    /// The matrices of both halves, by their names.
    fn matrices(&self, names: &Names) -> impl Iterator<Item = (&'static str, ExpertWeights<'a>)> + use<'a> {
        let (gate, up) = match self.hidden {
            Hidden::Gated { gate, up, .. } => (Some((names.gate, gate)), (names.up, up)),
            Hidden::Plain { up, .. } => (None, (names.up, up)),
            Hidden::Interleaved { gate_up, .. } => (None, (names.gate_up, gate_up)),
        };
        gate.into_iter().chain([up, (names.down, self.down)])
    }

    /// The biases that there are, by their names.
    fn biases(&self, names: &Names) -> impl Iterator<Item = (&'static str, Bias<'a>)> + use<'a> {
        let (gate, up) = match self.hidden {
            Hidden::Gated { epilogue, .. } => (epilogue.gate_bias, (names.up_bias, epilogue.up_bias)),
            Hidden::Plain { epilogue, .. } => (None, (names.up_bias, epilogue.bias)),
            Hidden::Interleaved { bias, .. } => (None, (names.gate_up_bias, bias)),
        };
        let biases = [(names.gate_bias, gate), up, (names.down_bias, self.down_bias)];
        biases.into_iter().filter_map(|(arg, bias)| Some((arg, bias?)))
    }

    /// Everything that the products would refuse.
    fn check<A: Float>(&self, stream: &Stream, shape: &Shape, class_rows: usize) -> Result<(), Error> {
        self.check_halves::<A>(stream, shape, class_rows, &ROUTED)?;
        let width = |need| Err(Error::Value { op: Op::Moe, arg: "shared_d_ffn", need, got: shape.shared_d_ffn as f64 });
        let shared = match (self.shared, shape.shared_d_ffn) {
            (None, 0) => return Ok(()),
            (None, _) => return width("0 for experts without a shared one"),
            (Some(_), 0) => return width("the width of the shared expert, at least 1"),
            (Some(shared), _) => shared,
        };
        let of_shared = Shape { d_ffn: shape.shared_d_ffn, num_experts: 1, top_k: 1, ..*shape };
        shared.halves().check_halves::<A>(stream, &of_shared, class_rows, &SHARED)?;
        let Some(gate) = shared.gate else { return Ok(()) };
        gate.check_floats(Op::Moe, "shared gate")?;
        check_shape(Op::Moe, "shared gate", "[1, D]", &[1, shape.d_model], &gate.dims())?;
        kernels_need!(stream, gate.vectors(Op::Moe, "shared gate"));
        kernels_need!(stream, router::check_kernels::<A>(Op::Moe, gate.dtype()).map_err(|error| error.about("shared gate")));
        Ok(())
    }

    fn check_halves<A: Float>(&self, stream: &Stream, shape: &Shape, class_rows: usize, names: &Names) -> Result<(), Error> {
        let Shape { d_model, d_ffn, num_experts, interleaved, .. } = *shape;
        if matches!(self.hidden, Hidden::Interleaved { .. }) && !interleaved {
            let need = "1, for interleaved gate and up (`Shape::with_interleaved`)";
            return Err(Error::Value { op: Op::Moe, arg: "interleaved", need, got: 0.0 });
        }
        for (arg, w) in self.matrices(names) {
            let (want, [n, k]) = match arg {
                _ if arg == names.down => ("[E, D, F]", [d_model, d_ffn]),
                _ if arg == names.gate_up => ("[E, 2F, D]", [2 * d_ffn, d_model]),
                _ => ("[E, F, D]", [d_ffn, d_model]),
            };
            check_shape(Op::Moe, arg, want, &[num_experts, n, k], &[w.num_experts(), w.n(), w.k()])?;
        }
        for (arg, bias) in self.biases(names) {
            let n = match arg {
                _ if arg == names.down_bias => d_model,
                _ if arg == names.gate_up_bias => 2 * d_ffn,
                _ => d_ffn,
            };
            bias.check(Op::Moe, arg, [num_experts, n])?;
        }
        match self.hidden {
            Hidden::Gated { gate, up, epilogue } => {
                epilogue.glu.check(Op::Moe)?;
                if gate.order() != up.order() {
                    return Err(Error::mismatch(Op::Moe, names.up, "in the order of its gate", up.order().name()));
                }
            }
            Hidden::Plain { epilogue, .. } => epilogue.activation.check(Op::Moe)?,
            Hidden::Interleaved { glu, .. } => glu.check(Op::Moe)?,
        }
        if stream.place() == Place::Host {
            return Ok(());
        }
        let takes_codes = |(_, w): &(&'static str, ExpertWeights<'_>)| shape.fp8_inputs && grouped_gemm::takes_codes(stream, w, class_rows);
        let others = self.matrices(names).filter(|matrix| !takes_codes(matrix));
        grouped_gemm::check_kernels(Op::Moe, A::DTYPE, others, self.biases(names))?;
        grouped_gemm::check_fp8(Op::Moe, self.matrices(names).filter(takes_codes))?;
        let Hidden::Gated { gate, up, .. } = self.hidden else { return Ok(()) };
        if takes_codes(&(names.gate, gate)) != takes_codes(&(names.up, up)) || !grouped_gemm::agree(&gate, &up) {
            return Err(Error::unsupported(Op::Moe, "another type of weights, or exact inputs of one alone,", names.up, names.gate));
        }
        Ok(())
    }

    /// Everything that both halves read, by its name.
    fn halves_accesses(&self, names: &Names) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a> {
        let matrices = self.matrices(names).flat_map(|(arg, w)| w.accesses().map(move |access| (arg, access)));
        matrices.chain(self.biases(names).map(|(arg, bias)| (arg, bias.access())))
    }

    /// The same, of the shared expert, too.
    fn accesses(&self) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a> {
        self.halves_accesses(&ROUTED).chain(self.shared.into_iter().flat_map(|shared| shared.accesses()))
    }
}

/// What the parts of an expert are called in messages.
struct Names {
    gate: &'static str,
    up: &'static str,
    gate_up: &'static str,
    down: &'static str,
    gate_bias: &'static str,
    up_bias: &'static str,
    gate_up_bias: &'static str,
    down_bias: &'static str,
}

const ROUTED: Names = Names {
    gate: "gate",
    up: "up",
    gate_up: "gate_up",
    down: "down",
    gate_bias: "gate_bias",
    up_bias: "up_bias",
    gate_up_bias: "gate_up_bias",
    down_bias: "down_bias",
};
const SHARED: Names = Names {
    gate: "shared gate_proj",
    up: "shared up",
    gate_up: "shared gate_up",
    down: "shared down",
    gate_bias: "shared gate_bias",
    up_bias: "shared up_bias",
    gate_up_bias: "shared gate_up_bias",
    down_bias: "shared down_bias",
};

/// The layer's weights, borrowed where they lie. Each matrix has a type of its own.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Weights<'a> {
    /// `[E, D]`.
    pub router: WeightRows<'a>,
    /// Both halves of the experts.
    pub experts: Experts<'a>,
    /// How each token's experts are chosen and weighed; by default as in DBRX.
    pub choice: Choice<'a>,
}

impl<'a> Weights<'a> {
    /// A router, `[E, D]`, and the experts that it chooses from.
    pub fn new(router: impl Into<WeightRows<'a>>, experts: Experts<'a>) -> Weights<'a> {
        Weights { router: router.into(), experts, choice: Choice::default() }
    }

    /// With experts chosen or weighed otherwise than in DBRX.
    ///
    /// ```
    /// use dropless::layout::ExpertWeights;
    /// use dropless::moe::{Experts, Weights};
    /// use dropless::router::{Choice, Normalize};
    /// use dropless::Rows;
    ///
    /// // Two experts of width 1 for tokens of width 1, their weights left as the softmax has them.
    /// let (router, matrix) = ([0.0f32; 2], [0.0f32; 2]);
    /// let matrix = ExpertWeights::nk(Rows::from_slice(&matrix, 2, 1)?, 2)?;
    /// let choice = Choice::default().with_normalize(Normalize::None);
    /// let weights = Weights::new(Rows::from_slice(&router, 2, 1)?, Experts::gated(matrix, matrix, matrix)).with_choice(choice);
    /// # let _ = weights;
    /// # Ok::<(), dropless::Error>(())
    /// ```
    #[must_use]
    pub fn with_choice(self, choice: Choice<'a>) -> Weights<'a> {
        Weights { choice, ..self }
    }
}

/// Writes the layer's output for every token: `y[t] = sum_s weight[t, s] * expert[t, s](x[t])`, with `expert
/// e(x) = (silu(x gate_e^T) * (x up_e^T)) down_e`, or what [`Experts`] says instead; a shared expert's row is
/// added to the sum.
///
/// | argument    | shape          | meaning                                                          |
/// |-------------|----------------|------------------------------------------------------------------|
/// | `plan`      |                | sizes, made once                                                 |
/// | `x`         | `[T, D]`       | the tokens, `T <= max_tokens`                                    |
/// | `weights`   | [`Weights`]    | router, choice and experts                                       |
/// | `routing`   | k, E of `plan` | receives the routing, which is returned                          |
/// | `workspace` |                | scratch of at least [`Plan::workspace_bytes`]                    |
/// | `y`         | `[T, D]`       | written in full; what it held before does not matter             |
///
/// Router logits and weights are `f32`; the rows between the halves and each expert's output row are rounded
/// to the type of `x`; `y` is summed in `f32` in the order of the token's choices and rounded once. A token's
/// bits depend on the token, the weights and the class of `T`: on the CPU `T * top_k <= 16 * E`, or more; on
/// a GPU `T <= 8`, `T <= 32`, `T <= 64`, or more (see [`grouped_gemm::nt`]); [`Plan::in_class`] makes it one.
/// On a GPU the layer of up to 256 experts is 5 launches for `T <= 64`, 6 for `T <= 128` and 7 for more; a
/// shared expert is two more, and one for its gate; interleaved gate and up are one more; rows as FP8
/// ([`Shape::with_fp8_inputs`]) are one more, and for a shared expert two. None waits for the host. No token
/// is dropped for any distribution over experts. `T = 0` is a no-op with an empty routing. A NaN in token `t`
/// stays in row `t`.
///
/// # Errors
///
/// [`Error::Shape`] if a shape is not the plan's; [`Error::Capacity`] for more tokens than the plan or
/// `routing` holds, or a smaller workspace; [`Error::Value`] for a choice that [`router::route`] would
/// refuse, constants of a gate or an activation that are no numbers, interleaved gate and up where the plan
/// has no room for them ([`Shape::with_interleaved`]), and a shared expert where the plan has none, or the
/// other way round; [`Error::Mismatch`] for a gate and an up of two orders; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row of `x`, `y`, the router or a shared gate does
/// not begin on 16 bytes, [`Error::Unsupported`] for weights of another type than `x`, biases of neither that
/// type nor `f32`, and experts whose matrices do not lie at one distance from each other. Nothing is written.
pub fn forward<'r, A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    weights: &Weights<'_>,
    routing: &'r mut RoutingBuffers<'_>,
    workspace: &mut Workspace,
    y: &mut RowsMut<'_, A>,
) -> Result<Routing<'r>, Error> {
    let num_tokens = plan.check_tokens(stream, &x, workspace)?;
    plan.check_router(stream, &weights.router, &weights.choice, routing)?;
    weights.experts.check::<A>(stream, &plan.shape, plan.class_rows(num_tokens))?;
    check_output(stream, plan, num_tokens, y)?;
    let parts = routing.parts_mut(Op::Moe, num_tokens)?;
    let mut arguments = vec![("x", x.access()), ("router", weights.router.access()), ("y", y.access())];
    arguments.extend(weights.choice.accesses());
    arguments.extend(weights.experts.accesses());
    arguments.extend(parts.accesses());
    arguments.push(("workspace", workspace.access()));
    stream.admit(Op::Moe, &arguments)?;
    let mut steps = || {
        let routing = route(stream, plan, x, weights.router, weights.choice, routing, workspace)?;
        forward_routed(stream, plan, x, &weights.experts, &routing, workspace, y)
    };
    stream.rehearse(Op::Moe, &mut steps)?;
    steps()?;
    routing.routing(num_tokens)
}

/// The first step: scores each token's experts and chooses among them.
///
/// Arguments are those of [`forward`]; `router` is `[E, D]`, `choice` a [`Choice`] or the
/// [`Normalize`](router::Normalize) of a softmax. The routing may be kept, changed by other means, and given
/// to [`experts`].
///
/// # Errors
///
/// As [`forward`]. Nothing is written.
pub fn route<'r, 'w, 'c, A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    router: impl Into<WeightRows<'w>>,
    choice: impl Into<Choice<'c>>,
    routing: &'r mut RoutingBuffers<'_>,
    workspace: &mut Workspace,
) -> Result<Routing<'r>, Error> {
    let (router, choice, num_tokens) = (router.into(), choice.into(), plan.check_tokens(stream, &x, workspace)?);
    plan.check_router(stream, &router, &choice, routing)?;
    let parts = routing.parts_mut(Op::Moe, num_tokens)?;
    let mut arguments = vec![("x", x.access()), ("router", router.access()), ("workspace", workspace.access())];
    arguments.extend(choice.accesses());
    arguments.extend(parts.accesses());
    stream.admit(Op::Moe, &arguments)?;
    let mut logits = workspace.carve(Op::Moe).rows::<f32>(num_tokens, plan.shape.num_experts)?;
    router::logits(stream, x, router, &mut logits)?;
    router::route(stream, logits.as_rows(), choice, routing)
}

/// Both halves of each token's experts: `outputs[r] = expert of row r (x[token of row r])`. A shared expert
/// is left out: see [`shared`].
///
/// | argument    | shape          | meaning                                                          |
/// |-------------|----------------|------------------------------------------------------------------|
/// | `x`         | `[T, D]`       | the tokens, `T <= max_tokens`                                    |
/// | `experts`   | [`Experts`]    | both halves                                                      |
/// | `routing`   | T, k, E        | from [`route`], or from wherever it was decided                  |
/// | `outputs`   | `[R, D]`       | every row that an expert owns is written in full                 |
///
/// # Errors
///
/// As [`forward`]. Nothing is written.
pub fn experts<A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    experts: &Experts<'_>,
    routing: &Routing<'_>,
    workspace: &mut Workspace,
    outputs: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let routed = Experts { shared: None, ..*experts };
    plan.without_shared().check_routed(stream, &x, &routed, routing, workspace)?;
    check_shape(Op::Moe, "outputs", "[R, D]", &[routing.rows(), plan.shape.d_model], &outputs.dims())?;
    kernels_need!(stream, outputs.vectors(Op::Moe, "outputs"));
    admit_routed(stream, &x, &routed, routing, workspace, ("outputs", outputs.access()))?;
    let Parts { mut interleaved, mut hidden, mut codes, .. } = plan.carve_rows(workspace, x.rows())?;
    let mut steps = || both_halves(stream, plan, x, experts, routing, [&mut interleaved, &mut hidden], &mut codes, outputs);
    stream.rehearse(Op::Moe, &mut steps)?;
    steps()
}

/// The rows of a shared expert for every token, and their factors, in the workspace: what [`combine_onto`]
/// adds.
///
/// Of experts that are spread over devices one device alone adds it. The workspace is in use as long as the
/// result is.
///
/// # Errors
///
/// As [`forward`]; [`Error::Value`] if there is no shared expert. Nothing is written.
pub fn shared<'w, A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    experts: &Experts<'_>,
    workspace: &'w mut Workspace<'_>,
) -> Result<Base<'w, A>, Error> {
    plan.check_tokens(stream, &x, workspace)?;
    experts.check::<A>(stream, &plan.shape, plan.class_rows(x.rows()))?;
    let Some(shared) = experts.shared else {
        return Err(Error::Value { op: Op::Moe, arg: "shared_d_ffn", need: "at least 1 for this step", got: 0.0 });
    };
    let mut arguments = vec![("x", x.access()), ("workspace", workspace.access())];
    arguments.extend(shared.accesses());
    stream.admit(Op::Moe, &arguments)?;
    stream.rehearse(Op::Moe, || {
        let parts = plan.carve_rows(workspace, x.rows())?;
        shared_expert(stream, plan, x, &shared, parts.shared).map(drop)
    })?;
    let parts = plan.carve_rows(workspace, x.rows())?;
    shared_expert(stream, plan, x, &shared, parts.shared)
}

/// [`experts`], [`shared`] where there is one, then [`combine`]: the layer for a routing that was decided
/// elsewhere.
///
/// # Errors
///
/// As [`forward`]. Nothing is written.
pub fn forward_routed<A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    experts: &Experts<'_>,
    routing: &Routing<'_>,
    workspace: &mut Workspace,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    plan.check_routed(stream, &x, experts, routing, workspace)?;
    check_output(stream, plan, x.rows(), y)?;
    admit_routed(stream, &x, experts, routing, workspace, ("y", y.access()))?;
    let mut steps = || {
        let mut parts = plan.carve_rows(workspace, x.rows())?;
        let hidden = [&mut parts.interleaved, &mut parts.hidden];
        both_halves(stream, plan, x, experts, routing, hidden, &mut parts.codes, &mut parts.outputs)?;
        let Some(shared) = experts.shared else { return combine(stream, parts.outputs.as_rows(), routing, y) };
        let base = shared_expert(stream, plan, x, &shared, parts.shared)?;
        permute::combine_onto(stream, parts.outputs.as_rows(), routing, base, y)
    };
    stream.rehearse(Op::Moe, &mut steps)?;
    steps()
}

/// Every argument of the steps behind the routing, before the first of them writes.
fn admit_routed<A: Float>(
    stream: &Stream,
    x: &Rows<'_, A>,
    experts: &Experts<'_>,
    routing: &Routing<'_>,
    workspace: &Workspace<'_>,
    output: (&'static str, Access<'_>),
) -> Result<(), Error> {
    let mut arguments = vec![("x", x.access()), ("workspace", workspace.access()), output];
    arguments.extend(routing.accesses().map(|access| ("routing", access)));
    arguments.extend(experts.accesses());
    stream.admit(Op::Moe, &arguments)
}

/// The rows of the expert that every token goes to, and their factors.
fn shared_expert<'p, A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    shared: &Shared<'_>,
    parts: SharedParts<'p, A>,
) -> Result<Base<'p, A>, Error> {
    let SharedParts { mut interleaved, mut hidden, mut outputs, mut gate, mut codes } = parts;
    let mut rows = ExpertRows::dense(x.rows())?;
    if stream.place() == Place::Host {
        // In the class of the routed rows, so that a token's bits change with the batch where the layer says
        // so and nowhere else.
        let few = grouped_gemm::FEW_ROWS;
        let is_few = x.rows() * plan.shape.top_k <= few * plan.shape.num_experts;
        rows = rows.in_class(if is_few { few } else { usize::MAX });
    }
    let rows = plan.rows(rows);
    let halves = shared.halves();
    if codes.serve(stream, &halves.up(), &rows) {
        let x = codes.quantize(stream, x, None, rows)?;
        first_half_of_codes(stream, x, &halves, rows, [&mut interleaved, &mut hidden])?;
    } else {
        first_half(stream, x, &halves, rows, [&mut interleaved, &mut hidden])?;
    }
    second_half(stream, hidden.as_rows(), &halves, rows, &mut codes, &mut outputs)?;
    let Some(of_gate) = shared.gate else { return Ok(Base::new(outputs.into_rows())) };
    router::logits(stream, x, of_gate, &mut gate)?;
    Ok(Base::new(outputs.into_rows()).with_gate(gate.into_rows()))
}

#[allow(clippy::too_many_arguments)] // the parts of the workspace
fn both_halves<A: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    experts: &Experts<'_>,
    routing: &Routing<'_>,
    [interleaved, hidden]: [&mut RowsMut<'_, A>; 2],
    codes: &mut Codes<'_>,
    outputs: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let rows = plan.rows(routing.expert_rows());
    if codes.serve(stream, &experts.up(), &rows) {
        let x = codes.quantize(stream, x, Some(routing), rows)?;
        first_half_of_codes(stream, x, experts, rows, [interleaved, hidden])?;
    } else if stream.place() != Place::Host && x.rows() > MAX_GATHERED {
        // The sorted rows lie where the outputs will: those are written when these have been read.
        permute::gather(stream, x, routing, outputs)?;
        first_half(stream, outputs.as_rows(), experts, rows, [interleaved, hidden])?;
    } else {
        first_half(stream, x, experts, plan.rows(routing.gathered_rows()), [interleaved, hidden])?;
    }
    second_half(stream, hidden.as_rows(), experts, rows, codes, outputs)
}

/// `interleaved` has columns where the plan has room for [`Hidden::Interleaved`].
fn first_half<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    experts: &Experts<'_>,
    rows: ExpertRows<'_>,
    [interleaved, hidden]: [&mut RowsMut<'_, A>; 2],
) -> Result<(), Error> {
    match experts.hidden {
        Hidden::Gated { gate, up, epilogue } => grouped_gemm::glu(stream, x, gate, up, rows, &epilogue, hidden),
        Hidden::Plain { up, epilogue } => grouped_gemm::linear(stream, x, up, rows, &epilogue, hidden),
        Hidden::Interleaved { gate_up, bias, glu } => {
            grouped_gemm::linear(stream, x, gate_up, rows, &biased(bias), interleaved)?;
            glu::interleaved_of(stream, glu, interleaved.as_rows(), Some(rows), hidden)
        }
    }
}

/// [`first_half`] of rows as FP8.
fn first_half_of_codes<A: Float>(
    stream: &Stream,
    x: QuantizedInputs<'_>,
    experts: &Experts<'_>,
    rows: ExpertRows<'_>,
    [interleaved, hidden]: [&mut RowsMut<'_, A>; 2],
) -> Result<(), Error> {
    match experts.hidden {
        Hidden::Gated { gate, up, epilogue } => grouped_gemm::glu_quantized(stream, x, gate, up, rows, &epilogue, hidden),
        Hidden::Plain { up, epilogue } => grouped_gemm::linear_quantized(stream, x, up, rows, &epilogue, hidden),
        Hidden::Interleaved { gate_up, bias, glu } => {
            grouped_gemm::linear_quantized(stream, x, gate_up, rows, &biased(bias), interleaved)?;
            glu::interleaved_of(stream, glu, interleaved.as_rows(), Some(rows), hidden)
        }
    }
}

fn second_half<A: Float>(
    stream: &Stream,
    hidden: Rows<'_, A>,
    experts: &Experts<'_>,
    rows: ExpertRows<'_>,
    codes: &mut Codes<'_>,
    outputs: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (down, epilogue) = (experts.down, biased(experts.down_bias));
    if !codes.serve(stream, &down, &rows) {
        return grouped_gemm::linear(stream, hidden, down, rows, &epilogue, outputs);
    }
    let hidden = codes.quantize(stream, hidden, None, rows)?;
    grouped_gemm::linear_quantized(stream, hidden, down, rows, &epilogue, outputs)
}

fn biased(bias: Option<Bias<'_>>) -> Epilogue<'_> {
    bias.map_or(Epilogue::default(), |bias| Epilogue::default().with_bias(bias))
}

/// Of more tokens a GPU copies the rows in order of their experts, before it multiplies them. A copy costs 2 % of the first half's time, at
/// 8192 tokens of DBRX on an H100; the product reads sorted rows by TMA, where it has to fetch scattered ones through its threads, which
/// costs it a fifth.
const MAX_GATHERED: usize = 64;

/// Columns of a workspace matrix with at least `cols`, whose rows begin on 16 bytes.
fn aligned<A>(cols: usize) -> usize {
    cols.next_multiple_of(16 / size_of::<A>())
}

/// Parts of a workspace: the rows between the halves, before and after the gate is applied, and the experts'
/// output rows.
struct Parts<'w, A> {
    interleaved: RowsMut<'w, A>,
    hidden: RowsMut<'w, A>,
    outputs: RowsMut<'w, A>,
    shared: SharedParts<'w, A>,
    codes: Codes<'w>,
}

/// The same of a shared expert, and the products that its factors are made from.
struct SharedParts<'w, A> {
    interleaved: RowsMut<'w, A>,
    hidden: RowsMut<'w, A>,
    outputs: RowsMut<'w, A>,
    gate: RowsMut<'w, f32>,
    codes: Codes<'w>,
}

/// Room for rows as FP8: first the inputs of the first half, then those of the second. Either may be narrower
/// than the room.
struct Codes<'w> {
    codes: RowsMut<'w, u8>,
    scales: RowsMut<'w, f32>,
    rows: usize,
}

impl<'w> Codes<'w> {
    fn dims(rows: usize, cols: usize) -> [[usize; 2]; 2] {
        let rows_of_scales = if cols == 0 { 0 } else { aligned::<f32>(rows) };
        [[rows, aligned::<u8>(cols)], [cols.div_ceil(quantize::BLOCK), rows_of_scales]]
    }

    fn bytes(rows: usize, cols: usize) -> Result<[usize; 2], Error> {
        let [codes, scales] = Codes::dims(rows, cols);
        let codes = Workspace::bytes_for::<u8>(Op::Moe, codes[0], codes[1])?;
        Ok([codes, Workspace::bytes_for::<f32>(Op::Moe, scales[0], scales[1])?])
    }

    fn carve(carver: &mut Carver<'w>, rows: usize, cols: usize) -> Result<Codes<'w>, Error> {
        let [codes, scales] = Codes::dims(rows, cols);
        Ok(Codes { codes: carver.rows(codes[0], codes[1])?, scales: carver.rows(scales[0], scales[1])?, rows })
    }

    /// Whether these weights are multiplied by rows as FP8: where there is room for them.
    fn serve(&self, stream: &Stream, w: &ExpertWeights<'_>, rows: &ExpertRows<'_>) -> bool {
        let class_rows = rows.asked_class().unwrap_or(rows.max_rows_per_expert());
        self.codes.cols() > 0 && grouped_gemm::takes_codes(stream, w, class_rows)
    }

    /// The rows as FP8: with a routing those of tokens, in the order of their experts, else those that
    /// experts own.
    fn quantize<A: Float>(
        &mut self,
        stream: &Stream,
        x: Rows<'_, A>,
        routing: Option<&Routing<'_>>,
        owned: ExpertRows<'_>,
    ) -> Result<QuantizedInputs<'_>, Error> {
        let mut codes = self.codes.reborrow().col_range(0..x.cols())?;
        let scales = self.scales.reborrow().row_range(0..x.cols().div_ceil(quantize::BLOCK))?;
        let mut scales = scales.col_range(0..self.rows)?;
        match routing {
            Some(routing) => quantize::gather_e4m3(stream, x, routing, &mut codes, &mut scales)?,
            None => quantize::e4m3_of(stream, x, owned, &mut codes, &mut scales)?,
        }
        QuantizedInputs::new(codes.into_rows(), scales.into_rows())
    }
}

/// What every step would refuse, before the first one writes.
impl<A: Float> Plan<A> {
    /// The tokens and the workspace. Gives T.
    fn check_tokens(&self, stream: &Stream, x: &Rows<'_, A>, workspace: &Workspace) -> Result<usize, Error> {
        let num_tokens = x.rows();
        check_shape(Op::Moe, "x", "[T, D]", &[num_tokens, self.shape.d_model], &x.dims())?;
        if num_tokens > self.max_tokens {
            return Err(Error::Capacity { op: Op::Moe, what: "tokens of the plan", need: num_tokens, have: self.max_tokens });
        }
        if workspace.bytes() < self.workspace_bytes {
            let (need, have) = (self.workspace_bytes, workspace.bytes());
            return Err(Error::Capacity { op: Op::Moe, what: "workspace bytes", need, have });
        }
        kernels_need!(stream, x.vectors(Op::Moe, "x"));
        Ok(num_tokens)
    }

    fn check_router(
        &self,
        stream: &Stream,
        router: &WeightRows<'_>,
        choice: &Choice<'_>,
        routing: &RoutingBuffers<'_>,
    ) -> Result<(), Error> {
        let Shape { d_model, num_experts, top_k, .. } = self.shape;
        check_shape(Op::Moe, "router", "[E, D]", &[num_experts, d_model], &router.dims())?;
        check_shape(Op::Moe, "routing", "[k, E]", &[top_k, num_experts], &[routing.top_k(), routing.num_experts()])?;
        choice.check(Op::Moe, num_experts, top_k)?;
        kernels_need!(stream, router.vectors(Op::Moe, "router"));
        kernels_need!(stream, router::check_kernels::<A>(Op::Moe, router.dtype()).map_err(|error| error.about("router")));
        Ok(())
    }

    fn check_routed(
        &self,
        stream: &Stream,
        x: &Rows<'_, A>,
        experts: &Experts<'_>,
        routing: &Routing<'_>,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        let num_tokens = self.check_tokens(stream, x, workspace)?;
        let Shape { num_experts, top_k, .. } = self.shape;
        let got = [routing.num_tokens(), routing.top_k(), routing.num_experts()];
        check_shape(Op::Moe, "routing", "[T, k, E]", &[num_tokens, top_k, num_experts], &got)?;
        experts.check::<A>(stream, &self.shape, self.class_rows(num_tokens))
    }

    /// The parts of the workspace but for the logits.
    fn carve_rows<'w>(&self, workspace: &'w mut Workspace, num_tokens: usize) -> Result<Parts<'w, A>, Error> {
        let Shape { d_model, d_ffn, num_experts, top_k, shared_d_ffn, .. } = self.shape;
        let (rows, shared_tokens) = (num_tokens * top_k, if shared_d_ffn == 0 { 0 } else { num_tokens });
        let mut carver = workspace.carve(Op::Moe);
        carver.rows::<f32>(num_tokens, num_experts)?; // the logits
        let mut part = |rows, cols| carver.rows::<A>(rows, aligned::<A>(cols))?.col_range(0..cols);
        let [interleaved_cols, shared_interleaved_cols] = self.shape.interleaved_cols();
        let [code_cols, shared_code_cols] = self.shape.code_cols();
        let (interleaved, hidden, outputs) = (part(rows, interleaved_cols)?, part(rows, d_ffn)?, part(rows, d_model)?);
        let shared = SharedParts {
            interleaved: part(shared_tokens, shared_interleaved_cols)?,
            hidden: part(shared_tokens, shared_d_ffn)?,
            outputs: part(shared_tokens, d_model)?,
            gate: carver.rows::<f32>(shared_tokens, 1)?,
            codes: Codes::carve(&mut carver, shared_tokens, shared_code_cols)?,
        };
        let codes = Codes::carve(&mut carver, rows, code_cols)?;
        Ok(Parts { interleaved, hidden, outputs, shared, codes })
    }

    /// The same for steps that leave the shared expert out.
    fn without_shared(&self) -> Plan<A> {
        Plan { shape: Shape { shared_d_ffn: 0, ..self.shape }, ..*self }
    }

    /// The most rows that an expert owns in calls of the class of so many tokens.
    fn class_rows(&self, num_tokens: usize) -> usize {
        self.class_rows.unwrap_or(num_tokens)
    }

    /// In the plan's class.
    fn rows<'a>(&self, rows: ExpertRows<'a>) -> ExpertRows<'a> {
        self.class_rows.map_or(rows, |max_rows| rows.in_class(max_rows))
    }
}

fn check_output<A: Float>(stream: &Stream, plan: &Plan<A>, num_tokens: usize, y: &RowsMut<'_, A>) -> Result<(), Error> {
    check_shape(Op::Moe, "y", "[T, D]", &[num_tokens, plan.shape.d_model], &y.dims())?;
    kernels_need!(stream, y.vectors(Op::Moe, "y"));
    Ok(())
}
