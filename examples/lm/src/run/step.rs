//! The operations of a step, on one run's buffers, for activations of any type.
//!
//! A sum is not computed by the operation that adds, but together with the norm that reads it, in one pass
//! over the residual. Every result is shown to the trace as soon as it is there.

use dropless::{ExpertRows, Float, Rows, RowsMut, Stream, TokenIds, WeightRows};
use dropless::{attention, embedding, grouped_gemm, moe, norm, rope, router};

use super::columns::starts;
use super::config::{self, Config, QkNorm};
use super::decoder::{Attend, Dense, Latent, Layout, Linear, Step};
use super::failure::{Failure, refuse};
use super::model::{Experts, Matrix, Phase, State};
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
    /// What still has to be added to the residual.
    added: Added,
}

/// Which buffers still have to be added to the residual: `out`, or `beside`, or both.
#[derive(Clone, Copy, PartialEq)]
enum Added {
    Nothing,
    /// Of attention.
    Out,
    /// Of the layer's second half.
    OutOfFfn,
    /// The norm of that.
    Beside,
    /// Both halves of a layer, which read the same residual.
    Both,
}

/// Normalises the rows of `x` with the family's norm.
fn normalise<A: Float>(
    (stream, config): (&Stream, &Config),
    x: Rows<'_, A>,
    weights: norm::Weights<'_>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Failure> {
    match config.norm {
        config::Norm::Layer => norm::layer_norm(stream, x, weights, config.norm_eps, y)?,
        config::Norm::Rms => norm::rms_norm(stream, x, weights, config.norm_eps, y)?,
    }
    Ok(())
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
        Ok(Running { config, stream, phase, ids, all, state, trace, layer: None, added: Added::Nothing })
    }

    /// Shows a result.
    fn see(&mut self, name: &'static str, of: fn(&State<A>) -> &Matrix<A>) -> Result<(), Failure> {
        let rows = of(self.state).rows(self.ids.len())?;
        self.trace.see(self.stream, self.layer, Seen::Rows(name, rows))
    }

    /// `x = x + what was added`, and `n = norm(x)`.
    fn add_and_norm(&mut self, post: Option<norm::Weights<'_>>, weights: norm::Weights<'_>) -> Result<(), Failure> {
        let (t, stream, config, added) = (self.ids.len(), self.stream, self.config, self.added);
        let State { x, normed, out, beside, .. } = &mut *self.state;
        let (out, beside) = (norm::Addend::from(out.rows(t)?), beside.rows(t)?);
        let (x, n) = (&mut x.rows_mut(t)?, &mut normed.rows_mut(t)?);
        let addend = match added {
            Added::Nothing => return normalise((stream, config), x.as_rows(), weights, n),
            Added::Out | Added::OutOfFfn => out,
            Added::Beside => norm::Addend::from(beside),
            Added::Both => out.with_also(beside),
        };
        let addend = addend.with_scale(config.factors.residual);
        let addend = post.map_or(addend, |post| addend.with_post_norm(post));
        match config.norm {
            config::Norm::Layer => norm::add_layer_norm(stream, addend, x, weights, config.norm_eps, n)?,
            config::Norm::Rms => norm::add_rms_norm(stream, addend, x, weights, config.norm_eps, n)?,
        }
        Ok(())
    }

    /// Shows the residual and its norm by the names that they have here, and goes on to the next layer.
    fn see_norm(&mut self) -> Result<(), Failure> {
        let name = match std::mem::replace(&mut self.added, Added::Nothing) {
            Added::Nothing => {
                self.layer = Some(0);
                "norm_1"
            }
            Added::Out => {
                self.see("resid_mid", |state| &state.x)?;
                "norm_2"
            }
            Added::OutOfFfn | Added::Beside | Added::Both => {
                self.see("hidden", |state| &state.x)?;
                self.layer = self.layer.map(|layer| layer + 1).filter(|next| *next < self.config.num_layers);
                if self.layer.is_some() { "norm_1" } else { "final_norm" }
            }
        };
        self.see(name, |state| &state.normed)
    }

    /// Begins the FFN of a layer. True if its output is added together with that of attention.
    fn begin_ffn(&mut self) -> bool {
        let is_beside = self.added == Added::Out;
        self.added = if is_beside { Added::Both } else { Added::OutOfFfn };
        is_beside
    }

    fn see_ffn(&mut self) -> Result<(), Failure> {
        match self.added {
            Added::Both => self.see("ffn_out", |state| &state.beside),
            _ => self.see("ffn_out", |state| &state.out),
        }
    }
}

impl<A: Float> Step for Running<'_, A> {
    fn stream(&self) -> &Stream {
        self.stream
    }

    fn embed(&mut self, table: WeightRows<'_>) -> Result<(), Failure> {
        let (t, factor) = (self.ids.len(), self.config.factors.embedding);
        embedding::lookup_scaled(self.stream, self.ids, table, factor, &mut self.state.x.rows_mut(t)?)?;
        self.see(if factor == 1.0 { "embed" } else { "scaled_embed" }, |state| &state.x)
    }

    fn norm(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure> {
        self.add_and_norm(None, weights)?;
        self.see_norm()
    }

    fn norm_beside(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure> {
        let (t, State { x, normed, .. }) = (self.ids.len(), &mut *self.state);
        normalise((self.stream, self.config), x.rows(t)?, weights, &mut normed.rows_mut(t)?)?;
        self.see("norm_2", |state| &state.normed)
    }

    fn norm_after(&mut self, post: norm::Weights<'_>, weights: norm::Weights<'_>) -> Result<(), Failure> {
        self.add_and_norm(Some(post), weights)?;
        self.see_norm()
    }

    fn norm_added(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure> {
        let (t, State { out, beside, .. }) = (self.ids.len(), &mut *self.state);
        normalise((self.stream, self.config), out.rows(t)?, weights, &mut beside.rows_mut(t)?)?;
        self.added = Added::Beside;
        Ok(())
    }

    fn project(&mut self, parts: &[Linear<'_>]) -> Result<(), Failure> {
        let (t, clip) = (self.ids.len(), self.config.attention.clip);
        let State { normed, qkv, .. } = &mut *self.state;
        for (Linear { weight, epilogue }, first) in parts.iter().zip(starts(self.config.heads)) {
            let part = &mut qkv.rows_mut(t)?.col_range(first..first + weight.n())?;
            grouped_gemm::linear(self.stream, normed.rows(t)?, *weight, self.all, epilogue, part)?;
        }
        let qkv = qkv.rows(t)?;
        if qkv.cols() != self.config.heads.qkv_cols() {
            return Ok(()); // the parts have padding between them, and are not kept
        }
        self.trace.see(self.stream, self.layer, Seen::Projected { qkv, clip })
    }

    fn project_latent(&mut self, latent: &Latent<'_>) -> Result<(), Failure> {
        let (t, stream, all) = (self.ids.len(), self.stream, self.all);
        let Some(constants) = self.config.attention.latent else { return refuse("a layer has latents, the model has none") };
        let State { normed, qkv, latents: [q_low, kv_low], normed_latents: [q_normed, kv_normed], .. } = &mut *self.state;
        let (x, q_cols, kv_cols) = (normed.rows(t)?, self.config.heads.q_cols(), constants.kv_cols);
        let [_, first, _] = starts(self.config.heads);
        let (q, kv) = (0..q_cols, first..first + latent.kv.n());
        match &latent.q_down {
            None => grouped_gemm::nt(stream, x, latent.query, all, &mut qkv.rows_mut(t)?.col_range(q)?)?,
            Some((down, norm)) => {
                let cols = 0..down.n();
                grouped_gemm::nt(stream, x, *down, all, &mut q_low.rows_mut(t)?.col_range(cols.clone())?)?;
                let low = q_low.rows(t)?.col_range(cols.clone())?;
                norm::rms_norm(stream, low, *norm, constants.norm_eps, &mut q_normed.rows_mut(t)?.col_range(cols.clone())?)?;
                let low = q_normed.rows(t)?.col_range(cols)?;
                grouped_gemm::nt(stream, low, latent.query, all, &mut qkv.rows_mut(t)?.col_range(q)?)?;
            }
        }
        grouped_gemm::nt(stream, x, latent.kv_down, all, &mut kv_low.rows_mut(t)?.col_range(0..latent.kv_down.n())?)?;
        let low = kv_low.rows(t)?.col_range(0..kv_cols)?;
        norm::rms_norm(stream, low, latent.kv_norm, constants.norm_eps, &mut kv_normed.rows_mut(t)?.col_range(0..kv_cols)?)?;
        let low = kv_normed.rows(t)?.col_range(0..kv_cols)?;
        Ok(grouped_gemm::nt(stream, low, latent.kv, all, &mut qkv.rows_mut(t)?.col_range(kv)?)?)
    }

    fn attend(&mut self, attend: Attend<'_>) -> Result<(), Failure> {
        let (t, stream, config) = (self.ids.len(), self.stream, self.config);
        let State { qkv, q, context, rope, cache, workspace, latents: [_, kv_low], .. } = &mut *self.state;
        let (l, heads) = (self.layer.unwrap_or_default(), config.heads);
        let rows = qkv.rows(t)?;
        let [_, k, v] = starts(heads);
        let projected = match (attend.layout, config.attention.latent) {
            (Layout::Fused, _) => rope::Projected::Fused(rows.col_range(0..heads.qkv_cols())?),
            (Layout::PerHead, _) => rope::Projected::PerHead(rows.col_range(0..heads.qkv_cols())?),
            (Layout::Separate, _) => rope::Projected::Separate {
                q: rows.col_range(0..heads.q_cols())?,
                k: rows.col_range(k..k + heads.kv_cols())?,
                v: rows.col_range(v..v + heads.v_cols())?,
            },
            (Layout::Latent, None) => return refuse("a layer has latents, the model has none"),
            (Layout::Latent, Some(latent)) => rope::Projected::Latent {
                q: rows.col_range(0..heads.q_cols())?,
                kv: rows.col_range(k..rows.cols())?,
                k_rope: kv_low.rows(t)?.col_range(latent.kv_cols..latent.kv_cols + rope.rotary_dim())?,
            },
        };
        let mut options = rope::Options::default().with_clip(config.attention.clip).with_pairing(config.rope.pairing);
        if let (Some([q, k]), Some(of)) = (attend.qk_norm, config.attention.qk_norm) {
            options = options.with_qk_norm(match of {
                QkNorm::PerHead => rope::QkNorm::per_head(q, k, config.norm_eps),
                QkNorm::FullWidth => rope::QkNorm::full_width(q, k, config.norm_eps),
            });
        }
        let (rotated, appended) = (&mut q.rows_mut(t)?, &mut cache.layer_mut(l)?);
        rope::clip_rotate_append(stream, projected, heads, options, rope, appended, rotated)?;
        let (q, cache) = (q.rows(t)?, cache.layer(l)?);
        if attend.layout != Layout::Latent {
            self.trace.see(stream, self.layer, Seen::Rotated { q, cache: &cache, heads })?;
        }
        let (options, context) = (scores(config, &attend), &mut context.rows_mut(t)?);
        match self.phase {
            Phase::Prefill => attention::prefill(stream, q, options, &cache, context)?,
            Phase::Decode => attention::decode(stream, q, options, &cache, workspace, context)?,
        }
        self.see("attn_ctx", |state| &state.context)
    }

    fn add_projected(&mut self, out: &Linear<'_>) -> Result<(), Failure> {
        let (t, State { context, out: rows, .. }) = (self.ids.len(), &mut *self.state);
        grouped_gemm::linear(self.stream, context.rows(t)?, out.weight, self.all, &out.epilogue, &mut rows.rows_mut(t)?)?;
        self.added = Added::Out;
        self.see("attn_out", |state| &state.out)
    }

    fn add_experts(&mut self, weights: &moe::Weights<'_>) -> Result<(), Failure> {
        let (t, stream, phase, layer) = (self.ids.len(), self.stream, self.phase, self.layer);
        let (num_layers, num_experts, is_beside) = (self.config.num_layers, self.config.num_experts(), self.begin_ffn());
        let State { normed, out, beside, experts, workspace, .. } = &mut *self.state;
        let Some(Experts { plan, routing, tokens }) = experts else { return refuse("a layer has experts, the model has none") };
        let (x, y) = (normed.rows(t)?, &mut if is_beside { beside } else { out }.rows_mut(t)?);
        let routing = moe::forward(stream, plan, x, weights, routing, workspace, y)?;
        let bias = weights.choice.logit_bias;
        self.trace.see(stream, layer, Seen::Routed { x, router: weights.router, bias, routing: &routing })?;
        if let (Phase::Prefill, Some(layer)) = (phase, layer) {
            let counts = tokens.rows_mut(num_layers, num_experts)?;
            router::count(stream, &routing, &mut counts.row_range(layer..layer + 1)?)?;
        }
        self.see_ffn()
    }

    fn add_dense(&mut self, weights: &Dense<'_>) -> Result<(), Failure> {
        let (t, stream, all) = (self.ids.len(), self.stream, self.all);
        let is_beside = self.begin_ffn();
        let State { normed, out, beside, hidden, .. } = &mut *self.state;
        let (x, cols) = (normed.rows(t)?, 0..weights.down.weight.k());
        let h = &mut hidden.rows_mut(t)?.col_range(cols.clone())?;
        match weights.hidden {
            moe::Hidden::Gated { gate, up, epilogue } => grouped_gemm::glu(stream, x, gate, up, all, &epilogue, h)?,
            moe::Hidden::Plain { up, epilogue } => grouped_gemm::linear(stream, x, up, all, &epilogue, h)?,
            _ => return refuse("an MLP whose gate and up are interleaved is one of experts"),
        }
        let (h, y) = (hidden.rows(t)?.col_range(cols)?, if is_beside { beside } else { out });
        grouped_gemm::linear(stream, h, weights.down.weight, all, &weights.down.epilogue, &mut y.rows_mut(t)?)?;
        self.see_ffn()
    }
}

/// Scale, bound, window and sinks of a layer's scores.
fn scores<'a>(config: &Config, attend: &Attend<'a>) -> attention::Options<'a> {
    let mut options = attention::Options::new(config.heads);
    if let Some(scale) = config.attention.scale {
        options = options.with_scale(scale);
    }
    if let Some(softcap) = config.attention.softcap {
        options = options.with_softcap(softcap);
    }
    if let Some(window) = attend.window {
        options = options.with_window(window);
    }
    match attend.sinks {
        Some(sinks) => options.with_sinks(sinks),
        None => options,
    }
}
