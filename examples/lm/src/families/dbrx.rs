//! DBRX, Databricks 2024: LayerNorm without a bias, one fused projection whose results are clipped, experts
//! stacked in one tensor each.
//!
//! Two layouts of `config.json` are read: the original one, and the longer one that newer releases of Hugging
//! Face transformers save. Unknown fields are ignored. Absent and null differ for
//! `moe_normalize_expert_weights`: absent means 1, null means no normalisation.

use dropless::HeadLayout;
use dropless::activation::{Activation, Glu};
use dropless::layout::MAX_EXPERTS;
use dropless::router::Normalize;
use serde_json::json;

use super::Family;
use super::block::{self, Affine, Attention, Block, Ffn, Hidden, Mlp, Outside, Projection};
use super::config::{self, Config, Dense, Experts, Factors, Norm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::{Failure, refuse_file};
use super::run::json::Value;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "DBRX",
    model_types: &["dbrx"],
    architectures: &["DbrxForCausalLM"],
    positions_field: "max_seq_len",
    config,
    describe_outside,
    describe,
};

/// What LayerNorm adds to the variance: a constant of the model, not a field.
const NORM_EPS: f32 = 1e-5;

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let (attention, ffn) = (top.section("attn_config.")?, top.section("ffn_config.")?);

    // What would make it another model than the one that is computed here.
    top.must_be("model_type", json!("dbrx"))?;
    top.must_be("tie_word_embeddings", json!(false))?;
    ffn.must_be("ffn_act_fn", json!({ "name": "silu" }))?;
    for section in [top, &attention] {
        section.must_be("attn_type", json!("grouped_query_attention"))?;
        section.must_be("rope_scaling", Value::Null)?;
    }
    let rope = top.section("rope_parameters.")?;
    ["rope_type", "type"].iter().try_for_each(|name| rope.must_be(name, json!("default")))?;

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
    let norm = match ffn.get("moe_normalize_expert_weights") {
        None => Some(1.0),
        Some(_) => ffn.positive("moe_normalize_expert_weights")?,
    };
    let max_positions = top.optional_size("max_seq_len", MAX_SIZE)?.unwrap_or(2048);
    Ok(Config {
        family: &FAMILY,
        num_layers,
        d_model,
        vocab: top.size("vocab_size", MAX_SIZE)?,
        max_positions,
        heads,
        attention: config::Attention { clip: attention.positive("clip_qkv")?, ..config::Attention::default() },
        rope: top.rope(&attention, 10_000.0, head_dim, max_positions)?,
        norm: Norm::Layer,
        norm_eps: NORM_EPS,
        activation: Activation::Identity,
        dense_d_ffn: 0,
        dense: Dense::First(0),
        experts: Some(Experts {
            num_experts,
            top_k,
            d_ffn: ffn.size("ffn_hidden_size", MAX_SIZE)?,
            normalize: norm.map_or(Normalize::None, Normalize::P),
            ..Experts::default()
        }),
        factors: Factors::default(),
        is_tied: false,
        is_parallel: false,
        quantization: None,
        dtype: top.dtype(),
    })
}

fn describe_outside(config: &Config) -> Outside<Spec> {
    let Config { d_model: d, vocab, .. } = *config;
    Outside {
        embedding: Spec::embedding("transformer.wte.weight", [vocab, d]),
        final_norm: Affine::plain(Spec::norm("transformer.norm_f.weight", d)),
        head: Some(Affine::plain(Spec::linear(Part::Head, "lm_head.weight", [vocab, d]))),
    }
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let Config { d_model: d, heads, .. } = *config;
    let Experts { num_experts: e, d_ffn: f, .. } = config.experts.unwrap_or_default();
    let name = |tensor: &str| format!("transformer.blocks.{l}.{tensor}");
    let norm = |tensor: &str| Affine::plain(Spec::norm(name(tensor), d));
    let attention = |tensor: &str, dims| Affine::plain(Spec::linear(Part::Attention, name(tensor), dims));
    // The experts' matrices lie one below the other; those of w2 have their inputs as rows.
    let experts = |tensor: &str| Affine::plain(Spec::stacked(Part::Experts, name(tensor), e, [f, d]).flat());
    let down = Affine::plain(Spec::stacked_kn(Part::Experts, name("ffn.experts.mlp.w2"), e, [f, d]).flat());
    let (gate, up) = (experts("ffn.experts.mlp.w1"), experts("ffn.experts.mlp.v1"));
    let ffn = Ffn::Experts(block::Experts::new(
        Spec::linear(Part::Router, name("ffn.router.layer.weight"), [e, d]),
        Mlp { hidden: Hidden::Gated { gate, up, glu: Glu::Silu }, down },
    ));
    let fused = vec![attention("norm_attn_norm.attn.Wqkv.weight", [heads.qkv_cols(), d])];
    let out = attention("norm_attn_norm.attn.out_proj.weight", [d, d]);
    Block::new(
        norm("norm_attn_norm.norm_1.weight"),
        Attention::new(Projection::Rows(fused), out),
        norm("norm_attn_norm.norm_2.weight"),
        ffn,
    )
}
