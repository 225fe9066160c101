//! Mixtral 8x7B and 8x22B, Mistral AI 2023: RMSNorm, queries, keys and values by a projection each, a tensor
//! for each matrix of each expert.
//!
//! Two layouts of `config.json` are read: the original one, and the one that newer releases of Hugging Face
//! transformers save. Unknown fields are ignored.

use dropless::layout::MAX_EXPERTS;
use dropless::{ExpertWeights, HeadLayout, WeightRows, moe};
use serde_json::json;

use super::Family;
use super::config::Config;
use super::decoder::{Decoder, Layer, Layers, Made, MadeLayer, Spec, Step};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::{Failure, refuse_file};
use super::run::json::Value;
use super::run::weights::Matrices;

pub const FAMILY: Family = Family {
    title: "Mixtral",
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    positions_field: "max_position_embeddings",
    config,
    outside: |config| outside(config).into(),
    of_layer: |config, l| of_layer(config, l).into(),
    decoder,
    layer,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    // What would make it another model than the one that is computed here.
    top.must_be("model_type", json!("mixtral"))?;
    top.must_be("hidden_act", json!("silu"))?;
    top.must_be("tie_word_embeddings", json!(false))?;
    for absent in ["sliding_window", "quantization_config", "rope_scaling"] {
        top.must_be(absent, Value::Null)?;
    }

    let d_model = top.size("hidden_size", MAX_SIZE)?;
    let num_heads = top.size("num_attention_heads", MAX_SIZE)?;
    let num_kv_heads = top.size("num_key_value_heads", MAX_SIZE)?;
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
    let num_experts = top.size("num_local_experts", MAX_EXPERTS as u64)?;
    let top_k = top.size("num_experts_per_tok", MAX_SIZE)?;
    top.at_most("num_experts_per_tok", top_k, "num_local_experts", num_experts)?;
    let heads = HeadLayout::new(num_heads, num_kv_heads, head_dim).or_else(|error| refuse_file(top.file(), error))?;
    Ok(Config {
        family: &FAMILY,
        num_layers: top.size("num_hidden_layers", MAX_SIZE)?,
        d_model,
        heads,
        d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        num_experts,
        top_k,
        vocab: top.size("vocab_size", MAX_SIZE)?,
        max_positions: top.optional_size("max_position_embeddings", MAX_SIZE)?.unwrap_or(131_072),
        rope_theta: top.rope_theta(top, 1_000_000.0)?,
        clip: None,
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-5),
        // A softmax over all experts, of which the chosen ones are divided by their sum: a softmax over these
        // alone.
        weight_norm: Some(1.0),
        dtype: top.dtype(),
    })
}

/// Embedding, last norm, head.
fn outside(config: &Config) -> [Spec; 3] {
    let Config { d_model: d, vocab, .. } = *config;
    [
        Spec::embedding("model.embed_tokens.weight".into(), [vocab, d]),
        Spec::norm("model.norm.weight".into(), d),
        Spec::linear("lm_head.weight".into(), [vocab, d]),
    ]
}

/// A layer's norm, query, key, value and output projections; norm, router, gate, up, down.
fn of_layer(config: &Config, l: usize) -> [Spec; 10] {
    let Config { d_model: d, d_ffn: f, num_experts, heads, .. } = *config;
    let name = |tensor: &str| format!("model.layers.{l}.{tensor}.weight");
    let of_expert = |e: usize, w: &str| name(&format!("block_sparse_moe.experts.{e}.{w}"));
    let each = |w: &str, dims| Spec::each((0..num_experts).map(|e| of_expert(e, w)).collect(), dims);
    [
        Spec::norm(name("input_layernorm"), d),
        Spec::linear(name("self_attn.q_proj"), [heads.q_cols(), d]),
        Spec::linear(name("self_attn.k_proj"), [heads.kv_cols(), d]),
        Spec::linear(name("self_attn.v_proj"), [heads.kv_cols(), d]),
        Spec::linear(name("self_attn.o_proj"), [d, heads.q_cols()]),
        Spec::norm(name("post_attention_layernorm"), d),
        Spec::linear(name("block_sparse_moe.gate"), [num_experts, d]),
        each("w1", [f, d]),
        each("w3", [f, d]),
        each("w2", [d, f]),
    ]
}

struct Mixtral<'w> {
    embedding: WeightRows<'w>, // [V, D]
    layers: Box<dyn Layers + 'w>,
    final_norm: WeightRows<'w>, // [1, D]
    head: ExpertWeights<'w>,    // [V, D]
}

struct MixtralLayer<'w> {
    norm_1: WeightRows<'w>,      // [1, D]
    qkv: [ExpertWeights<'w>; 3], // [H d, D], [Hkv d, D], [Hkv d, D]
    o_proj: ExpertWeights<'w>,   // [D, H d]
    norm_2: WeightRows<'w>,      // [1, D]
    moe: moe::Weights<'w>,       // gate w1, up w3: E x [F, D]; down w2: E x [D, F]
}

fn layer<'w>(config: &Config, l: usize, weights: &'w Matrices<'w>) -> MadeLayer<'w> {
    let e = config.num_experts;
    let [norm_1, q, k, v, o_proj, norm_2, gate, w1, w3, w2] = weights.of(of_layer(config, l))?;
    let experts = moe::Experts::gated(w1.experts_nk(e)?, w3.experts_nk(e)?, w2.experts_nk(e)?);
    Ok(Box::new(MixtralLayer {
        norm_1: norm_1.rows(),
        qkv: [q.linear()?, k.linear()?, v.linear()?],
        o_proj: o_proj.linear()?,
        norm_2: norm_2.rows(),
        moe: moe::Weights::new(gate.rows(), experts),
    }))
}

fn decoder<'w>(config: &Config, weights: &'w Matrices<'w>, layers: Box<dyn Layers + 'w>) -> Made<'w> {
    let [embedding, final_norm, head] = weights.of(outside(config))?;
    let (embedding, final_norm, head) = (embedding.rows(), final_norm.rows(), head.linear()?);
    Ok(Box::new(Mixtral { embedding, layers, final_norm, head }))
}

impl Layer for MixtralLayer<'_> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.rms_norm(self.norm_1)?; //            n = norm_1(x)
        s.project(&self.qkv)?; //               q, k, v = n q_proj^T, n k_proj^T, n v_proj^T
        s.attend()?; //                         c = attention(rotate(q), rotate(k), v)
        s.add_projected(self.o_proj)?; //       x = x + c o_proj^T
        s.rms_norm(self.norm_2)?; //            n = norm_2(x)
        s.add_experts(&self.moe) //             x = x + moe(n)
    }
}

impl Decoder for Mixtral<'_> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.embed(self.embedding)?; //            x = embedding[ids]
        self.layers.step(s)?; //                x = layer(x), for each layer
        s.rms_norm(self.final_norm) //          n = final_norm(x), of which the head gives logits
    }

    fn head(&self) -> ExpertWeights<'_> {
        self.head
    }
}
