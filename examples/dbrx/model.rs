//! The forward pass, written once for every device and every pair of types.
//!
//! ```text
//! x = embedding[ids]
//! for each layer:  x += out_proj(attention(clip, rotate, append(wqkv(norm_1(x)))))
//!                  x += moe(norm_2(x))
//! logits = head(final_norm(x))
//! ```
//! Each sum is computed together with the norm that reads it. Everything is allocated once, for the largest step.

use std::borrow::Cow;
use std::ops::Range;

use dropless::layout::KvShape;
use dropless::router::Normalize;
use dropless::{
    Buffer, Device, Element, Error, ExpertRows, Float, KvCache, RopeTable, RoutingBuffers, Rows, RowsMut, Stream, TokenIds, Workspace,
    attention, embedding, grouped_gemm, moe, norm, rope, sample,
};

use super::config::{Config, NORM_EPS};
use super::failure::Failure;
use super::memory::Sizes;
use super::trace::{Trace, host};
use super::weights::Weights;

/// How the attention of a step is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Any number of tokens for each sequence.
    Prefill,
    /// One token for each sequence.
    Decode,
}

/// A model with everything that its steps need.
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
    x: Matrix<A>,        // [T, D], the residual
    normed: Matrix<A>,   // [T, D]
    qkv: Matrix<A>,      // [T, (H + 2 Hkv) d]
    q: Matrix<A>,        // [T, H d]
    context: Matrix<A>,  // [T, H d]
    out: Matrix<A>,      // [T, D], what is added to the residual next
    logits: Matrix<f32>, // [rows, V]
    best: Buffer<u32>,   // [rows]
    step_tokens: usize,
    expert_tokens: Vec<Vec<u64>>, // [layers][E], of prompts: a decoding step reads nothing back but its tokens
}

/// A buffer for the largest step, of which a step uses the first rows.
struct Matrix<T> {
    buffer: Buffer<T>,
    cols: usize,
}

impl<T: Element> Matrix<T> {
    fn new(stream: &Stream, rows: usize, cols: usize) -> Result<Matrix<T>, Error> {
        let mut buffer = Buffer::zeros(stream, rows * cols)?;
        buffer.commit(); // all of it is used by every long prompt
        Ok(Matrix { buffer, cols })
    }

    fn rows(&self, rows: usize) -> Result<Rows<'_, T>, Error> {
        self.buffer.rows(rows, self.cols)
    }

    fn rows_mut(&mut self, rows: usize) -> Result<RowsMut<'_, T>, Error> {
        self.buffer.rows_mut(rows, self.cols)
    }
}

impl<'w, A: Float, W: Float> Model<'w, A, W> {
    /// Allocates for steps of `sizes`, whose memory need was checked.
    pub fn new(stream: Stream, config: &Config, weights: Weights<'w, W>, sizes: &Sizes) -> Result<Self, Failure> {
        let Config { d_model, vocab, num_experts, top_k, num_layers, heads, .. } = *config;
        let Sizes { batch, context, step_tokens, logits_rows, .. } = *sizes;
        let floats = |cols| Matrix::new(&stream, step_tokens, cols);
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
            logits: Matrix::new(&stream, logits_rows, vocab)?,
            best: Buffer::zeros(&stream, logits_rows)?,
            step_tokens: 0,
            expert_tokens: vec![vec![0; num_experts]; num_layers],
            config: config.clone(),
            weights,
            stream,
        })
    }

    /// Feeds `new_tokens[b]` tokens to sequence `b`; `ids` holds them all, sequence after sequence.
    pub fn step(&mut self, ids: &[u32], new_tokens: &[usize], phase: Phase, trace: &mut Trace) -> Result<(), Failure> {
        let Model { config, weights, stream, rope, plan, cache, routing, workspace, x, normed, qkv, q, context, out, .. } = self;
        let Config { heads, clip, .. } = *config;
        let (clip_option, attend) = (rope::Options::default().with_clip(clip), attention::Options::new(heads));
        let t = ids.len();
        let all = ExpertRows::dense(t)?;

        cache.append(stream, new_tokens)?;
        trace.begin(phase, new_tokens[0], cache.len(0));
        let ids = TokenIds::from_host(stream, ids, config.vocab, &mut self.ids)?;
        embedding::lookup(stream, ids, weights.embedding, &mut x.rows_mut(t)?)?;
        trace.model(stream, "embed", x.rows(t)?)?;
        let first = weights.layers.first().map_or(weights.final_norm, |layer| layer.norm_1);
        norm::layer_norm(stream, x.rows(t)?, first, NORM_EPS, &mut normed.rows_mut(t)?)?;

        for (l, layer) in weights.layers.iter().enumerate() {
            trace.layer(stream, l, "norm_1", normed.rows(t)?)?;
            grouped_gemm::nt(stream, normed.rows(t)?, layer.wqkv, all, &mut qkv.rows_mut(t)?)?;
            trace.qkv(stream, l, qkv.rows(t)?, clip)?;
            rope::clip_rotate_append(stream, qkv.rows(t)?, heads, clip_option, rope, &mut cache.layer_mut(l)?, &mut q.rows_mut(t)?)?;
            trace.rotated(stream, l, q.rows(t)?, &cache.layer(l)?, heads)?;
            match phase {
                Phase::Prefill => attention::prefill(stream, q.rows(t)?, attend, &cache.layer(l)?, &mut context.rows_mut(t)?)?,
                Phase::Decode => {
                    attention::decode(stream, q.rows(t)?, attend, &cache.layer(l)?, workspace, &mut context.rows_mut(t)?)?;
                }
            }
            trace.layer(stream, l, "attn_ctx", context.rows(t)?)?;
            grouped_gemm::nt(stream, context.rows(t)?, layer.out_proj, all, &mut out.rows_mut(t)?)?;
            trace.layer(stream, l, "attn_out", out.rows(t)?)?;
            norm::add_layer_norm(stream, out.rows(t)?, &mut x.rows_mut(t)?, layer.norm_2, NORM_EPS, &mut normed.rows_mut(t)?)?;
            trace.layer(stream, l, "resid_mid", x.rows(t)?)?;
            trace.layer(stream, l, "norm_2", normed.rows(t)?)?;

            let routed = moe::forward(stream, plan, normed.rows(t)?, &layer.moe, routing, workspace, &mut out.rows_mut(t)?)?;
            trace.routing(stream, l, normed.rows(t)?, layer.moe.router, &routed)?;
            trace.layer(stream, l, "ffn_out", out.rows(t)?)?;
            if phase == Phase::Prefill {
                let offsets = host(stream, routed.offsets())?;
                for (tokens, rows) in self.expert_tokens[l].iter_mut().zip(offsets.windows(2)) {
                    *tokens += u64::from(rows[1] - rows[0]);
                }
            }
            let next = weights.layers.get(l + 1).map_or(weights.final_norm, |layer| layer.norm_1);
            norm::add_layer_norm(stream, out.rows(t)?, &mut x.rows_mut(t)?, next, NORM_EPS, &mut normed.rows_mut(t)?)?;
            trace.layer(stream, l, "hidden", x.rows(t)?)?;
        }
        trace.model(stream, "final_norm", normed.rows(t)?)?;
        self.step_tokens = t;
        Ok(())
    }

    /// The logits of some tokens of the last step, `[rows, V]`, and the stream that computes them.
    pub fn logits(&mut self, rows: Range<usize>) -> Result<(&Stream, Rows<'_, f32>), Failure> {
        let count = rows.len();
        let tokens = self.normed.rows(self.step_tokens)?.row_range(rows)?;
        grouped_gemm::nt(&self.stream, tokens, self.weights.head, ExpertRows::dense(count)?, &mut self.logits.rows_mut(count)?)?;
        Ok((&self.stream, self.logits.rows(count)?))
    }

    /// The likeliest next token after each of the first `rows` rows that [`Model::logits`] gave last.
    pub fn best(&mut self, rows: usize) -> Result<Cow<'_, [u32]>, Failure> {
        let best = sample::argmax(&self.stream, self.logits.rows(rows)?, &mut self.best)?;
        host(&self.stream, best.ids())
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.stream.device().clone()
    }

    /// Forgets all sequences and counts.
    pub fn clear(&mut self) -> Result<(), Failure> {
        // The last first, so that pages are handed out again in the order of the sequences.
        (0..self.cache.shape().num_sequences).rev().try_for_each(|sequence| self.cache.clear(&self.stream, sequence))?;
        self.expert_tokens.iter_mut().for_each(|tokens| tokens.fill(0));
        Ok(())
    }

    /// Keeps the first sequence's keys and values, `len` tokens of them.
    pub fn keep_cache(&self, len: usize, trace: &mut Trace) -> Result<(), Failure> {
        (0..self.config.num_layers)
            .try_for_each(|layer| trace.cache(&self.stream, layer, &self.cache.layer(layer)?, self.config.heads, len))
    }

    /// How many tokens of prompts each expert of each layer was given.
    pub fn expert_tokens(&self) -> &[Vec<u64>] {
        &self.expert_tokens
    }
}

fn plan<A: Float>(config: &Config, step_tokens: usize) -> Result<moe::Plan<A>, Error> {
    let Config { d_model, d_ffn, num_experts, top_k, .. } = *config;
    let normalize = config.weight_norm.map_or(Normalize::None, Normalize::P);
    moe::Plan::new(moe::Shape::new(d_model, d_ffn, num_experts, top_k).with_normalize(normalize), step_tokens)
}

/// Scratch that the operations of a step ask for; they take turns with it.
pub fn scratch_bytes<A: Float>(config: &Config, sizes: &Sizes) -> Result<usize, Error> {
    let experts = plan::<A>(config, sizes.step_tokens)?.workspace_bytes();
    Ok(experts.max(attention::decode_workspace_bytes(config.heads, sizes.batch, sizes.context)?))
}
