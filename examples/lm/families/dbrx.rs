//! DBRX, Databricks 2024: LayerNorm, one fused projection whose results are clipped, experts stacked in one
//! tensor each.
//!
//! Two layouts of `config.json` are read: the original one, and the longer one that newer releases of Hugging
//! Face transformers save. Unknown fields are ignored. Absent and null differ for
//! `moe_normalize_expert_weights`: absent means 1, null means no normalisation.

use dropless::layout::MAX_EXPERTS;
use dropless::router::Normalize;
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
    title: "DBRX",
    model_type: "dbrx",
    architecture: "DbrxForCausalLM",
    positions_field: "max_seq_len",
    config,
    outside: |config| outside(config).into(),
    of_layer: |config, l| of_layer(config, l).into(),
    decoder,
    layer,
};

/// What LayerNorm adds to the variance: a constant of the model, not a field.
const NORM_EPS: f32 = 1e-5;

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let (attention, ffn) = (top.section("attn_config.")?, top.section("ffn_config.")?);

    // What would make it another model than the one that is computed here.
    top.must_be("model_type", json!("dbrx"))?;
    top.must_be("tie_word_embeddings", json!(false))?;
    top.must_be("quantization_config", Value::Null)?;
    ffn.must_be("ffn_act_fn", json!({ "name": "silu" }))?;
    for section in [top, &attention] {
        section.must_be("attn_type", json!("grouped_query_attention"))?;
        section.must_be("rope_scaling", Value::Null)?;
    }

    let (num_layers, d_model) = (top.size("n_layers", MAX_SIZE)?, top.size("d_model", MAX_SIZE)?);
    let (num_heads, num_kv_heads) = (top.size("n_heads", MAX_SIZE)?, attention.size("kv_n_heads", MAX_SIZE)?);
    top.divides("n_heads", num_heads, "d_model", d_model)?;
    attention.divides("kv_n_heads", num_kv_heads, "n_heads", num_heads)?;
    let head_dim = d_model / num_heads;
    if !head_dim.is_multiple_of(2) {
        return top.refuse("n_heads", format_args!("must give heads of even size, got d_model / n_heads = {head_dim}"));
    }
    let num_experts = ffn.size("moe_num_experts", MAX_EXPERTS as u64)?;
    let top_k = ffn.size("moe_top_k", MAX_SIZE)?;
    ffn.at_most("moe_top_k", top_k, "moe_num_experts", num_experts)?;
    let heads = HeadLayout::new(num_heads, num_kv_heads, head_dim).or_else(|error| refuse_file(top.file(), error))?;
    Ok(Config {
        family: &FAMILY,
        num_layers,
        d_model,
        heads,
        d_ffn: ffn.size("ffn_hidden_size", MAX_SIZE)?,
        num_experts,
        top_k,
        vocab: top.size("vocab_size", MAX_SIZE)?,
        max_positions: top.optional_size("max_seq_len", MAX_SIZE)?.unwrap_or(2048),
        rope_theta: top.rope_theta(&attention, 10_000.0)?,
        clip: attention.positive("clip_qkv")?,
        norm_eps: NORM_EPS,
        weight_norm: match ffn.get("moe_normalize_expert_weights") {
            None => Some(1.0),
            Some(_) => ffn.positive("moe_normalize_expert_weights")?,
        },
        dtype: top.dtype(),
    })
}

/// Embedding, last norm, head.
fn outside(config: &Config) -> [Spec; 3] {
    let Config { d_model: d, vocab, .. } = *config;
    [
        Spec::embedding("transformer.wte.weight".into(), [vocab, d]),
        Spec::norm("transformer.norm_f.weight".into(), d),
        Spec::linear("lm_head.weight".into(), [vocab, d]),
    ]
}

/// A layer's norm, fused projection, projection; norm, router, gate, up, down.
fn of_layer(config: &Config, l: usize) -> [Spec; 8] {
    let Config { d_model: d, d_ffn: f, num_experts: e, heads, .. } = *config;
    let name = |tensor: &str| format!("transformer.blocks.{l}.{tensor}");
    [
        Spec::norm(name("norm_attn_norm.norm_1.weight"), d),
        Spec::linear(name("norm_attn_norm.attn.Wqkv.weight"), [heads.qkv_cols(), d]),
        Spec::linear(name("norm_attn_norm.attn.out_proj.weight"), [d, d]),
        Spec::norm(name("norm_attn_norm.norm_2.weight"), d),
        Spec::linear(name("ffn.router.layer.weight"), [e, d]),
        Spec::linear(name("ffn.experts.mlp.w1"), [e * f, d]),
        Spec::linear(name("ffn.experts.mlp.v1"), [e * f, d]),
        // Its rows are its inputs.
        Spec { inputs: Some(f), ..Spec::linear(name("ffn.experts.mlp.w2"), [e * f, d]) },
    ]
}

struct Dbrx<'w> {
    embedding: WeightRows<'w>, // [V, D]
    layers: Box<dyn Layers + 'w>,
    final_norm: WeightRows<'w>, // [1, D]
    head: ExpertWeights<'w>,    // [V, D]
}

struct DbrxLayer<'w> {
    norm_1: WeightRows<'w>,      // [1, D]
    wqkv: ExpertWeights<'w>,     // [(H + 2 Hkv) d, D]
    out_proj: ExpertWeights<'w>, // [D, H d]
    norm_2: WeightRows<'w>,      // [1, D]
    moe: moe::Weights<'w>,       // gate w1, up v1, down w2: [E F, D]
}

fn layer<'w>(config: &Config, l: usize, weights: &'w Matrices<'w>) -> MadeLayer<'w> {
    let e = config.num_experts;
    let normalize = config.weight_norm.map_or(Normalize::None, Normalize::P);
    let [norm_1, wqkv, out_proj, norm_2, router, w1, v1, w2] = weights.of(of_layer(config, l))?;
    let experts = moe::Experts::gated(w1.experts_nk(e)?, v1.experts_nk(e)?, w2.experts_kn(e)?);
    Ok(Box::new(DbrxLayer {
        norm_1: norm_1.rows(),
        wqkv: wqkv.linear()?,
        out_proj: out_proj.linear()?,
        norm_2: norm_2.rows(),
        moe: moe::Weights::new(router.rows(), experts).with_choice(normalize.into()),
    }))
}

fn decoder<'w>(config: &Config, weights: &'w Matrices<'w>, layers: Box<dyn Layers + 'w>) -> Made<'w> {
    let [embedding, final_norm, head] = weights.of(outside(config))?;
    let (embedding, final_norm, head) = (embedding.rows(), final_norm.rows(), head.linear()?);
    Ok(Box::new(Dbrx { embedding, layers, final_norm, head }))
}

impl Layer for DbrxLayer<'_> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.layer_norm(self.norm_1)?; //          n = norm_1(x)
        s.project(&[self.wqkv])?; //            q, k, v = n wqkv^T
        s.attend()?; //                         c = attention(rotate(clip(q)), rotate(clip(k)), clip(v))
        s.add_projected(self.out_proj)?; //     x = x + c out_proj^T
        s.layer_norm(self.norm_2)?; //          n = norm_2(x)
        s.add_experts(&self.moe) //             x = x + moe(n)
    }
}

impl Decoder for Dbrx<'_> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        s.embed(self.embedding)?; //            x = embedding[ids]
        self.layers.step(s)?; //                x = layer(x), for each layer
        s.layer_norm(self.final_norm) //        n = final_norm(x), of which the head gives logits
    }

    fn head(&self) -> ExpertWeights<'_> {
        self.head
    }
}
