//! gpt-oss 20b and 120b, OpenAI 2025: biases everywhere, attention sinks, a window in every second layer,
//! YaRN, a clamped gate whose columns and those of up are interleaved.
//!
//! The layout is that of transformers: weights of 16 or 32 bits have an expert's inputs as rows, the
//! published MXFP4 blocks its outputs.

use dropless::activation::Glu;
use dropless::router::{Normalize, Score};

use super::Family;
use super::block::{Affine, Attention, Block, Experts, Ffn, Hidden, Mlp};
use super::common::{self, Names};
use super::config::{self, Config, Slides};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::run::input::brief;
use super::run::json::Value;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "gpt-oss",
    model_types: &["gpt_oss"],
    architectures: &["GptOssForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside: common::outside,
    describe,
};

/// The factor within the sigmoid of a gate, where no field says it, and what is added to up.
const ALPHA: f32 = 1.702;
const ADDED: f32 = 1.0;

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let mut experts = common::experts(top, ["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    (experts.score, experts.normalize, experts.interleaved) = (Score::SoftmaxOverChosen, Normalize::None, true);
    let has_bias = top.flag("attention_bias", true)?;
    let scaling = top.rope_scaling(top)?;
    if scaling.get(scaling.either("rope_type", "type")).is_none() {
        return top.refuse("rope_scaling", "is missing");
    }
    let base = common::config(top, &FAMILY, 150_000.0)?;
    let window = Some(top.size("sliding_window", MAX_SIZE)?);
    let slides = slides(top, base.num_layers)?;
    Ok(Config {
        attention: config::Attention { window, slides, qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() },
        experts: Some(config::Experts { glu: glu(top)?, ..experts }),
        norm_eps: top.positive("rms_norm_eps")?.unwrap_or(1e-5),
        ..base
    })
}

fn glu(top: &Fields<'_>) -> Result<Glu, Failure> {
    let alpha = top.positive("swiglu_alpha")?.unwrap_or(ALPHA);
    Ok(Glu::Clamped { alpha, limit: top.positive("swiglu_limit")?.unwrap_or(7.0), added: ADDED })
}

/// Which layers have a window: by `layer_types`, or the first one and every second one after it.
fn slides(top: &Fields<'_>, num_layers: usize) -> Result<Slides, Failure> {
    let kinds = top.list("layer_types")?;
    if kinds.is_empty() {
        return Ok(Slides::EverySecond);
    }
    if kinds.len() != num_layers {
        return top.refuse("layer_types", format_args!("must have num_hidden_layers = {num_layers} entries, got {}", kinds.len()));
    }
    let slides = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => top.refuse("layer_types", format_args!("must hold sliding_attention or full_attention, got {}", brief(kind))),
    };
    Ok(Slides::Listed(kinds.iter().map(slides).collect::<Result<_, _>>()?))
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let (names, experts, d) = (Names::new(config, l), config.experts.unwrap_or_default(), config.d_model);
    let (e, f) = (experts.num_experts, experts.d_ffn);
    let stacked = |tensor: &str, [k, n]: [usize; 2]| {
        let name = |suffix: &str| names.name(&format!("mlp.experts.{tensor}{suffix}"));
        Affine::biased(Spec::stacked_kn(Part::Experts, name(""), e, [k, n]), Spec::biases(Part::Experts, name("_bias"), [e, n]))
    };
    let ffn = Ffn::Experts(Experts {
        logit_bias: Some(names.router_bias("mlp.router.bias", &experts)),
        ..Experts::new(
            names.router("mlp.router", &experts),
            Mlp {
                hidden: Hidden::Interleaved { both: stacked("gate_up_proj", [d, 2 * f]), glu: experts.glu },
                down: stacked("down_proj", [f, d]),
            },
        )
    });
    let sinks = Spec::bias(Part::Attention, names.name("self_attn.sinks"), config.heads.num_heads()).read_as_f32();
    let attention = Attention { sinks: Some(sinks), ..names.attention("self_attn") };
    Block::new(names.norm("input_layernorm"), attention, names.norm("post_attention_layernorm"), ffn)
}
