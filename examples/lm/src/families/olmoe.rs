//! OLMoE, Ai2 2024: queries and keys are normalised over all heads together, weights do not add up to 1.

use super::Family;
use super::block::{Block, Experts, Ffn};
use super::common::{self, Names, PROJECTIONS};
use super::config::{self, Config, QkNorm};
use super::fields::Fields;
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "OLMoE",
    model_types: &["olmoe"],
    architectures: &["OlmoeForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let mut experts = common::experts(top, ["num_experts", "num_experts_per_tok", "intermediate_size"])?;
    experts.normalize = common::norm_topk_prob(top)?;
    let (has_bias, qk_norm) = (top.flag("attention_bias", false)?, Some(QkNorm::FullWidth));
    let clip = top.positive("clip_qkv")?;
    let attention = config::Attention { clip, qk_norm, qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() };
    let norm_eps = top.positive("rms_norm_eps")?.unwrap_or(1e-5);
    Ok(Config { attention, experts: Some(experts), norm_eps, ..common::config(top, &FAMILY, 10_000.0)? })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts) = (Names::new(config, l), config.experts.unwrap_or_default());
    let ffn = Ffn::Experts(Experts::new(names.router("mlp.gate", &experts), names.each_expert("mlp.experts", &experts, PROJECTIONS)));
    names.block(ffn)
}
