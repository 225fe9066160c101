//! GLM-4.5 and 4.6, Zhipu 2025: the experts of DeepSeek-V3 after grouped-query attention, of whose heads a
//! part is rotated.

use super::Family;
use super::block::Block;
use super::common::{self, Names};
use super::config::{self, Config, Dense, QkNorm};
use super::deepseek;
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "GLM-4.5",
    model_types: &["glm4_moe"],
    architectures: &["Glm4MoeForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    top.must_be("hidden_act", "silu".into())?;
    let heads = common::heads(top)?;
    let share = top.partial_rotary_factor()?.unwrap_or(0.5);
    let rotary = common::rotary_dim(top, "partial_rotary_factor", heads.head_dim(), (heads.head_dim() as f32 * share) as usize)?;
    let qk_norm = top.flag("use_qk_norm", false)?.then_some(QkNorm::PerHead);
    Ok(Config {
        attention: config::Attention { qk_norm, qkv_bias: top.flag("attention_bias", false)?, ..config::Attention::default() },
        dense_d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        dense: Dense::First(top.count("first_k_dense_replace", MAX_SIZE)?),
        experts: Some(deepseek::experts(top)?),
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-5),
        ..common::base(top, &FAMILY, heads, (10_000.0, rotary))?
    })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let names = Names::new(config, l);
    let ffn = deepseek::ffn(config, &names, l);
    names.block(ffn)
}
