//! Models in GGUF files: entries of their headers as the fields that families read, and the names that
//! tensors have there. Everything else about a model is in its family's file.
//!
//! | `general.architecture` | family | what differs in the file |
//! |---|---|---|
//! | `qwen3moe` | Qwen3-MoE | experts are stacked |
//! | `llama` | Mixtral, Llama | the same; rows of queries and keys are permuted for interleaved pairs |
//! | `gpt-oss` | gpt-oss | gate and up are matrices of their own |
//! | `dbrx` | DBRX | the inputs of w2 are columns |
//!
//! Source of keys and names: `constants.py` of the Python package `gguf`.

use dropless::HeadLayout;
use dropless::activation::Glu;
use dropless::rope::Pairing;
use serde_json::json;

use super::block::{self, Affine, Attention, Block, Ffn, Hidden, Mlp, Outside, Projection};
use super::config::{Config, Norm, QkNorm, Scaling};
use super::fields::Fields;
use super::run::failure::{Failure, refuse_file};
use super::run::gguf::GgufFile;
use super::run::input::brief;
use super::run::json::Value;
use super::spec::{Part, Spec};
use super::{Family, dbrx, gpt_oss, llama, mixtral, qwen3};

/// One architecture.
struct Architecture {
    /// Its name, with which its keys begin.
    name: &'static str,
    /// What reads the fields.
    reader: &'static Family,
    family: &'static Family,
    /// Keys after the name, and the fields that they are.
    keys: &'static [(&'static str, &'static str)],
    /// Fields that no key has.
    constants: &'static [(&'static str, &'static str)],
}

/// Keys that most architectures have.
const KEYS: &[(&str, &str)] = &[
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("expert_used_count", "num_experts_per_tok"),
    ("rope.freq_base", "rope_theta"),
    ("rope.scaling.type", "rope_scaling.rope_type"),
    ("rope.scaling.factor", "rope_scaling.factor"),
    ("rope.scaling.original_context_length", "rope_scaling.original_max_position_embeddings"),
    ("rope.scaling.yarn_beta_fast", "rope_scaling.beta_fast"),
    ("rope.scaling.yarn_beta_slow", "rope_scaling.beta_slow"),
];

const QWEN3_MOE: Architecture = Architecture {
    name: "qwen3moe",
    reader: &qwen3::FAMILY,
    family: &Family { positions_field: "qwen3moe.context_length", describe_outside, describe: describe_plain, ..qwen3::FAMILY },
    keys: &[
        ("feed_forward_length", "intermediate_size"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_count", "num_experts"),
    ],
    constants: &[("norm_topk_prob", "true"), ("use_sliding_window", "false")],
};

const LLAMA: Architecture = Architecture {
    name: "llama",
    reader: &llama::FAMILY,
    family: &Family { positions_field: "llama.context_length", describe_outside, describe: describe_plain, ..llama::FAMILY },
    keys: &[("feed_forward_length", "intermediate_size")],
    constants: &[],
};

const MIXTRAL: Architecture = Architecture {
    name: "llama",
    reader: &mixtral::FAMILY,
    family: &Family { positions_field: "llama.context_length", describe_outside, describe: describe_plain, ..mixtral::FAMILY },
    keys: &[("feed_forward_length", "intermediate_size"), ("expert_count", "num_local_experts")],
    constants: &[],
};

const GPT_OSS: Architecture = Architecture {
    name: "gpt-oss",
    reader: &gpt_oss::FAMILY,
    family: &Family { positions_field: "gpt-oss.context_length", describe_outside, describe: describe_gpt_oss, ..gpt_oss::FAMILY },
    keys: &[
        ("expert_feed_forward_length", "intermediate_size"),
        ("expert_count", "num_local_experts"),
        ("attention.sliding_window", "sliding_window"),
    ],
    // The model was trained without rounding the ends of YaRN's ramp.
    constants: &[("rope_scaling.truncate", "false"), ("attention_bias", "true")],
};

const DBRX: Architecture = Architecture {
    name: "dbrx",
    reader: &dbrx::FAMILY,
    family: &Family { positions_field: "dbrx.context_length", describe_outside, describe: describe_dbrx, ..dbrx::FAMILY },
    keys: &[
        ("block_count", "n_layers"),
        ("context_length", "max_seq_len"),
        ("embedding_length", "d_model"),
        ("attention.head_count", "n_heads"),
        ("attention.head_count_kv", "attn_config.kv_n_heads"),
        ("attention.clamp_kqv", "attn_config.clip_qkv"),
        ("rope.freq_base", "attn_config.rope_theta"),
        ("feed_forward_length", "ffn_config.ffn_hidden_size"),
        ("expert_count", "ffn_config.moe_num_experts"),
        ("expert_used_count", "ffn_config.moe_top_k"),
    ],
    constants: &[("ffn_config.moe_normalize_expert_weights", "1.0")],
};

/// Keys that must have this value where they are present.
const MUST_BE: &[(&str, &str)] = &[
    ("rope.scaling.attn_factor", "1.0"),
    ("expert_weights_scale", "1.0"),
    ("expert_weights_norm", "true"),
    ("expert_gating_func", "1"), // softmax
    ("expert_shared_count", "0"),
    ("use_parallel_residual", "false"),
];

/// The model that a file holds.
pub fn read_gguf(file: &GgufFile) -> Result<Config, Failure> {
    let architecture = architecture(file)?;
    let fields = fields(file, architecture)?;
    let config = (architecture.reader.config)(&fields)?;
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    let heads: HeadLayout = config.heads;
    for (suffix, want) in [
        ("attention.key_length", heads.head_dim()),
        ("attention.value_length", heads.value_dim()),
        ("rope.dimension_count", config.rope.rotary_dim),
    ] {
        match file.entry(&key(suffix)) {
            Some(got) if got.as_u64() != Some(want as u64) => {
                return refuse_file(&file.path, format_args!("`{}` must be {want}, got {}", key(suffix), brief(got)));
            }
            _ => {}
        }
    }
    let mut config = Config { family: architecture.family, ..config };
    let of_layer_norm = key("attention.layer_norm_epsilon");
    if let Some(value) = file.entry(&of_layer_norm) {
        match value.as_f64().map(|epsilon| epsilon as f32).filter(|epsilon| *epsilon > 0.0 && epsilon.is_finite()) {
            Some(epsilon) => config.norm_eps = epsilon,
            None => return refuse_file(&file.path, format_args!("`{of_layer_norm}` must be a positive number, got {}", brief(value))),
        }
    }
    if architecture.name == "llama" {
        config.rope.pairing = Pairing::Interleaved;
    }
    if let Some(experts) = &mut config.experts {
        experts.interleaved = false;
    }
    if let Some(scaling) = divisors(file, config.rope.rotary_dim)? {
        config.rope.scaling = scaling;
    }
    match config.elements() {
        Some(_) => Ok(config),
        None => refuse_file(&file.path, "the model's parameters are more than 2^60, which no machine holds"),
    }
}

fn architecture(file: &GgufFile) -> Result<&'static Architecture, Failure> {
    const KEY: &str = "general.architecture";
    let Some(name) = file.entry(KEY) else { return refuse_file(&file.path, format_args!("`{KEY}` is missing")) };
    let experts = file.entry("llama.expert_count").is_some_and(|count| count.as_u64() != Some(0));
    Ok(match name.as_str() {
        Some("qwen3moe") => &QWEN3_MOE,
        Some("llama") if experts => &MIXTRAL,
        Some("llama") => &LLAMA,
        Some("gpt-oss") => &GPT_OSS,
        Some("dbrx") => &DBRX,
        _ => {
            return refuse_file(&file.path, format_args!("`{KEY}` must be one of qwen3moe, llama, gpt-oss, dbrx, got {}", brief(name)));
        }
    })
}

/// The entries by the names of fields. A refusal has the name of the key.
fn fields<'a>(file: &'a GgufFile, architecture: &Architecture) -> Result<Fields<'a>, Failure> {
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    for (suffix, want) in MUST_BE {
        let want: Value = serde_json::from_str(want).unwrap_or_default();
        if let Some(got) = file.entry(&key(suffix)).filter(|got| **got != want) {
            return refuse_file(&file.path, format_args!("`{}` must be {want}, got {}", key(suffix), brief(got)));
        }
    }
    let mut fields = json!({});
    let own = |suffix: &str| architecture.keys.iter().any(|(known, _)| *known == suffix);
    let keys: Vec<(&str, &str)> = architecture.keys.iter().chain(KEYS.iter().filter(|(suffix, _)| !own(suffix))).copied().collect();
    for (suffix, field) in &keys {
        match file.entry(&key(suffix)) {
            Some(Value::String(word)) if *suffix == "rope.scaling.type" && word == "none" => {}
            Some(value) => put(&mut fields, field, value.clone()),
            None => {}
        }
    }
    for (field, value) in architecture.constants {
        put(&mut fields, field, serde_json::from_str(value).unwrap_or_default());
    }
    let table = file.find("token_embd.weight").and_then(|table| table.shape.first());
    let Some(vocab) = table else { return refuse_file(&file.path, "tensor `token_embd.weight` is missing") };
    put(&mut fields, "vocab_size", json!(vocab));
    put(&mut fields, "tie_word_embeddings", json!(architecture.name != "dbrx" && file.find("output.weight").is_none()));
    if architecture.name == "llama" && file.find("blk.0.attn_q.bias").is_some() {
        put(&mut fields, "attention_bias", json!(true));
    }
    let shown = keys.iter().map(|(suffix, field)| ((*field).to_owned(), key(suffix))).collect();
    Ok(Fields::of(&file.path, fields, shown))
}

/// Sets a field, which a dot may lead to.
fn put(fields: &mut Value, field: &str, value: Value) {
    match field.split_once('.') {
        Some((section, field)) => put(&mut fields[section], field, value),
        None => fields[field] = value,
    }
}

/// What Llama 3's files have instead of constants of its scaling: a divisor for each frequency.
fn divisors(file: &GgufFile, rotary_dim: usize) -> Result<Option<Scaling>, Failure> {
    const NAME: &str = "rope_freqs.weight";
    let Some(tensor) = file.find(NAME) else { return Ok(None) };
    let refuse = |text: String| refuse_file(&file.path, format_args!("tensor `{NAME}` {text}"));
    if tensor.shape != [rotary_dim / 2] {
        return refuse(format!("must be {:?} by the file's entries, got {:?}", [rotary_dim / 2], tensor.shape));
    }
    let Some(values) = file.numbers(tensor) else { return refuse(format!("must be F32, got {}", tensor.dtype.name())) };
    if let Some(value) = values.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
        return refuse(format!("must hold positive numbers, got {value:e}"));
    }
    Ok(Some(Scaling::Long { original: usize::MAX, divisors: [values.clone(), values], factors: [1.0; 2] }))
}

fn describe_outside(config: &Config) -> Outside<Spec> {
    let Config { d_model: d, vocab, .. } = *config;
    Outside {
        embedding: Spec::embedding("token_embd.weight", [vocab, d]),
        final_norm: Affine::plain(Spec::norm("output_norm.weight", d)),
        head: (!config.is_tied).then(|| Affine::plain(Spec::linear(Part::Head, "output.weight", [vocab, d]))),
    }
}

fn describe_plain(config: &Config, l: usize) -> Block<Spec> {
    Names { config, l }.block("ffn_norm")
}

fn describe_gpt_oss(config: &Config, l: usize) -> Block<Spec> {
    let names = Names { config, l };
    let mut block = names.block("post_attention_norm");
    let sinks = Spec::bias(Part::Attention, names.name("attn_sinks.weight"), config.heads.num_heads()).read_as_f32();
    block.attention.sinks = Some(sinks);
    if let Ffn::Experts(experts) = &mut block.ffn {
        let count = config.num_experts();
        experts.logit_bias = Some(Spec::bias(Part::Router, names.name("ffn_gate_inp.bias"), count).read_as_f32());
        let biased = |of: &mut Affine<Spec>, tensor: &str| {
            let (_, [n, _]) = of.weight.matrix_dims();
            of.bias = Some(Spec::biases(Part::Experts, names.name(&format!("{tensor}.bias")), [count, n]));
        };
        if let Hidden::Gated { gate, up, .. } = &mut experts.mlp.hidden {
            biased(gate, "ffn_gate_exps");
            biased(up, "ffn_up_exps");
        }
        biased(&mut experts.mlp.down, "ffn_down_exps");
    }
    block
}

fn describe_dbrx(config: &Config, l: usize) -> Block<Spec> {
    Names { config, l }.block("attn_output_norm")
}

/// The tensors of one layer.
struct Names<'c> {
    config: &'c Config,
    l: usize,
}

impl Names<'_> {
    fn name(&self, tensor: &str) -> String {
        format!("blk.{}.{tensor}", self.l)
    }

    fn norm(&self, tensor: &str) -> Affine<Spec> {
        Affine::plain(Spec::norm(self.name(&format!("{tensor}.weight")), self.config.d_model))
    }

    fn linear(&self, part: Part, tensor: &str, [n, k]: [usize; 2], has_bias: bool) -> Affine<Spec> {
        let bias = has_bias.then(|| Spec::bias(part, self.name(&format!("{tensor}.bias")), n));
        Affine { weight: Spec::linear(part, self.name(&format!("{tensor}.weight")), [n, k]), bias }
    }

    fn block(&self, norm_2: &str) -> Block<Spec> {
        Block::new(self.norm("attn_norm"), self.attention(), self.norm(norm_2), self.ffn())
    }

    fn attention(&self) -> Attention<Spec> {
        let Config { d_model: d, heads, attention, norm, .. } = self.config;
        let part = |name: &str, cols| self.linear(Part::Attention, name, [cols, *d], attention.qkv_bias);
        let projections = match norm {
            Norm::Layer => vec![part("attn_qkv", heads.qkv_cols())],
            Norm::Rms => vec![part("attn_q", heads.q_cols()), part("attn_k", heads.kv_cols()), part("attn_v", heads.v_cols())],
        };
        let out = self.linear(Part::Attention, "attn_output", [*d, heads.context_cols()], attention.out_bias);
        let factors = |name: &str, cols| Spec::norm(self.name(&format!("{name}.weight")), cols);
        let qk_norm = attention.qk_norm.map(|of| match of {
            QkNorm::PerHead => [heads.head_dim(); 2],
            QkNorm::FullWidth => [heads.q_cols(), heads.kv_cols()],
        });
        let qk_norm = qk_norm.map(|[q, k]| [factors("attn_q_norm", q), factors("attn_k_norm", k)]);
        Attention { qk_norm, window: self.config.window(self.l), ..Attention::new(Projection::Rows(projections), out) }
    }

    fn ffn(&self) -> Ffn<Spec> {
        let d = self.config.d_model;
        let Some(experts) = self.config.experts.filter(|_| !self.config.is_dense(self.l)) else {
            let f = self.config.dense_d_ffn;
            let matrix = |name: &str, dims| self.linear(Part::Dense, name, dims, false);
            let hidden = Hidden::Gated { gate: matrix("ffn_gate", [f, d]), up: matrix("ffn_up", [f, d]), glu: Glu::Silu };
            return Ffn::Dense(Mlp { hidden, down: matrix("ffn_down", [d, f]) });
        };
        let (e, f) = (experts.num_experts, experts.d_ffn);
        let stacked = |name: &str, dims| Affine::plain(Spec::stacked(Part::Experts, self.name(&format!("{name}.weight")), e, dims));
        Ffn::Experts(block::Experts::new(
            Spec::linear(Part::Router, self.name("ffn_gate_inp.weight"), [e, d]),
            Mlp {
                hidden: Hidden::Gated { gate: stacked("ffn_gate_exps", [f, d]), up: stacked("ffn_up_exps", [f, d]), glu: experts.glu },
                down: stacked("ffn_down_exps", [d, f]),
            },
        ))
    }
}
