//! Llama 1 to 3, Meta 2023, and Mistral 7B: dense layers, RMSNorm, gated MLP.

use super::Family;
use super::block::Block;
use super::common::{self, Names};
use super::config::{self, Config};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "Llama",
    model_types: &["llama"],
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

/// The same with a window.
pub const MISTRAL: Family =
    Family { title: "Mistral", model_types: &["mistral"], architectures: &["MistralForCausalLM"], config: mistral, ..FAMILY };

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    top.must_be("mlp_bias", false.into())?;
    let has_bias = top.flag("attention_bias", false)?;
    let attention = config::Attention { qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() };
    dense(top, &FAMILY, attention)
}

fn mistral(top: &Fields<'_>) -> Result<Config, Failure> {
    let window = top.optional_size("sliding_window", MAX_SIZE)?;
    dense(top, &MISTRAL, config::Attention { window, ..config::Attention::default() })
}

fn dense(top: &Fields<'_>, family: &'static Family, attention: config::Attention) -> Result<Config, Failure> {
    let dense_d_ffn = top.size("intermediate_size", MAX_SIZE)?;
    Ok(Config { attention, dense_d_ffn, ..common::config(top, family, 10_000.0)? })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let names = Names::new(config, l);
    Block::new(names.norm("input_layernorm"), names.attention("self_attn"), names.norm("post_attention_layernorm"), names.dense("mlp"))
}
