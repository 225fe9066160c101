//! The operations of a step, on one run's buffers, for activations of any type.
//!
//! A sum is not computed by the operation that adds, but together with the norm that reads it, in one pass
//! over the residual. Every result is shown to the trace as soon as it is there.

use dropless::{ExpertRows, ExpertWeights, Float, Stream, TokenIds, WeightRows};
use dropless::{attention, embedding, grouped_gemm, moe, norm, rope, router};

use super::config::Config;
use super::decoder::Step;
use super::failure::Failure;
use super::model::{Matrix, Phase, State};
use super::trace::{Seen, Trace};

/// A step that is under way.
pub struct Running<'s, A> {
    config: &'s Config,
    stream: &'s Stream,
    phase: Phase,
    ids: TokenIds<'s>,
    all: ExpertRows<'static>, // the tokens as rows of one product
    state: &'s mut State<A>,
    trace: &'s mut Trace,
    /// The layer that it is in; none before the first and after the last.
    layer: Option<usize>,
    /// What `out` is, where it still has to be added to the residual.
    added: Option<Added>,
}

/// What a layer adds to the residual.
#[derive(Clone, Copy, PartialEq)]
enum Added {
    Attention,
    Experts,
}

/// How a row is normalised.
#[derive(Clone, Copy)]
enum Norm {
    Layer,
    Rms,
}

impl<'s, A: Float> Running<'s, A> {
    pub fn new(
        config: &'s Config,
        stream: &'s Stream,
        phase: Phase,
        ids: TokenIds<'s>,
        state: &'s mut State<A>,
        trace: &'s mut Trace,
    ) -> Result<Self, Failure> {
        let all = ExpertRows::dense(ids.len())?;
        Ok(Running { config, stream, phase, ids, all, state, trace, layer: None, added: None })
    }

    /// Shows a result.
    fn see(&mut self, name: &'static str, of: fn(&State<A>) -> &Matrix<A>) -> Result<(), Failure> {
        let rows = of(self.state).rows(self.ids.len())?;
        self.trace.see(self.stream, self.layer, Seen::Rows(name, rows))
    }

    /// `x = x + out` where that is still to be done, and `n = norm(x)`.
    fn norm(&mut self, norm: Norm, weight: WeightRows<'_>) -> Result<(), Failure> {
        let (t, eps, stream) = (self.ids.len(), self.config.norm_eps, self.stream);
        let State { x, normed, out, .. } = &mut *self.state;
        let (out, n, added) = (out.rows(t)?, &mut normed.rows_mut(t)?, self.added.take());
        match (norm, added) {
            (Norm::Layer, None) => norm::layer_norm(stream, x.rows(t)?, weight, eps, n)?,
            (Norm::Layer, Some(_)) => norm::add_layer_norm(stream, out, &mut x.rows_mut(t)?, weight, eps, n)?,
            (Norm::Rms, None) => norm::rms_norm(stream, x.rows(t)?, weight, eps, n)?,
            (Norm::Rms, Some(_)) => norm::add_rms_norm(stream, out, &mut x.rows_mut(t)?, weight, eps, n)?,
        }
        let name = match added {
            None => {
                self.layer = Some(0);
                "norm_1"
            }
            Some(Added::Attention) => {
                self.see("resid_mid", |state| &state.x)?;
                "norm_2"
            }
            Some(Added::Experts) => {
                self.see("hidden", |state| &state.x)?;
                self.layer = self.layer.map(|layer| layer + 1).filter(|next| *next < self.config.num_layers);
                if self.layer.is_some() { "norm_1" } else { "final_norm" }
            }
        };
        self.see(name, |state| &state.normed)
    }
}

impl<A: Float> Step for Running<'_, A> {
    fn stream(&self) -> &Stream {
        self.stream
    }

    fn embed(&mut self, table: WeightRows<'_>) -> Result<(), Failure> {
        embedding::lookup(self.stream, self.ids, table, &mut self.state.x.rows_mut(self.ids.len())?)?;
        self.see("embed", |state| &state.x)
    }

    fn layer_norm(&mut self, weight: WeightRows<'_>) -> Result<(), Failure> {
        self.norm(Norm::Layer, weight)
    }

    fn rms_norm(&mut self, weight: WeightRows<'_>) -> Result<(), Failure> {
        self.norm(Norm::Rms, weight)
    }

    fn project(&mut self, weights: &[ExpertWeights<'_>]) -> Result<(), Failure> {
        let (t, clip) = (self.ids.len(), self.config.clip);
        let State { normed, qkv, .. } = &mut *self.state;
        let mut first = 0;
        for weight in weights {
            let cols = first..first + weight.n();
            first = cols.end;
            let part = &mut qkv.rows_mut(t)?.col_range(cols)?;
            grouped_gemm::nt(self.stream, normed.rows(t)?, *weight, self.all, part)?;
        }
        self.trace.see(self.stream, self.layer, Seen::Projected { qkv: qkv.rows(t)?, clip })
    }

    fn attend(&mut self) -> Result<(), Failure> {
        let (t, stream, &Config { heads, clip, .. }) = (self.ids.len(), self.stream, self.config);
        let State { qkv, q, context, rope, cache, workspace, .. } = &mut *self.state;
        let (l, options) = (self.layer.unwrap_or_default(), attention::Options::new(heads));
        let (rotated, appended) = (&mut q.rows_mut(t)?, &mut cache.layer_mut(l)?);
        rope::clip_rotate_append(stream, qkv.rows(t)?, heads, rope::Options::default().with_clip(clip), rope, appended, rotated)?;
        let (q, cache) = (q.rows(t)?, cache.layer(l)?);
        self.trace.see(stream, self.layer, Seen::Rotated { q, cache: &cache, heads })?;
        let context = &mut context.rows_mut(t)?;
        match self.phase {
            Phase::Prefill => attention::prefill(stream, q, options, &cache, context)?,
            Phase::Decode => attention::decode(stream, q, options, &cache, workspace, context)?,
        }
        self.see("attn_ctx", |state| &state.context)
    }

    fn add_projected(&mut self, weight: ExpertWeights<'_>) -> Result<(), Failure> {
        let (t, State { context, out, .. }) = (self.ids.len(), &mut *self.state);
        grouped_gemm::nt(self.stream, context.rows(t)?, weight, self.all, &mut out.rows_mut(t)?)?;
        self.added = Some(Added::Attention);
        self.see("attn_out", |state| &state.out)
    }

    fn add_experts(&mut self, weights: &moe::Weights<'_>) -> Result<(), Failure> {
        let (t, stream) = (self.ids.len(), self.stream);
        let Config { num_layers, num_experts, .. } = *self.config;
        let State { normed, out, plan, routing, workspace, expert_tokens, .. } = &mut *self.state;
        let (x, y) = (normed.rows(t)?, &mut out.rows_mut(t)?);
        let routing = moe::forward(stream, plan, x, weights, routing, workspace, y)?;
        self.trace.see(stream, self.layer, Seen::Routed { x, router: weights.router, routing: &routing })?;
        if let (Phase::Prefill, Some(layer)) = (self.phase, self.layer) {
            let counts = expert_tokens.rows_mut(num_layers, num_experts)?;
            router::count(stream, &routing, &mut counts.row_range(layer..layer + 1)?)?;
        }
        self.added = Some(Added::Experts);
        self.see("ffn_out", |state| &state.out)
    }
}
