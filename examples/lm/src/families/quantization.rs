//! `quantization_config` of `config.json`: how a checkpoint holds matrices that are quantised.
//!
//! The names of the tensors say which matrices are. The list of modules that are not quantised only forbids.

use serde_json::json;

use super::fields::{Fields, MAX_SIZE};
use super::run::failure::Failure;
use super::run::input::brief;
use super::run::json::Value;

/// How some matrices are quantised.
#[derive(Clone, Debug)]
pub struct Quantization {
    pub scheme: Scheme,
    /// Modules that are not quantised; `*` stands for any text. Regular expressions (`re:`) are not read, so
    /// they forbid nothing.
    kept: Vec<String>,
}

/// The tensors of a matrix `X` of N outputs and K inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// FP8: `X`, and `X_scale_inv` with a factor for each block of so many outputs and inputs.
    Blocks([usize; 2]),
    /// FP8: `X`, and `X_scale` with a factor for each output, or one for all.
    Float { by_output: bool },
    /// `X_blocks`, `X_scales`.
    Mxfp4,
    /// INT4: `X_packed`, `X_scale`, `X_shape`, and `X_zero_point` unless zero points are 8. None: all of K is
    /// one group.
    Packed { group: Option<usize>, symmetric: bool },
    /// INT4: `qweight`, `qzeros`, `scales`, perhaps `g_idx`.
    Gptq { group: Option<usize> },
    /// INT4: `qweight`, `qzeros`, `scales`.
    Awq { group: Option<usize> },
}

impl Scheme {
    /// The name of the tensor that holds the codes of `X`.
    pub fn codes(self, name: &str) -> String {
        match self {
            Scheme::Blocks(_) | Scheme::Float { .. } => name.to_owned(),
            Scheme::Mxfp4 => format!("{name}_blocks"),
            Scheme::Packed { .. } => format!("{name}_packed"),
            Scheme::Gptq { .. } | Scheme::Awq { .. } => format!("{}.qweight", stem(name)),
        }
    }

    /// The name of the tensor that holds their scales.
    pub fn scales(self, name: &str) -> String {
        match self {
            Scheme::Blocks(_) => format!("{name}_scale_inv"),
            Scheme::Float { .. } | Scheme::Packed { .. } => format!("{name}_scale"),
            Scheme::Mxfp4 => format!("{name}_scales"),
            Scheme::Gptq { .. } | Scheme::Awq { .. } => format!("{}.scales", stem(name)),
        }
    }
}

/// The module of a tensor.
pub fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

impl Quantization {
    /// What the file says; none where it says nothing of it.
    pub fn read(top: &Fields<'_>) -> Result<Option<Quantization>, Failure> {
        if top.get("quantization_config").is_none_or(Value::is_null) {
            return Ok(None);
        }
        let of = top.section("quantization_config.")?;
        let Some(method) = of.get("quant_method") else { return of.refuse("quant_method", "is missing") };
        let (scheme, kept) = match method.as_str() {
            Some("fp8") => (blocks(&of)?, "modules_to_not_convert"),
            Some("mxfp4") => (Scheme::Mxfp4, "modules_to_not_convert"),
            Some("compressed-tensors") => (compressed(&of)?, "ignore"),
            Some("gptq") => (gptq(&of)?, "modules_to_not_convert"),
            Some("awq") => (awq(&of)?, "modules_to_not_convert"),
            _ => return of.refuse_value("quant_method", &["fp8", "mxfp4", "compressed-tensors", "gptq", "awq"], method),
        };
        let module = |value: &Value| match value.as_str() {
            Some(name) => Ok(name.to_owned()),
            None => of.refuse(kept, format_args!("must hold names of modules, got {}", brief(value))),
        };
        let kept = of.list(kept)?.iter().map(module).collect::<Result<_, _>>()?;
        Ok(Some(Quantization { scheme, kept }))
    }

    /// The entry by which a tensor's module is not quantised.
    pub fn keeps(&self, tensor: &str) -> Option<&str> {
        let module = stem(tensor);
        self.kept.iter().map(String::as_str).find(|pattern| is_of(module, pattern))
    }
}

/// Whether a pattern matches a module's name, or a beginning or an end of it that a dot bounds.
fn is_of(module: &str, pattern: &str) -> bool {
    let ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
    let begins = || module.match_indices('.').map(|(at, _)| at + 1);
    ends.into_iter().any(|end| matches(&module[..end], pattern)) || begins().any(|begin| matches(&module[begin..], pattern))
}

/// Whether a text is a pattern whose `*` stand for anything. The time is that of one pass for each `*`.
fn matches(text: &str, pattern: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(mut left) = text.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*').filter(|part| !part.is_empty()) {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(last)
}

fn blocks(of: &Fields<'_>) -> Result<Scheme, Failure> {
    of.must_be("fmt", json!("e4m3"))?;
    let name = "weight_block_size";
    let sizes: Vec<Option<u64>> = of.list(name)?.iter().map(|size| size.as_u64().filter(|size| (1..=MAX_SIZE).contains(size))).collect();
    match (of.get(name), sizes.as_slice()) {
        (Some(_), [Some(rows), Some(cols)]) => Ok(Scheme::Blocks([*rows as usize, *cols as usize])),
        (None | Some(Value::Null), _) => of.refuse(name, "is missing"),
        (Some(other), _) => of.refuse(name, format_args!("must be two whole numbers from 1 to {MAX_SIZE}, got {}", brief(other))),
    }
}

/// A number of inputs that share a scale; -1 and null are all of them.
fn group_size(of: &Fields<'_>) -> Result<Option<usize>, Failure> {
    match of.get("group_size") {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => of.optional_size("group_size", MAX_SIZE),
    }
}

fn compressed(of: &Fields<'_>) -> Result<Scheme, Failure> {
    let format = of.get("format").unwrap_or(&Value::Null);
    let group = of.section("config_groups.")?.only()?;
    group.must_be("format", format.clone())?;
    let targets = group.list("targets")?;
    if targets.iter().any(|target| target.as_str() != Some("Linear")) {
        return group.refuse("targets", format_args!("must be [\"Linear\"], got {}", brief(Value::from(targets))));
    }
    let weights = group.section("weights.")?;
    let strategy = weights.get("strategy").unwrap_or(&Value::Null);
    match format.as_str() {
        Some("float-quantized") => {
            weights.must_be("num_bits", json!(8))?;
            weights.must_be("type", json!("float"))?;
            match strategy.as_str() {
                Some(word @ ("tensor" | "channel")) => Ok(Scheme::Float { by_output: word == "channel" }),
                _ => weights.refuse_value("strategy", &["tensor", "channel"], strategy),
            }
        }
        Some("pack-quantized") => {
            weights.must_be("num_bits", json!(4))?;
            weights.must_be("type", json!("int"))?;
            match weights.get("actorder") {
                None | Some(Value::Null | Value::Bool(false)) => {}
                Some(word) if matches!(word.as_str(), Some("weight" | "static")) => {} // inputs stay in order
                Some(other) => return weights.refuse_value("actorder", &["null", "weight"], other),
            }
            let symmetric = weights.flag("symmetric", true)?;
            match (strategy.as_str(), group_size(&weights)?) {
                (Some("channel"), _) => Ok(Scheme::Packed { group: None, symmetric }),
                (Some("group"), Some(size)) => Ok(Scheme::Packed { group: Some(size), symmetric }),
                (Some("group"), None) => weights.refuse("group_size", "is missing"),
                _ => weights.refuse_value("strategy", &["channel", "group"], strategy),
            }
        }
        _ => of.refuse_value("format", &["float-quantized", "pack-quantized"], format),
    }
}

/// Codes of 4 bits, and how many inputs share a scale: both must be said.
fn of_4_bits(of: &Fields<'_>) -> Result<Option<usize>, Failure> {
    for name in ["bits", "group_size"] {
        if of.get(name).is_none() {
            return of.refuse(name, "is missing");
        }
    }
    of.must_be("bits", json!(4))?;
    group_size(of)
}

fn gptq(of: &Fields<'_>) -> Result<Scheme, Failure> {
    of.must_be("checkpoint_format", json!("gptq"))?;
    of.must_be("dynamic", json!({}))?; // other bits for some modules
    Ok(Scheme::Gptq { group: of_4_bits(of)? })
}

fn awq(of: &Fields<'_>) -> Result<Scheme, Failure> {
    of.must_be("zero_point", json!(true))?;
    of.one_of("version", &["gemm", "GEMM"])?;
    Ok(Scheme::Awq { group: of_4_bits(of)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_their_patterns() {
        let module = "model.layers.12.mlp.gate_proj";
        for pattern in ["model.layers.12.mlp.gate_proj", "model.layers.*.mlp", "gate_proj", "mlp.gate_proj", "model", "*.gate_proj", "*"] {
            assert!(is_of(module, pattern), "{pattern}");
        }
        for pattern in ["model.layers.1", "gate", "proj", "lm_head", "model.layers.*.self_attn", "*gate", "", "re:.*gate_proj"] {
            assert!(!is_of(module, pattern), "{pattern}");
        }
    }
}
