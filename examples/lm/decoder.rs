//! What a run and a family know of each other: the matrices that a family has, the operations of a step, and
//! the order in which a family's step uses them.

use dropless::{ExpertWeights, Stream, WeightRows, moe};

use super::run::failure::Failure;

/// A matrix that a checkpoint must hold: one tensor, or one for each expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// All of one shape. The first stands for the matrix.
    pub names: Vec<String>,
    pub shape: Vec<usize>,
    /// Inputs of one output: by them random weights are scaled. Those of a norm have none, and are ones.
    pub inputs: Option<usize>,
}

impl Spec {
    /// Weights of a norm, `[D]`.
    pub fn norm(name: String, cols: usize) -> Spec {
        Spec { names: vec![name], shape: vec![cols], inputs: None }
    }

    /// An embedding `[V, D]`, which is looked up, not multiplied.
    pub fn embedding(name: String, [rows, cols]: [usize; 2]) -> Spec {
        Spec { inputs: Some(1), ..Spec::linear(name, [rows, cols]) }
    }

    /// Weights `[N, K]` of N outputs and K inputs.
    pub fn linear(name: String, dims: [usize; 2]) -> Spec {
        Spec::each(vec![name], dims)
    }

    /// Weights `[N, K]` for each of several experts.
    pub fn each(names: Vec<String>, [rows, cols]: [usize; 2]) -> Spec {
        Spec { names, shape: vec![rows, cols], inputs: Some(cols) }
    }

    /// Each tensor as a matrix: a vector is one row.
    pub fn dims(&self) -> [usize; 2] {
        match *self.shape {
            [rows, cols] => [rows, cols],
            _ => [1, self.shape.iter().product()],
        }
    }

    /// All tensors stacked, as one matrix.
    pub fn stacked_dims(&self) -> [usize; 2] {
        let [rows, cols] = self.dims();
        [self.names.len() * rows, cols]
    }
}

/// A matrix that was found: the rows of its tensors, in the order of the names.
#[derive(Clone, Copy)]
pub struct Matrix<'a>(pub &'a [WeightRows<'a>]);

impl<'a> Matrix<'a> {
    /// The rows of the only tensor.
    pub fn rows(self) -> WeightRows<'a> {
        self.0[0]
    }

    /// One matrix `[N, K]`.
    pub fn linear(self) -> Result<ExpertWeights<'a>, Failure> {
        Ok(ExpertWeights::nk(self.rows(), 1)?)
    }

    /// Matrices `[N, K]`, stacked in one tensor or each in its own.
    pub fn experts_nk(self, num_experts: usize) -> Result<ExpertWeights<'a>, Failure> {
        Ok(match self.0 {
            [stacked] => ExpertWeights::nk(*stacked, num_experts)?,
            each => ExpertWeights::nk_each(each)?,
        })
    }

    /// Matrices `[K, N]`, stacked in one tensor.
    pub fn experts_kn(self, num_experts: usize) -> Result<ExpertWeights<'a>, Failure> {
        Ok(ExpertWeights::kn(self.rows(), num_experts)?)
    }
}

/// A model of some family: its weights by role, and how they are used.
pub trait Decoder: Send {
    /// The equations of the model, from the ids of some tokens to the last norm. The constants in them (what
    /// a norm adds, the clip, the heads, the experts of a token) are those of the configuration.
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure>;

    /// `[V, D]`: of each row of the last norm it gives the logits of the next token.
    fn head(&self) -> ExpertWeights<'_>;
}

/// A model, or why its weights were refused.
pub type Made<'w> = Result<Box<dyn Decoder + 'w>, Failure>;

/// One layer of a model.
pub trait Layer: Send {
    /// Its equations.
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure>;
}

/// A layer, or why its weights were refused.
pub type MadeLayer<'w> = Result<Box<dyn Layer + 'w>, Failure>;

/// All layers of a model: the seam between a step and where a layer's weights are when it comes to them.
pub trait Layers: Send {
    /// The equations of all layers, one after the other.
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure>;
}

/// Layers whose weights stay where they are.
impl Layers for Vec<Box<dyn Layer + '_>> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        self.iter().try_for_each(|layer| layer.step(s))
    }
}

/// The operations of a step. They work on registers: for each token its residual `x`, its norm `n`, its
/// queries, keys and values `q`, `k`, `v`, and its context `c`.
pub trait Step {
    /// Where the operations are queued.
    fn stream(&self) -> &Stream;

    /// `x = table[ids]`.
    fn embed(&mut self, table: WeightRows<'_>) -> Result<(), Failure>;

    /// `n = (x - mean(x)) / sqrt(var(x) + eps) * weight`.
    fn layer_norm(&mut self, weight: WeightRows<'_>) -> Result<(), Failure>;

    /// `n = x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(&mut self, weight: WeightRows<'_>) -> Result<(), Failure>;

    /// `q, k, v = n w^T`, where `w` are the rows of all `weights`.
    fn project(&mut self, weights: &[ExpertWeights<'_>]) -> Result<(), Failure>;

    /// `c = attention(rotate(clip(q)), K, V)`, after `rotate(clip(k))` and `clip(v)` were appended to the
    /// layer's keys `K` and values `V`.
    fn attend(&mut self) -> Result<(), Failure>;

    /// `x = x + c weight^T`.
    fn add_projected(&mut self, weight: ExpertWeights<'_>) -> Result<(), Failure>;

    /// `x = x + moe(n)`, the last operation of a layer.
    fn add_experts(&mut self, weights: &moe::Weights<'_>) -> Result<(), Failure>;
}
