//! What a run needs to know of a model, whatever its family: sizes, constants, and how many parameters follow
//! from them.

use dropless::HeadLayout;

use super::families::Family;

/// A model's sizes and constants.
#[derive(Clone, Debug)]
pub struct Config {
    pub family: &'static Family,
    pub num_layers: usize,
    pub d_model: usize,
    pub heads: HeadLayout,
    pub d_ffn: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub vocab: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
    pub rope_theta: f32,
    /// Queries, keys and values are limited to `[-clip, clip]`; none: they are not.
    pub clip: Option<f32>,
    /// What a norm adds to the mean of the squares.
    pub norm_eps: f32,
    /// The p of the norm by which a token's expert weights are divided; none: they are left as they are.
    pub weight_norm: Option<f32>,
    /// The type the checkpoint says it was saved in; what counts is what lies in the file.
    pub dtype: Option<String>,
}

/// The tensors of one kind: for counting and for the table.
pub struct Part {
    pub name: &'static str,
    /// One layer's, or the one of the whole model.
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

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        self.elements().unwrap_or(u64::MAX)
    }

    /// All parameters, or none where their number passes 2^60. Every later product of sizes is below this
    /// one.
    pub fn elements(&self) -> Option<u64> {
        let [d, f, e, v] = [self.d_model, self.d_ffn, self.num_experts, self.vocab].map(|size| size as u128);
        let experts = 3u128.checked_mul(e)?.checked_mul(f)?.checked_mul(d)?;
        let attention = (self.heads.qkv_cols() as u128 + self.heads.q_cols() as u128).checked_mul(d)?;
        let layer = experts.checked_add(attention)?.checked_add((e + 2) * d)?;
        let all = layer.checked_mul(self.num_layers as u128)?.checked_add((2 * v + 1) * d)?;
        u64::try_from(all).ok().filter(|all| *all <= 1 << 60)
    }

    /// The parameters by kind, in the order in which a token meets them.
    pub fn parts(&self) -> Vec<Part> {
        let Config { num_layers: layers, d_model: d, d_ffn: f, num_experts: e, top_k: k, vocab: v, heads, .. } = *self;
        let part = |name, shape: String, copies: usize, each: usize, active: usize| {
            let count = |each: usize| (copies * each) as u64;
            Part { name, shape, copies, total: count(each), active: count(active) }
        };
        let (q, qkv) = (heads.q_cols(), heads.qkv_cols());
        vec![
            part("embedding", format!("{v} x {d}"), 1, v * d, v * d),
            part("attention", format!("{qkv} x {d}, {d} x {q}"), layers, (qkv + q) * d, (qkv + q) * d),
            part("router", format!("{e} x {d}"), layers, e * d, e * d),
            part("experts", format!("{e} x 3 x {f} x {d}"), layers, 3 * e * f * d, 3 * k * f * d),
            part("norms", format!("{d}"), 2 * layers + 1, d, d),
            part("head", format!("{v} x {d}"), 1, v * d, v * d),
        ]
    }
}
