//! Qwen2-MoE and Qwen1.5-MoE, Alibaba 2024: biases on queries, keys and values, a shared expert with a
//! sigmoid.

use super::Family;
use super::block::{Block, Experts, Ffn};
use super::common::{self, Names, PROJECTIONS};
use super::config::{self, Config};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "Qwen2-MoE",
    model_types: &["qwen2_moe"],
    architectures: &["Qwen2MoeForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    top.must_be("use_sliding_window", false.into())?;
    let mut experts = common::experts(top, ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])?;
    experts.normalize = common::norm_topk_prob(top)?;
    experts.shared_d_ffn = top.size("shared_expert_intermediate_size", MAX_SIZE)?;
    Ok(Config {
        attention: config::Attention { qkv_bias: top.flag("qkv_bias", true)?, ..config::Attention::default() },
        experts: Some(experts),
        dense: common::sparse_steps(top)?,
        dense_d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        ..common::config(top, &FAMILY, 10_000.0)?
    })
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let names = Names::new(config, l);
    let ffn = match config.experts.filter(|_| !config.is_dense(l)) {
        None => names.dense("mlp"),
        Some(experts) => Ffn::Experts(Experts {
            shared: Some((
                names.gated(Part::SharedExpert, "mlp.shared_expert", experts.shared_d_ffn),
                Some(names.matrix(Part::SharedExpert, "mlp.shared_expert_gate", [1, config.d_model]).read_as_floats()),
            )),
            ..Experts::new(names.router("mlp.gate", &experts), names.each_expert("mlp.experts", &experts, PROJECTIONS))
        }),
    };
    names.block(ffn)
}
