//! The grouped and block-sparse products and the MoE layer, at each number of tokens.

use std::collections::BTreeSet;

use dropless::activation::Glu;
use dropless::block_sparse::{self, Dense, Sparse};
use dropless::epilogue::{Bias, GluEpilogue};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::router;
use dropless::{
    Bf16, Buffer, Error, ExpertWeights, Float, Routing, RoutingBuffers, Rows, Stream, Topology, Workspace, grouped_gemm, permute,
};
use dropless_kit::fill::{Random, normal};

use super::drawn::{Drawn, Table};
use super::record::{At, CHECKED, Failure, Meter, Record};

/// The layer's matrices on the device and, by their rows, on the host.
struct Model {
    shape: Shape,
    table: Table,
    router: Buffer<Bf16>,
    w1: Drawn,
    v1: Drawn,
    w2: Drawn,
}

impl Model {
    fn new(stream: &Stream, shape: Shape) -> Result<Model, Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = shape;
        let table = Table::new(stream, d_model, (d_model as f64).sqrt().recip())?;
        let stack = |seed| table.drawn(stream, seed, num_experts * d_ffn, d_model);
        let router = Buffer::from_slice(stream, &table.host[..num_experts * d_model])?;
        Ok(Model { shape, router, w1: stack(2)?, v1: stack(3)?, w2: stack(4)?, table })
    }

    /// Row `row` of a stack.
    fn row(&self, stack: &Drawn, row: usize) -> &[Bf16] {
        stack.row(&self.table, row)
    }

    /// The stacks' rows: gate, up and down.
    fn stacks(&self) -> Result<[Rows<'_, Bf16>; 3], Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = self.shape;
        let [w1, v1, w2] = [&self.w1, &self.v1, &self.w2].map(|stack| stack.buffer.rows(num_experts * d_ffn, d_model));
        Ok([w1?, v1?, w2?])
    }

    /// The same as the experts' matrices.
    fn matrices(&self) -> Result<[ExpertWeights<'_>; 3], Error> {
        let ([w1, v1, w2], num_experts) = (self.stacks()?, self.shape.num_experts);
        Ok([ExpertWeights::nk(w1, num_experts)?, ExpertWeights::nk(v1, num_experts)?, ExpertWeights::kn(w2, num_experts)?])
    }

    fn router(&self) -> Result<Rows<'_, Bf16>, Error> {
        self.router.rows(self.shape.num_experts, self.shape.d_model)
    }

    fn weights(&self) -> Result<Weights<'_>, Error> {
        let [w1, v1, w2] = self.matrices()?;
        Ok(Weights::new(self.router()?, Experts::gated(w1, v1, w2)))
    }
}

fn dot(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    a.zip(b).map(|(a, b)| a * b).sum()
}

fn wide(values: &[Bf16]) -> impl Iterator<Item = f64> + '_ {
    values.iter().map(|value| f64::from(value.to_f32()))
}

/// An element is right within bf16's rounding and that of a long f32 sum.
fn close(got: Bf16, want: f64) -> Result<(), Failure> {
    let got = f64::from(got.to_f32());
    let right = (got - want).abs() <= 2f64.powi(-8) * want.abs() + 1e-3;
    if right { Ok(()) } else { Err(format!("an element is {got}, should be {want}").into()) }
}

/// All figures of the layer at each number of tokens; one that cannot be had costs no other.
pub fn measure(meter: Meter<'_>, shape: Shape, tokens: &[usize], record: &mut Record) -> Result<(), Failure> {
    let model = Model::new(meter.stream, shape)?;
    let bench = Bench { meter, model: &model };
    for &tokens in tokens {
        if let Err(failure) = bench.of(record, tokens) {
            record.figure(&At { what: "all", tokens, ..At::default() }, || Err(failure));
        }
    }
    Ok(())
}

/// What every measurement needs.
#[derive(Clone, Copy)]
struct Bench<'a> {
    meter: Meter<'a>,
    model: &'a Model,
}

impl Bench<'_> {
    /// The same products over blocks, one weight at a time: `sdd` is `nt` of the sorted rows, whose time
    /// stands beside it, `dsd` is `nn`.
    fn sparse(&self, record: &mut Record, tokens: usize, routing: &Routing<'_>, sorted: &Buffer<Bf16>) -> Result<(), Failure> {
        let Bench { meter: Meter { stream, .. }, model } = *self;
        let Shape { d_model, d_ffn, num_experts, .. } = model.shape;
        let rows = routing.rows();
        let (flop, bytes) = ((2 * rows * d_model * d_ffn) as f64, (num_experts * d_model * d_ffn * 2) as f64);
        let ([w1, ..], x) = (model.matrices()?, sorted.rows(rows, d_model)?);
        let [w1_rows, _, w2_rows] = model.stacks()?;
        let mut h = Buffer::<Bf16>::zeros(stream, rows * d_ffn)?;
        let nt = At { what: "nt", tokens, flop, bytes, ..At::default() };
        record.figure(&nt, || {
            let call = |h: &mut Buffer<Bf16>| grouped_gemm::nt(stream, x, w1, routing.expert_rows(), &mut h.rows_mut(rows, d_ffn)?);
            self.meter.measure(&mut h, true, &mut None, call, |_| Ok(()))
        });
        drop(h);
        let mut first = None;
        for (block, form) in [(64, "64"), (128, "128")] {
            let mut topology = Topology::for_experts(stream, block, rows, &vec![d_ffn; num_experts])?;
            block_sparse::arrange(stream, routing.expert_rows(), &mut topology)?;
            let (w1, w2) = (Dense::from(w1_rows).t(), Dense::from(w2_rows));
            let stored = topology.stored_rows();
            let mut blocks = Buffer::<Bf16>::zeros(stream, stored * block)?;
            record.figure(&At { what: "sdd", form, ..nt }, || {
                let call =
                    |blocks: &mut Buffer<Bf16>| block_sparse::sdd(stream, x.into(), w1, &topology, &mut blocks.rows_mut(stored, block)?);
                self.meter.measure(&mut blocks, false, &mut None, call, |_| Ok(()))
            });
            let mut y = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
            let s = Sparse::new(&topology, blocks.rows(stored, block)?);
            record.figure(&At { what: "dsd", form, ..nt }, || {
                let call = |y: &mut Buffer<Bf16>| block_sparse::dsd(stream, s, w2, &mut y.rows_mut(rows, d_model)?);
                self.meter.measure(&mut y, true, &mut first, call, |_| Ok(()))
            });
        }
        Ok(())
    }

    /// Everything for one number of tokens. An error is one that leaves nothing to measure.
    fn of(&self, record: &mut Record, tokens: usize) -> Result<(), Failure> {
        let Bench { meter: Meter { stream, emulated }, model } = *self;
        let Shape { d_model, d_ffn, num_experts, top_k, .. } = model.shape;
        let rows = tokens * top_k;
        let x_host = normal::<Bf16>(5, tokens * d_model, 1.0);
        let x = Buffer::from_slice(stream, &x_host)?;
        let x = || x.rows(tokens, d_model);
        let weights = model.weights()?;
        let [w1, v1, w2] = model.matrices()?;
        let plan = Plan::<Bf16>::new(model.shape, tokens)?;
        let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
        let mut y = Buffer::<Bf16>::zeros(stream, tokens * d_model)?;
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, num_experts)?;
        let mut layer_buffers = RoutingBuffers::new(stream, tokens, top_k, num_experts)?;

        let mut logits = Buffer::<f32>::zeros(stream, tokens * num_experts)?;
        router::logits(stream, x()?, model.router()?, &mut logits.rows_mut(tokens, num_experts)?)?;
        let routing = router::route(stream, logits.rows(tokens, num_experts)?, weights.choice, &mut buffers)?;
        let (ids, slots) = (routing.expert_ids().to_vec(stream)?, routing.row_to_slot().to_vec(stream)?);
        let offsets = routing.offsets().to_vec(stream)?;
        let owner = |row: usize| offsets.partition_point(|offset| *offset as usize <= row) - 1;
        let used = ids.iter().collect::<BTreeSet<_>>().len();
        let (flop, bytes) = ((2 * rows * d_model * d_ffn) as f64, (used * d_model * d_ffn * 2) as f64); // of one product
        let at = |what, form, products: f64| At { what, form, tokens, flop: products * flop, bytes: products * bytes, ..At::default() };

        // What the gather inside `glu_nt` saves: the rows sorted beforehand, and the time that takes.
        let mut sorted = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
        let (mut glus, mut products) = (None, None); // the first form's
        let mut h = Buffer::<Bf16>::zeros(stream, rows * d_ffn)?;
        record.figure(&At { what: "gather", tokens, bytes: (4 * rows * d_model) as f64, ..At::default() }, || {
            let call = |sorted: &mut Buffer<Bf16>| permute::gather(stream, x()?, &routing, &mut sorted.rows_mut(rows, d_model)?);
            self.meter.measure(&mut sorted, true, &mut None, call, |_| Ok(()))
        });
        record.figure(&at("glu_nt_of_sorted", "", 2.0), || {
            let call = |h: &mut Buffer<Bf16>| {
                let (x, mut h) = (sorted.rows(rows, d_model)?, h.rows_mut(rows, d_ffn)?);
                grouped_gemm::glu_nt(stream, x, w1, v1, routing.expert_rows(), &mut h)
            };
            self.meter.measure(&mut h, true, &mut glus, call, |_| Ok(()))
        });
        if tokens > 64
            && let Err(failure) = self.sparse(record, tokens, &routing, &sorted)
        {
            record.figure(&at("sparse", "", 0.0), || Err(failure));
        }
        drop(sorted);

        let mut out = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
        for (form, class) in grouped_gemm::forms() {
            // Forms for few rows up to 64 tokens, those for many beyond; both at 64, where they may be
            // compared, and at 1, for what a plan in one class costs.
            let many = class == usize::MAX;
            if many != (tokens > 64) && ![1, 64].contains(&tokens) && !emulated {
                continue;
            }
            let mut random = Random::new(6);
            record.figure(&at("glu_nt", form, 2.0), || {
                let call = |h: &mut Buffer<Bf16>| {
                    let mut h = h.rows_mut(rows, d_ffn)?;
                    grouped_gemm::glu_nt(stream, x()?, w1, v1, routing.gathered_rows().in_class(class), &mut h)
                };
                self.meter.measure(&mut h, true, &mut glus, call, |h| {
                    (0..CHECKED).try_for_each(|_| {
                        let (row, col) = (random.below(rows), random.below(d_ffn));
                        let x = &x_host[slots[row] as usize / top_k * d_model..][..d_model];
                        let [gate, up] = [&model.w1, &model.v1].map(|w| dot(wide(x), wide(model.row(w, owner(row) * d_ffn + col))));
                        close(h[row * d_ffn + col], gate / (1.0 + (-gate).exp()) * up)
                    })
                })
            });
            // All forms multiply the same rows, also if this one has fewer left.
            let h_host = glus.get_or_insert_with(|| normal(7, rows * d_ffn, 1.0));
            record.figure(&at("nn", form, 1.0), || {
                h.copy_from_slice(stream, h_host)?;
                let call = |out: &mut Buffer<Bf16>| {
                    let (h, mut out) = (h.rows(rows, d_ffn)?, out.rows_mut(rows, d_model)?);
                    grouped_gemm::nn(stream, h, w2, routing.expert_rows().in_class(class), &mut out)
                };
                self.meter.measure(&mut out, true, &mut products, call, |out| {
                    (0..CHECKED).try_for_each(|_| {
                        let (row, col) = (random.below(rows), random.below(d_model));
                        let column = (0..d_ffn).map(|f| f64::from(model.row(&model.w2, owner(row) * d_ffn + f)[col].to_f32()));
                        close(out[row * d_model + col], dot(wide(&h_host[row * d_ffn..][..d_ffn]), column))
                    })
                })
            });
        }
        // With biases and the clamped gate of gpt-oss, which go through shared memory once more.
        record.figure(&at("glu_gpt_oss", "", 2.0), || {
            let bias = Buffer::<Bf16>::from_slice(stream, &normal(8, num_experts * d_ffn, 0.1))?;
            let bias = || bias.rows(num_experts, d_ffn).map(Bias::new);
            let epilogue = GluEpilogue::default().with_glu(Glu::GPT_OSS).with_biases([bias()?, bias()?]);
            let call = |h: &mut Buffer<Bf16>| {
                grouped_gemm::glu(stream, x()?, w1, v1, routing.gathered_rows(), &epilogue, &mut h.rows_mut(rows, d_ffn)?)
            };
            self.meter.measure(&mut h, true, &mut None, call, |_| Ok(()))
        });
        drop((h, out));

        // As a graph, whose launches must give what the call gives; and with kernels that start before the
        // one in front is done.
        let mut called = None;
        for (form, dependent) in [("graph", false), ("graph, dependent", true)] {
            record.figure(&at("layer", form, 3.0), || {
                let mut forward = |y: &mut Buffer<Bf16>| {
                    let y = &mut y.rows_mut(tokens, d_model)?;
                    moe::forward(stream, &plan, x()?, &weights, &mut layer_buffers, &mut workspace, y).map(|_| ())
                };
                forward(&mut y)?;
                called.get_or_insert(y.to_vec(stream)?);
                stream.set_dependent_launch(dependent);
                let graph = stream.capture(|| forward(&mut y));
                stream.set_dependent_launch(false);
                let graph = graph?;
                // SAFETY: every buffer that was recorded lives until the end of this function, behind which
                // nothing is in flight.
                let figure = self.meter.measure(&mut y, true, &mut called, |_| unsafe { graph.launch() }, |_| Ok(()))?;
                stream.synchronize()?;
                Ok(figure)
            });
        }
        Ok(stream.synchronize()?)
    }
}
