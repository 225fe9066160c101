//! Grok-1, xAI 2024: factors of embedding and logits, capped scores, a norm after attention and after the
//! experts, whose gate is a GELU. The names are those of the checkpoints that were converted to PyTorch.

use dropless::activation::Glu;
use dropless::router::Normalize;

use super::Family;
use super::block::{Affine, Block, Experts, Ffn, Outside, Residual};
use super::common::{self, Names};
use super::config::{self, Config, Factors};
use super::fields::Fields;
use super::run::failure::Failure;
use super::spec::Spec;

pub const FAMILY: Family = Family {
    title: "Grok-1",
    model_types: &["grok-1", "grok_1"],
    architectures: &["Grok1ModelForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let mut experts = common::experts(top, ["num_experts", "num_experts_per_tok", "intermediate_size"])?;
    (experts.normalize, experts.glu) = (Normalize::None, Glu::GeluTanh);
    let heads = common::heads(top)?;
    let factor = |name| Ok::<_, Failure>(top.positive(name)?.unwrap_or(1.0));
    Ok(Config {
        attention: config::Attention {
            scale: top.positive("attn_output_multiplier")?,
            softcap: Some(top.positive("max_attn_value")?.unwrap_or(30.0)),
            ..config::Attention::default()
        },
        experts: Some(experts),
        factors: Factors {
            embedding: factor("embedding_multiplier_scale")?,
            logits: factor("output_multiplier_scale")?,
            ..Factors::default()
        },
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-5),
        is_tied: top.flag("tie_word_embeddings", true)?,
        ..common::base(top, &FAMILY, heads, (10_000.0, heads.head_dim()))?
    })
}

fn describe_outside(config: &Config) -> Outside<Spec> {
    Outside { final_norm: Affine::plain(Spec::norm("model.norm.scale", config.d_model)), ..common::outside(config) }
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts) = (Names::new(config, l), config.experts.unwrap_or_default());
    let norm = |name: &str| Affine::plain(Spec::norm(names.name(&format!("{name}.scale")), config.d_model));
    let ffn = Ffn::Experts(Experts::new(
        names.router("moe_block.gate", &experts),
        names.each_expert("moe_block.experts", &experts, ["linear", "linear_v", "linear_1"]),
    ));
    let residual = Residual::Normed([norm("post_attn_norm"), norm("post_moe_norm")]);
    Block { residual, ..Block::new(norm("pre_attn_norm"), names.attention("attn"), norm("pre_moe_norm"), ffn) }
}
