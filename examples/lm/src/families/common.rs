//! What most families have in common: the fields of `config.json` and the names of tensors that Llama began
//! with.

use std::collections::BTreeSet;

use dropless::HeadLayout;
use dropless::activation::{Activation, Glu};
use dropless::layout::MAX_EXPERTS;
use dropless::router::Normalize;
use serde_json::json;

use super::Family;
use super::block::{Affine, Attention, Block, Ffn, Hidden, Mlp, Outside, Projection};
use super::config::{self, Config, Dense, Experts, Factors, Norm, QkNorm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::{Failure, refuse_file};
use super::run::input::brief;
use super::run::json::Value;
use super::spec::{Part, Spec};

/// Llama's fields, of a model without experts whose activation is SiLU. Heads are rotated as a whole.
pub fn config(top: &Fields<'_>, family: &'static Family, default_theta: f32) -> Result<Config, Failure> {
    top.must_be("hidden_act", json!("silu"))?;
    let heads = heads(top)?;
    base(top, family, heads, (default_theta, heads.head_dim()))
}

/// The same with other heads, of which `rotary_dim` elements are rotated, and any activation.
pub fn base(
    top: &Fields<'_>,
    family: &'static Family,
    heads: HeadLayout,
    (default_theta, rotary_dim): (f32, usize),
) -> Result<Config, Failure> {
    let max_positions = top.optional_size("max_position_embeddings", MAX_SIZE)?.unwrap_or(131_072);
    Ok(Config {
        family,
        num_layers: top.size("num_hidden_layers", MAX_SIZE)?,
        d_model: top.size("hidden_size", MAX_SIZE)?,
        vocab: top.size("vocab_size", MAX_SIZE)?,
        max_positions,
        heads,
        attention: config::Attention::default(),
        rope: top.rope(top, default_theta, rotary_dim, max_positions)?,
        norm: Norm::Rms,
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-6),
        activation: Activation::Identity,
        dense_d_ffn: 0,
        dense: Dense::First(0),
        experts: None,
        factors: Factors::default(),
        is_tied: top.flag("tie_word_embeddings", false)?,
        is_parallel: false,
        quantization: None,
        dtype: top.dtype(),
    })
}

/// Refuses what would make it another model than the one that is computed.
pub fn check(top: &Fields<'_>, family: &Family) -> Result<(), Failure> {
    if let Some(name) = top.get("model_type")
        && !family.model_types.iter().any(|known| name.as_str() == Some(known))
    {
        return top.refuse_value("model_type", family.model_types, name);
    }
    Ok(())
}

/// Heads by the usual fields. `head_dim` may be missing, and so may `num_key_value_heads`.
pub fn heads(top: &Fields<'_>) -> Result<HeadLayout, Failure> {
    let d_model = top.size("hidden_size", MAX_SIZE)?;
    let num_heads = top.size("num_attention_heads", MAX_SIZE)?;
    let num_kv_heads = top.optional_size("num_key_value_heads", MAX_SIZE)?.unwrap_or(num_heads);
    top.divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)?;
    let (of_heads, head_dim) = match top.optional_size("head_dim", MAX_SIZE)? {
        Some(head_dim) => ("head_dim", head_dim),
        None => {
            top.divides("num_attention_heads", num_heads, "hidden_size", d_model)?;
            ("num_attention_heads", d_model / num_heads)
        }
    };
    if !head_dim.is_multiple_of(2) {
        return top.refuse(of_heads, format_args!("must give heads of even size, got {head_dim}"));
    }
    HeadLayout::new(num_heads, num_kv_heads, head_dim).or_else(|error| refuse_file(top.file(), error))
}

/// An even number of elements, at least two, and no more than a head has.
pub fn rotary_dim(top: &Fields<'_>, name: &str, head_dim: usize, rotary_dim: usize) -> Result<usize, Failure> {
    match rotary_dim {
        even if (2..=head_dim).contains(&even) && even.is_multiple_of(2) => Ok(even),
        other => top.refuse(name, format_args!("must rotate an even number of a head's {head_dim} elements, at least 2, got {other}")),
    }
}

/// Experts by the names that a family has for their number, the choices of a token, and their width.
pub fn experts(top: &Fields<'_>, [num_experts, top_k, d_ffn]: [&str; 3]) -> Result<Experts, Failure> {
    let (of_experts, of_choices) = (num_experts, top_k);
    let num_experts = top.size(of_experts, MAX_EXPERTS as u64)?;
    let top_k = top.size(of_choices, MAX_SIZE)?;
    top.at_most(of_choices, top_k, of_experts, num_experts)?;
    Ok(Experts { num_experts, top_k, d_ffn: top.size(d_ffn, MAX_SIZE)?, ..Experts::default() })
}

/// Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it.
pub fn sparse_steps(top: &Fields<'_>) -> Result<Dense, Failure> {
    let step = top.optional_size("decoder_sparse_step", MAX_SIZE)?.unwrap_or(1);
    let number = |value: &Value| match value.as_u64() {
        Some(number) => Ok(number as usize),
        None => top.refuse("mlp_only_layers", format_args!("must hold whole numbers, got {}", brief(value))),
    };
    let listed: BTreeSet<usize> = top.list("mlp_only_layers")?.iter().map(number).collect::<Result<_, _>>()?;
    Ok(Dense::Except { step, listed: listed.into_iter().collect() })
}

/// A softmax's weights as they are, or divided by their sum where `norm_topk_prob` says so.
pub fn norm_topk_prob(top: &Fields<'_>) -> Result<Normalize, Failure> {
    Ok(if top.flag("norm_topk_prob", false)? { Normalize::P(1.0) } else { Normalize::None })
}

/// Embedding, last norm, and a head unless the embedding is one.
pub fn outside(config: &Config) -> Outside<Spec> {
    let dims = [config.vocab, config.d_model];
    Outside {
        embedding: Spec::embedding("model.embed_tokens.weight", dims),
        final_norm: Affine::plain(Spec::norm("model.norm.weight", config.d_model)),
        head: (!config.is_tied).then(|| Affine::plain(Spec::linear(Part::Head, "lm_head.weight", dims))),
    }
}

/// The tensors of one layer, whose names begin alike.
pub struct Names<'c> {
    config: &'c Config,
    prefix: String,
    /// Its number.
    l: usize,
}

impl<'c> Names<'c> {
    /// `model.layers.3.`
    pub fn new(config: &'c Config, l: usize) -> Names<'c> {
        Names { config, prefix: format!("model.layers.{l}."), l }
    }

    /// A whole name.
    pub fn name(&self, tensor: &str) -> String {
        format!("{}{tensor}", self.prefix)
    }

    /// A norm of a token's columns, without a bias.
    pub fn norm(&self, tensor: &str) -> Affine<Spec> {
        Affine::plain(self.factors(tensor, self.config.d_model))
    }

    /// The same with one.
    pub fn biased_norm(&self, tensor: &str) -> Affine<Spec> {
        let bias = Spec::bias(Part::Norms, self.name(&format!("{tensor}.bias")), self.config.d_model);
        Affine { bias: Some(bias), ..self.norm(tensor) }
    }

    /// A norm's factors.
    pub fn factors(&self, tensor: &str, len: usize) -> Spec {
        Spec::norm(self.name(&format!("{tensor}.weight")), len)
    }

    /// A matrix.
    pub fn matrix(&self, part: Part, tensor: &str, dims: [usize; 2]) -> Spec {
        Spec::linear(part, self.name(&format!("{tensor}.weight")), dims)
    }

    /// A matrix, and a bias if it has one.
    pub fn linear(&self, part: Part, tensor: &str, [n, k]: [usize; 2], has_bias: bool) -> Affine<Spec> {
        let bias = has_bias.then(|| Spec::bias(part, self.name(&format!("{tensor}.bias")), n));
        Affine { weight: self.matrix(part, tensor, [n, k]), bias }
    }

    /// Attention by the usual names, then what follows it, each after a norm without a bias.
    pub fn block(&self, ffn: Ffn<Spec>) -> Block<Spec> {
        let (norm_1, norm_2) = (self.norm("input_layernorm"), self.norm("post_attention_layernorm"));
        Block::new(norm_1, self.attention("self_attn"), norm_2, ffn)
    }

    /// `q_proj`, `k_proj`, `v_proj`, `o_proj` and the norms of queries and keys, as the configuration says.
    pub fn attention(&self, prefix: &str) -> Attention<Spec> {
        let Config { d_model: d, heads, attention, .. } = self.config;
        let tensor = |name: &str| format!("{prefix}.{name}");
        let part = |name: &str, cols| self.linear(Part::Attention, &tensor(name), [cols, *d], attention.qkv_bias);
        let parts = vec![part("q_proj", heads.q_cols()), part("k_proj", heads.kv_cols()), part("v_proj", heads.v_cols())];
        let out = self.linear(Part::Attention, &tensor("o_proj"), [*d, heads.context_cols()], attention.out_bias);
        let qk_norm = attention.qk_norm.map(|of| match of {
            QkNorm::PerHead => [heads.head_dim(); 2],
            QkNorm::FullWidth => [heads.q_cols(), heads.kv_cols()],
        });
        let qk_norm = qk_norm.map(|[q, k]| [self.factors(&tensor("q_norm"), q), self.factors(&tensor("k_norm"), k)]);
        Attention { qk_norm, window: self.config.window(self.l), ..Attention::new(Projection::Rows(parts), out) }
    }

    /// Gate, up and down of an MLP, each a matrix.
    pub fn gated(&self, part: Part, prefix: &str, d_ffn: usize) -> Mlp<Spec> {
        let d = self.config.d_model;
        let matrix = |name: &str, dims| self.linear(part, &format!("{prefix}.{name}"), dims, false);
        let (gate, up) = (matrix("gate_proj", [d_ffn, d]), matrix("up_proj", [d_ffn, d]));
        Mlp { hidden: Hidden::Gated { gate, up, glu: Glu::Silu }, down: matrix("down_proj", [d, d_ffn]) }
    }

    /// The MLP of a layer without experts.
    pub fn dense(&self, prefix: &str) -> Ffn<Spec> {
        Ffn::Dense(self.gated(Part::Dense, prefix, self.config.dense_d_ffn))
    }

    /// Gate, up and down of every expert, each a tensor, by their names.
    pub fn each_expert(&self, prefix: &str, experts: &Experts, [gate, up, down]: [&str; 3]) -> Mlp<Spec> {
        let (d, f) = (self.config.d_model, experts.d_ffn);
        let name = |matrix: &str| self.name(&format!("{prefix}.{{}}.{matrix}.weight"));
        let each = |matrix: &str, dims| Affine::plain(Spec::each(Part::Experts, name(matrix), experts.num_experts, dims));
        Mlp { hidden: Hidden::Gated { gate: each(gate, [f, d]), up: each(up, [f, d]), glu: experts.glu }, down: each(down, [d, f]) }
    }

    /// The router's matrix.
    pub fn router(&self, tensor: &str, experts: &Experts) -> Spec {
        self.matrix(Part::Router, tensor, [experts.num_experts, self.config.d_model])
    }

    /// A number for each expert.
    pub fn router_bias(&self, tensor: &str, experts: &Experts) -> Spec {
        Spec::bias(Part::Router, self.name(tensor), experts.num_experts).read_as_f32()
    }
}

/// `gate_proj`, `up_proj`, `down_proj`.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// Mixtral's names for them.
pub const W1_W3_W2: [&str; 3] = ["w1", "w3", "w2"];
