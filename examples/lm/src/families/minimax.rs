//! MiniMax-M2, 2025: sigmoid router with a bias, queries and keys normalised over all heads together, of each
//! head a part rotated.

use dropless::router::Score;
use serde_json::json;

use super::Family;
use super::block::{Block, Experts, Ffn};
use super::common::{self, Names, W1_W3_W2};
use super::config::{self, Config, QkNorm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::run::input::brief;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "MiniMax-M2",
    model_types: &["minimax_m2", "minimax"],
    architectures: &["MiniMaxM2ForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    for (field, value) in [
        ("hidden_act", json!("silu")),
        ("scoring_func", json!("sigmoid")),
        ("qk_norm_type", json!("per_layer")),
        ("use_routing_bias", json!(true)),
        ("shared_intermediate_size", json!(0)),
    ] {
        top.must_be(field, value)?;
    }
    // A 1 stands for softmax attention; linear attention is another model's.
    if let Some(kind) = top.list("attn_type_list")?.iter().find(|kind| kind.as_u64() != Some(1)) {
        return top.refuse("attn_type_list", format_args!("must hold nothing but 1, got {}", brief(kind)));
    }
    let mut experts = common::experts(top, ["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    experts.score = Score::Sigmoid;
    let heads = common::heads(top)?;
    let share = top.partial_rotary_factor()?.unwrap_or(1.0) * heads.head_dim() as f32;
    let rotary = top.optional_size("rotary_dim", MAX_SIZE)?.unwrap_or(share as usize);
    let rotary = common::rotary_dim(top, "rotary_dim", heads.head_dim(), rotary)?;
    let qk_norm = top.flag("use_qk_norm", true)?.then_some(QkNorm::FullWidth);
    Ok(Config {
        attention: config::Attention { qk_norm, ..config::Attention::default() },
        experts: Some(experts),
        ..common::base(top, &FAMILY, heads, (5e6, rotary))?
    })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts) = (Names::new(config, l), config.experts.unwrap_or_default());
    let ffn = Ffn::Experts(Experts {
        choice_bias: Some(names.router_bias("block_sparse_moe.e_score_correction_bias", &experts)),
        ..Experts::new(names.router("block_sparse_moe.gate", &experts), names.each_expert("block_sparse_moe.experts", &experts, W1_W3_W2))
    });
    names.block(ffn)
}
