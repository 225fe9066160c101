//! Granite 3.0 MoE, IBM 2024: factors of embedding, scores, residual and logits; gate and up of all experts
//! in one tensor.

use dropless::activation::Glu;
use dropless::router::{Normalize, Score};

use super::Family;
use super::block::{Affine, Block, Experts, Ffn, Hidden, Mlp};
use super::common::{self, Names};
use super::config::{self, Config, Factors};
use super::fields::Fields;
use super::run::failure::Failure;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "Granite-MoE",
    model_types: &["granitemoe"],
    architectures: &["GraniteMoeForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let mut experts = common::experts(top, ["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    (experts.score, experts.normalize) = (Score::SoftmaxOverChosen, Normalize::None);
    let has_bias = top.flag("attention_bias", false)?;
    let factor = |name| Ok::<_, Failure>(top.positive(name)?.unwrap_or(1.0));
    Ok(Config {
        attention: config::Attention {
            scale: Some(factor("attention_multiplier")?),
            qkv_bias: has_bias,
            out_bias: has_bias,
            ..config::Attention::default()
        },
        experts: Some(experts),
        factors: Factors {
            embedding: factor("embedding_multiplier")?,
            residual: factor("residual_multiplier")?,
            logits: logits_factor(top)?,
        },
        ..common::config(top, &FAMILY, 10_000.0)?
    })
}

/// Logits are divided by what the field says.
fn logits_factor(top: &Fields<'_>) -> Result<f32, Failure> {
    let divisor = top.positive("logits_scaling")?.unwrap_or(1.0);
    match 1.0 / divisor {
        finite if finite.is_finite() => Ok(finite),
        _ => top.refuse("logits_scaling", format_args!("must have a finite reciprocal, got {divisor:e}")),
    }
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts, d) = (Names::new(config, l), config.experts.unwrap_or_default(), config.d_model);
    let stacked = |tensor: &str, dims| {
        let name = names.name(&format!("block_sparse_moe.{tensor}.weight"));
        Affine::plain(Spec::stacked(Part::Experts, name, experts.num_experts, dims))
    };
    let both = stacked("input_linear", [2 * experts.d_ffn, d]);
    let both = Affine { weight: both.weight.in_halves(), ..both };
    let ffn = Ffn::Experts(Experts::new(
        names.router("block_sparse_moe.router.layer", &experts),
        Mlp { hidden: Hidden::Halves { both, glu: Glu::Silu }, down: stacked("output_linear", [d, experts.d_ffn]) },
    ));
    names.block(ffn)
}
