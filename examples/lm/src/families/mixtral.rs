//! Mixtral 8x7B and 8x22B, Mistral AI 2023: RMSNorm, queries, keys and values by a projection each, a tensor
//! for each matrix of each expert.
//!
//! Two layouts of `config.json` are read: the original one, and the one that newer releases of Hugging Face
//! transformers save. Unknown fields are ignored.

use super::Family;
use super::block::{Block, Experts, Ffn};
use super::common::{self, Names, W1_W3_W2};
use super::config::{self, Config};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "Mixtral",
    model_types: &["mixtral"],
    architectures: &["MixtralForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    // A softmax over all experts, of which the chosen ones are divided by their sum.
    let experts = common::experts(top, ["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    top.size("num_key_value_heads", MAX_SIZE)?; // which is optional elsewhere
    let window = top.optional_size("sliding_window", MAX_SIZE)?;
    let attention = config::Attention { window, ..config::Attention::default() };
    let norm_eps = top.positive("rms_norm_eps")?.unwrap_or(1e-5);
    Ok(Config { attention, experts: Some(experts), norm_eps, ..common::config(top, &FAMILY, 1e6)? })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts) = (Names::new(config, l), config.experts.unwrap_or_default());
    let ffn = Ffn::Experts(Experts::new(
        names.router("block_sparse_moe.gate", &experts),
        names.each_expert("block_sparse_moe.experts", &experts, W1_W3_W2),
    ));
    names.block(ffn)
}
