//! A model on a device, with everything that its steps need: allocated once, for the largest step.

use std::borrow::Cow;
use std::ops::Range;

use dropless::layout::KvShape;
use dropless::{Buffer, Device, Element, Error, ExpertRows, Float, KvCache, RopeTable, RoutingBuffers, Rows, RowsMut};
use dropless::{Stream, TokenIds, Workspace, attention, grouped_gemm, moe, sample};

use super::config::Config;
use super::decoder::Decoder;
use super::failure::Failure;
use super::memory::Sizes;
use super::step::Running;
use super::trace::{Trace, host};

/// How the attention of a step is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Any number of tokens for each sequence.
    Prefill,
    /// One token for each sequence.
    Decode,
}

/// A model of any family, with activations of type `A`.
pub struct Model<'w, A> {
    decoder: Box<dyn Decoder + 'w>,
    config: Config,
    stream: Stream,
    ids: Buffer<u32>, // [T]
    state: State<A>,
    logits: Matrix<f32>, // [rows, V]
    best: Buffer<u32>,   // [rows]
    step_tokens: usize,
}

/// What the operations of a step work on.
pub struct State<A> {
    pub x: Matrix<A>,       // [T, D], the residual
    pub normed: Matrix<A>,  // [T, D]
    pub qkv: Matrix<A>,     // [T, (H + 2 Hkv) d]
    pub q: Matrix<A>,       // [T, H d]
    pub context: Matrix<A>, // [T, H d]
    pub out: Matrix<A>,     // [T, D], what is added to the residual next
    pub rope: RopeTable,
    pub cache: KvCache<A>,
    pub plan: moe::Plan<A>,
    pub routing: RoutingBuffers<'static>,
    pub workspace: Workspace<'static>,
    /// [layers][E], the tokens of prompts that each expert was given. A decoding step reads nothing back but
    /// its tokens.
    pub expert_tokens: Vec<Vec<u64>>,
}

/// A buffer for the largest step, of which a step uses the first rows.
pub struct Matrix<T> {
    buffer: Buffer<T>,
    cols: usize,
}

impl<T: Element> Matrix<T> {
    fn new(stream: &Stream, rows: usize, cols: usize) -> Result<Matrix<T>, Error> {
        let mut buffer = Buffer::zeros(stream, rows * cols)?;
        buffer.commit(); // all of it is used by every long prompt
        Ok(Matrix { buffer, cols })
    }

    /// The first rows.
    pub fn rows(&self, rows: usize) -> Result<Rows<'_, T>, Error> {
        self.buffer.rows(rows, self.cols)
    }

    /// The same, for writing.
    pub fn rows_mut(&mut self, rows: usize) -> Result<RowsMut<'_, T>, Error> {
        self.buffer.rows_mut(rows, self.cols)
    }
}

impl<'w, A: Float> Model<'w, A> {
    /// Allocates for steps of `sizes`, whose memory need was checked.
    pub fn new(stream: Stream, config: &Config, decoder: Box<dyn Decoder + 'w>, sizes: &Sizes) -> Result<Self, Failure> {
        let Config { d_model, vocab, num_experts, top_k, num_layers, heads, .. } = *config;
        let Sizes { batch, context, step_tokens, logits_rows, .. } = *sizes;
        let floats = |cols| Matrix::new(&stream, step_tokens, cols);
        let state = State {
            rope: RopeTable::new(&stream, config.rope_theta, heads.head_dim(), context)?,
            plan: plan(config, step_tokens)?,
            cache: KvCache::new(&stream, num_layers, KvShape::contiguous(heads, batch, context))?,
            routing: RoutingBuffers::new(&stream, step_tokens, top_k, num_experts)?,
            workspace: Workspace::new(&stream, scratch_bytes::<A>(config, sizes)?)?,
            x: floats(d_model)?,
            normed: floats(d_model)?,
            qkv: floats(heads.qkv_cols())?,
            q: floats(heads.q_cols())?,
            context: floats(heads.q_cols())?,
            out: floats(d_model)?,
            expert_tokens: vec![vec![0; num_experts]; num_layers],
        };
        Ok(Model {
            state,
            ids: Buffer::zeros(&stream, step_tokens)?,
            logits: Matrix::new(&stream, logits_rows, vocab)?,
            best: Buffer::zeros(&stream, logits_rows)?,
            step_tokens: 0,
            config: config.clone(),
            decoder,
            stream,
        })
    }

    /// Feeds `new_tokens[b]` tokens to sequence `b`; `ids` holds them all, sequence after sequence.
    pub fn step(&mut self, ids: &[u32], new_tokens: &[usize], phase: Phase, trace: &mut Trace) -> Result<(), Failure> {
        let Model { decoder, config, stream, state, .. } = self;
        state.cache.append(stream, new_tokens)?;
        trace.begin(phase, new_tokens[0], state.cache.len(0));
        let ids = TokenIds::from_host(stream, ids, config.vocab, &mut self.ids)?;
        self.step_tokens = ids.len();
        decoder.step(&mut Running::new(config, stream, phase, ids, state, trace)?)
    }

    /// The logits of some tokens of the last step, `[rows, V]`, and the stream that computes them.
    pub fn logits(&mut self, rows: Range<usize>) -> Result<(&Stream, Rows<'_, f32>), Failure> {
        let count = rows.len();
        let tokens = self.state.normed.rows(self.step_tokens)?.row_range(rows)?;
        let all = ExpertRows::dense(count)?;
        grouped_gemm::nt(&self.stream, tokens, self.decoder.head(), all, &mut self.logits.rows_mut(count)?)?;
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
        let State { cache, expert_tokens, .. } = &mut self.state;
        // The last first, so that pages are handed out again in the order of the sequences.
        (0..cache.shape().num_sequences).rev().try_for_each(|sequence| cache.clear(&self.stream, sequence))?;
        expert_tokens.iter_mut().for_each(|tokens| tokens.fill(0));
        Ok(())
    }

    /// Keeps the first sequence's keys and values, `len` tokens of them.
    pub fn keep_cache(&self, len: usize, trace: &mut Trace) -> Result<(), Failure> {
        let Config { num_layers, heads, .. } = self.config;
        let cache = |layer| self.state.cache.layer(layer);
        (0..num_layers).try_for_each(|layer| trace.cache(&self.stream, layer, &cache(layer)?, heads, len))
    }

    /// How many tokens of prompts each expert of each layer was given.
    pub fn expert_tokens(&self) -> &[Vec<u64>] {
        &self.state.expert_tokens
    }
}

fn plan<A: Float>(config: &Config, step_tokens: usize) -> Result<moe::Plan<A>, Error> {
    let Config { d_model, d_ffn, num_experts, top_k, .. } = *config;
    moe::Plan::new(moe::Shape::new(d_model, d_ffn, num_experts, top_k), step_tokens)
}

/// Scratch that the operations of a step ask for; they take turns with it.
pub fn scratch_bytes<A: Float>(config: &Config, sizes: &Sizes) -> Result<usize, Error> {
    let experts = plan::<A>(config, sizes.step_tokens)?.workspace_bytes();
    Ok(experts.max(attention::decode_workspace_bytes(config.heads, sizes.batch, sizes.context)?))
}
