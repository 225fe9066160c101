//! Phi-3.5-MoE, Microsoft 2024: LayerNorm and projections with biases, LongRoPE, a router that weighs each of
//! its two experts among those that are close to it.

use dropless::router::{Normalize, Score};
use serde_json::json;

use super::Family;
use super::block::{Affine, Block, Experts, Ffn, Outside};
use super::common::{self, Names, W1_W3_W2};
use super::config::{self, Config, Norm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "Phi-3.5-MoE",
    model_types: &["phimoe"],
    architectures: &["PhimoeForCausalLM", "PhiMoEForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    top.must_be("lm_head_bias", json!(true))?;
    top.must_be("tie_word_embeddings", json!(false))?;
    top.must_be("num_experts_per_tok", json!(2))?; // the router knows no other number
    let mut experts = common::experts(top, ["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    let jitter = top.required("router_jitter_noise")?;
    (experts.score, experts.normalize) = (Score::SparseMixer { jitter }, Normalize::None);
    let has_bias = top.flag("attention_bias", true)?;
    let window = top.optional_size("sliding_window", MAX_SIZE)?;
    Ok(Config {
        attention: config::Attention { window, qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() },
        norm: Norm::Layer,
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-5),
        experts: Some(experts),
        ..common::config(top, &FAMILY, 1e6)?
    })
}

fn describe_outside(config: &Config) -> Outside<Spec> {
    let Config { vocab, d_model, .. } = *config;
    let Outside { embedding, final_norm, head } = common::outside(config);
    Outside {
        embedding,
        final_norm: Affine { bias: Some(Spec::bias(Part::Norms, "model.norm.bias", d_model)), ..final_norm },
        head: head.map(|head| Affine { bias: Some(Spec::bias(Part::Head, "lm_head.bias", vocab)), ..head }),
    }
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts) = (Names::new(config, l), config.experts.unwrap_or_default());
    let ffn = Ffn::Experts(Experts::new(
        names.router("block_sparse_moe.gate", &experts),
        names.each_expert("block_sparse_moe.experts", &experts, W1_W3_W2),
    ));
    let norm_2 = names.biased_norm("post_attention_layernorm");
    Block::new(names.biased_norm("input_layernorm"), names.attention("self_attn"), norm_2, ffn)
}
