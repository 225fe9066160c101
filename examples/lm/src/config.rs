//! What a run needs to know of a model, whatever its family: sizes, constants, and how many parameters follow
//! from them.

use dropless::activation::{Activation, Glu};
use dropless::rope::Pairing;
use dropless::router::{Choice, Groups, Normalize, Score};
use dropless::{Error, HeadLayout, RopeScaling, RopeTable, Stream};

use super::families::{Family, Quantization};
use super::spec::{Part, Spec};

/// A model's sizes and constants.
#[derive(Clone, Debug)]
pub struct Config {
    pub family: &'static Family,
    pub num_layers: usize,
    pub d_model: usize,
    pub vocab: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
    pub heads: HeadLayout,
    pub attention: Attention,
    pub rope: Rope,
    pub norm: Norm,
    /// What a norm adds to the variance, or to the mean of the squares.
    pub norm_eps: f32,
    /// Of an MLP without a gate.
    pub activation: Activation,
    /// Columns between the halves of a layer without experts; 0 if there is no such layer.
    pub dense_d_ffn: usize,
    /// Which layers have no experts.
    pub dense: Dense,
    pub experts: Option<Experts>,
    pub factors: Factors,
    /// The embedding is the head as well.
    pub is_tied: bool,
    /// Attention and what follows it read the same residual.
    pub is_parallel: bool,
    /// How a checkpoint holds its matrices, where some are quantised.
    pub quantization: Option<Quantization>,
    /// The type that `config.json` names. Only random weights have it; those of a checkpoint are what they
    /// are.
    pub dtype: Option<String>,
}

/// How rows are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    Layer,
    Rms,
}

/// Constants of attention.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    /// Queries, keys and values are limited to `[-clip, clip]`; none: they are not.
    pub clip: Option<f32>,
    /// Factor of the scores; none: `head_dim^-0.5`.
    pub scale: Option<f32>,
    /// Bound of the scores' size.
    pub softcap: Option<f32>,
    pub qk_norm: Option<QkNorm>,
    /// Biases of the projections to queries, keys and values, and of the output projection.
    pub qkv_bias: bool,
    pub out_bias: bool,
    /// Keys that a query sees, in the layers that `slides` names.
    pub window: Option<usize>,
    pub slides: Slides,
    pub latent: Option<Latent>,
}

/// The layers whose queries see a window of the keys.
#[derive(Clone, Debug, Default)]
pub enum Slides {
    #[default]
    All,
    /// The first one, and every second one after it.
    EverySecond,
    Listed(Vec<bool>),
}

/// What the norm of queries and keys is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    PerHead,
    FullWidth,
}

/// Columns of the latents that queries, and keys and values, come from.
#[derive(Clone, Copy, Debug)]
pub struct Latent {
    /// None: queries come from the token itself.
    pub q_cols: Option<usize>,
    pub kv_cols: usize,
    /// What the norms of the latents add.
    pub norm_eps: f32,
}

/// Rotary embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    pub theta: f32,
    pub rotary_dim: usize,
    pub pairing: Pairing,
    pub scaling: Scaling,
}

/// How frequencies differ from powers of theta.
#[derive(Clone, Debug)]
pub enum Scaling {
    Fixed(RopeScaling<'static>),
    /// Divisors for runs of up to `original` positions, and for longer ones; and factors of the table.
    Long {
        original: usize,
        divisors: [Vec<f32>; 2],
        factors: [f32; 2],
    },
}

/// Experts and how they are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    pub num_experts: usize,
    pub top_k: usize,
    pub d_ffn: usize,
    /// Columns of the shared expert; 0 for none.
    pub shared_d_ffn: usize,
    pub score: Score,
    pub groups: Option<Groups>,
    pub normalize: Normalize,
    pub epsilon: f32,
    pub scale: f32,
    pub glu: Glu,
    /// Gate and up are the interleaved columns of one matrix, and run as one product.
    pub interleaved: bool,
}

/// The layers without experts.
#[derive(Clone, Debug)]
pub enum Dense {
    /// The first ones.
    First(usize),
    /// All but every `step`-th, and those that are listed: in order, each once.
    Except { step: usize, listed: Vec<usize> },
}

/// What results are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    pub embedding: f32,
    /// Of what a layer adds.
    pub residual: f32,
    pub logits: f32,
}

impl Default for Factors {
    fn default() -> Factors {
        Factors { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

impl Default for Experts {
    /// A softmax whose chosen part adds up to 1, of nothing yet.
    fn default() -> Experts {
        let Choice { score, groups, normalize, epsilon, scale, .. } = Choice::default();
        let (num_experts, top_k, d_ffn, shared_d_ffn) = (0, 0, 0, 0);
        Experts { num_experts, top_k, d_ffn, shared_d_ffn, score, groups, normalize, epsilon, scale, glu: Glu::Silu, interleaved: false }
    }
}

impl Experts {
    /// How they are chosen, but for biases.
    pub fn choice(&self) -> Choice<'static> {
        let choice = Choice::from(self.normalize).with_score(self.score).with_epsilon(self.epsilon).with_scale(self.scale);
        self.groups.map_or(choice, |groups| choice.with_groups(groups))
    }
}

impl Rope {
    /// Halves of `rotary_dim` elements, with plain frequencies.
    pub fn new(theta: f32, rotary_dim: usize) -> Rope {
        Rope { theta, rotary_dim, pairing: Pairing::Half, scaling: Scaling::Fixed(RopeScaling::None) }
    }

    /// Cosines and sines of `positions` positions. A run whose longest sequence has `reached` of them takes
    /// the frequencies for that length, where there are several.
    pub fn table(&self, stream: &Stream, positions: usize, reached: usize) -> Result<RopeTable, Error> {
        let scaled = |scaling: &RopeScaling<'_>| RopeTable::scaled(stream, self.theta, self.rotary_dim, positions, scaling);
        match &self.scaling {
            Scaling::Fixed(scaling) => scaled(scaling),
            Scaling::Long { original, divisors, factors } => {
                let which = usize::from(reached > *original);
                scaled(&RopeScaling::Divided { factors: &divisors[which], attention_factor: factors[which] })
            }
        }
    }

    /// What a report adds to theta.
    pub fn scaling_text(&self) -> &'static str {
        match &self.scaling {
            Scaling::Fixed(RopeScaling::None) => "",
            Scaling::Fixed(RopeScaling::Linear { .. }) => ", linear scaling",
            Scaling::Fixed(RopeScaling::Llama3 { .. }) => ", scaling of Llama 3",
            Scaling::Fixed(RopeScaling::Yarn { .. }) => ", YaRN",
            Scaling::Fixed(_) | Scaling::Long { .. } => ", LongRoPE",
        }
    }
}

impl Dense {
    /// Whether layer `l` is one of them.
    pub fn has(&self, l: usize) -> bool {
        match self {
            Dense::First(count) => l < *count,
            Dense::Except { step, listed } => !(l + 1).is_multiple_of(*step) || listed.binary_search(&l).is_ok(),
        }
    }

    /// Of the first `layers` layers: the number of dense ones, the first dense one, and the first one with
    /// experts. Computed without a loop over all layers.
    fn first_of_each(&self, layers: usize) -> (usize, Option<usize>, Option<usize>) {
        match self {
            Dense::First(count) => {
                let count = layers.min(*count);
                (count, (count > 0).then_some(0), Some(count).filter(|l| *l < layers))
            }
            Dense::Except { step, listed } => {
                let others = listed.iter().filter(|l| **l < layers && (**l + 1).is_multiple_of(*step)).count();
                let first = if *step > 1 { Some(0) } else { listed.first().copied() };
                let mut every = (step - 1..layers).step_by(*step);
                let other = every.find(|l| listed.binary_search(l).is_err());
                (layers - layers / step + others, first.filter(|l| *l < layers), other)
            }
        }
    }
}

/// The tensors of one part of a model: for counting and for the table.
pub struct Count {
    pub part: Part,
    /// Those of one layer, or of the whole model.
    pub shape: String,
    pub copies: usize,
    /// Parameters of all copies, and those that one token uses.
    pub total: u64,
    pub active: u64,
}

impl Config {
    /// The same model with its first layers only.
    pub fn with_layers(self, layers: usize) -> Config {
        Config { num_layers: self.num_layers.min(layers), ..self }
    }

    /// Layer `l` has no experts.
    pub fn is_dense(&self, l: usize) -> bool {
        self.experts.is_none() || self.dense.has(l)
    }

    /// Experts of a layer, 0 in a model without them.
    pub fn num_experts(&self) -> usize {
        self.experts.map_or(0, |experts| experts.num_experts)
    }

    /// The window of layer `l`.
    pub fn window(&self, l: usize) -> Option<usize> {
        self.attention.window.filter(|_| match &self.attention.slides {
            Slides::All => true,
            Slides::EverySecond => l.is_multiple_of(2),
            Slides::Listed(slides) => slides.get(l).copied().unwrap_or(false),
        })
    }

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        self.elements().unwrap_or(u64::MAX)
    }

    /// All parameters, or none where their number passes 2^60. Every later product of sizes is below this
    /// one.
    pub fn elements(&self) -> Option<u64> {
        let groups = self.layer_groups();
        let layers = groups.iter().map(|(count, l)| sum(&self.family.of_layer(self, *l))?.checked_mul(*count as u128));
        let outside = sum(&self.family.outside(self))?;
        let all = layers.into_iter().try_fold(outside, |all, layers| all.checked_add(layers?))?;
        u64::try_from(all).ok().filter(|all| *all <= 1 << 60)
    }

    /// Layers of one shape: how many there are, and one of them.
    pub fn layer_groups(&self) -> Vec<(usize, usize)> {
        let layers = self.num_layers;
        let (count, dense, other) = match &self.experts {
            None => (layers, Some(0), None),
            Some(_) => self.dense.first_of_each(layers),
        };
        dense.map(|l| (count, l)).into_iter().chain(other.map(|l| (layers - count, l))).collect()
    }

    /// The parameters by part, in the order in which a token meets them.
    pub fn counts(&self) -> Vec<Count> {
        let mut sorted: Vec<(usize, Vec<Spec>)> = vec![(1, self.family.outside(self))];
        sorted.extend(self.layer_groups().into_iter().map(|(count, l)| (count, self.family.of_layer(self, l))));
        Part::ALL.into_iter().filter_map(|part| self.count(part, &sorted)).collect()
    }

    fn count(&self, part: Part, groups: &[(usize, Vec<Spec>)]) -> Option<Count> {
        let (mut copies, mut total, mut active, mut shapes) = (0, 0, 0, Vec::new());
        for (layers, specs) in groups {
            let specs: Vec<&Spec> = specs.iter().filter(|spec| spec.part == part).collect();
            if specs.is_empty() {
                continue;
            }
            let elements = specs.iter().filter_map(|spec| spec.elements()).sum::<u128>() as u64;
            let [chosen, of] = match (part, self.experts) {
                (Part::Experts, Some(experts)) => [experts.top_k, experts.num_experts],
                _ => [1, 1],
            };
            let norms = specs.iter().filter(|spec| part == Part::Norms && spec.inputs.is_none()).count().max(1);
            copies += layers * norms;
            total += elements * *layers as u64;
            active += elements / of as u64 * chosen as u64 * *layers as u64;
            shapes = if shapes.is_empty() { shapes_text(&specs) } else { shapes };
        }
        (copies > 0).then(|| Count { part, shape: shapes.join(", "), copies, total, active })
    }
}

/// Parameters of some matrices, or none beyond 2^127.
fn sum(specs: &[Spec]) -> Option<u128> {
    specs.iter().try_fold(0u128, |sum, spec| sum.checked_add(spec.elements()?))
}

/// The shapes of the matrices, each once and with how many have it: `8 x 3 x 56 x 64`.
fn shapes_text(specs: &[&Spec]) -> Vec<String> {
    let mut shapes: Vec<(usize, String)> = Vec::new();
    for spec in specs.iter().filter(|spec| spec.part == Part::Norms || spec.shape.len() > 1) {
        let [rows, cols] = spec.stacked_dims();
        let shape = match (spec.shape.as_slice(), spec.matrices) {
            ([len], _) => len.to_string(),
            (_, 1) => format!("{rows} x {cols}"),
            (_, matrices) => format!("{matrices} x {} x {cols}", rows / matrices),
        };
        match shapes.iter_mut().find(|(_, known)| *known == shape) {
            Some((count, _)) => *count += 1,
            None => shapes.push((1, shape)),
        }
    }
    let text = |(count, shape): (usize, String)| if count > 1 { format!("{count} of {shape}") } else { shape };
    let norms = specs.first().is_some_and(|spec| spec.part == Part::Norms);
    shapes.into_iter().map(|(count, shape)| text((if norms { 1 } else { count }, shape))).collect()
}
