//! A model on a device, with everything that its steps need: allocated once, for the largest step.
//!
//! The tokens that are chosen stay on the device, where the next step looks them up. On a GPU the step that
//! decodes is captured once, as a graph, and launched for every token. What changes from token to token lies
//! in memory: the step itself writes the ids, and the cache writes the lengths before each launch.

use std::borrow::Cow;
use std::ops::Range;

use dropless::device::Graph;
use dropless::layout::KvShape;
use dropless::{Buffer, Device, Element, Error, ExpertRows, Float, KvCache, Place, RopeTable, RoutingBuffers, Rows};
use dropless::{RowsMut, Stream, TokenIds, Workspace, attention, grouped_gemm, moe, sample};

use super::columns::Columns;
use super::config::{self, Config};
use super::decoder::{Decoder, Linear};
use super::failure::Failure;
use super::memory::Sizes;
use super::options::Sampling;
use super::step::Running;
use super::trace::{Detail, Trace, host};
use super::weights;

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
    /// Of a decoding step, on a GPU: all sequences of a run decode side by side, so that one graph serves all
    /// of its steps. The first field, so that it is dropped before the memory that it uses.
    graph: Option<Graph>,
    /// Whether steps that decode are graphs.
    by_graph: bool,
    decoder: Decoder<'w>,
    config: Config,
    stream: Stream,
    ids: Buffer<u32>, // [T], tokens of prompts
    state: State<A>,
    next: Buffer<u32>, // [B], each sequence's next token
    chooser: Chooser,
    step_tokens: usize,
}

/// How the next token is chosen.
enum Chooser {
    Greedy,
    /// By draws that depend on the sequence's number and its length, `[B]` each.
    Drawn {
        options: sample::Options,
        sequences: Buffer<u32>,
        lengths: Buffer<u32>,
    },
}

impl Chooser {
    fn new(stream: &Stream, sampling: Option<Sampling>, batch: usize) -> Result<Chooser, Error> {
        let Some(Sampling { temperature, top_p, seed }) = sampling else { return Ok(Chooser::Greedy) };
        let numbers: Vec<u32> = (0..batch as u32).collect();
        Ok(Chooser::Drawn {
            options: sample::Options::new(temperature).with_top_p(top_p).with_seed(seed),
            sequences: Buffer::from_slice(stream, &numbers)?,
            lengths: Buffer::zeros(stream, batch)?,
        })
    }

    /// Writes the length of every sequence to the buffer that a captured graph reads.
    fn set_length(&mut self, stream: &Stream, length: usize) -> Result<(), Error> {
        match self {
            Chooser::Greedy => Ok(()),
            Chooser::Drawn { lengths, .. } => lengths.copy_from_slice(stream, &vec![length as u32; lengths.len()]),
        }
    }

    /// Writes each sequence's next token.
    fn choose(&self, stream: &Stream, logits: Rows<'_, f32>, next: &mut Buffer<u32>) -> Result<(), Error> {
        match self {
            Chooser::Greedy => sample::argmax(stream, logits, next).map(drop),
            Chooser::Drawn { options, sequences, lengths } => {
                let batch = logits.rows();
                let draws = sample::Draws::new(sequences.rows(1, batch)?, lengths.rows(1, batch)?)?;
                sample::top_p(stream, logits, *options, draws, next).map(drop)
            }
        }
    }
}

/// What the operations of a step work on.
pub struct State<A> {
    pub x: Matrix<A>,       // [T, D], the residual
    pub normed: Matrix<A>,  // [T, D]
    pub qkv: Matrix<A>,     // [T, columns of the projections]
    pub q: Matrix<A>,       // [T, H d]
    pub context: Matrix<A>, // [T, H dv]
    pub out: Matrix<A>,     // [T, D], what is added to the residual next
    pub beside: Matrix<A>,  // [T, D], what is added with it, or what `out` was
    pub latents: [Matrix<A>; 2],
    pub normed_latents: [Matrix<A>; 2],
    pub hidden: Matrix<A>, // [T, F] of a layer without experts
    pub rope: RopeTable,
    pub cache: KvCache<A>,
    pub experts: Option<Experts<A>>,
    pub workspace: Workspace<'static>,
    /// `[B, V]`, the logits of each sequence's next token; after them, where they are kept, those of a
    /// prompt's tokens.
    logits: Matrix<f32>,
}

/// What layers with experts need besides.
pub struct Experts<A> {
    pub plan: moe::Plan<A>,
    pub routing: RoutingBuffers<'static>,
    /// [layers, E], the tokens of prompts that each expert was given: added up where they are, and read once.
    pub tokens: Buffer<u32>,
}

/// A buffer for the largest step, of which a step uses the first rows.
pub struct Matrix<T> {
    buffer: Buffer<T>,
    cols: usize,
    /// Elements from one row to the next: on a GPU rows begin on 16 bytes.
    stride: usize,
}

impl<T: Element> Matrix<T> {
    fn new(stream: &Stream, rows: usize, cols: usize) -> Result<Matrix<T>, Error> {
        let stride = weights::stride::<T>(stream.place(), cols);
        let mut buffer = Buffer::zeros(stream, rows * stride)?;
        buffer.commit(); // all of it is used by every long prompt
        Ok(Matrix { buffer, cols, stride })
    }

    /// The first rows.
    pub fn rows(&self, rows: usize) -> Result<Rows<'_, T>, Error> {
        self.buffer.rows(rows, self.stride)?.col_range(0..self.cols)
    }

    /// The same, for writing.
    pub fn rows_mut(&mut self, rows: usize) -> Result<RowsMut<'_, T>, Error> {
        self.buffer.rows_mut(rows, self.stride)?.col_range(0..self.cols)
    }
}

impl<'w, A: Float> Model<'w, A> {
    /// Allocates for steps of `sizes`, whose memory need was checked. A step that copies weights from the
    /// host cannot be a graph.
    pub fn new(
        stream: Stream,
        config: &Config,
        decoder: Decoder<'w>,
        sizes: &Sizes,
        sampling: Option<Sampling>,
        is_streamed: bool,
    ) -> Result<Self, Failure> {
        let Sizes { batch, context, reached, step_tokens, logits_rows, .. } = *sizes;
        let (columns, floats) = (Columns::of(config), |cols| Matrix::new(&stream, step_tokens, cols));
        let [low, lower] = columns.latents;
        let state = State {
            rope: config.rope.table(&stream, context, reached)?,
            cache: KvCache::new(&stream, config.num_layers, KvShape::contiguous(config.heads, batch, context))?,
            experts: config.experts.map(|experts| Experts::new(&stream, config, &experts, sizes)).transpose()?,
            workspace: Workspace::new(&stream, scratch_bytes::<A>(config, sizes)?)?,
            x: floats(columns.d_model)?,
            normed: floats(columns.d_model)?,
            qkv: floats(columns.qkv)?,
            q: floats(columns.q)?,
            context: floats(columns.context)?,
            out: floats(columns.d_model)?,
            beside: floats(columns.d_model)?,
            latents: [floats(low)?, floats(lower)?],
            normed_latents: [floats(low)?, floats(lower)?],
            hidden: floats(columns.dense)?,
            logits: Matrix::new(&stream, logits_rows, config.vocab)?,
        };
        let (ids, next) = (Buffer::zeros(&stream, step_tokens)?, Buffer::zeros(&stream, batch)?);
        let chooser = Chooser::new(&stream, sampling, batch)?;
        stream.synchronize()?; // weights that are copied to a GPU are on their way until now
        let by_graph = stream.place() != Place::Host && !is_streamed;
        Ok(Model { graph: None, by_graph, decoder, config: config.clone(), stream, ids, state, next, chooser, step_tokens: 0 })
    }

    /// Feeds `new_tokens[b]` tokens of prompts to sequence `b`; `ids` holds them all, sequence after
    /// sequence.
    pub fn prefill(&mut self, ids: &[u32], new_tokens: &[usize], trace: &mut Trace) -> Result<(), Failure> {
        let Model { decoder, config, stream, state, .. } = self;
        state.cache.append(stream, new_tokens)?;
        trace.begin(Phase::Prefill, new_tokens[0], state.cache.len(0));
        let ids = TokenIds::from_host(stream, ids, config.vocab, &mut self.ids)?;
        self.step_tokens = ids.len();
        decoder.step(&mut Running::new(config, stream, Phase::Prefill, ids, state, trace)?)
    }

    /// The logits of some tokens of the last step of prompts, `[rows, V]`, and the stream that computes them.
    pub fn prompt_logits(&mut self, rows: Range<usize>) -> Result<(&Stream, Rows<'_, f32>), Failure> {
        let kept = self.next.len()..self.next.len() + rows.len();
        let (stream, state) = (&self.stream, &mut self.state);
        state.head(stream, self.decoder.head(), self.step_tokens, rows, kept.clone())?;
        Ok((stream, state.logits.rows(kept.end)?.row_range(kept)?))
    }

    /// Uses the logits of token `row` of the last prefill step to choose a sequence's next token.
    pub fn ends_prompt(&mut self, sequence: usize, row: usize) -> Result<(), Failure> {
        let (stream, head) = (&self.stream, self.decoder.head());
        self.state.head(stream, head, self.step_tokens, row..row + 1, sequence..sequence + 1)
    }

    /// Chooses each sequence's next token.
    pub fn choose(&mut self) -> Result<(), Failure> {
        let Model { stream, state, next, chooser, .. } = self;
        chooser.set_length(stream, state.cache.len(0))?;
        Ok(chooser.choose(stream, state.logits.rows(next.len())?, next)?)
    }

    /// Feeds each sequence the token that was chosen for it, and chooses the next one. The host waits for
    /// nothing.
    pub fn decode(&mut self, trace: &mut Trace) -> Result<(), Failure> {
        let by_graph = self.by_graph && trace.detail() < Detail::Layers;
        let Model { graph, decoder, config, stream, state, next, chooser, .. } = self;
        state.cache.append(stream, &vec![1; next.len()])?;
        chooser.set_length(stream, state.cache.len(0))?;
        trace.begin(Phase::Decode, 1, state.cache.len(0));
        let mut work = || state.decode(stream, decoder, config, chooser, next, trace);
        if !by_graph {
            return work();
        }
        let graph = match graph {
            Some(graph) => graph,
            None => {
                let mut captured = Ok(());
                let new = stream.capture(|| {
                    captured = work();
                    Ok(())
                });
                captured?;
                graph.insert(new?)
            }
        };
        // SAFETY: the graph uses the buffers of this model and the weights that it borrows: all of them are
        // there, used on this stream alone, and by one thread, since `self` is borrowed exclusively. No
        // routing and no ids outlive the step that made them.
        unsafe { graph.launch()? };
        Ok(())
    }

    /// The logits that chose the first sequence's next token, `[1, V]`, and the stream that computes them.
    pub fn next_logits(&self) -> Result<(&Stream, Rows<'_, f32>), Failure> {
        Ok((&self.stream, self.state.logits.rows(1)?))
    }

    /// Each sequence's next token, for which the host waits.
    pub fn next(&self) -> Result<Cow<'_, [u32]>, Failure> {
        host(&self.stream, self.next.rows(1, self.next.len())?)
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.stream.device().clone()
    }

    /// Forgets all sequences and counts.
    pub fn clear(&mut self) -> Result<(), Failure> {
        let State { cache, experts, .. } = &mut self.state;
        // The last first, so that pages are handed out again in the order of the sequences.
        (0..cache.shape().num_sequences).rev().try_for_each(|sequence| cache.clear(&self.stream, sequence))?;
        let Some(Experts { tokens, .. }) = experts else { return Ok(()) };
        Ok(tokens.copy_from_slice(&self.stream, &vec![0; tokens.len()])?)
    }

    /// Keeps the first sequence's keys and values, `len` tokens of them.
    pub fn keep_cache(&self, len: usize, trace: &mut Trace) -> Result<(), Failure> {
        let Config { num_layers, heads, .. } = self.config;
        let cache = |layer| self.state.cache.layer(layer);
        (0..num_layers).try_for_each(|layer| trace.cache(&self.stream, layer, &cache(layer)?, heads, len))
    }

    /// How many tokens of prompts each expert was given, of each layer that has experts. The host waits for
    /// them.
    pub fn expert_tokens(&self) -> Result<Vec<(usize, Vec<u64>)>, Failure> {
        let Some(Experts { tokens, .. }) = &self.state.experts else { return Ok(Vec::new()) };
        let counts = tokens.to_vec(&self.stream)?;
        let of_layer = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).collect();
        let layers = counts.chunks(self.config.num_experts()).map(of_layer).enumerate();
        Ok(layers.filter(|(l, _)| !self.config.is_dense(*l)).collect())
    }
}

impl<A: Float> State<A> {
    /// Computes the logits of the step's tokens `rows` into rows of the logits. The step has `step_tokens`.
    fn head(
        &mut self,
        stream: &Stream,
        head: &Linear<'_>,
        step_tokens: usize,
        rows: Range<usize>,
        into: Range<usize>,
    ) -> Result<(), Failure> {
        let (tokens, all) = (self.normed.rows(step_tokens)?.row_range(rows)?, ExpertRows::dense(into.len())?);
        let logits = &mut self.logits.rows_mut(into.end)?.row_range(into)?;
        Ok(grouped_gemm::linear(stream, tokens, head.weight, all, &head.epilogue, logits)?)
    }

    /// The launches of a decoding step, from the ids to the ids.
    fn decode(
        &mut self,
        stream: &Stream,
        decoder: &Decoder<'_>,
        config: &Config,
        chooser: &Chooser,
        next: &mut Buffer<u32>,
        trace: &mut Trace,
    ) -> Result<(), Failure> {
        let batch = next.len();
        let ids = next.rows(1, batch)?;
        // SAFETY: zeros at first, and then what was chosen among V columns.
        let ids = unsafe { TokenIds::from_raw(ids, config.vocab)? };
        decoder.step(&mut Running::new(config, stream, Phase::Decode, ids, self, trace)?)?;
        self.head(stream, decoder.head(), batch, 0..batch, 0..batch)?;
        Ok(chooser.choose(stream, self.logits.rows(batch)?, next)?)
    }
}

impl<A: Float> Experts<A> {
    fn new(stream: &Stream, config: &Config, experts: &config::Experts, sizes: &Sizes) -> Result<Experts<A>, Error> {
        let step_tokens = sizes.step_tokens;
        Ok(Experts {
            plan: plan(config, experts, sizes)?,
            routing: RoutingBuffers::new(stream, step_tokens, experts.top_k, experts.num_experts)?,
            tokens: Buffer::zeros(stream, config.num_layers * experts.num_experts)?,
        })
    }
}

fn plan<A: Float>(config: &Config, experts: &config::Experts, sizes: &Sizes) -> Result<moe::Plan<A>, Error> {
    let shape = moe::Shape::new(config.d_model, experts.d_ffn, experts.num_experts, experts.top_k).with_shared(experts.shared_d_ffn);
    let shape = if experts.interleaved { shape.with_interleaved() } else { shape };
    moe::Plan::new(if sizes.fp8_inputs { shape.with_fp8_inputs() } else { shape }, sizes.step_tokens)
}

/// Scratch that the operations of a step ask for; they take turns with it.
pub fn scratch_bytes<A: Float>(config: &Config, sizes: &Sizes) -> Result<usize, Error> {
    let plan = config.experts.map(|experts| plan::<A>(config, &experts, sizes)).transpose()?;
    let experts = plan.map_or(0, |plan| plan.workspace_bytes());
    Ok(experts.max(attention::decode_workspace_bytes(config.heads, sizes.batch, sizes.context)?))
}
