//! Small checkpoints of several families in each format: names, shapes, types and configuration are those
//! that engines read, and every weight is the oracle's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dropless::{Bf16, F16, Float, QuantizedRows, Rows};
use dropless_lm::target::Target;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::converted;
use crate::fixture::{Folder, checkpoint};
use crate::oracle::expected;
use crate::rounded::NARROW;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    /// The file's name.
    pub file: String,
}

/// All tensors of a checkpoint, read by another reader.
pub fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !(file.starts_with("model") && file.ends_with(".safetensors")) {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let (dtype, shape, bytes) = (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
            assert!(all.insert(name.to_owned(), Tensor { dtype, shape, bytes, file: file.clone() }).is_none());
        }
    }
    all
}

pub fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

impl Tensor {
    pub fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::BF16 => self.bytes.as_chunks().0.iter().map(|bytes| Bf16(u16::from_le_bytes(*bytes)).to_f32()).collect(),
            Dtype::F16 => self.bytes.as_chunks().0.iter().map(|bytes| F16(u16::from_le_bytes(*bytes)).to_f32()).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn bf16(&self) -> Vec<Bf16> {
        assert_eq!(self.dtype, Dtype::BF16);
        self.bytes.as_chunks().0.iter().map(|bytes| Bf16(u16::from_le_bytes(*bytes))).collect()
    }

    fn whole_numbers(&self) -> Vec<usize> {
        assert_eq!(self.dtype, Dtype::I64);
        self.bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as usize).collect()
    }
}

/// Endings of the names of projections, and of no other tensors.
const PROJECTIONS: [&str; 19] = [
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "q_a_proj.weight",
    "q_b_proj.weight",
    "kv_a_proj_with_mqa.weight",
    "kv_b_proj.weight",
    "attn.Wqkv.weight",
    "attn.out_proj.weight",
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
    "shared_experts.up_proj.weight",
    "shared_expert.up_proj.weight",
];
/// Of tensors that hold all experts' matrices; the other ones have one of these before a number.
const STACKS: [(&str, Turn); 7] = [
    ("experts.mlp.w1", Turn::Flat),
    ("experts.mlp.v1", Turn::Flat),
    ("experts.mlp.w2", Turn::Transposed),
    ("experts.gate_up_proj", Turn::Transposed),
    ("experts.down_proj", Turn::Transposed),
    ("input_linear.weight", Turn::Flat),
    ("output_linear.weight", Turn::Flat),
];

#[derive(Clone, Copy, PartialEq)]
enum Turn {
    Flat,
    Transposed,
}

/// The matrices that a tensor's weights become, if it is to be quantised: their shape, and the weights of
/// all in the order of the result.
pub fn matrices(name: &str, tensor: &Tensor, num_experts: usize, only_experts: bool) -> Option<(Vec<usize>, Vec<f32>)> {
    let floats = || tensor.floats();
    if let Some((_, turn)) = STACKS.iter().find(|(end, _)| name.ends_with(end)) {
        let cols = *tensor.shape.last().unwrap();
        let rows = tensor.shape.iter().product::<usize>() / cols / num_experts;
        if *turn == Turn::Flat {
            return Some((vec![num_experts, rows, cols], floats()));
        }
        let (weights, mut turned) = (floats(), Vec::new());
        for expert in weights.chunks(rows * cols) {
            turned.extend((0..cols).flat_map(|col| expert.chunks(cols).map(move |row| row[col])));
        }
        return Some((vec![num_experts, cols, rows], turned));
    }
    let of_expert = name.split('.').any(|part| part == "experts");
    let ends = ["w1.weight", "w2.weight", "w3.weight", "linear.weight", "linear_1.weight", "linear_v.weight"];
    let w = of_expert && ends.iter().any(|end| name.ends_with(end));
    let is_projection = w || PROJECTIONS.iter().any(|end| name.ends_with(end));
    (is_projection && (of_expert || !only_experts)).then(|| (tensor.shape.clone(), floats()))
}

/// The tensors of a quantised matrix, taken out of the result and read again by the library.
pub fn read_again(target: Target, name: &str, shape: &[usize], from: &mut BTreeMap<String, Tensor>) -> (Vec<f32>, Vec<String>) {
    let &[.., n, k] = shape else { panic!("{shape:?}") };
    let mut files = Vec::new();
    let mut take = |suffix: &str, dtype: Dtype, sizes: &[usize]| {
        let whole = format!("{name}{suffix}");
        let tensor = from.remove(&whole).unwrap_or_else(|| panic!("{whole} is missing"));
        let outer = &shape[..shape.len() - 2];
        assert_eq!((tensor.dtype, &tensor.shape), (dtype, &[outer, sizes].concat()), "{whole}");
        files.push(tensor.file.clone());
        tensor
    };
    let mut values = Vec::new();
    match target {
        Target::Fp8 => {
            let (rows, cols) = (n.div_ceil(128), k.div_ceil(128));
            let codes = take("", Dtype::F8_E4M3, &[n, k]);
            let scales = take("_scale_inv", Dtype::F32, &[rows, cols]).floats();
            for (codes, scales) in codes.bytes.chunks(n * k).zip(scales.chunks(rows * cols)) {
                let scales = Rows::from_slice(scales, rows, cols).unwrap();
                let matrix = QuantizedRows::e4m3(Rows::from_slice(codes, n, k).unwrap(), scales, [128, 128]).unwrap();
                matrix.check_scales().unwrap();
                values.extend(matrix.to_f32().unwrap());
            }
        }
        Target::Mxfp4 => {
            let codes = take("_blocks", Dtype::U8, &[n, k / 32, 16]);
            let scales = take("_scales", Dtype::U8, &[n, k / 32]);
            let rows = codes.bytes.len() / (k / 2);
            let scales = Rows::from_slice(&scales.bytes, rows, k / 32).unwrap();
            let matrix = QuantizedRows::mxfp4(Rows::from_slice(&codes.bytes, rows, k / 2).unwrap(), scales).unwrap();
            matrix.check_scales().unwrap();
            values = matrix.to_f32().unwrap();
        }
        Target::Int4 => {
            let (words, groups) = (k.div_ceil(8), k.div_ceil(128));
            let codes = take("_packed", Dtype::I32, &[n, words]);
            let scales = take("_scale", Dtype::BF16, &[n, groups]).bf16();
            let rows = scales.len() / groups;
            let whole = format!("{name}_shape");
            let sizes = from.remove(&whole).unwrap_or_else(|| panic!("{whole} is missing"));
            assert_eq!((sizes.whole_numbers(), &sizes.shape), (shape.to_vec(), &vec![shape.len()]), "{whole}");
            let scales = Rows::from_slice(&scales, rows, groups).unwrap();
            let matrix = QuantizedRows::int4(Rows::from_slice(&codes.bytes, rows, 4 * words).unwrap(), scales, k, 128).unwrap();
            matrix.check_scales().unwrap();
            values = matrix.to_f32().unwrap();
        }
    }
    (values, files)
}

/// Converts a checkpoint and looks at everything that it became. Gives the modules that stay, by its
/// configuration.
#[track_caller]
fn becomes(model: &Path, num_experts: usize, target: Target, only: Option<&str>) -> BTreeSet<String> {
    let folder = Folder::new();
    let out = folder.file("out");
    let args = [&["--to", target.name()][..], &only.map_or(vec![], |only| vec!["--only", only])].concat();
    let report = converted(model, &out, &args);
    let only_experts = only == Some("experts") || only.is_none() && target == Target::Mxfp4;
    let (before, mut after) = (tensors(model), tensors(&out));
    let (mut count, mut kept) = (0, BTreeSet::new());
    for (name, tensor) in &before {
        let found = matrices(name, tensor, num_experts, only_experts);
        let Some((shape, weights)) = found.filter(|(shape, _)| target != Target::Mxfp4 || shape.last().unwrap() % 32 == 0) else {
            assert_eq!(after.remove(name).as_ref(), Some(tensor), "{name} stays as it is");
            kept.insert(name.strip_suffix(".weight").filter(|_| tensor.shape.len() > 1).unwrap_or_default().to_owned());
            continue;
        };
        count += 1;
        let (values, files) = read_again(target, name, &shape, &mut after);
        assert!(files.iter().all(|file| *file == tensor.file), "{name} in {files:?}, not in {}", tensor.file);
        let (n, k) = (shape[shape.len() - 2], shape[shape.len() - 1]);
        let (mut squares, mut of_weights, mut largest) = (0.0, 0.0, 0.0f64);
        for (number, (weights, values)) in weights.chunks(n * k).zip(values.chunks(n * k)).enumerate() {
            let want = expected(target, weights, [n, k]);
            for (i, (got, weight)) in values.iter().zip(weights).enumerate() {
                let what = format!("{name}, matrix {number}, weight {weight:e} at {i}");
                assert_eq!(got.to_bits(), want.values[i].to_bits(), "{what}: {got:e}, not {:e}", want.values[i]);
                let error = (f64::from(*got) - f64::from(*weight)).abs();
                assert!(error <= want.bounds[i], "{what}: {error:e} beyond {:e}", want.bounds[i]);
                squares += error * error;
                of_weights += f64::from(*weight).powi(2);
                largest = largest.max(error);
            }
        }
        let line = format!("  {:>8.3} %  {:>8.2e}  {name} {shape:?}", 100.0 * (squares / of_weights).sqrt(), largest);
        assert!(report.contains(&line), "the report lacks {line}: {report}");
    }
    assert!(count > 0 && after.is_empty(), "{:?} are left", after.keys());
    kept.remove("");
    let lists = ["/quantization_config/modules_to_not_convert", "/quantization_config/ignore"];
    let config = config(&out);
    let list = lists.iter().find_map(|list| config.pointer(list)).unwrap();
    let modules: BTreeSet<String> = list.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    assert_eq!(modules, kept);
    modules
}

/// The cases that the table in the example's README is about.
#[test]
fn a_matrix_for_each_expert() {
    for target in Target::ALL {
        for (name, experts) in [("mixtral-tiny", 8), ("qwen3_moe", 16), ("deepseek_v3", 16), ("phimoe", 8)] {
            // 40 and 56 inputs are no whole blocks of MXFP4: such matrices stay.
            becomes(&checkpoint(name), experts, target, Some("projections"));
        }
    }
}

#[test]
fn stacks_of_experts_in_either_order() {
    for target in Target::ALL {
        for (name, experts) in [("tiny-dbrx-f32", 16), ("gpt_oss", 8), ("granitemoe", 16)] {
            becomes(&checkpoint(name), experts, target, Some("projections"));
        }
    }
}

#[test]
fn only_experts_or_what_the_format_usually_has() {
    let model = &checkpoint("tiny-dbrx-f32");
    for target in Target::ALL {
        let kept = becomes(model, 16, target, Some("experts"));
        let usual = becomes(model, 16, target, None);
        let attention = "transformer.blocks.0.norm_attn_norm.attn.Wqkv";
        assert!(kept.contains(attention) && kept.contains("lm_head") && kept.contains("transformer.blocks.1.ffn.router.layer"));
        assert_eq!(usual.contains(attention), target == Target::Mxfp4);
    }
}

/// Sizes that no published model has: rows of any number of inputs, of which a block has a few.
#[test]
fn any_shape() {
    let shapes = dropless_kit::goldens::root().join("tests/data/shapes");
    for name in ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "grok1", "minimax_m2", "mixtral", "olmoe", "qwen2_moe"] {
        let model = &shapes.join(name);
        let fields = config(model);
        let number = ["num_experts", "n_routed_experts", "num_local_experts"].iter().find_map(|field| fields[field].as_u64());
        for target in [Target::Fp8, Target::Int4] {
            becomes(model, number.unwrap() as usize, target, Some("projections"));
        }
    }
}

/// No experts: projections alone.
#[test]
fn dense_models() {
    for name in ["llama-tiny", "gptneox-tiny", "qwen3"] {
        becomes(&checkpoint(name), 1, Target::Fp8, None);
        becomes(&checkpoint(name), 1, Target::Int4, None);
    }
}

/// Shards keep their names, and an index says what lies where.
#[test]
fn shards_stay_shards() {
    let (model, folder) = (checkpoint("tiny-dbrx-f32-sharded"), Folder::new());
    becomes(&model, 16, Target::Int4, None);
    let out = folder.file("out");
    converted(&model, &out, &["--to", "int4", "--only", "experts"]);
    let index: Value = serde_json::from_slice(&std::fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
    let after = tensors(&out);
    let want: serde_json::Map<String, Value> = after.iter().map(|(name, tensor)| (name.clone(), json!(tensor.file))).collect();
    let bytes: usize = after.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index, json!({ "metadata": { "total_size": bytes }, "weight_map": want }));
}

/// Weights of 16 bits give what the same numbers in f32 give.
#[test]
fn narrow_weights() {
    for narrow in &NARROW {
        let [stored, widened] = narrow.checkpoints("tiny-dbrx-f32", |_| false);
        let folder = Folder::new();
        for target in Target::ALL {
            let [a, b] = ["narrow", "wide"].map(|name| folder.file(&format!("{name}-{}", target.name())));
            converted(stored.path(), &a, &["--to", target.name(), "--only", "projections"]);
            converted(widened.path(), &b, &["--to", target.name(), "--only", "projections"]);
            let (a, b) = (tensors(&a), tensors(&b));
            assert!(a.keys().eq(b.keys()));
            for (name, tensor) in &a {
                let other = &b[name];
                if tensor.dtype == other.dtype {
                    assert_eq!(tensor, other, "{name}");
                } else {
                    assert_eq!((tensor.dtype, other.dtype), (narrow.dtype, Dtype::F32), "{name} stays");
                }
            }
        }
    }
}

/// `config.json` keeps its fields and says what the formats' own checkpoints say.
#[test]
fn configurations_name_the_format() {
    let (model, folder) = (checkpoint("qwen3_moe"), Folder::new());
    for target in Target::ALL {
        let out = folder.file(target.name());
        converted(&model, &out, &["--to", target.name(), "--only", "projections"]);
        let mut got = config(&out);
        let mut section = got.as_object_mut().unwrap().remove("quantization_config").unwrap();
        assert_eq!(got, config(&model));
        let kept = match section["quant_method"].as_str().unwrap() {
            "compressed-tensors" => "ignore",
            _ => "modules_to_not_convert",
        };
        assert!(section.as_object_mut().unwrap().remove(kept).unwrap().as_array().unwrap().contains(&json!("lm_head")));
        let want = match target {
            Target::Fp8 => {
                json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128] })
            }
            Target::Mxfp4 => json!({ "quant_method": "mxfp4" }),
            Target::Int4 => json!({
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "kv_cache_scheme": null,
                "config_groups": { "group_0": {
                    "targets": ["Linear"],
                    "input_activations": null,
                    "output_activations": null,
                    "weights": {
                        "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
                        "dynamic": false, "actorder": null, "observer": "mse",
                    },
                } },
            }),
        };
        assert_eq!(section, want);
    }
}

/// Tokenizer and licence go along; what is not of the model does not.
#[test]
fn files_beside_the_weights() {
    let (model, folder) = (Folder::copy_of("qwen3_moe"), Folder::new());
    for name in ["tokenizer.json", "LICENSE.txt", "generation_config.json"] {
        std::fs::write(model.file(name), name).unwrap();
    }
    std::fs::write(model.file("notes.txt"), "mine").unwrap();
    let out = folder.file("out");
    converted(model.path(), &out, &["--to", "fp8"]);
    let names: BTreeSet<String> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let want = ["LICENSE.txt", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names, want.map(str::to_owned).into());
    assert_eq!(std::fs::read(out.join("LICENSE.txt")).unwrap(), b"LICENSE.txt");
}

/// Every byte is the same for any number of threads, and for another run.
#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let folder = Folder::new();
    for target in Target::ALL {
        let bytes = [1, 2, 7].map(|threads| {
            let out = folder.file(&format!("{}-{threads}", target.name()));
            let args = ["--to", target.name(), "--threads", &threads.to_string()];
            let report = converted(&checkpoint("tiny-dbrx-f32"), &out, &args);
            let lines: Vec<String> = report.lines().filter(|line| line.contains(" %  ")).map(str::to_owned).collect();
            (std::fs::read(out.join("model.safetensors")).unwrap(), lines)
        });
        assert!(bytes[0] == bytes[1] && bytes[0] == bytes[2] && !bytes[0].1.is_empty());
    }
}
