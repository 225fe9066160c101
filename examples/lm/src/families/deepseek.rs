//! DeepSeek-V3, 2024, and Kimi-K2, Moonshot 2025: multi-head latent attention, experts in groups chosen by
//! sigmoids and a bias, a shared expert, first layers without experts.
//!
//! Attention runs in its expanded form: every head has a key and a value of its own in the cache. The form
//! that caches the latents alone needs kernels of its own, which are not here.

use dropless::HeadLayout;
use dropless::rope::Pairing;
use dropless::router::{GroupScore, Groups, MAX_GROUPS, Normalize, Score};
use serde_json::json;

use super::Family;
use super::block::{self, Affine, Attention, Block, Ffn, Projection};
use super::common::{self, Names, PROJECTIONS};
use super::config::{self, Config, Dense, Experts, Latent, Rope};
use super::fields::{Fields, MAX_SIZE, mscale};
use super::run::failure::{Failure, refuse_file};
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "DeepSeek-V3",
    model_types: &["deepseek_v3", "kimi_k2"],
    architectures: &["DeepseekV3ForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

/// What the norms of the latents add: a constant of the model, not a field.
const LATENT_NORM_EPS: f32 = 1e-6;
/// What is added to the sum that weights are divided by.
const WEIGHT_EPS: f32 = 1e-20;

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    top.must_be("hidden_act", json!("silu"))?;
    top.must_be("attention_bias", json!(false))?;
    top.must_be("moe_layer_freq", json!(1))?;
    let num_heads = top.size("num_attention_heads", MAX_SIZE)?;
    top.must_be("num_key_value_heads", json!(num_heads))?;
    let (fixed, rotary) = (top.size("qk_nope_head_dim", MAX_SIZE)?, top.size("qk_rope_head_dim", MAX_SIZE)?);
    let rotary = common::rotary_dim(top, "qk_rope_head_dim", fixed + rotary, rotary)?;
    let value_dim = top.size("v_head_dim", MAX_SIZE)?;
    let heads = HeadLayout::new(num_heads, num_heads, fixed + rotary).and_then(|heads| heads.with_value_dim(value_dim));
    let heads = heads.or_else(|error| refuse_file(top.file(), error))?;
    let base = common::base(top, &FAMILY, heads, (10_000.0, rotary))?;
    Ok(Config {
        attention: config::Attention {
            scale: Some(scale(top, heads.head_dim())?),
            latent: Some(Latent {
                q_cols: top.optional_size("q_lora_rank", MAX_SIZE)?,
                kv_cols: top.size("kv_lora_rank", MAX_SIZE)?,
                norm_eps: LATENT_NORM_EPS,
            }),
            ..config::Attention::default()
        },
        rope: Rope { pairing: if top.flag("rope_interleave", true)? { Pairing::Interleaved } else { Pairing::Half }, ..base.rope },
        dense_d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        dense: Dense::First(top.count("first_k_dense_replace", MAX_SIZE)?),
        experts: Some(experts(top)?),
        ..base
    })
}

/// Of the scores: longer contexts by YaRN make it larger.
fn scale(top: &Fields<'_>, head_dim: usize) -> Result<f32, Failure> {
    let scaling = top.rope_scaling(top)?;
    let is_yarn = scaling.rope_type() == Some("yarn");
    let plain = (head_dim as f32).sqrt().recip();
    let Some(all) = scaling.positive_or_zero("mscale_all_dim")?.filter(|_| is_yarn) else { return Ok(plain) };
    let growth = mscale(scaling.required("factor")?, all);
    match plain * growth * growth {
        finite if finite.is_finite() => Ok(finite),
        _ => scaling.refuse("mscale_all_dim", format_args!("must give scores a finite factor, got {all:e}")),
    }
}

/// Experts in groups, chosen by sigmoids with a bias, and the shared one.
pub fn experts(top: &Fields<'_>) -> Result<Experts, Failure> {
    top.must_be("scoring_func", json!("sigmoid"))?;
    top.must_be("topk_method", json!("noaux_tc"))?;
    let experts = common::experts(top, ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"])?;
    if top.get("n_shared_experts").is_none() {
        return top.refuse("n_shared_experts", "is missing; null or 0 is none");
    }
    let shared = top.count("n_shared_experts", MAX_SIZE)?;
    let Some(shared_d_ffn) = experts.d_ffn.checked_mul(shared).filter(|cols| *cols as u64 <= MAX_SIZE) else {
        let most = MAX_SIZE / experts.d_ffn as u64;
        return top
            .refuse("n_shared_experts", format_args!("must be <= {most} of moe_intermediate_size = {}, got {shared}", experts.d_ffn));
    };
    Ok(Experts {
        shared_d_ffn,
        score: Score::Sigmoid,
        groups: groups(top, &experts)?,
        normalize: if top.flag("norm_topk_prob", true)? { Normalize::P(1.0) } else { Normalize::None },
        epsilon: WEIGHT_EPS,
        scale: top.required("routed_scaling_factor")?,
        ..experts
    })
}

/// None where all experts are one group.
fn groups(top: &Fields<'_>, experts: &Experts) -> Result<Option<Groups>, Failure> {
    let num_groups = top.optional_size("n_group", MAX_GROUPS as u64)?.unwrap_or(1);
    let top_groups = if num_groups == 1 { 1 } else { top.size("topk_group", MAX_SIZE)? };
    top.at_most("topk_group", top_groups, "n_group", num_groups)?;
    top.divides("n_group", num_groups, "n_routed_experts", experts.num_experts)?;
    let size = experts.num_experts / num_groups;
    if num_groups == 1 {
        return Ok(None);
    }
    if size < 2 {
        return top.refuse("n_group", format_args!("must leave two experts to a group, got {num_groups} groups of {size}"));
    }
    top.at_most("num_experts_per_tok", experts.top_k, "the experts of topk_group groups", top_groups * size)?;
    Ok(Some(Groups::new(num_groups, top_groups, GroupScore::TwoBest)))
}

/// Experts and a shared one, or the MLP of a layer without them.
pub fn ffn(config: &Config, names: &Names<'_>, l: usize) -> Ffn<Spec> {
    let Some(experts) = config.experts.filter(|_| !config.is_dense(l)) else { return names.dense("mlp") };
    let shared = || (names.gated(Part::SharedExpert, "mlp.shared_experts", experts.shared_d_ffn), None);
    Ffn::Experts(block::Experts {
        choice_bias: Some(names.router_bias("mlp.gate.e_score_correction_bias", &experts)),
        shared: (experts.shared_d_ffn > 0).then(shared),
        ..block::Experts::new(names.router("mlp.gate", &experts), names.each_expert("mlp.experts", &experts, PROJECTIONS))
    })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let names = Names::new(config, l);
    let ffn = ffn(config, &names, l);
    Block::new(names.norm("input_layernorm"), attention(config, &names), names.norm("post_attention_layernorm"), ffn)
}

fn attention(config: &Config, names: &Names<'_>) -> Attention<Spec> {
    let Config { d_model: d, heads, ref rope, .. } = *config;
    let (num_heads, rotary) = (heads.num_heads(), rope.rotary_dim);
    let latent = config.attention.latent.unwrap_or(Latent { q_cols: None, kv_cols: 1, norm_eps: LATENT_NORM_EPS });
    let tensor = |name: &str| format!("self_attn.{name}");
    let matrix = |name: &str, dims| names.matrix(Part::Attention, &tensor(name), dims);
    let factors = |name: &str, cols| names.factors(&tensor(name), cols);
    let (q_down, query) = match latent.q_cols {
        Some(cols) => {
            let down = [matrix("q_a_proj", [cols, d]), factors("q_a_layernorm", cols)];
            (Some(down), matrix("q_b_proj", [heads.q_cols(), cols]))
        }
        None => (None, matrix("q_proj", [heads.q_cols(), d])),
    };
    let kv_cols = num_heads * (heads.head_dim() - rotary + heads.value_dim());
    let latent = block::Latent {
        q_down,
        query,
        kv_down: matrix("kv_a_proj_with_mqa", [latent.kv_cols + rotary, d]),
        kv_norm: factors("kv_a_layernorm", latent.kv_cols),
        kv: matrix("kv_b_proj", [kv_cols, latent.kv_cols]),
    };
    Attention::new(Projection::Latent(latent), Affine::plain(matrix("o_proj", [d, heads.context_cols()])))
}
