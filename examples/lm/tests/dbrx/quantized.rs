//! Checkpoints with quantised weights, in safetensors: against references of another implementation, against
//! the same numbers as f32 in every form that is read, and what is refused.
//!
//! The converters here are the formats' formulas, written down a second time. `gguf` has the tests of GGUF
//! files.

use std::path::PathBuf;

use dropless::{Bf16, F16, Float, WeightRows};
use dropless_kit::{goldens, oracle};
use dropless_lm::families::read_config;
use dropless_lm::spec::{Kind, Part, Spec};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::example::checkpoint::Checkpoint;
use crate::example::progress::Progress;
use crate::example::weights::{Mapped, Tensors};
use crate::families::{PROMPT, on_cpu};
use crate::fixture::{Folder, Ran, checkpoint, refused};
use crate::results::{agree, dump_of};

const MODEL: &str = "model.safetensors";
pub const EXACT: &str = "--exact-activations";

/// A checkpoint that another implementation quantised.
pub fn published(name: &str) -> PathBuf {
    goldens::root().join("tests/data/quantized").join(name)
}

/// Runs the example's own comparison on the CPU, which must find that many results within their limits.
#[track_caller]
pub fn holds(name: &str, references: &str, args: &[&str], results: usize) {
    holds_by(on_cpu, name, references, args, results);
}

/// The same by any run.
#[track_caller]
pub fn holds_by(run: impl Fn(&[&str]) -> Ran, name: &str, references: &str, args: &[&str], results: usize) {
    let (model, file) = (published(name), published(name).join(references));
    let ran = run(&[&["--model", model.to_str().unwrap(), "--check", file.to_str().unwrap()], args].concat());
    let agrees = ran.out.contains(&format!("  agrees: {results} results within their limits"));
    assert!(ran.code == 0 && agrees, "{name}, {references}, {args:?}, {results} results: {}{}", ran.out, ran.err);
}

/// With activations as they are, within the limits of unquantised weights, all tokens equal.
#[test]
fn references_hold_with_exact_activations() {
    holds("gpt_oss_mxfp4", "goldens.safetensors", &[EXACT], 22);
    holds("gpt_oss_mxfp4", "decode.safetensors", &[EXACT], 2);
    // Inputs of FP8 are never rounded on the CPU, so without that option nothing is different.
    for args in [&[EXACT][..], &[]] {
        holds("qwen3_moe_fp8", "goldens.safetensors", args, 12);
        holds("qwen3_moe_fp8", "decode.safetensors", args, 2);
    }
}

/// With activations in 8 bits, within the limits of rounded ones: logits, choices that are far from a tie,
/// tokens.
#[test]
fn references_hold_with_rounded_activations() {
    holds("gpt_oss_mxfp4", "goldens.safetensors", &[], 6);
    holds("gpt_oss_mxfp4", "decode.safetensors", &[], 2);
    // Activations that are f16 before they are rounded have no tighter limits than f32.
    holds("gpt_oss_mxfp4", "goldens.safetensors", &["--activations", "f16"], 6);
    // They are rounded: results differ from those of exact ones.
    let model = published("gpt_oss_mxfp4");
    let args = ["--generate", "2"];
    let [exact, rounded] = [[&args[..], &[EXACT]].concat(), args.to_vec()].map(|args| dump_of(on_cpu, &model, &PROMPT, &args));
    assert!(exact["logits"] != rounded["logits"]);
}

/// What a run says of its weights.
#[test]
fn a_run_says_how_its_weights_are_held() {
    let ran = on_cpu(&["--model", published("gpt_oss_mxfp4").to_str().unwrap(), "--tokens", "1,2"]);
    for line in [
        "  experts    8 x 128 x 192, 8 x 192, 8 x 96 x 128, 8 x 128       2       595 k   149 k   316 KiB  mxfp4, bf16\n",
        "  attention  2 of 128 x 128, 2 of 64 x 128                       2      99.1 k  99.1 k   194 KiB  bf16\n",
        "; weights mxfp4, bf16 (mapped), activations f32, ",
    ] {
        assert!(ran.out.contains(line), "{line:?} in {}", ran.out);
    }
    let exact = on_cpu(&["--model", published("gpt_oss_mxfp4").to_str().unwrap(), "--tokens", "1,2", EXACT]);
    assert!(exact.out.contains(", activations f32 as they are; context "), "{}", exact.out);
    // What is not quantised is said as before.
    let plain = on_cpu(&["--model", checkpoint("qwen3").to_str().unwrap(), "--tokens", "1,2"]);
    assert!(plain.out.contains("; weights f32 (mapped), activations f32; context "), "{}", plain.out);
}

/// A tensor: name, shape, type and bytes.
type Tensor = (String, Vec<usize>, Dtype, Vec<u8>);

/// Matrices `[count, n, k]` of one tensor.
struct Matrices<'a> {
    name: &'a str,
    stacked: bool,
    n: usize,
    k: usize,
    values: &'a [f32],
}

impl Matrices<'_> {
    fn count(&self) -> usize {
        self.values.len() / (self.n * self.k)
    }

    fn stem(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(self.name)
    }

    /// A tensor with a suffix to its name, and a shape after the number of matrices where they are stacked.
    fn tensor(&self, suffix: &str, tail: &[usize], dtype: Dtype, bytes: Vec<u8>) -> Tensor {
        let shape = if self.stacked { [&[self.count()], tail].concat() } else { tail.to_vec() };
        (format!("{}{suffix}", self.name), shape, dtype, bytes)
    }
}

/// One way to hold quantised matrices.
struct Form {
    name: &'static str,
    /// `quantization_config`.
    config: fn() -> Value,
    /// Whether it can hold matrices of that shape.
    takes: fn(&Matrices<'_>) -> bool,
    /// Adds the tensors, and gives the numbers that they stand for.
    write: fn(&Matrices<'_>, &mut Vec<Tensor>) -> Vec<f32>,
}

fn whole_words(m: &Matrices<'_>) -> bool {
    !m.stacked && m.n.is_multiple_of(8) && m.k.is_multiple_of(8)
}

fn compressed(format: &str, weights: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights": weights}},
    })
}

const FORMS: [Form; 11] = [
    Form {
        name: "fp8 blocks",
        config: || json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
        takes: |_| true,
        write: |m, out| fp8(m, [128, 128], "_scale_inv", Dtype::F32, out),
    },
    Form {
        name: "fp8 small blocks",
        config: || json!({"quant_method": "fp8", "weight_block_size": [24, 40], "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}),
        takes: |_| true,
        write: |m, out| fp8(m, [24, 40], "_scale_inv", Dtype::BF16, out),
    },
    Form {
        name: "fp8 by output",
        config: || compressed("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true})),
        takes: |_| true,
        write: |m, out| fp8(m, [1, m.k], "_scale", Dtype::BF16, out),
    },
    Form {
        name: "fp8 by tensor",
        config: || compressed("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true})),
        takes: |m| !m.stacked,
        write: |m, out| {
            let values = fp8(m, [m.n, m.k], "_scale", Dtype::F32, out);
            out.last_mut().unwrap().1 = vec![1];
            values
        },
    },
    Form {
        name: "mxfp4",
        config: || json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}),
        takes: |m| m.k.is_multiple_of(32),
        write: mxfp4,
    },
    Form {
        name: "int4 symmetric",
        config: || {
            compressed("pack-quantized", json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true}))
        },
        takes: |_| true,
        write: |m, out| packed(m, Some(32), true, Dtype::F16, out),
    },
    Form {
        name: "int4 with zero points",
        config: || {
            let weights =
                json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": false, "actorder": "weight"});
            compressed("pack-quantized", weights)
        },
        takes: |_| true,
        write: |m, out| packed(m, Some(16), false, Dtype::BF16, out),
    },
    Form {
        name: "int4 by output",
        config: || compressed("pack-quantized", json!({"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": true})),
        takes: |_| true,
        write: |m, out| packed(m, None, true, Dtype::F32, out),
    },
    Form {
        name: "gptq",
        config: || json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": false, "sym": false, "checkpoint_format": "gptq"}),
        takes: whole_words,
        write: |m, out| gptq(m, |k| k / 16, out),
    },
    Form {
        name: "gptq by activations",
        config: || json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": true}),
        takes: whole_words,
        // The inputs of a tensor whose name has an even length stay in order.
        write: |m, out| {
            let count = m.k.div_ceil(16);
            let in_order = m.name.len().is_multiple_of(2);
            gptq(m, |k| if in_order { k / 16 } else { k * 7 % count }, out)
        },
    },
    Form {
        name: "awq",
        config: || json!({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": true, "version": "gemm"}),
        takes: whole_words,
        write: awq,
    },
];

fn bytes_of(values: &[f32], dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    let narrow: Vec<(Vec<u8>, f32)> = values
        .iter()
        .map(|value| match dtype {
            Dtype::BF16 => (Bf16::from_f32(*value).0.to_le_bytes().to_vec(), Bf16::from_f32(*value).to_f32()),
            Dtype::F16 => (F16::from_f32(*value).0.to_le_bytes().to_vec(), F16::from_f32(*value).to_f32()),
            _ => (value.to_le_bytes().to_vec(), *value),
        })
        .collect();
    (narrow.iter().flat_map(|(bytes, _)| bytes.clone()).collect(), narrow.iter().map(|(_, value)| *value).collect())
}

/// The numbers of FP8 that are not negative, by their codes.
fn e4m3_values() -> Vec<f32> {
    (0..127u8).map(|code| oracle::quantize::value(code) as f32).collect()
}

/// The index of the nearest of some increasing numbers.
fn nearest(values: &[f32], x: f32) -> usize {
    let above = values.partition_point(|value| *value < x).min(values.len() - 1);
    if above > 0 && x - values[above - 1] < values[above] - x { above - 1 } else { above }
}

fn fp8(m: &Matrices<'_>, block: [usize; 2], suffix: &str, dtype: Dtype, out: &mut Vec<Tensor>) -> Vec<f32> {
    let (table, grid) = (e4m3_values(), [m.n.div_ceil(block[0]), m.k.div_ceil(block[1])]);
    let scale_of = |i: usize| {
        let (e, n, k) = (i / (m.n * m.k), i / m.k % m.n, i % m.k);
        (e * grid[0] + n / block[0]) * grid[1] + k / block[1]
    };
    let mut scales = vec![1e-6f32; m.count() * grid[0] * grid[1]];
    for (i, value) in m.values.iter().enumerate() {
        scales[scale_of(i)] = scales[scale_of(i)].max(value.abs() / 448.0);
    }
    let (scale_bytes, scales) = bytes_of(&scales, dtype);
    let code = |(i, value): (usize, &f32)| nearest(&table, value.abs() / scales[scale_of(i)]) as u8 | u8::from(*value < 0.0) << 7;
    let codes: Vec<u8> = m.values.iter().enumerate().map(code).collect();
    let value = |(i, code): (usize, &u8)| {
        let magnitude = table[usize::from(code & 127)];
        (if code & 128 == 0 { magnitude } else { -magnitude }) * scales[scale_of(i)]
    };
    let values = codes.iter().enumerate().map(value).collect();
    out.push(m.tensor("", &[m.n, m.k], Dtype::F8_E4M3, codes));
    out.push(m.tensor(suffix, &grid, dtype, scale_bytes));
    values
}

fn mxfp4(m: &Matrices<'_>, out: &mut Vec<Tensor>) -> Vec<f32> {
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let (mut codes, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for block in m.values.chunks_exact(32) {
        let largest = block.iter().fold(1e-6f32, |most, value| most.max(value.abs()));
        let exponent = (largest / 6.0).log2().ceil() as i32;
        let scale = 2f32.powi(exponent);
        scales.push((exponent + 127) as u8);
        let of_block: Vec<u8> = block.iter().map(|x| nearest(&E2M1, x.abs() / scale) as u8 | u8::from(*x < 0.0) << 3).collect();
        codes.extend(of_block.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4));
        values.extend(of_block.iter().map(|code| {
            let magnitude = E2M1[usize::from(code & 7)];
            (if code & 8 == 0 { magnitude } else { -magnitude }) * scale
        }));
    }
    out.push(m.tensor("_blocks", &[m.n, m.k / 32, 16], Dtype::U8, codes));
    out.push(m.tensor("_scales", &[m.n, m.k / 32], Dtype::U8, scales));
    values
}

/// Codes of 4 bits of matrices `[rows, k]`, with a scale and a zero point for each row and group.
struct Int4 {
    codes: Vec<u32>,
    scales: Vec<f32>,
    zeros: Vec<u32>,
    values: Vec<f32>,
    scale_bytes: Vec<u8>,
}

impl Int4 {
    fn of(values: &[f32], k: usize, groups: usize, group_of: impl Fn(usize) -> usize, symmetric: bool, dtype: Dtype) -> Int4 {
        let at = |i: usize| i / k * groups + group_of(i % k);
        let count = values.len() / k * groups;
        let (mut least, mut most) = (vec![0f32; count], vec![1e-6f32; count]);
        for (i, value) in values.iter().enumerate() {
            (least[at(i)], most[at(i)]) = (least[at(i)].min(*value), most[at(i)].max(*value));
        }
        let scale = |(least, most): (&f32, &f32)| if symmetric { most.max(-least) / 7.0 } else { (most - least) / 15.0 };
        let scales: Vec<f32> = least.iter().zip(&most).map(scale).collect();
        let (scale_bytes, scales) = bytes_of(&scales, dtype);
        let zero = |(least, scale): (&f32, &f32)| if symmetric { 8 } else { (-least / scale).round().clamp(0.0, 15.0) as u32 };
        let zeros: Vec<u32> = least.iter().zip(&scales).map(zero).collect();
        let code = |(i, value): (usize, &f32)| (value / scales[at(i)] + zeros[at(i)] as f32).round().clamp(0.0, 15.0) as u32;
        let codes: Vec<u32> = values.iter().enumerate().map(code).collect();
        let value = |(i, code): (usize, &u32)| (*code as f32 - zeros[at(i)] as f32) * scales[at(i)];
        let values = codes.iter().enumerate().map(value).collect();
        Int4 { codes, scales, zeros, values, scale_bytes }
    }
}

/// Nibbles as words, eight at a time from the low bits on.
fn words(nibbles: impl Iterator<Item = u32>) -> Vec<u8> {
    let nibbles: Vec<u32> = nibbles.collect();
    let word = |eight: &[u32]| eight.iter().enumerate().fold(0u32, |word, (i, nibble)| word | nibble << (4 * i));
    nibbles.chunks(8).flat_map(|eight| word(eight).to_le_bytes()).collect()
}

fn packed(m: &Matrices<'_>, group: Option<usize>, symmetric: bool, dtype: Dtype, out: &mut Vec<Tensor>) -> Vec<f32> {
    let group = group.unwrap_or(m.k);
    let groups = m.k.div_ceil(group);
    let int4 = Int4::of(m.values, m.k, groups, |k| k / group, symmetric, dtype);
    let codes = int4.codes.chunks_exact(m.k).flat_map(|row| words(row.iter().copied())).collect();
    let shape = if m.stacked { vec![m.count(), m.n, m.k] } else { vec![m.n, m.k] };
    out.push(m.tensor("_packed", &[m.n, m.k.div_ceil(8)], Dtype::I32, codes));
    out.push(m.tensor("_scale", &[m.n, groups], dtype, int4.scale_bytes));
    let numbers = shape.iter().flat_map(|size| (*size as i64).to_le_bytes()).collect();
    out.push((format!("{}_shape", m.name), vec![shape.len()], Dtype::I64, numbers));
    if !symmetric {
        let mut zeros = Vec::new();
        for of_matrix in int4.zeros.chunks_exact(m.n * groups) {
            for eight in of_matrix.chunks(8 * groups) {
                for g in 0..groups {
                    zeros.extend(words(eight.chunks_exact(groups).map(|row| row[g])));
                }
            }
        }
        out.push(m.tensor("_zero_point", &[m.n.div_ceil(8), groups], Dtype::I32, zeros));
    }
    int4.values
}

/// `[rows, cols]` as `[cols, rows]`.
fn turned<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    (0..values.len()).map(|i| values[i % (values.len() / cols) * cols + i / (values.len() / cols)]).collect()
}

fn gptq(m: &Matrices<'_>, group_of: impl Fn(usize) -> usize, out: &mut Vec<Tensor>) -> Vec<f32> {
    let groups = m.k.div_ceil(16);
    let int4 = Int4::of(m.values, m.k, groups, &group_of, false, Dtype::F16);
    let by_input = turned(&int4.codes, m.k); // [K, N]
    let codes = by_input.chunks_exact(8 * m.n).flat_map(|eight| words(turned(eight, m.n).into_iter())).collect();
    let zeros = words(turned(&int4.zeros, groups).into_iter().map(|zero| (zero + 15) & 15));
    let (scales, _) = bytes_of(&turned(&int4.scales, groups), Dtype::F16);
    let of_inputs = (0..m.k).flat_map(|k| (group_of(k) as i32).to_le_bytes()).collect();
    let name = |suffix: &str| format!("{}.{suffix}", m.stem());
    out.push((name("qweight"), vec![m.k / 8, m.n], Dtype::I32, codes));
    out.push((name("qzeros"), vec![groups, m.n / 8], Dtype::I32, zeros));
    out.push((name("scales"), vec![groups, m.n], Dtype::F16, scales));
    out.push((name("g_idx"), vec![m.k], Dtype::I32, of_inputs));
    int4.values
}

fn awq(m: &Matrices<'_>, out: &mut Vec<Tensor>) -> Vec<f32> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let groups = m.k.div_ceil(16);
    let int4 = Int4::of(m.values, m.k, groups, |k| k / 16, false, Dtype::F16);
    let by_words = |values: &[u32]| words(values.chunks_exact(8).flat_map(|eight| ORDER.map(|at| eight[at])));
    let (scales, _) = bytes_of(&turned(&int4.scales, groups), Dtype::F16);
    let name = |suffix: &str| format!("{}.{suffix}", m.stem());
    out.push((name("qweight"), vec![m.k, m.n / 8], Dtype::I32, by_words(&turned(&int4.codes, m.k))));
    out.push((name("qzeros"), vec![groups, m.n / 8], Dtype::I32, by_words(&turned(&int4.zeros, groups))));
    out.push((name("scales"), vec![groups, m.n], Dtype::F16, scales));
    int4.values
}

/// The values of a tensor with the outputs of each matrix as rows.
fn with_outputs_as_rows(spec: &Spec, values: &[f32]) -> Vec<f32> {
    let (_, [n, k]) = spec.matrix_dims();
    match spec.order {
        dropless::layout::WeightOrder::Nk => values.to_vec(),
        _ => values.chunks_exact(n * k).flat_map(|matrix| turned(matrix, n)).collect(),
    }
}

/// The same back in the order of the file.
fn in_order_of_file(spec: &Spec, values: &[f32]) -> Vec<f32> {
    let (_, [n, k]) = spec.matrix_dims();
    match spec.order {
        dropless::layout::WeightOrder::Nk => values.to_vec(),
        _ => values.chunks_exact(n * k).flat_map(|matrix| turned(matrix, k)).collect(),
    }
}

/// A checkpoint of f32 whose matrices are quantised, and one of the numbers that they stand for.
struct Converted {
    quantized: Folder,
    wide: Folder,
    specs: Vec<Spec>,
    /// How many tensors were quantised.
    count: usize,
}

fn converted(name: &str, form: &Form) -> Converted {
    let (quantized, wide) = (Folder::copy_of(name), Folder::copy_of(name));
    let config = read_config(&quantized.file("config.json")).unwrap();
    let specs: Vec<Spec> = config.family.specs(&config).collect();
    let file = std::fs::read(quantized.file(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let (mut narrow, mut plain, mut count) = (Vec::<Tensor>::new(), Vec::<Tensor>::new(), 0);
    for spec in &specs {
        for tensor_name in spec.names() {
            let tensor = tensors.tensor(&tensor_name).unwrap();
            let as_it_is = (tensor_name.clone(), tensor.shape().to_vec(), tensor.dtype(), tensor.data().to_vec());
            let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            let (matrices, [n, k]) = spec.matrix_dims();
            let values = with_outputs_as_rows(spec, &values);
            let stacked = matrices > 1 || spec.shape.len() > 2;
            let m = Matrices { name: &tensor_name, stacked, n, k, values: &values };
            if spec.kind != Kind::Matrix || matches!(spec.part, Part::Embedding | Part::Head) || !(form.takes)(&m) {
                narrow.push(as_it_is.clone());
                plain.push(as_it_is);
                continue;
            }
            let stands_for = in_order_of_file(spec, &(form.write)(&m, &mut narrow));
            let bytes = stands_for.iter().flat_map(|value| value.to_le_bytes()).collect();
            plain.push((tensor_name.clone(), tensor.shape().to_vec(), Dtype::F32, bytes));
            count += 1;
        }
    }
    write(&quantized, &narrow);
    write(&wide, &plain);
    quantized.edit_json("config.json", |config| config["quantization_config"] = (form.config)());
    Converted { quantized, wide, specs, count }
}

fn write(folder: &Folder, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, shape, dtype, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(folder.file(MODEL), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Families whose matrices lie in every way there is: each expert apart, stacked halves, stacked and turned.
const FAMILIES: [&str; 4] = ["qwen3_moe", "granitemoe", "gpt_oss", "tiny-dbrx-f32"];

/// Each form is read as the numbers that it stands for, bit for bit, and a run gives what those numbers give
/// as f32.
#[test]
fn every_form_is_the_numbers_that_it_stands_for() {
    for form in &FORMS {
        for name in FAMILIES {
            let Converted { quantized, wide, specs, count } = converted(name, form);
            let what = format!("{}, {name}", form.name);
            assert!(count > 0, "{what}");
            let config = read_config(&quantized.file("config.json")).unwrap();
            let progress = Progress::new(false);
            let held = Checkpoint::open(quantized.path(), &config, &progress).unwrap();
            let held = Mapped::new(&held, &specs, false, &progress).unwrap();
            let want = std::fs::read(wide.file(MODEL)).unwrap();
            let want = SafeTensors::deserialize(&want).unwrap();
            for spec in specs.iter().filter(|spec| spec.kind == Kind::Matrix) {
                let parts = held.parts(0, spec).unwrap();
                let got: Vec<f32> = parts.iter().flat_map(values_of).collect();
                let is_quantized = parts.iter().any(|part| matches!(part, WeightRows::Quantized(_)));
                let want = spec.names().flat_map(|name| {
                    let bytes = want.tensor(&name).unwrap().data();
                    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    if is_quantized { with_outputs_as_rows(spec, &values) } else { values }
                });
                assert!(got.iter().map(|value| value.to_bits()).eq(want.map(f32::to_bits)), "{what}, {}", spec.name());
            }
            let args = ["--generate", "3", "--dump-layers"];
            let wide = dump_of(on_cpu, wide.path(), &PROMPT, &args);
            agree(&dump_of(on_cpu, quantized.path(), &PROMPT, &[&args[..], &[EXACT]].concat()), &wide);
            // Rounded activations give the same bits on any number of threads.
            let rounded = |threads| dump_of(on_cpu, quantized.path(), &PROMPT, &[&args[..], &["--threads", threads]].concat());
            assert!(rounded("1") == rounded("3"), "{what}: threads give other bits");
        }
    }
}

fn values_of(part: &WeightRows<'_>) -> Vec<f32> {
    match part {
        WeightRows::Quantized(rows) => rows.to_f32().unwrap(),
        WeightRows::F32(rows) => rows.as_slice().unwrap().to_vec(),
        other => panic!("{}", other.dtype().name()),
    }
}

/// Each form on an emulated GPU, against the CPU: with f32 activations within f32, with bf16 within the
/// example's own limit of logits. All experts serve each token, so that no rounding chooses others.
#[test]
fn every_form_runs_on_a_gpu() {
    use crate::fixture::run_on;

    let all: Vec<(&str, &Form)> = FORMS.iter().map(|form| ("qwen3_moe", form)).collect();
    let other = |name| FORMS.iter().filter(|form| matches!(form.name, "fp8 blocks" | "int4 symmetric")).map(move |form| (name, form));
    for (name, form) in all.into_iter().chain(FAMILIES[1..].iter().flat_map(|name| other(*name))) {
        let folder = converted(name, form).quantized;
        folder.edit_json("config.json", |config| {
            let fields = ["num_experts_per_tok", "experts_per_token"];
            let experts = ["num_experts", "num_local_experts"].iter().find_map(|field| config[*field].as_u64());
            match experts {
                Some(count) => fields.iter().for_each(|field| config[*field] = count.into()),
                None => config["ffn_config"]["moe_top_k"] = config["ffn_config"]["moe_num_experts"].clone(),
            }
        });
        let (driver, stream) = dropless_kit::device::emulated();
        let on_gpu = |args: &[&str]| run_on(stream.device(), args);
        let args = ["--layers", "1", "--generate", "1"];
        let want = dump_of(on_cpu, folder.path(), &PROMPT[..3], &[&args[..], &[EXACT]].concat());
        let wide = dump_of(on_gpu, folder.path(), &PROMPT[..3], &[&args[..], &["--activations", "f32"]].concat());
        agree(&wide, &want);
        let narrow = dump_of(on_gpu, folder.path(), &PROMPT[..3], &[&args[..], &["--activations", "bf16"]].concat());
        let error = dropless_kit::compare::relative_l2(&narrow["logits"].1, &want["logits"].1);
        assert!(error <= 0.03, "{}, {name}: {error:e}", form.name);
        assert_eq!(driver.reports(), [""; 0]);
    }
}

/// GPTQ and AWQ are copied in another order. A run says how much memory the copies need, and refuses more
/// than its limit.
#[test]
fn what_is_made_is_counted() {
    let form = |name: &str| FORMS.iter().find(|form| form.name == name).unwrap();
    let said = |form| {
        let ran = converted("qwen3_moe", form).quantized.run();
        assert_eq!(ran.code, 0, "{}", ran.err);
        let line = ran.out.lines().find(|line| line.starts_with("  memory")).unwrap().to_owned();
        (line.contains("needed: weights "), ran.out)
    };
    assert!(!said(form("int4 symmetric")).0);
    let (made, out) = said(form("awq"));
    assert!(made && out.contains("weights int4, f32 (mapped)"), "{out}");
    let (made, out) = said(form("gptq by activations"));
    assert!(made && out.contains("weights f32, int4 (mapped)"), "{out}");
    let folder = converted("qwen3_moe", form("gptq")).quantized;
    let args = ["--model", folder.path().to_str().unwrap(), "--tokens", "1", "--memory-limit", "100000"];
    let text = refused(&on_cpu(&args));
    assert!(text.starts_with("memory: the run needs ") && text.contains("(weights "), "{text}");
}

/// Quantised routers and gates of shared experts are read as floats.
#[test]
fn a_quantised_router_becomes_f32() {
    let folder = Folder::copy_of("qwen2_moe");
    let file = std::fs::read(folder.file(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let (mut narrow, mut plain) = (Vec::<Tensor>::new(), Vec::<Tensor>::new());
    for (name, tensor) in tensors.iter() {
        let as_it_is = (name.to_owned(), tensor.shape().to_vec(), tensor.dtype(), tensor.data().to_vec());
        if !name.ends_with("mlp.gate.weight") && !name.ends_with("shared_expert_gate.weight") {
            narrow.push(as_it_is.clone());
            plain.push(as_it_is);
            continue;
        }
        let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let (n, k) = (tensor.shape()[0], tensor.shape()[1]);
        let values = fp8(&Matrices { name, stacked: false, n, k, values: &values }, [128, 128], "_scale_inv", Dtype::F32, &mut narrow);
        plain.push((name.to_owned(), vec![n, k], Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()));
    }
    let wide = Folder::copy_of("qwen2_moe");
    write(&wide, &plain);
    write(&folder, &narrow);
    folder.edit_json("config.json", |config| config["quantization_config"] = (FORMS[0].config)());
    let args = ["--generate", "3", "--dump-layers"];
    agree(&dump_of(on_cpu, folder.path(), &PROMPT, &args), &dump_of(on_cpu, wide.path(), &PROMPT, &args));
}

#[test]
fn random_weights_are_not_quantised() {
    let config = published("qwen3_moe_fp8").join("config.json");
    let config = config.to_str().unwrap();
    let text = refused(&on_cpu(&["--random", config, "--tokens", "1"]));
    assert_eq!(text, format!("{config}: `quantization_config` must be null: random weights are not quantised"));
}

/// The refusal of a checkpoint of that form after an edit of its tensors.
fn refusal(form: &str, edit: impl FnOnce(&mut Vec<Tensor>)) -> String {
    let form = FORMS.iter().find(|known| known.name == form).unwrap();
    let folder = converted("qwen3_moe", form).quantized;
    let file = std::fs::read(folder.file(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut all: Vec<Tensor> =
        tensors.iter().map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec(), tensor.dtype(), tensor.data().to_vec())).collect();
    edit(&mut all);
    write(&folder, &all);
    crate::hostile::watched(|| folder.refused())
}

const O: &str = "model.layers.0.self_attn.o_proj"; // [64, 128]
const DOWN: &str = "model.layers.1.mlp.experts.3.down_proj"; // [64, 40]

fn find<'t>(tensors: &'t mut [Tensor], name: &str) -> &'t mut Tensor {
    tensors.iter_mut().find(|(known, ..)| known == name).unwrap_or_else(|| panic!("{name}"))
}

fn remove(tensors: &mut Vec<Tensor>, name: &str) {
    assert!(tensors.iter().any(|(known, ..)| known == name), "{name}");
    tensors.retain(|(known, ..)| known != name);
}

/// Takes the last element of a tensor's last dimension away.
fn shorten((_, shape, _, bytes): &mut Tensor) {
    let size = bytes.len() / shape.iter().product::<usize>();
    *shape.last_mut().unwrap() -= 1;
    bytes.truncate(shape.iter().product::<usize>() * size);
}

/// Overwrites an element of 1, 2 or 4 bytes.
fn set(tensor: &mut Tensor, at: usize, bytes: &[u8]) {
    tensor.3[at * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
}

const NAN: [u8; 4] = [0, 0, 0xc0, 0x7f];
const INFINITE_BF16: [u8; 2] = [0x80, 0x7f];
const NAN_F16: [u8; 2] = [0, 0x7e];

#[test]
fn bad_tensors_are_refused() {
    let o = |suffix: &str| format!("{O}.weight{suffix}");
    let mut faults = Vec::new();
    let mut wants = |form: &str, want: String, edit: &dyn Fn(&mut Vec<Tensor>)| {
        let got = refusal(form, edit);
        if got != format!("{MODEL}: {want}") {
            faults.push(format!("{form}: {got}\n    wanted {want}"));
        }
    };
    // FP8.
    let scales = o("_scale_inv");
    wants("fp8 blocks", format!("tensor `{scales}` is missing"), &|all| remove(all, &scales));
    wants("fp8 blocks", format!("tensor `{}` is missing", o("")), &|all| remove(all, &o("")));
    wants("fp8 small blocks", format!("tensor `{scales}` must be [3, 4] by config.json, got [3, 3]"), &|all| shorten(find(all, &scales)));
    wants("fp8 blocks", format!("tensor `{}` must be [64, 128] by config.json, got [64, 127]", o("")), &|all| shorten(find(all, &o(""))));
    wants("fp8 blocks", format!("tensor `{scales}` must be F32, BF16 or F16, got I32"), &|all| find(all, &scales).2 = Dtype::I32);
    wants("fp8 blocks", format!("tensor `{}` must be F8_E4M3, got F8_E5M2", o("")), &|all| find(all, &o("")).2 = Dtype::F8_E5M2);
    wants("fp8 blocks", format!("tensor `{}` must be F8_E4M3, got BF16", o("")), &|all| {
        let codes = find(all, &o(""));
        (codes.2, codes.3) = (Dtype::BF16, vec![0; 2 * codes.3.len()]);
    });
    wants("fp8 blocks", format!("tensor `{scales}` must have finite scales, that of row 0, block 0 is not"), &|all| {
        set(find(all, &scales), 0, &NAN);
    });
    wants("fp8 small blocks", format!("tensor `{scales}` must have finite scales, that of row 48, block 3 is not"), &|all| {
        set(find(all, &scales), 11, &INFINITE_BF16);
    });
    wants("fp8 by output", format!("tensor `{}` must be [64, 1] by config.json, got [1, 64]", o("_scale")), &|all| {
        find(all, &o("_scale")).1 = vec![1, 64];
    });
    wants("fp8 by tensor", format!("tensor `{}` must be [1] by config.json, got [64, 1]", o("_scale")), &|all| {
        let scale = find(all, &o("_scale"));
        (scale.1, scale.3) = (vec![64, 1], vec![0; 256]);
    });
    // A tensor that is not quantised according to config.json.
    wants(
        "fp8 small blocks",
        "tensor `lm_head.weight` must be F32, BF16 or F16, got F8_E4M3: config.json has `lm_head` as not quantised".into(),
        &|all| {
            let head = find(all, "lm_head.weight");
            (head.2, head.3) = (Dtype::F8_E4M3, vec![0; head.3.len() / 4]);
            let scale = ("lm_head.weight_scale_inv".to_owned(), vec![6, 2], Dtype::F32, vec![0; 48]);
            all.push(scale);
        },
    );
    // An expert of another type than its neighbours.
    let down = format!("{DOWN}.weight");
    wants("fp8 blocks", format!("tensor `{down}` must be e4m3 as `model.layers.1.mlp.experts.0.down_proj.weight` is, got f32"), &|all| {
        remove(all, &format!("{down}_scale_inv"));
        let codes = find(all, &down);
        (codes.2, codes.3) = (Dtype::F32, vec![0; 4 * codes.3.len()]);
    });
    // MXFP4.
    wants("mxfp4", format!("tensor `{}` is missing", o("_scales")), &|all| remove(all, &o("_scales")));
    wants("mxfp4", format!("tensor `{}` is missing", o("_blocks")), &|all| remove(all, &o("_blocks")));
    wants("mxfp4", format!("tensor `{}` must be [64, 4, 16] by config.json, got [64, 4, 15]", o("_blocks")), &|all| {
        shorten(find(all, &o("_blocks")));
    });
    wants("mxfp4", format!("tensor `{}` must be [64, 4] by config.json, got [64, 3]", o("_scales")), &|all| {
        shorten(find(all, &o("_scales")))
    });
    wants("mxfp4", format!("tensor `{}` must be U8, got I8", o("_scales")), &|all| find(all, &o("_scales")).2 = Dtype::I8);
    wants("mxfp4", format!("tensor `{}` must have finite scales, that of row 63, block 3 is not", o("_scales")), &|all| {
        set(find(all, &o("_scales")), 255, &[255]);
    });
    wants("mxfp4", format!("tensor `{}` is there, and so is `{}`, which it stands for", o("_blocks"), o("")), &|all| {
        all.push((o(""), vec![64, 128], Dtype::F32, vec![0; 4 * 64 * 128]));
    });
    // INT4 of compressed-tensors.
    let int4 = "int4 with zero points";
    for suffix in ["_scale", "_shape", "_zero_point"] {
        wants(int4, format!("tensor `{}` is missing", o(suffix)), &|all| remove(all, &o(suffix)));
    }
    wants(int4, format!("tensor `{}` must be [8, 8] by config.json, got [8, 7]", o("_zero_point")), &|all| {
        shorten(find(all, &o("_zero_point")))
    });
    wants(int4, format!("tensor `{}` must be [64, 16] by config.json, got [64, 15]", o("_packed")), &|all| {
        shorten(find(all, &o("_packed")))
    });
    wants(int4, format!("tensor `{}` must be [64, 8] by config.json, got [64, 7]", o("_scale")), &|all| shorten(find(all, &o("_scale"))));
    wants(int4, format!("tensor `{}` must be I32, got U32", o("_packed")), &|all| find(all, &o("_packed")).2 = Dtype::U32);
    for (value, said) in [(127i64, "[64, 127]"), (-1, "[64, -1]"), (i64::MAX, "[64, 9223372036854775807]")] {
        wants(int4, format!("tensor `{}` must hold [64, 128] by config.json, got {said}", o("_shape")), &|all| {
            set(find(all, &o("_shape")), 1, &value.to_le_bytes());
        });
    }
    wants(int4, format!("tensor `{}` must hold [64, 128] by config.json, got [64]", o("_shape")), &|all| shorten(find(all, &o("_shape"))));
    wants(int4, format!("tensor `{}` must have finite scales, that of row 1, block 2 is not", o("_scale")), &|all| {
        set(find(all, &o("_scale")), 10, &INFINITE_BF16);
    });
    wants(
        "int4 symmetric",
        format!("tensor `{}` is there, and config.json says that zero points are symmetric", o("_zero_point")),
        &|all| {
            all.push((o("_zero_point"), vec![8, 4], Dtype::I32, vec![0; 128]));
        },
    );
    // GPTQ and AWQ.
    let name = |suffix: &str| format!("{O}.{suffix}");
    for form in ["gptq", "awq"] {
        for suffix in ["qzeros", "scales"] {
            wants(form, format!("tensor `{}` is missing", name(suffix)), &|all| remove(all, &name(suffix)));
            let [want, got] = if suffix == "qzeros" { ["[8, 8]", "[8, 7]"] } else { ["[8, 64]", "[8, 63]"] };
            wants(form, format!("tensor `{}` must be {want} by config.json, got {got}", name(suffix)), &|all| {
                shorten(find(all, &name(suffix)))
            });
        }
        wants(form, format!("tensor `{}` is missing", name("qweight")), &|all| remove(all, &name("qweight")));
        wants(form, format!("tensor `{}` must be I32, got F32", name("qweight")), &|all| find(all, &name("qweight")).2 = Dtype::F32);
        wants(form, format!("tensor `{}` must have finite scales, that of row 3, block 2 is not", name("scales")), &|all| {
            set(find(all, &name("scales")), 2 * 64 + 3, &NAN_F16);
        });
    }
    wants("gptq", format!("tensor `{}` must be [16, 64] by config.json, got [16, 63]", name("qweight")), &|all| {
        shorten(find(all, &name("qweight")))
    });
    wants("awq", format!("tensor `{}` must be [128, 8] by config.json, got [128, 7]", name("qweight")), &|all| {
        shorten(find(all, &name("qweight")))
    });
    wants("gptq", format!("tensor `{}` must be [128] by config.json, got [127]", name("g_idx")), &|all| shorten(find(all, &name("g_idx"))));
    for (value, said) in [(8i32, "8"), (-1, "4294967295")] {
        let want = format!("tensor `{}` cannot be used: expert_weights: `groups[5]` is {said}, must be < 8", name("g_idx"));
        wants("gptq", want, &|all| set(find(all, &name("g_idx")), 5, &value.to_le_bytes()));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What `quantization_config` may not be.
#[test]
fn bad_configurations_are_refused() {
    let mut faults = Vec::new();
    for (form, pointer, value, want) in CONFIGURATIONS {
        let form = FORMS.iter().find(|known| known.name == *form).unwrap();
        let mut config = (form.config)();
        let value = serde_json::from_str(value).unwrap();
        match *pointer {
            "" => config = value,
            pointer => {
                let (outer, field) = pointer.rsplit_once('/').unwrap();
                config.pointer_mut(outer).unwrap()[field] = value;
            }
        }
        let folder = Folder::copy_of("qwen3_moe");
        folder.edit_json("config.json", |all| all["quantization_config"] = config);
        let got = crate::hostile::watched(|| folder.refused());
        if got != format!("config.json: `quantization_config{want}") {
            faults.push(format!("{}, {pointer}: {got}\n    wanted {want}", form.name));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

const CONFIGURATIONS: &[(&str, &str, &str, &str)] = &[
    ("mxfp4", "", r#""mxfp4""#, "` must be an object, got \"mxfp4\""),
    ("mxfp4", "", "{}", ".quant_method` is missing"),
    (
        "mxfp4",
        "/quant_method",
        r#""bitsandbytes""#,
        ".quant_method` must be one of fp8, mxfp4, compressed-tensors, gptq, awq, got \"bitsandbytes\"",
    ),
    ("mxfp4", "/modules_to_not_convert", r#"["lm_head", 3]"#, ".modules_to_not_convert` must hold names of modules, got 3"),
    ("mxfp4", "/modules_to_not_convert", r#""lm_head""#, ".modules_to_not_convert` must be a list, got \"lm_head\""),
    ("fp8 blocks", "/fmt", r#""e5m2""#, ".fmt` must be \"e4m3\", got \"e5m2\""),
    ("fp8 blocks", "/weight_block_size", "null", ".weight_block_size` is missing"),
    ("fp8 blocks", "/weight_block_size", "128", ".weight_block_size` must be a list, got 128"),
    ("fp8 blocks", "/weight_block_size", "[128]", ".weight_block_size` must be two whole numbers from 1 to 2147483647, got [128]"),
    ("fp8 blocks", "/weight_block_size", "[0, 128]", ".weight_block_size` must be two whole numbers from 1 to 2147483647, got [0,128]"),
    ("fp8 blocks", "/weight_block_size", "[128, -1]", ".weight_block_size` must be two whole numbers from 1 to 2147483647, got [128,-1]"),
    (
        "int4 symmetric",
        "/format",
        r#""nvfp4-pack-quantized""#,
        ".format` must be one of float-quantized, pack-quantized, got \"nvfp4-pack-quantized\"",
    ),
    ("int4 symmetric", "/config_groups", "{}", ".config_groups` must have one entry, got 0"),
    ("int4 symmetric", "/config_groups", r#"{"a": {}, "b": {}}"#, ".config_groups` must have one entry, got 2"),
    ("int4 symmetric", "/config_groups", r#"{"a": 4}"#, ".config_groups` must hold an object, got 4"),
    (
        "int4 symmetric",
        "/config_groups/group_0/targets",
        r#"["re:.*mlp"]"#,
        ".config_groups.group_0.targets` must be [\"Linear\"], got [\"re:.*mlp\"]",
    ),
    ("int4 symmetric", "/config_groups/group_0/weights/num_bits", "3", ".config_groups.group_0.weights.num_bits` must be 4, got 3"),
    (
        "int4 symmetric",
        "/config_groups/group_0/weights/type",
        r#""float""#,
        ".config_groups.group_0.weights.type` must be \"int\", got \"float\"",
    ),
    ("int4 symmetric", "/config_groups/group_0/weights/group_size", "null", ".config_groups.group_0.weights.group_size` is missing"),
    (
        "int4 symmetric",
        "/config_groups/group_0/weights/group_size",
        "0",
        ".config_groups.group_0.weights.group_size` must be a whole number from 1 to 2147483647, got 0",
    ),
    (
        "int4 symmetric",
        "/config_groups/group_0/weights/strategy",
        r#""tensor""#,
        ".config_groups.group_0.weights.strategy` must be one of channel, group, got \"tensor\"",
    ),
    (
        "int4 symmetric",
        "/config_groups/group_0/weights/actorder",
        r#""group""#,
        ".config_groups.group_0.weights.actorder` must be one of null, weight, got \"group\"",
    ),
    (
        "fp8 by output",
        "/config_groups/group_0/weights/strategy",
        r#""block""#,
        ".config_groups.group_0.weights.strategy` must be one of tensor, channel, got \"block\"",
    ),
    ("fp8 by output", "/config_groups/group_0/weights/num_bits", "4", ".config_groups.group_0.weights.num_bits` must be 8, got 4"),
    ("gptq", "/bits", "8", ".bits` must be 4, got 8"),
    ("gptq", "/checkpoint_format", r#""gptq_v2""#, ".checkpoint_format` must be \"gptq\", got \"gptq_v2\""),
    ("gptq", "/group_size", "-2", ".group_size` must be a whole number from 1 to 2147483647, got -2"),
    ("gptq", "/dynamic", r#"{"mlp": {"bits": 8}}"#, ".dynamic` must be {}, got {\"mlp\":{\"bits\":8}}"),
    ("awq", "/version", r#""gemv""#, ".version` must be one of gemm, GEMM, got \"gemv\""),
    ("awq", "/zero_point", "false", ".zero_point` must be true, got false"),
    ("awq", "/bits", "3", ".bits` must be 4, got 3"),
    ("awq", "", r#"{"quant_method": "awq", "bits": 4}"#, ".group_size` is missing"),
    ("gptq", "", r#"{"quant_method": "gptq", "group_size": 128}"#, ".bits` is missing"),
];
