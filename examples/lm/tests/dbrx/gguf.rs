//! GGUF files: results against those of another implementation; a file of each architecture, made from a
//! checkpoint of its family; and files that are refused.
//!
//! The writer here follows the format's specification. Names and layouts of tensors are those of llama.cpp's
//! converter.

use std::path::Path;

use dropless::{Bf16, F16, Float};
use dropless_lm::families::read_gguf;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::example::gguf::{GgufFile, header_of};
use crate::example::progress::Progress;
use crate::families::{PROMPT, on_cpu};
use crate::fixture::{Folder, checkpoint, refused};
use crate::hostile::watched;
use crate::quantized::{EXACT, holds, published};
use crate::results::{agree, dump_of};
use crate::rounded::edited;

const MODEL: &str = "model.gguf";
/// Bytes of the header of the file that [`model`] gives.
const HEADER_BYTES: usize = 3296;

fn model() -> Vec<u8> {
    std::fs::read(published("gguf_qwen3moe").join(MODEL)).unwrap()
}

#[test]
fn references_hold() {
    holds("gguf_qwen3moe", "goldens.safetensors", &[EXACT], 12);
    holds("gguf_qwen3moe", "goldens.safetensors", &[], 4);
}

/// `--model` names the file itself, or a folder with one such file. What a run says of the weights.
#[test]
fn a_file_is_named_by_itself_or_by_its_folder() {
    let folder = Folder::new();
    std::fs::write(folder.file("some.GGUF"), model()).unwrap();
    let of = |path: &Path| on_cpu(&["--model", path.to_str().unwrap(), "--tokens", "1,2,3"]);
    for path in [folder.file("some.GGUF"), folder.path().to_owned()] {
        let ran = of(&path);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        assert!(ran.out.starts_with("Qwen3-MoE  "), "{}", ran.out);
        for line in [
            "  attention  2 of 256 x 256, 2 of 128 x 256       1       197 k   197 k   132 KiB  q4_k, q4_0, q8_0, q6_k\n",
            "  experts    3 of 4 x 256 x 256                   1       786 k   393 k   490 KiB  q6_k, q4_k, gguf mxfp4\n",
        ] {
            assert!(ran.out.contains(line), "{line:?} in {}", ran.out);
        }
    }
    std::fs::write(folder.file("other.gguf"), model()).unwrap();
    let text = refused(&of(folder.path()));
    assert!(text.contains("has 2 GGUF files, ") && text.ends_with("other.gguf first; give the path of one"), "{text}");
    let text = refused(&of(&folder.file("third.gguf")));
    assert!(text.ends_with("third.gguf: not found"), "{text}");
    std::fs::write(folder.file("model.bin"), model()).unwrap();
    let text = refused(&of(&folder.file("model.bin")));
    assert!(text.ends_with("model.bin: must be a folder, or a GGUF file whose name ends in .gguf"), "{text}");
}

/// An entry's value.
#[derive(Clone)]
enum Entry {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Raw(u32, Vec<u8>),
}

/// A tensor by its name, its shape with the innermost size last, its type and its bytes.
type Tensor = (String, Vec<usize>, u32, Vec<u8>);

/// A file of these entries and tensors.
fn written(entries: &[(String, Entry)], tensors: &[Tensor]) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let mut file = b"GGUF".to_vec();
    let number = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let text = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    word(&mut file, 3);
    number(&mut file, tensors.len() as u64);
    number(&mut file, entries.len() as u64);
    for (key, entry) in entries {
        text(&mut file, key);
        match entry {
            Entry::U32(value) => [4, *value].into_iter().for_each(|value| word(&mut file, value)),
            Entry::F32(value) => [6, value.to_bits()].into_iter().for_each(|value| word(&mut file, value)),
            Entry::Text(value) => {
                word(&mut file, 8);
                text(&mut file, value);
            }
            Entry::Raw(kind, bytes) => {
                word(&mut file, *kind);
                file.extend(bytes);
            }
        }
    }
    let mut offset = 0;
    for (name, shape, kind, bytes) in tensors {
        text(&mut file, name);
        word(&mut file, shape.len() as u32);
        shape.iter().rev().for_each(|size| number(&mut file, *size as u64));
        word(&mut file, *kind);
        number(&mut file, offset);
        offset = (offset + bytes.len() as u64).next_multiple_of(ALIGNMENT as u64);
    }
    for (.., bytes) in tensors {
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(bytes);
    }
    file
}

/// The floats of a checkpoint of safetensors, by name.
struct Source {
    file: Vec<u8>,
    config: Value,
}

impl Source {
    fn open(name: &str) -> Source {
        let folder = checkpoint(name);
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        Source { file: std::fs::read(folder.join("model.safetensors")).unwrap(), config }
    }

    fn get(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = SafeTensors::deserialize(&self.file).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        (tensor.shape().to_vec(), tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn size(&self, pointer: &str) -> usize {
        self.config.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer}")) as usize
    }

    fn number(&self, pointer: &str) -> f32 {
        self.config.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer}")) as f32
    }
}

/// A file that is being written.
struct File<'s> {
    source: &'s Source,
    name: &'static str,
    entries: Vec<(String, Entry)>,
    tensors: Vec<Tensor>,
}

impl<'s> File<'s> {
    fn new(source: &'s Source, name: &'static str) -> File<'s> {
        let entries = vec![("general.architecture".to_owned(), Entry::Text(name))];
        File { source, name, entries, tensors: Vec::new() }
    }

    fn entry(&mut self, key: &str, entry: Entry) {
        self.entries.push((format!("{}.{key}", self.name), entry));
    }

    /// Entries of whole numbers: their keys, and the fields of `config.json` that hold the values.
    fn sizes(&mut self, keys: &[(&str, &str)]) {
        keys.iter().for_each(|(key, pointer)| self.entry(key, Entry::U32(self.source.size(pointer) as u32)));
    }

    fn add(&mut self, name: impl Into<String>, shape: Vec<usize>, values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.push((name.into(), shape, 0, bytes));
    }

    /// A tensor with the same values, under another name.
    fn copy(&mut self, from: &str, to: impl Into<String>) {
        let (shape, values) = self.source.get(from);
        self.add(to, shape, &values);
    }

    /// The tensors of all experts in one; `{}` stands for the number.
    fn stack(&mut self, from: &str, count: usize, to: impl Into<String>) {
        let all: Vec<(Vec<usize>, Vec<f32>)> = (0..count).map(|e| self.source.get(&from.replace("{}", &e.to_string()))).collect();
        let shape = [&[count], &all[0].0[..]].concat();
        let values: Vec<f32> = all.into_iter().flat_map(|(_, values)| values).collect();
        self.add(to, shape, &values);
    }

    /// Rows of heads in the order of llama.cpp, which rotates neighbouring rows: the two halves of a head in
    /// turn.
    fn permuted(&mut self, from: &str, heads: usize, to: impl Into<String>) {
        let (shape, values) = self.source.get(from);
        let (rows, half) = (shape[0], shape[0] / heads / 2);
        let cols = values.len() / rows;
        let from_row = |row: usize| {
            let (head, at) = (row / (2 * half), row % (2 * half));
            head * 2 * half + at % 2 * half + at / 2
        };
        let values: Vec<f32> = (0..rows).flat_map(|row| values[from_row(row) * cols..][..cols].to_vec()).collect();
        self.add(to, shape, &values);
    }

    fn bytes(&self) -> Vec<u8> {
        written(&self.entries, &self.tensors)
    }
}

const COMMON: [(&str, &str); 8] = [
    ("block_count", "/num_hidden_layers"),
    ("context_length", "/max_position_embeddings"),
    ("embedding_length", "/hidden_size"),
    ("feed_forward_length", "/intermediate_size"),
    ("attention.head_count", "/num_attention_heads"),
    ("attention.head_count_kv", "/num_key_value_heads"),
    ("expert_count", "/num_local_experts"),
    ("expert_used_count", "/num_experts_per_tok"),
];

/// Llama, and Mixtral where it has experts.
fn llama(source: &Source, experts: bool) -> Vec<u8> {
    let mut file = File::new(source, "llama");
    file.sizes(&COMMON[..if experts { 8 } else { 6 }]);
    file.entry("attention.layer_norm_rms_epsilon", Entry::F32(source.number("/rms_norm_eps")));
    file.entry("rope.freq_base", Entry::F32(source.number("/rope_theta")));
    let [heads, kv_heads] = ["/num_attention_heads", "/num_key_value_heads"].map(|field| source.size(field));
    file.entry("rope.dimension_count", Entry::U32((source.size("/hidden_size") / heads) as u32));
    file.copy("model.embed_tokens.weight", "token_embd.weight");
    file.copy("model.norm.weight", "output_norm.weight");
    file.copy("lm_head.weight", "output.weight");
    for l in 0..source.size("/num_hidden_layers") {
        let (from, to) = (|name: &str| format!("model.layers.{l}.{name}.weight"), |name: &str| format!("blk.{l}.{name}.weight"));
        file.copy(&from("input_layernorm"), to("attn_norm"));
        file.copy(&from("post_attention_layernorm"), to("ffn_norm"));
        file.permuted(&from("self_attn.q_proj"), heads, to("attn_q"));
        file.permuted(&from("self_attn.k_proj"), kv_heads, to("attn_k"));
        file.copy(&from("self_attn.v_proj"), to("attn_v"));
        file.copy(&from("self_attn.o_proj"), to("attn_output"));
        if experts {
            let count = source.size("/num_local_experts");
            file.copy(&from("block_sparse_moe.gate"), to("ffn_gate_inp"));
            for (w, name) in [("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")] {
                file.stack(&from(&format!("block_sparse_moe.experts.{{}}.{w}")), count, to(name));
            }
        } else {
            ["gate", "up", "down"].iter().for_each(|name| file.copy(&from(&format!("mlp.{name}_proj")), to(&format!("ffn_{name}"))));
        }
    }
    file.bytes()
}

/// gpt-oss: gate and up apart, their outputs as rows.
fn gpt_oss(source: &Source) -> Vec<u8> {
    let mut file = File::new(source, "gpt-oss");
    file.sizes(&COMMON);
    file.sizes(&[
        ("expert_feed_forward_length", "/intermediate_size"),
        ("attention.key_length", "/head_dim"),
        ("attention.value_length", "/head_dim"),
        ("attention.sliding_window", "/sliding_window"),
        ("rope.scaling.original_context_length", "/rope_scaling/original_max_position_embeddings"),
    ]);
    file.entry("attention.layer_norm_rms_epsilon", Entry::F32(source.number("/rms_norm_eps")));
    file.entry("rope.freq_base", Entry::F32(source.number("/rope_theta")));
    file.entry("rope.scaling.type", Entry::Text("yarn"));
    file.entry("rope.scaling.factor", Entry::F32(source.number("/rope_scaling/factor")));
    file.copy("model.embed_tokens.weight", "token_embd.weight");
    file.copy("model.norm.weight", "output_norm.weight");
    file.copy("lm_head.weight", "output.weight");
    for l in 0..source.size("/num_hidden_layers") {
        let (from, to) = (|name: &str| format!("model.layers.{l}.{name}"), |name: &str| format!("blk.{l}.{name}"));
        file.copy(&from("input_layernorm.weight"), to("attn_norm.weight"));
        file.copy(&from("post_attention_layernorm.weight"), to("post_attention_norm.weight"));
        for (name, other) in [("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")] {
            for kind in ["weight", "bias"] {
                file.copy(&from(&format!("self_attn.{name}.{kind}")), to(&format!("{other}.{kind}")));
            }
        }
        file.copy(&from("self_attn.sinks"), to("attn_sinks.weight"));
        ["weight", "bias"].iter().for_each(|kind| file.copy(&from(&format!("mlp.router.{kind}")), to(&format!("ffn_gate_inp.{kind}"))));
        let (shape, both) = source.get(&from("mlp.experts.gate_up_proj"));
        let [e, d, f] = [shape[0], shape[1], shape[2] / 2];
        let (_, biases) = source.get(&from("mlp.experts.gate_up_proj_bias"));
        for (which, name) in ["ffn_gate_exps", "ffn_up_exps"].iter().enumerate() {
            let value = |i: usize| both[(i / (f * d) * d + i % d) * 2 * f + 2 * (i / d % f) + which];
            file.add(to(&format!("{name}.weight")), vec![e, f, d], &(0..e * f * d).map(value).collect::<Vec<_>>());
            let bias = |i: usize| biases[i / f * 2 * f + 2 * (i % f) + which];
            file.add(to(&format!("{name}.bias")), vec![e, f], &(0..e * f).map(bias).collect::<Vec<_>>());
        }
        let (_, down) = source.get(&from("mlp.experts.down_proj"));
        let value = |i: usize| down[(i / (d * f) * f + i % f) * d + i / f % d];
        file.add(to("ffn_down_exps.weight"), vec![e, d, f], &(0..e * d * f).map(value).collect::<Vec<_>>());
        file.copy(&from("mlp.experts.down_proj_bias"), to("ffn_down_exps.bias"));
    }
    file.bytes()
}

/// DBRX: one tensor for each of the experts' matrices, their outputs as rows.
fn dbrx(source: &Source) -> Vec<u8> {
    let mut file = File::new(source, "dbrx");
    file.sizes(&[
        ("block_count", "/n_layers"),
        ("context_length", "/max_seq_len"),
        ("embedding_length", "/d_model"),
        ("feed_forward_length", "/ffn_config/ffn_hidden_size"),
        ("attention.head_count", "/n_heads"),
        ("attention.head_count_kv", "/attn_config/kv_n_heads"),
        ("expert_count", "/ffn_config/moe_num_experts"),
        ("expert_used_count", "/ffn_config/moe_top_k"),
    ]);
    file.entry("attention.layer_norm_epsilon", Entry::F32(1e-5));
    file.entry("attention.clamp_kqv", Entry::F32(source.number("/attn_config/clip_qkv")));
    file.entry("rope.freq_base", Entry::F32(source.number("/attn_config/rope_theta")));
    file.copy("transformer.wte.weight", "token_embd.weight");
    file.copy("transformer.norm_f.weight", "output_norm.weight");
    file.copy("lm_head.weight", "output.weight");
    let [e, f, d] = ["/ffn_config/moe_num_experts", "/ffn_config/ffn_hidden_size", "/d_model"].map(|field| source.size(field));
    for l in 0..source.size("/n_layers") {
        let (from, to) = (|name: &str| format!("transformer.blocks.{l}.{name}"), |name: &str| format!("blk.{l}.{name}.weight"));
        file.copy(&from("norm_attn_norm.norm_1.weight"), to("attn_norm"));
        file.copy(&from("norm_attn_norm.norm_2.weight"), to("attn_output_norm"));
        file.copy(&from("norm_attn_norm.attn.Wqkv.weight"), to("attn_qkv"));
        file.copy(&from("norm_attn_norm.attn.out_proj.weight"), to("attn_output"));
        file.copy(&from("ffn.router.layer.weight"), to("ffn_gate_inp"));
        for (w, name) in [("w1", "ffn_gate_exps"), ("v1", "ffn_up_exps")] {
            let (_, values) = source.get(&from(&format!("ffn.experts.mlp.{w}")));
            file.add(to(name), vec![e, f, d], &values);
        }
        let (_, down) = source.get(&from("ffn.experts.mlp.w2"));
        let value = |i: usize| down[(i / (d * f) * f + i % f) * d + i / f % d];
        file.add(to("ffn_down_exps"), vec![e, d, f], &(0..e * d * f).map(value).collect::<Vec<_>>());
    }
    file.bytes()
}

/// A checkpoint of each family, written as a GGUF file, agrees with its references. Rotated heads are left
/// out: their elements are in another order.
#[test]
fn every_architecture_agrees_with_its_family() {
    for (name, file) in [
        ("mixtral-tiny", llama(&Source::open("mixtral-tiny"), true)),
        ("llama-tiny", llama(&Source::open("llama-tiny"), false)),
        ("gpt_oss", gpt_oss(&Source::open("gpt_oss"))),
        ("tiny-dbrx-f32", dbrx(&Source::open("tiny-dbrx-f32"))),
    ] {
        let folder = Folder::new();
        std::fs::write(folder.file(MODEL), file).unwrap();
        for references in ["goldens.safetensors", "decode.safetensors"] {
            let whole = std::fs::read(checkpoint(name).join(references)).unwrap();
            let kept = edited(&whole, |name, tensor| {
                let rotated = ["q_rope", "k_rope", "qkv", "cache."].iter().any(|part| name.contains(part));
                (!rotated).then(|| (tensor.shape().to_vec(), tensor.dtype(), tensor.data().to_vec()))
            });
            std::fs::write(folder.file(references), kept).unwrap();
            let (model, file) = (folder.file(MODEL), folder.file(references));
            let ran = on_cpu(&["--model", model.to_str().unwrap(), "--check", file.to_str().unwrap()]);
            assert!(ran.code == 0 && ran.out.contains("  agrees: "), "{name}, {references}: {}{}", ran.out, ran.err);
        }
    }
}

/// A change of a file's entries and tensors.
type Edit = dyn Fn(&mut Vec<(String, Entry)>, &mut Vec<Tensor>);

/// Floats of each type side by side; Llama 3's divisors; a head that is the embedding.
#[test]
fn variants_run() {
    let source = Source::open("llama-tiny");
    let file = |edit: &Edit| {
        let folder = Folder::new();
        let (mut entries, mut tensors) = parsed(&llama(&source, false));
        edit(&mut entries, &mut tensors);
        std::fs::write(folder.file(MODEL), written(&entries, &tensors)).unwrap();
        folder
    };
    let args = ["--generate", "3"];
    let dump = |folder: &Folder| dump_of(on_cpu, folder.path(), &PROMPT, &args);
    let plain = dump(&file(&|_, _| {}));
    // Weights of 16 bits, or the same numbers as f32.
    let narrow = |wide: bool| {
        file(&move |_, tensors| {
            for (i, (name, _, kind, bytes)) in tensors.iter_mut().enumerate().filter(|(_, tensor)| tensor.1.len() > 1) {
                let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<_>>();
                let f16 = (i + name.len()) % 2 == 0;
                let bits = |value: &f32| if f16 { F16::from_f32(*value).0 } else { Bf16::from_f32(*value).0 };
                let value = |bits: u16| if f16 { F16(bits).to_f32() } else { Bf16(bits).to_f32() };
                (*kind, *bytes) = if wide {
                    (0, values.iter().flat_map(|x| value(bits(x)).to_le_bytes()).collect())
                } else {
                    (if f16 { 1 } else { 30 }, values.iter().flat_map(|x| bits(x).to_le_bytes()).collect())
                };
            }
        })
    };
    agree(&dump(&narrow(false)), &dump(&narrow(true)));
    // Divisors of 1 change nothing; divisors of 2 do.
    let divided = |divisor: f32| {
        file(&move |_, tensors| {
            tensors.push(("rope_freqs.weight".into(), vec![8], 0, std::iter::repeat_n(divisor.to_le_bytes(), 8).flatten().collect()));
        })
    };
    agree(&dump(&divided(1.0)), &plain);
    assert!(dump(&divided(2.0))["logits"] != plain["logits"]);
    let linear = file(&|entries, _| {
        entries.push(("llama.rope.scaling.type".into(), Entry::Text("linear")));
        entries.push(("llama.rope.scaling.factor".into(), Entry::F32(2.0)));
    });
    agree(&dump(&linear), &dump(&divided(2.0)));
    let tied = file(&|_, tensors| tensors.retain(|(name, ..)| name != "output.weight"));
    assert!(dump(&tied)["logits"] != plain["logits"]);
}

/// Entries and tensors of a file that the writer above wrote; entries as raw bytes.
fn parsed(file: &[u8]) -> (Vec<(String, Entry)>, Vec<Tensor>) {
    let mut at = 8;
    let mut take = |count: usize| {
        at += count;
        &file[at - count..at]
    };
    let number = |bytes: &[u8]| u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let word = |bytes: &[u8]| u32::from_le_bytes(*bytes.first_chunk().unwrap());
    let (num_tensors, num_entries) = (number(take(8)), number(take(8)));
    let mut entries = Vec::new();
    for _ in 0..num_entries {
        let length = number(take(8));
        let key = String::from_utf8(take(length).to_vec()).unwrap();
        let kind = word(take(4));
        let bytes = match kind {
            4 | 6 => take(4).to_vec(),
            8 => {
                let length = take(8).to_vec();
                let text = take(number(&length)).to_vec();
                [length, text].concat()
            }
            other => panic!("{other}"),
        };
        entries.push((key, Entry::Raw(kind, bytes)));
    }
    let mut described = Vec::new();
    for _ in 0..num_tensors {
        let length = number(take(8));
        let name = String::from_utf8(take(length).to_vec()).unwrap();
        let dims = word(take(4));
        let mut shape: Vec<usize> = (0..dims).map(|_| number(take(8))).collect();
        shape.reverse();
        let kind = word(take(4));
        described.push((name, shape, kind, number(take(8))));
    }
    let data = take(0).as_ptr().addr() - file.as_ptr().addr();
    let data = data.next_multiple_of(32);
    let tensor = |(name, shape, kind, offset): (String, Vec<usize>, u32, usize)| {
        let len = 4 * shape.iter().product::<usize>();
        (name, shape, kind, file[data + offset..][..len].to_vec())
    };
    (entries, described.into_iter().map(tensor).collect())
}

/// The refusal of a small Mixtral after an edit of entries and tensors.
fn refusal(edit: impl FnOnce(&mut Vec<(String, Entry)>, &mut Vec<Tensor>)) -> String {
    let (mut entries, mut tensors) = parsed(&llama(&Source::open("mixtral-tiny"), true));
    edit(&mut entries, &mut tensors);
    refusal_of(&written(&entries, &tensors))
}

fn refusal_of(file: &[u8]) -> String {
    let folder = Folder::new();
    std::fs::write(folder.file(MODEL), file).unwrap();
    let text = watched(|| folder.refused());
    text.strip_prefix(&format!("{MODEL}: ")).unwrap_or_else(|| panic!("{text}")).to_owned()
}

fn put(entries: &mut Vec<(String, Entry)>, key: &str, entry: Entry) {
    match entries.iter_mut().find(|(known, _)| known == key) {
        Some((_, old)) => *old = entry,
        None => entries.push((key.to_owned(), entry)),
    }
}

fn tensor<'t>(tensors: &'t mut [Tensor], name: &str) -> &'t mut Tensor {
    tensors.iter_mut().find(|(known, ..)| known == name).unwrap_or_else(|| panic!("{name}"))
}

const UP: &str = "blk.1.ffn_up_exps.weight"; // [8, 56, 64]

/// Entries that are missing, absurd or another model's, by their keys.
#[test]
fn bad_entries_are_refused() {
    let mut faults = Vec::new();
    for (key, entry, want) in [
        (
            "general.architecture",
            Some(Entry::Text("bert")),
            "`general.architecture` must be one of qwen3moe, llama, gpt-oss, dbrx, got \"bert\"",
        ),
        ("general.architecture", Some(Entry::U32(3)), "`general.architecture` must be one of qwen3moe, llama, gpt-oss, dbrx, got 3"),
        ("general.architecture", None, "`general.architecture` is missing"),
        ("llama.block_count", None, "`llama.block_count` is missing"),
        ("llama.block_count", Some(Entry::U32(0)), "`llama.block_count` must be a whole number from 1 to 2147483647, got 0"),
        ("llama.block_count", Some(Entry::U32(3)), "tensor `blk.2.attn_norm.weight` is missing"),
        (
            "llama.block_count",
            Some(Entry::U32(u32::MAX)),
            "`llama.block_count` must be a whole number from 1 to 2147483647, got 4294967295",
        ),
        (
            "llama.embedding_length",
            Some(Entry::Text("64")),
            "`llama.embedding_length` must be a whole number from 1 to 2147483647, got \"64\"",
        ),
        (
            "llama.embedding_length",
            Some(Entry::F32(f32::NAN)),
            "`llama.embedding_length` must be a whole number from 1 to 2147483647, got \"NaN\"",
        ),
        ("llama.embedding_length", Some(Entry::U32(128)), "`llama.rope.dimension_count` must be 32, got 16"),
        (
            "llama.attention.head_count_kv",
            Some(Entry::U32(3)),
            "`llama.attention.head_count_kv` must divide llama.attention.head_count = 4, got 3",
        ),
        ("llama.attention.key_length", Some(Entry::U32(7)), "`llama.attention.key_length` must give heads of even size, got 7"),
        ("llama.attention.value_length", Some(Entry::U32(8)), "`llama.attention.value_length` must be 16, got 8"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Some(Entry::F32(-1.0)),
            "`llama.attention.layer_norm_rms_epsilon` must be a positive number, got -1.0",
        ),
        (
            "llama.attention.layer_norm_epsilon",
            Some(Entry::F32(0.0)),
            "`llama.attention.layer_norm_epsilon` must be a positive number, got 0.0",
        ),
        (
            "llama.expert_count",
            Some(Entry::U32(7)),
            "tensor `blk.0.ffn_gate_inp.weight` must be [7, 64] by the file's entries, got [8, 64]",
        ),
        ("llama.expert_used_count", Some(Entry::U32(9)), "`llama.expert_used_count` must be <= llama.expert_count = 8, got 9"),
        ("llama.expert_gating_func", Some(Entry::U32(2)), "`llama.expert_gating_func` must be 1, got 2"),
        (
            "llama.rope.scaling.type",
            Some(Entry::Text("dynamic")),
            "`llama.rope.scaling.type` must be one of default, linear, llama3, yarn, longrope, got \"dynamic\"",
        ),
        ("llama.rope.scaling.attn_factor", Some(Entry::F32(2.0)), "`llama.rope.scaling.attn_factor` must be 1.0, got 2.0"),
        (
            "llama.feed_forward_length",
            Some(Entry::U32(57)),
            "tensor `blk.0.ffn_gate_exps.weight` must be [8, 57, 64] by the file's entries, got [8, 56, 64]",
        ),
        ("split.count", Some(Entry::U32(3)), "is one of 3 parts of a model; parts must be merged first"),
        ("general.alignment", Some(Entry::U32(24)), "`general.alignment` must be a power of two from 8 to 65536, got 24"),
        ("general.alignment", Some(Entry::U32(1 << 31)), "`general.alignment` must be a power of two from 8 to 65536, got 2147483648"),
        ("general.alignment", Some(Entry::Text("32")), "`general.alignment` must be a power of two from 8 to 65536, got \"32\""),
        ("a", Some(Entry::Raw(13, vec![0; 8])), "the value of `a` has type 13, which is none of GGUF's (0 to 12)"),
        ("a", Some(Entry::Raw(7, vec![2])), "the value of `a` must be 0 or 1, got 2"),
        (
            "a",
            Some(Entry::Raw(9, [&99u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat())),
            "the value of `a` has elements of type 99, which is none of GGUF's (0 to 12)",
        ),
        (
            "a",
            Some(Entry::Raw(9, [&12u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat())),
            "the value of `a` must have 18446744073709551615 elements, more than the file has room for",
        ),
        (
            "a",
            Some(Entry::Raw(9, [&8u32.to_le_bytes()[..], &(1u64 << 40).to_le_bytes()].concat())),
            "the value of `a` must have 1099511627776 elements, more than the file has room for",
        ),
        (
            "a",
            Some(Entry::Raw(9, [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat().repeat(5))),
            "the value of `a` has more than 4 arrays within each other",
        ),
    ] {
        let got = refusal(|entries, _| match entry {
            Some(entry) => put(entries, key, entry),
            None => entries.retain(|(known, _)| known != key),
        });
        if got != want {
            faults.push(format!("{key}: {got}\n    wanted {want}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let twice = refusal(|entries, _| entries.push(entries[1].clone()));
    assert_eq!(twice, "entry `llama.block_count` stands twice");
}

/// Tensors that are missing, of another shape or type, or elsewhere.
#[test]
fn bad_tensors_are_refused() {
    let mut faults = Vec::new();
    let mut wants = |want: &str, edit: &dyn Fn(&mut Vec<Tensor>)| {
        let got = refusal(|_, tensors| edit(tensors));
        if got != want {
            faults.push(format!("{got}\n    wanted {want}"));
        }
    };
    wants(&format!("tensor `{UP}` is missing"), &|all| all.retain(|(name, ..)| name != UP));
    wants("tensor `token_embd.weight` is missing", &|all| all.retain(|(name, ..)| name != "token_embd.weight"));
    wants(&format!("tensor `{UP}` stands twice"), &|all| {
        let copy = tensor(all, UP).clone();
        all.push(copy);
    });
    wants(&format!("tensor `{UP}` must be [8, 56, 64] by the file's entries, got [8, 64, 56]"), &|all| tensor(all, UP).1 = vec![8, 64, 56]);
    wants(&format!("tensor `{UP}` is Q2_K, which is not supported"), &|all| tensor(all, UP).2 = 10);
    wants(&format!("tensor `{UP}` has type 4, which is none that is known"), &|all| tensor(all, UP).2 = 4);
    wants(&format!("tensor `{UP}` has type 4294967295, which is none that is known"), &|all| tensor(all, UP).2 = u32::MAX);
    wants(&format!("tensor `{UP}` must have rows of whole blocks of 256 elements of Q4_K, got [64, 56, 8]"), &|all| tensor(all, UP).2 = 12);
    wants("tensor `blk.0.attn_norm.weight` must be F32, F16 or BF16, got q8_0", &|all| {
        let norm = tensor(all, "blk.0.attn_norm.weight");
        (norm.2, norm.3) = (8, vec![0; 68]);
    });
    // The scale of the second block of the third row is infinite. A row is 64 elements in 68 bytes.
    wants(&format!("tensor `{UP}` must have finite scales, that of row 2, block 1 is not"), &|all| {
        let up = tensor(all, UP);
        (up.2, up.3) = (8, vec![0; 8 * 56 * 68]);
        up.3[2 * 68 + 34..][..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    });
    wants(&format!("tensor `{UP}` must have finite scales, that of row 447, block 1 is not"), &|all| {
        let up = tensor(all, UP);
        (up.2, up.3) = (39, vec![0; 8 * 56 * 34]);
        up.3[8 * 56 * 34 - 17] = 255;
    });
    wants("tensor `rope_freqs.weight` must hold positive numbers, got NaN", &|all| {
        all.push(("rope_freqs.weight".into(), vec![8], 0, f32::NAN.to_le_bytes().repeat(8)));
    });
    wants("tensor `rope_freqs.weight` must be [8] by the file's entries, got [7]", &|all| {
        all.push(("rope_freqs.weight".into(), vec![7], 0, 1f32.to_le_bytes().repeat(7)));
    });
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Where the header ends: after the description of the last tensor. Its name is followed by the number of
/// dimensions, three sizes, the type and the offset.
fn header_ends(file: &[u8]) -> usize {
    let name = b"blk.1.ffn_down_exps.weight";
    let at = file.windows(name.len()).position(|window| window == name).unwrap();
    at + name.len() + 4 + 3 * 8 + 4 + 8
}

/// Counts, sizes and offsets that no file has room for.
#[test]
fn absurd_numbers_are_refused() {
    let whole = llama(&Source::open("mixtral-tiny"), true);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refusal_of(&file)
    };
    let all = whole.len();
    assert_eq!(with(0, b"GGML"), "not a GGUF file: it begins with \"GGML\"");
    assert_eq!(with(4, &1u32.to_le_bytes()), "is of GGUF's version 1, must be 2 or 3, in little-endian order");
    assert_eq!(with(4, &3u32.to_be_bytes()), "is of GGUF's version 50331648, must be 2 or 3, in little-endian order");
    let most = |size: usize, most: usize| ((all - 24) / size).min(most);
    for count in [u64::MAX, 1 << 62, 1 << 20] {
        let [tensors, entries] = [8, 16].map(|at| with(at, &count.to_le_bytes()));
        assert_eq!(tensors, format!("must have {count} tensors, a file of {all} bytes may have {}", most(32, 1 << 17)));
        assert_eq!(entries, format!("must have {count} entries, a file of {all} bytes may have {}", most(13, 1 << 16)));
    }
    for length in [u64::MAX, 1 << 63, all as u64] {
        let want = format!("a key at byte 32 takes {length} bytes, the file has {all} (is it truncated?)");
        assert_eq!(with(24, &length.to_le_bytes()), want);
    }
    // The last tensor: dimensions, sizes, type, offset.
    let (name, end) = ("tensor `blk.1.ffn_down_exps.weight`", header_ends(&whole));
    let offset = u64::from_le_bytes(*whole[end - 8..].first_chunk().unwrap());
    let data = end.next_multiple_of(32) as u64;
    for dims in [0u32, 5, u32::MAX] {
        assert_eq!(with(end - 40, &dims.to_le_bytes()), format!("{name} must have 1 to 4 dimensions, got {dims}"));
    }
    let sizes = format!("{name} of [56, 18446744073709551615, 8] F32 has more than 2^62 bytes");
    assert_eq!(with(end - 28, &u64::MAX.to_le_bytes()), sizes);
    let empty = format!("{name} must have rows of whole blocks of 1 elements of F32, got [56, 0, 8]");
    assert_eq!(with(end - 28, &0u64.to_le_bytes()), empty);
    for wrong in [1, offset + 1, u64::MAX] {
        assert_eq!(with(end - 8, &wrong.to_le_bytes()), format!("{name} must begin at a multiple of 32 bytes, got {wrong}"));
    }
    let far = u64::MAX - 31;
    assert_eq!(with(end - 8, &far.to_le_bytes()), format!("{name} begins at byte {far} of the data, beyond 2^64"));
    let bytes = 8 * 64 * 56 * 4;
    let behind = 1u64 << 40;
    let text = format!("{name} ends at byte {}, the file has {all} (is it truncated?)", data + behind + bytes);
    assert_eq!(with(end - 8, &behind.to_le_bytes()), text);
    let text = with(end - 8, &0u64.to_le_bytes());
    let overlaps = format!("begins at byte {data}, where another one lies, which ends at ");
    assert!(text.contains(&overlaps), "{text}");
    // The last bytes are those of a tensor.
    let text = refusal_of(&whole[..all - 1]);
    assert!(text.ends_with(&format!(" ends at byte {all}, the file has {} (is it truncated?)", all - 1)), "{text}");
}

/// A file that ends too early is refused: at any byte of the header, or within the data.
#[test]
fn every_truncation_is_refused() {
    let whole = model();
    for length in (0..HEADER_BYTES).chain((HEADER_BYTES..whole.len()).step_by(997)) {
        let text = watched(|| header_of(&whole[..length])).map(|_| ()).unwrap_err();
        assert!(["truncated", "may have", "has room for"].iter().any(|part| text.contains(part)), "{length}: {text}");
    }
    assert!(header_of(&whole).is_ok());
}

/// Each bit of the header is flipped in turn. The file is refused, or is that of another model: no panic, and
/// no large allocation.
#[test]
fn every_bit_of_a_header() {
    let (mut file, mut refused) = (model(), 0);
    for at in 0..HEADER_BYTES {
        for bit in 0..8 {
            file[at] ^= 1 << bit;
            refused += usize::from(watched(|| header_of(&file)).is_err());
            file[at] ^= 1 << bit;
        }
    }
    assert!(refused > 4000, "{refused} refused");
}

/// Some bytes of the file are damaged, and all of it is opened: a refusal names the file.
#[test]
fn damaged_files_are_refused_or_are_other_models() {
    let whole = model();
    let folder = Folder::new();
    let path = folder.file(MODEL);
    let bytes = (4..HEADER_BYTES).step_by(17).map(|at| (at, 0xff)).chain((4..HEADER_BYTES).step_by(29).map(|at| (at, 0x01)));
    for (at, mask) in bytes.chain((HEADER_BYTES..whole.len()).step_by(30_011).map(|at| (at, 0x7c))) {
        let mut file = whole.clone();
        file[at] ^= mask;
        std::fs::write(&path, file).unwrap();
        let opened = watched(|| {
            let file = GgufFile::open(&path)?;
            let config = read_gguf(&file)?;
            crate::example::checkpoint::Checkpoint::of_gguf(file, &config)
                .and_then(|checkpoint| checkpoint.check_scales(&config, &Progress::new(false)))
        });
        if let Err(failure) = opened {
            let text = failure.text().unwrap();
            assert!(failure.exit_code() == 2 && text.contains(MODEL), "{at}: {text}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any bytes, alone and after the first words of a file, and any damage to several places of a file: no
    /// panic.
    #[test]
    fn any_bytes_are_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), damage in proptest::collection::vec((0..HEADER_BYTES, any::<u64>()), 1..6)) {
        let magic = [&b"GGUF\x03\0\0\0"[..], &bytes].concat();
        let few = [&b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"[..], &bytes].concat();
        let mut file = model();
        for (at, value) in damage {
            let at = at.min(HEADER_BYTES - 8);
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for file in [bytes, magic, few, file] {
            let _ = watched(|| header_of(&file));
        }
    }
}
