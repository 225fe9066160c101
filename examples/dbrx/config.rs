//! `config.json` of a DBRX checkpoint: which fields count, what they may be, and the tensors that follow from them.
//!
//! Both layouts are read: the original one, and the longer one that newer releases of Hugging Face transformers save.
//! Unknown fields are ignored. Absent and null differ for `moe_normalize_expert_weights`: absent means 1, null means no
//! normalisation.

use std::path::Path;

use dropless::HeadLayout;
use dropless::layout::MAX_EXPERTS;

use serde_json::json;

use super::failure::{Failure, refuse_file};
use super::input::{brief, read_text};
use super::json::{Object, Strict, Value};

/// No size in a configuration may pass this; the products of sizes are checked besides.
const MAX_SIZE: u64 = (1 << 31) - 1;
/// A configuration has some kilobytes.
const MAX_CONFIG_BYTES: u64 = 1_000_000;
/// What LayerNorm adds to the variance: a constant of the model, not a field.
pub const NORM_EPS: f32 = 1e-5;

/// A DBRX model's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub num_layers: usize,
    pub d_model: usize,
    pub heads: HeadLayout,
    pub d_ffn: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub vocab: usize,
    pub max_seq_len: usize,
    pub clip: Option<f32>,
    pub rope_theta: f32,
    /// The p of the norm by which a token's expert weights are divided; none: they are left as they are.
    pub weight_norm: Option<f32>,
    /// The type the checkpoint says it was saved in; what counts is what lies in the file.
    pub dtype: Option<String>,
}

/// A tensor that a checkpoint must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

/// The tensors of one kind: for counting and for the table.
pub struct Part {
    pub name: &'static str,
    /// One layer's, or the one of the whole model.
    pub shape: String,
    pub copies: usize,
    /// Parameters of all copies, and those that one token uses.
    pub total: u64,
    pub active: u64,
}

impl Config {
    /// Reads and checks a configuration.
    pub fn read(file: &Path) -> Result<Config, Failure> {
        Config::parse(file, &read_text(file, MAX_CONFIG_BYTES)?)
    }

    fn parse(file: &Path, text: &str) -> Result<Config, Failure> {
        let object: Object<Strict> = match serde_json::from_str(text) {
            Ok(object) => object,
            Err(error) => return refuse_file(file, format_args!("not a JSON object: {}", brief(error))),
        };
        let top = Fields { file, section: "", entries: object.0.into_iter().map(|(name, Strict(value))| (name, value)).collect() };
        let (attention, ffn) = (top.section("attn_config.")?, top.section("ffn_config.")?);
        let rope = top.section("rope_parameters.")?;

        // What would make it another model than the one that is computed here.
        top.must_be("model_type", json!("dbrx"))?;
        top.must_be("tie_word_embeddings", json!(false))?;
        top.must_be("quantization_config", Value::Null)?;
        ffn.must_be("ffn_act_fn", json!({ "name": "silu" }))?;
        for section in [&top, &attention] {
            section.must_be("attn_type", json!("grouped_query_attention"))?;
            section.must_be("rope_scaling", Value::Null)?;
        }
        rope.must_be("rope_type", json!("default"))?;
        rope.must_be("type", json!("default"))?; // its older name

        let (num_layers, d_model) = (top.size("n_layers", MAX_SIZE)?, top.size("d_model", MAX_SIZE)?);
        let (num_heads, num_kv_heads) = (top.size("n_heads", MAX_SIZE)?, attention.size("kv_n_heads", MAX_SIZE)?);
        if !d_model.is_multiple_of(num_heads) {
            return top.refuse("n_heads", format_args!("must divide d_model = {d_model}, got {num_heads}"));
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            return attention.refuse("kv_n_heads", format_args!("must divide n_heads = {num_heads}, got {num_kv_heads}"));
        }
        let head_dim = d_model / num_heads;
        if !head_dim.is_multiple_of(2) {
            return top.refuse("n_heads", format_args!("must give heads of even size, got d_model / n_heads = {head_dim}"));
        }
        let heads = HeadLayout::new(num_heads, num_kv_heads, head_dim).or_else(|error| refuse_file(file, error))?;
        let num_experts = ffn.size("moe_num_experts", MAX_EXPERTS as u64)?;
        let top_k = ffn.size("moe_top_k", MAX_SIZE)?;
        if top_k > num_experts {
            return ffn.refuse("moe_top_k", format_args!("must be <= moe_num_experts = {num_experts}, got {top_k}"));
        }
        let config = Config {
            num_layers,
            d_model,
            heads,
            d_ffn: ffn.size("ffn_hidden_size", MAX_SIZE)?,
            num_experts,
            top_k,
            vocab: top.size("vocab_size", MAX_SIZE)?,
            max_seq_len: top.get("max_seq_len").map_or(Ok(2048), |_| top.size("max_seq_len", MAX_SIZE))?,
            clip: attention.positive("clip_qkv")?,
            rope_theta: match attention.positive("rope_theta")? {
                Some(theta) => theta,
                None => rope.positive("rope_theta")?.unwrap_or(10_000.0),
            },
            weight_norm: match ffn.get("moe_normalize_expert_weights") {
                None => Some(1.0),
                Some(_) => ffn.positive("moe_normalize_expert_weights")?,
            },
            dtype: ["torch_dtype", "dtype"].iter().find_map(|name| Some(top.get(name)?.as_str()?.to_owned())),
        };
        if config.elements().is_none() {
            return refuse_file(file, "the model's parameters are more than 2^60, which no machine holds");
        }
        Ok(config)
    }

    /// The same model with its first layers only.
    pub fn with_layers(self, layers: usize) -> Config {
        Config { num_layers: self.num_layers.min(layers), ..self }
    }

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        self.elements().unwrap_or(u64::MAX)
    }

    /// All parameters, or none where their number passes 2^60. Every later product of sizes is below this one.
    fn elements(&self) -> Option<u64> {
        let [d, f, e, v] = [self.d_model, self.d_ffn, self.num_experts, self.vocab].map(|size| size as u128);
        let experts = 3u128.checked_mul(e)?.checked_mul(f)?.checked_mul(d)?;
        let attention = (self.heads.qkv_cols() as u128 + d).checked_mul(d)?;
        let layer = experts.checked_add(attention)?.checked_add((e + 2) * d)?;
        let all = layer.checked_mul(self.num_layers as u128)?.checked_add((2 * v + 1) * d)?;
        u64::try_from(all).ok().filter(|all| *all <= 1 << 60)
    }

    /// The parameters by kind, in the order in which a token meets them.
    pub fn parts(&self) -> Vec<Part> {
        let Config { num_layers: layers, d_model: d, d_ffn: f, num_experts: e, top_k: k, vocab: v, heads, .. } = *self;
        let part = |name, shape: String, copies: usize, each: usize, active: usize| {
            let count = |each: usize| (copies * each) as u64;
            Part { name, shape, copies, total: count(each), active: count(active) }
        };
        let qkv = heads.qkv_cols();
        vec![
            part("embedding", format!("{v} x {d}"), 1, v * d, v * d),
            part("attention", format!("{qkv} x {d}, {d} x {d}"), layers, (qkv + d) * d, (qkv + d) * d),
            part("router", format!("{e} x {d}"), layers, e * d, e * d),
            part("experts", format!("{e} x 3 x {f} x {d}"), layers, 3 * e * f * d, 3 * k * f * d),
            part("norms", format!("{d}"), 2 * layers + 1, d, d),
            part("head", format!("{v} x {d}"), 1, v * d, v * d),
        ]
    }

    /// The embedding's name.
    pub const EMBEDDING: &str = "transformer.wte.weight";
    /// The last norm's name.
    pub const FINAL_NORM: &str = "transformer.norm_f.weight";
    /// The name of the product that gives the logits.
    pub const HEAD: &str = "lm_head.weight";

    /// A layer's tensor.
    pub fn layer_tensor(&self, layer: usize, tensor: LayerTensor) -> TensorSpec {
        let (d, stacked) = (self.d_model, self.num_experts * self.d_ffn);
        let (name, shape) = match tensor {
            LayerTensor::Norm1 => ("norm_attn_norm.norm_1.weight", vec![d]),
            LayerTensor::Wqkv => ("norm_attn_norm.attn.Wqkv.weight", vec![self.heads.qkv_cols(), d]),
            LayerTensor::OutProj => ("norm_attn_norm.attn.out_proj.weight", vec![d, d]),
            LayerTensor::Norm2 => ("norm_attn_norm.norm_2.weight", vec![d]),
            LayerTensor::Router => ("ffn.router.layer.weight", vec![self.num_experts, d]),
            LayerTensor::W1 => ("ffn.experts.mlp.w1", vec![stacked, d]),
            LayerTensor::V1 => ("ffn.experts.mlp.v1", vec![stacked, d]),
            LayerTensor::W2 => ("ffn.experts.mlp.w2", vec![stacked, d]),
        };
        TensorSpec { name: format!("transformer.blocks.{layer}.{name}"), shape }
    }

    /// A tensor outside the layers: one of the three names above.
    pub fn model_tensor(&self, name: &str) -> TensorSpec {
        let shape = if name == Config::FINAL_NORM { vec![self.d_model] } else { vec![self.vocab, self.d_model] };
        TensorSpec { name: name.to_owned(), shape }
    }

    /// Every tensor of the model.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        let outside = [Config::EMBEDDING, Config::FINAL_NORM, Config::HEAD].map(|name| self.model_tensor(name));
        let inside = (0..self.num_layers).flat_map(|layer| LayerTensor::ALL.map(|tensor| self.layer_tensor(layer, tensor)));
        outside.into_iter().chain(inside)
    }
}

impl TensorSpec {
    /// As a matrix: a vector is one row.
    pub fn dims(&self) -> [usize; 2] {
        match *self.shape {
            [rows, cols] => [rows, cols],
            _ => [1, self.shape.iter().product()],
        }
    }
}

/// The eight tensors of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerTensor {
    Norm1,
    Wqkv,
    OutProj,
    Norm2,
    Router,
    W1,
    V1,
    W2,
}

impl LayerTensor {
    const ALL: [LayerTensor; 8] = [
        LayerTensor::Norm1,
        LayerTensor::Wqkv,
        LayerTensor::OutProj,
        LayerTensor::Norm2,
        LayerTensor::Router,
        LayerTensor::W1,
        LayerTensor::V1,
        LayerTensor::W2,
    ];
}

/// One section of the file, for lookups that name themselves.
struct Fields<'a> {
    file: &'a Path,
    section: &'static str,
    entries: Vec<(String, Value)>,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.entries.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    fn refuse<T>(&self, name: &str, text: impl std::fmt::Display) -> Result<T, Failure> {
        refuse_file(self.file, format_args!("`{}{name}` {text}", self.section))
    }

    /// The object of that name; absent and null are an empty one.
    fn section(&self, section: &'static str) -> Result<Fields<'a>, Failure> {
        let name = section.trim_end_matches('.');
        let entries = match self.get(name) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(map)) => map.clone().into_iter().collect(),
            Some(other) => return self.refuse(name, format_args!("must be an object, got {}", brief(other))),
        };
        Ok(Fields { file: self.file, section, entries })
    }

    /// A whole number of at least 1.
    fn size(&self, name: &str, max: u64) -> Result<usize, Failure> {
        let Some(value) = self.get(name) else { return self.refuse(name, "is missing") };
        match value.as_u64().filter(|size| (1..=max).contains(size)) {
            Some(size) => Ok(size as usize),
            None => self.refuse(name, format_args!("must be a whole number from 1 to {max}, got {}", brief(value))),
        }
    }

    /// A positive number; absent and null are none.
    fn positive(&self, name: &str) -> Result<Option<f32>, Failure> {
        let Some(value) = self.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
        match value.as_f64().map(|number| number as f32).filter(|number| *number > 0.0 && number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => self.refuse(name, format_args!("must be a positive number, got {}", brief(value))),
        }
    }

    /// A value that is the only one served here, where one is given at all.
    fn must_be(&self, name: &str, want: Value) -> Result<(), Failure> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(got) if *got == want => Ok(()),
            Some(other) => self.refuse(name, format_args!("must be {want}, got {}", brief(other))),
        }
    }
}
