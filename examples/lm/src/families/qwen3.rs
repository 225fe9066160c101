//! Qwen3 and Qwen3-MoE, Alibaba 2025: 0.6B to 32B, 30B-A3B and 235B-A22B. Queries and keys are normalised
//! head by head.

use super::Family;
use super::block::{Block, Experts, Ffn};
use super::common::{self, Names, PROJECTIONS};
use super::config::{self, Config, QkNorm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "Qwen3-MoE",
    model_types: &["qwen3_moe"],
    architectures: &["Qwen3MoeForCausalLM"],
    positions_field: "max_position_embeddings",
    config: sparse,
    describe_outside: common::outside,
    describe,
};

/// The same without experts.
pub const DENSE: Family = Family { title: "Qwen3", model_types: &["qwen3"], architectures: &["Qwen3ForCausalLM"], config: dense, ..FAMILY };

fn sparse(top: &Fields<'_>) -> Result<Config, Failure> {
    let mut experts =
        common::experts(top, [top.either("num_experts", "num_local_experts"), "num_experts_per_tok", "moe_intermediate_size"])?;
    experts.normalize = common::norm_topk_prob(top)?;
    Ok(Config { experts: Some(experts), dense: common::sparse_steps(top)?, ..config(top, &FAMILY)? })
}

fn dense(top: &Fields<'_>) -> Result<Config, Failure> {
    // Where it is missing, a head of Qwen3 has 128 elements, and not its share of the model's.
    top.size("head_dim", MAX_SIZE)?;
    config(top, &DENSE)
}

fn config(top: &Fields<'_>, family: &'static Family) -> Result<Config, Failure> {
    top.must_be("use_sliding_window", false.into())?;
    let has_bias = top.flag("attention_bias", false)?;
    let qk_norm = Some(QkNorm::PerHead);
    Ok(Config {
        attention: config::Attention { qk_norm, qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() },
        dense_d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        ..common::config(top, family, 10_000.0)?
    })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let names = Names::new(config, l);
    let ffn = match config.experts.filter(|_| !config.is_dense(l)) {
        None => names.dense("mlp"),
        Some(experts) => {
            Ffn::Experts(Experts::new(names.router("mlp.gate", &experts), names.each_expert("mlp.experts", &experts, PROJECTIONS)))
        }
    };
    names.block(ffn)
}
