//! A model that can run: layers whose weights were found, in the types of the library, and the equations of a
//! step on them.

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, Epilogue, GluEpilogue};
use dropless::layout::WeightOrder;
use dropless::router::Choice;
use dropless::{ExpertWeights, Rows, Stream, WeightRows, moe, norm};

use super::block::{self, Affine, Block, Ffn, Hidden, Mlp, Outside, Projection, Residual};
use super::config::{Config, Experts};
use super::run::failure::{Failure, refuse};
use super::spec::Spec;

/// A matrix that was found: the rows of its tensors, in the order of their numbers.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub parts: &'a [WeightRows<'a>],
    matrices: usize,
    order: WeightOrder,
}

impl<'a> Matrix<'a> {
    /// Tensors that agree with a description. A GPU has them all in one, or quantised ones at one distance.
    pub fn new(spec: &Spec, parts: &'a [WeightRows<'a>]) -> Matrix<'a> {
        // The rows of a quantised matrix are outputs, also where those of its floats are inputs.
        let order = if let Some(WeightRows::Quantized(_)) = parts.first() { WeightOrder::Nk } else { spec.order };
        Matrix { parts, matrices: spec.matrices, order }
    }

    /// The rows of the only tensor.
    fn rows(self) -> WeightRows<'a> {
        self.parts[0]
    }

    /// A vector of f32.
    fn numbers(self) -> Result<Rows<'a, f32>, Failure> {
        match self.parts {
            [WeightRows::F32(rows)] => Ok(*rows),
            _ => refuse("a vector of f32 was loaded as another type"),
        }
    }

    /// All matrices.
    pub fn weights(self) -> Result<ExpertWeights<'a>, Failure> {
        Ok(match (self.order, self.parts) {
            (WeightOrder::Nk, [stacked]) => ExpertWeights::nk(*stacked, self.matrices)?,
            (WeightOrder::Nk, each) => ExpertWeights::nk_each(each)?,
            (_, [stacked]) => ExpertWeights::kn(*stacked, self.matrices)?,
            (_, each) => ExpertWeights::kn_each(each)?,
        })
    }

    /// What is added to the outputs of all matrices.
    fn bias(self) -> Bias<'a> {
        Bias::new(self.rows())
    }
}

/// A product with a matrix, or with one for each expert.
#[derive(Clone, Copy)]
pub struct Linear<'w> {
    pub weight: ExpertWeights<'w>,
    pub epilogue: Epilogue<'w>,
}

impl<'w> Linear<'w> {
    fn new(of: &Affine<Matrix<'w>>) -> Result<Linear<'w>, Failure> {
        let bias = of.bias.map(Matrix::bias);
        let epilogue = bias.map_or_else(Epilogue::default, |bias| Epilogue::default().with_bias(bias));
        Ok(Linear { weight: of.weight.weights()?, epilogue })
    }
}

fn norm_of<'w>(of: &Affine<Matrix<'w>>) -> norm::Weights<'w> {
    let weights = norm::Weights::from(of.weight.rows());
    of.bias.map_or(weights, |bias| weights.with_bias(bias.rows()))
}

/// Queries, keys and values of a token.
pub enum Projections<'w> {
    /// Outputs of one matrix, or of three.
    Rows(Vec<Linear<'w>>),
    PerHead(Box<Linear<'w>>),
    Latent(Box<Latent<'w>>),
}

/// [`block::Latent`], found.
pub struct Latent<'w> {
    pub q_down: Option<(ExpertWeights<'w>, norm::Weights<'w>)>,
    pub query: ExpertWeights<'w>,
    pub kv_down: ExpertWeights<'w>,
    pub kv_norm: norm::Weights<'w>,
    pub kv: ExpertWeights<'w>,
}

/// What of attention differs from layer to layer.
#[derive(Clone, Copy)]
pub struct Attend<'w> {
    pub layout: Layout,
    pub qk_norm: Option<[WeightRows<'w>; 2]>,
    pub sinks: Option<Rows<'w, f32>>,
    pub window: Option<usize>,
}

/// Where the projections left a token's queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Fused,
    Separate,
    PerHead,
    Latent,
}

/// The second half of a layer: experts, or a dense MLP.
pub enum LayerFfn<'w> {
    Experts(Box<moe::Weights<'w>>),
    Dense(Box<Dense<'w>>),
}

/// An MLP of every token.
pub struct Dense<'w> {
    pub hidden: moe::Hidden<'w>,
    pub down: Linear<'w>,
}

/// One layer.
pub struct Layer<'w> {
    norm_1: norm::Weights<'w>,
    projections: Projections<'w>,
    attend: Attend<'w>,
    out: Linear<'w>,
    norm_2: norm::Weights<'w>,
    second: LayerFfn<'w>,
    residual: Residual<norm::Weights<'w>>,
}

impl<'w> Layer<'w> {
    /// Of weights that were found.
    pub fn new(config: &Config, block: &Block<Matrix<'w>>) -> Result<Layer<'w>, Failure> {
        let block::Attention { projection, qk_norm, sinks, window, out } = &block.attention;
        let (projections, layout) = match projection {
            Projection::Rows(parts) => {
                let layout = if parts.len() == 1 { Layout::Fused } else { Layout::Separate };
                (Projections::Rows(parts.iter().map(Linear::new).collect::<Result<_, _>>()?), layout)
            }
            Projection::PerHead(whole) => (Projections::PerHead(Box::new(Linear::new(whole)?)), Layout::PerHead),
            Projection::Latent(latent) => (Projections::Latent(Box::new(latent_of(latent)?)), Layout::Latent),
        };
        let (qk_norm, sinks) = (qk_norm.map(|both| both.map(Matrix::rows)), sinks.map(Matrix::numbers).transpose()?);
        let second = match (&block.ffn, &config.experts) {
            (Ffn::Experts(experts), Some(facts)) => LayerFfn::Experts(Box::new(experts_of(experts, facts)?)),
            (Ffn::Experts(_), None) => return refuse("a layer has experts in a model without them"),
            (Ffn::Dense(mlp), _) => LayerFfn::Dense(Box::new(Dense { hidden: hidden_of(&mlp.hidden)?, down: Linear::new(&mlp.down)? })),
        };
        Ok(Layer {
            norm_1: norm_of(&block.norm_1),
            projections,
            attend: Attend { layout, qk_norm, sinks, window: *window },
            out: Linear::new(out)?,
            norm_2: norm_of(&block.norm_2),
            second,
            residual: block.residual.map(&mut |norm| Ok::<_, Failure>(norm_of(norm)))?,
        })
    }

    /// Its equations.
    pub fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.norm(self.norm_1)?; //                          n = norm_1(x)
        match &self.projections {
            Projections::Rows(parts) => s.project(parts)?,
            Projections::PerHead(whole) => s.project(std::slice::from_ref(&**whole))?,
            Projections::Latent(latent) => s.project_latent(latent)?,
        } //                                              q, k, v of n
        s.attend(self.attend)?; //                        c = attention(rotate(norm(q)), rotate(norm(k)), v)
        s.add_projected(&self.out)?; //                   x = x + c out^T
        match &self.residual {
            Residual::Sequential => s.norm(self.norm_2)?,      //                  n = norm_2(x)
            Residual::Parallel => s.norm_beside(self.norm_2)?, //             the same, of x before the addition
            Residual::Normed([post, _]) => s.norm_after(*post, self.norm_2)?, // after x + post(c out^T) instead
        }
        match &self.second {
            LayerFfn::Experts(weights) => s.add_experts(weights)?, // x = x + moe(n)
            LayerFfn::Dense(weights) => s.add_dense(weights)?,     //     x = x + mlp(n)
        }
        match &self.residual {
            Residual::Normed([_, post]) => s.norm_added(*post), // x + post(moe(n)) instead
            _ => Ok(()),
        }
    }
}

fn latent_of<'w>(latent: &block::Latent<Matrix<'w>>) -> Result<Latent<'w>, Failure> {
    let block::Latent { q_down, query, kv_down, kv_norm, kv } = latent;
    let q_down = match q_down {
        Some([down, norm]) => Some((down.weights()?, norm::Weights::from(norm.rows()))),
        None => None,
    };
    let kv_norm = norm::Weights::from(kv_norm.rows());
    Ok(Latent { q_down, query: query.weights()?, kv_down: kv_down.weights()?, kv_norm, kv: kv.weights()? })
}

fn hidden_of<'w>(hidden: &Hidden<Matrix<'w>>) -> Result<moe::Hidden<'w>, Failure> {
    let epilogue = |biases: Option<[Bias<'w>; 2]>, glu: Glu| {
        let epilogue = GluEpilogue::default().with_glu(glu);
        biases.map_or(epilogue, |biases| epilogue.with_biases(biases))
    };
    Ok(match hidden {
        Hidden::Gated { gate, up, glu } => {
            let biases = gate.bias.zip(up.bias).map(|(gate, up)| [gate.bias(), up.bias()]);
            moe::Hidden::Gated { gate: gate.weight.weights()?, up: up.weight.weights()?, epilogue: epilogue(biases, *glu) }
        }
        Hidden::Halves { both, glu } => {
            let ([gate, up], biases) = (both.weight.weights()?.halves()?, both.bias.map(|bias| Bias::halves(bias.rows())).transpose()?);
            moe::Hidden::Gated { gate, up, epilogue: epilogue(biases, *glu) }
        }
        Hidden::Interleaved { both, glu } => {
            moe::Hidden::Interleaved { gate_up: both.weight.weights()?, bias: both.bias.map(Matrix::bias), glu: *glu }
        }
        Hidden::Plain { up, activation } => {
            let Linear { weight, epilogue } = Linear::new(up)?;
            moe::Hidden::Plain { up: weight, epilogue: epilogue.with_activation(*activation) }
        }
    })
}

fn experts_of<'w>(experts: &block::Experts<Matrix<'w>>, facts: &Experts) -> Result<moe::Weights<'w>, Failure> {
    let block::Experts { router, logit_bias, choice_bias, mlp, shared } = experts;
    let Linear { weight: down, epilogue } = Linear::new(&mlp.down)?;
    let mut all = moe::Experts::new(hidden_of(&mlp.hidden)?, down);
    if let Some(bias) = epilogue.bias {
        all = all.with_down_bias(bias);
    }
    if let Some((Mlp { hidden, down }, gate)) = shared {
        let shared = moe::Shared::new(hidden_of(hidden)?, down.weight.weights()?);
        all = all.with_shared(gate.map_or(shared, |gate| shared.with_gate(gate.rows())));
    }
    let mut choice: Choice<'w> = facts.choice();
    if let Some(bias) = logit_bias {
        choice = choice.with_logit_bias(bias.numbers()?);
    }
    if let Some(bias) = choice_bias {
        choice = choice.with_choice_bias(bias.numbers()?);
    }
    Ok(moe::Weights::new(router.rows(), all).with_choice(choice))
}

/// All layers of a model: resident, or copied to the GPU during the step.
pub trait Layers: Send {
    /// The equations of all layers, one after the other.
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure>;
}

/// Layers whose weights stay where they are.
impl Layers for Vec<Layer<'_>> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        self.iter().try_for_each(|layer| layer.step(s))
    }
}

/// A model.
pub struct Decoder<'w> {
    embedding: WeightRows<'w>,
    layers: Box<dyn Layers + 'w>,
    final_norm: norm::Weights<'w>,
    head: Linear<'w>,
}

impl<'w> Decoder<'w> {
    /// Of weights that were found.
    pub fn new(config: &Config, outside: &Outside<Matrix<'w>>, layers: Box<dyn Layers + 'w>) -> Result<Decoder<'w>, Failure> {
        let embedding = outside.embedding.rows();
        let mut head = match &outside.head {
            Some(head) => Linear::new(head)?,
            None => Linear { weight: ExpertWeights::nk(embedding, 1)?, epilogue: Epilogue::default() },
        };
        if config.factors.logits != 1.0 {
            head.epilogue = head.epilogue.with_activation(Activation::Scaled(config.factors.logits));
        }
        Ok(Decoder { embedding, layers, final_norm: norm_of(&outside.final_norm), head })
    }

    /// The equations of the model, from the ids of some tokens to the last norm.
    pub fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.embed(self.embedding)?; //     x = embedding[ids]
        self.layers.step(s)?; //         x = layer(x), for each layer
        s.norm(self.final_norm) //       n = final_norm(x), of which the head gives logits
    }

    /// `[V, D]`: of each row of the last norm it gives the logits of the next token.
    pub fn head(&self) -> &Linear<'w> {
        &self.head
    }
}

/// The operations of a step. They work on registers: for each token its residual `x`, its norm `n`, its
/// queries, keys and values `q`, `k`, `v`, and its context `c`. Constants are those of the configuration.
pub trait Step {
    /// Where the operations are queued.
    fn stream(&self) -> &Stream;

    /// `x = factor * table[ids]`.
    fn embed(&mut self, table: WeightRows<'_>) -> Result<(), Failure>;

    /// `n = norm(x)`.
    fn norm(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure>;

    /// The same of `x` without what was added to it last.
    fn norm_beside(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure>;

    /// The same, after what was added to `x` last was replaced by its norm `post`.
    fn norm_after(&mut self, post: norm::Weights<'_>, weights: norm::Weights<'_>) -> Result<(), Failure>;

    /// Replaces what was added to `x` last by its norm.
    fn norm_added(&mut self, weights: norm::Weights<'_>) -> Result<(), Failure>;

    /// `q, k, v = n w^T + bias`, of one matrix or of one each.
    fn project(&mut self, parts: &[Linear<'_>]) -> Result<(), Failure>;

    /// `q = norm(n q_down^T) query^T`; `c, r = n kv_down^T`; `k, v = norm(c) kv^T, with r in every key`.
    fn project_latent(&mut self, latent: &Latent<'_>) -> Result<(), Failure>;

    /// `c = attention(q, K, V)`, after `q` and `k` were normalised, clipped and rotated, and `k` and `v`
    /// appended to the layer's keys `K` and values `V`.
    fn attend(&mut self, attend: Attend<'_>) -> Result<(), Failure>;

    /// `x = x + factor * (c w^T + bias)`.
    fn add_projected(&mut self, out: &Linear<'_>) -> Result<(), Failure>;

    /// `x = x + factor * moe(n)`.
    fn add_experts(&mut self, weights: &moe::Weights<'_>) -> Result<(), Failure>;

    /// `x = x + factor * mlp(n)`.
    fn add_dense(&mut self, weights: &Dense<'_>) -> Result<(), Failure>;
}
