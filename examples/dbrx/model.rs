//! The forward pass, written once for every device and every pair of types.
//!
//! ```text
//! x = embedding[ids]
//! for each layer:  x += out_proj(attention(clip, rotate, append(wqkv(norm_1(x)))))
//!                  x += moe(norm_2(x))
//! logits = head(final_norm(x))
//! ```
//! Each sum is fused with the norm that reads it. Everything is allocated once, for the largest step.

use dropless::moe;
use dropless::router::Normalize;
use dropless::{
    Buffer, Error, ExpertRows, ExpertWeights, Float, KvCache, RopeTable, RoutingBuffers, Rows, RowsMut, Stream, TokenIds, Workspace,
    attention, embedding, grouped_gemm, norm, rope, router, sample,
};
use dropless::layout::KvShape;

use super::config::{Config, NORM_EPS};
use super::failure::Failure;
use super::memory::Sizes;
use super::trace::{Trace, host};
use super::weights::Weights;

/// How a step's attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Any number of tokens for each sequence.
    Prefill,
    /// One token for each sequence.
    Decode,
}

/// A model with everything its steps need.
pub struct Model<'w, A, W> {
    config: Config,
    weights: Weights<'w, W>,
    stream: Stream,
    rope: RopeTable,
    plan: moe::Plan<A>,
    cache: KvCache<A>,
    routing: RoutingBuffers,
    workspace: Workspace,
    ids: Buffer<u32>,    // [T]
    x: Buffer<A>,        // [T, D], the residual
    normed: Buffer<A>,   // [T, D]
    qkv: Buffer<A>,      // [T, (H + 2 Hkv) d]
    q: Buffer<A>,        // [T, H d]
    context: Buffer<A>,  // [T, H d]
    out: Buffer<A>,      // [T, D], what is added to the residual next
    logits: Buffer<f32>, // [rows, V]
    best: Buffer<u32>,   // [rows]
    expert_tokens: Vec<Vec<u64>>,
}

impl<'w, A: Float, W: Float> Model<'w, A, W> {
    /// Allocates for steps of `sizes`.
    pub fn new(stream: Stream, config: &Config, weights: Weights<'w, W>, sizes: &Sizes) -> Result<Self, Failure> {
        let Config { d_model, vocab, num_experts, top_k, num_layers, heads, .. } = *config;
        let Sizes { batch, context, step_tokens, logits_rows, .. } = *sizes;
        let floats = |cols: usize| Buffer::zeros(&stream, step_tokens * cols);
        Ok(Model {
            rope: RopeTable::new(&stream, config.rope_theta, heads.head_dim(), context)?,
            plan: plan(config, step_tokens)?,
            cache: KvCache::new(&stream, num_layers, KvShape::contiguous(heads, batch, context))?,
            routing: RoutingBuffers::new(&stream, step_tokens, top_k, num_experts)?,
            workspace: Workspace::new(&stream, scratch_bytes::<A>(config, sizes)?)?,
            ids: Buffer::zeros(&stream, step_tokens)?,
            x: floats(d_model)?,
            normed: floats(d_model)?,
            qkv: floats(heads.qkv_cols())?,
            q: floats(heads.q_cols())?,
            context: floats(heads.q_cols())?,
            out: floats(d_model)?,
            logits: Buffer::zeros(&stream, logits_rows * vocab)?,
            best: Buffer::zeros(&stream, logits_rows)?,
            expert_tokens: vec![vec![0; num_experts]; num_layers],
            config: config.clone(),
            weights,
            stream,
        })
    }

    /// Feeds `new_tokens[b]` tokens to sequence `b`; `ids` holds all of them, sequence by sequence. What the final norm gives is
    /// kept for [`Model::logits`].
    pub fn step(&mut self, ids: &[u32], new_tokens: &[usize], phase: Phase, trace: &mut Trace) -> Result<(), Failure> {
        let Model { config, weights, stream, .. } = self;
        let Config { d_model: d, heads, clip, vocab, .. } = *config;
        let t = ids.len();
        let (q_cols, qkv_cols) = (heads.q_cols(), heads.qkv_cols());
        let scale = 1.0 / (heads.head_dim() as f32).sqrt();
        let all = ExpertRows::dense(t)?;

        self.cache.append(stream, new_tokens)?;
        trace.begin(new_tokens[0], self.cache.len(0));
        let ids = TokenIds::from_host(stream, ids, vocab, &mut self.ids)?;
        embedding::lookup(stream, ids, weights.embedding, &mut self.x.rows_mut(t, d)?)?;
        trace.model("embed", self.x.rows(t, d)?)?;
        let first = weights.layers.first().map_or(weights.final_norm, |layer| layer.norm_1);
        norm::layer_norm(stream, self.x.rows(t, d)?, first, NORM_EPS, &mut self.normed.rows_mut(t, d)?)?;

        for (l, layer) in weights.layers.iter().enumerate() {
            trace.layer(l, "norm_1", self.normed.rows(t, d)?)?;
            grouped_gemm::nt(stream, self.normed.rows(t, d)?, layer.wqkv, all, &mut self.qkv.rows_mut(t, qkv_cols)?)?;
            trace.qkv(l, self.qkv.rows(t, qkv_cols)?, clip)?;
            let (qkv, cache, q) = (self.qkv.rows(t, qkv_cols)?, &mut self.cache.layer_mut(l)?, &mut self.q.rows_mut(t, q_cols)?);
            rope::clip_rotate_append(stream, qkv, heads, clip, &self.rope, cache, q)?;
            let (q, cache, context) = (self.q.rows(t, q_cols)?, &self.cache.layer(l)?, &mut self.context.rows_mut(t, q_cols)?);
            trace.rotated(l, q, cache, heads)?;
            match phase {
                Phase::Prefill => attention::prefill(stream, q, heads, scale, cache, context)?,
                Phase::Decode => attention::decode(stream, q, heads, scale, cache, &mut self.workspace, context)?,
            }
            trace.layer(l, "attn_ctx", self.context.rows(t, q_cols)?)?;
            grouped_gemm::nt(stream, self.context.rows(t, q_cols)?, layer.out_proj, all, &mut self.out.rows_mut(t, d)?)?;
            trace.layer(l, "attn_out", self.out.rows(t, d)?)?;
            let (out, x, normed) = (self.out.rows(t, d)?, &mut self.x.rows_mut(t, d)?, &mut self.normed.rows_mut(t, d)?);
            norm::add_layer_norm(stream, out, x, layer.norm_2, NORM_EPS, normed)?;
            trace.layer(l, "resid_mid", x.as_rows())?;
            trace.layer(l, "norm_2", normed.as_rows())?;

            let (normed, out) = (self.normed.rows(t, d)?, &mut self.out.rows_mut(t, d)?);
            let routing = moe::forward(stream, &self.plan, normed, &layer.moe, &mut self.routing, &mut self.workspace, out)?;
            for (sum, rows) in self.expert_tokens[l].iter_mut().zip(host(routing.offsets())?.windows(2)) {
                *sum += u64::from(rows[1] - rows[0]);
            }
            trace.routing(l, stream, normed, layer.moe.router, &routing)?;
            trace.layer(l, "ffn_out", out.as_rows())?;
            let next = weights.layers.get(l + 1).map_or(weights.final_norm, |layer| layer.norm_1);
            let (out, x, normed) = (self.out.rows(t, d)?, &mut self.x.rows_mut(t, d)?, &mut self.normed.rows_mut(t, d)?);
            norm::add_layer_norm(stream, out, x, next, NORM_EPS, normed)?;
            trace.layer(l, "hidden", x.as_rows())?;
        }
        trace.model("final_norm", self.normed.rows(t, d)?)
    }
}
