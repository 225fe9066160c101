//! GPT-NeoX, EleutherAI 2022: the 20B model, pythia, and Dolly 2.0 of Databricks. LayerNorm and projections
//! with biases, queries, keys and values head by head, attention beside an MLP without a gate.

use dropless::activation::Activation;

use super::Family;
use super::block::{Affine, Attention, Block, Ffn, Hidden, Mlp, Outside, Projection, Residual};
use super::common;
use super::config::{self, Config, Norm};
use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::spec::{Part, Spec};

pub const FAMILY: Family = Family {
    title: "GPT-NeoX",
    model_types: &["gpt_neox"],
    architectures: &["GPTNeoXForCausalLM"],
    positions_field: "max_position_embeddings",
    config,
    describe_outside,
    describe,
};

fn config(top: &Fields<'_>) -> Result<Config, Failure> {
    let heads = common::heads(top)?;
    let share = top.positive("rotary_pct")?.or(top.partial_rotary_factor()?).unwrap_or(0.25);
    let rotary = common::rotary_dim(top, "rotary_pct", heads.head_dim(), (heads.head_dim() as f32 * share) as usize)?;
    let has_bias = top.flag("attention_bias", true)?;
    let base = common::base(top, &FAMILY, heads, (10_000.0, rotary))?;
    let newer = top.section("rope_parameters.")?.positive("rope_theta")?;
    let theta = newer.or(top.positive("rotary_emb_base")?).unwrap_or(base.rope.theta);
    Ok(Config {
        rope: config::Rope { theta, ..base.rope },
        attention: config::Attention { qkv_bias: has_bias, out_bias: has_bias, ..config::Attention::default() },
        activation: activation(top)?,
        norm: Norm::Layer,
        norm_eps: top.positive("layer_norm_eps")?.unwrap_or(1e-5),
        dense_d_ffn: top.size("intermediate_size", MAX_SIZE)?,
        is_parallel: top.flag("use_parallel_residual", true)?,
        ..base
    })
}

fn activation(top: &Fields<'_>) -> Result<Activation, Failure> {
    Ok(match top.one_of("hidden_act", &["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])? {
        "gelu" => Activation::GeluErf,
        _ => Activation::GeluTanh,
    })
}

/// Factors and bias of a norm.
fn norm(name: &str, len: usize) -> Affine<Spec> {
    Affine::biased(Spec::norm(format!("{name}.weight"), len), Spec::bias(Part::Norms, format!("{name}.bias"), len))
}

fn describe_outside(config: &Config) -> Outside<Spec> {
    let dims = [config.vocab, config.d_model];
    Outside {
        embedding: Spec::embedding("gpt_neox.embed_in.weight", dims),
        final_norm: norm("gpt_neox.final_layer_norm", config.d_model),
        head: (!config.is_tied).then(|| Affine::plain(Spec::linear(Part::Head, "embed_out.weight", dims))),
    }
}

fn describe(config: &Config, l: usize) -> Block<Spec> {
    let Config { d_model: d, dense_d_ffn: f, heads, activation, .. } = *config;
    let name = |tensor: &str| format!("gpt_neox.layers.{l}.{tensor}");
    let linear = |part, tensor: &str, [n, k]: [usize; 2], has_bias: bool| {
        let bias = has_bias.then(|| Spec::bias(part, name(&format!("{tensor}.bias")), n));
        Affine { weight: Spec::linear(part, name(&format!("{tensor}.weight")), [n, k]), bias }
    };
    let config::Attention { qkv_bias, out_bias, .. } = config.attention;
    let whole = linear(Part::Attention, "attention.query_key_value", [heads.qkv_cols(), d], qkv_bias);
    let out = linear(Part::Attention, "attention.dense", [d, heads.context_cols()], out_bias);
    let up = linear(Part::Dense, "mlp.dense_h_to_4h", [f, d], true);
    let ffn = Ffn::Dense(Mlp { hidden: Hidden::Plain { up, activation }, down: linear(Part::Dense, "mlp.dense_4h_to_h", [d, f], true) });
    let attention = Attention::new(Projection::PerHead(whole), out);
    let (norm_1, norm_2) = (norm(&name("input_layernorm"), d), norm(&name("post_attention_layernorm"), d));
    let residual = if config.is_parallel { Residual::Parallel } else { Residual::Sequential };
    Block { residual, ..Block::new(norm_1, attention, norm_2, ffn) }
}
