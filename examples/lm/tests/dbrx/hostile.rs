//! Configurations and weights that are no model's, of every family: exit code 2 and a text that names the
//! file, the field or tensor, what was wanted and what was got. No panic, no long search, nothing large
//! allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeSet;

use dropless_kit::goldens;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::families::{ALL, merge};
use crate::fixture::{Folder, Ran, checkpoint, refused, run};
use crate::rounded::{Edited, edited};

const MODEL: &str = "model.safetensors";
/// No allocation of a refused run may be larger. The largest of the others is the memory that they may use.
const MAX_BYTES: usize = 64 << 20;
const LIMIT: [&str; 2] = ["--memory-limit", "50000000"];

/// The system's allocator, which keeps the size of each thread's largest allocation.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn seen(layout: Layout) {
    // A thread that ends has none.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
}

// SAFETY: every call goes to the system's allocator with the arguments that it came with. What is done
// besides allocates nothing: the cell is a constant at first and needs no drop.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        seen(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        seen(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as the caller promises; the new size was checked by it, too.
        unsafe {
            seen(Layout::from_size_align_unchecked(bytes, layout.align()));
            System.realloc(place, layout, bytes)
        }
    }
}

/// Gives the result of a call, which must not allocate much at once.
pub fn watched<R>(call: impl FnOnce() -> R) -> R {
    LARGEST.set(0);
    let result = call();
    let largest = LARGEST.get();
    assert!(largest <= MAX_BYTES, "{largest} bytes at once");
    result
}

/// A checkpoint of each family.
fn all() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|case| case.name).chain(["mixtral-tiny", "tiny-dbrx-f32"])
}

fn config_of(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(checkpoint(name).join("config.json")).unwrap()).unwrap()
}

/// Runs random weights of a configuration, and watches what they take.
fn run_random(folder: &Folder, config: &str) -> Ran {
    let file = folder.file("config.json");
    std::fs::write(&file, config).unwrap();
    LARGEST.set(0);
    let args = ["--random", file.to_str().unwrap(), "--tokens", "0", "--generate", "1", "--device", "cpu", "--threads", "1"];
    let mut ran = run(&[&args[..], &LIMIT].concat());
    let largest = LARGEST.get();
    assert!(largest <= MAX_BYTES, "{largest} bytes at once for {config}");
    ran.err = ran.err.replace(&format!("{}/", folder.path().display()), "");
    ran
}

/// The refusal of a configuration after a change of some fields, which is JSON.
#[track_caller]
fn refusal_of(name: &str, fields: &str) -> String {
    let mut config = config_of(name);
    merge(&mut config, serde_json::from_str(fields).unwrap());
    refused(&run_random(&Folder::new(), &config.to_string()))
}

/// Pointers to all fields of a configuration, and of the sections in it.
fn fields_of(config: &Value) -> Vec<String> {
    let mut pointers = Vec::new();
    for (name, value) in config.as_object().unwrap() {
        pointers.push(format!("/{name}"));
        if let Value::Object(section) = value {
            pointers.extend(section.keys().map(|field| format!("/{name}/{field}")));
        }
    }
    pointers
}

/// The words of the readers that a field could be called by.
fn words() -> BTreeSet<String> {
    let sources = goldens::root().join("examples/lm/src/families");
    let mut words = BTreeSet::new();
    for entry in std::fs::read_dir(sources).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let is_word = |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        words.extend(text.split('"').skip(1).step_by(2).filter(is_word).map(str::to_owned));
    }
    words
}

/// Sets a field, or takes it away.
fn put(config: &mut Value, pointer: &str, value: Option<Value>) {
    let (outer, field) = pointer.rsplit_once('/').unwrap();
    let section = config.pointer_mut(outer).unwrap().as_object_mut().unwrap();
    match value {
        Some(value) => drop(section.insert(field.to_owned(), value)),
        None => drop(section.remove(field)),
    }
}

/// Values that few fields may have, and what is wrong in nearly all.
fn odd_values() -> [Value; 13] {
    let sizes = [json!(-1), json!(0), json!(0.5), json!(i32::MAX), json!(1u64 << 31), json!(1u64 << 62), json!(u64::MAX)];
    let [negative, none, half, int, more, most, all] = sizes;
    [negative, none, half, int, more, most, all, json!(1e300), json!(1e-300), json!([1]), json!({}), json!(true), Value::Null]
}

/// A refusal that begins with the field, or with another field of the configuration that no longer agrees
/// with it, or says that the sizes are too large.
#[track_caller]
fn names_the_field(ran: &Ran, pointer: &str, value: &str) {
    let (text, field) = (refused(ran), pointer.trim_start_matches('/').replace('/', "."));
    let last = field.rsplit('.').next().unwrap();
    let named = text.starts_with("config.json: ") && text.contains(&format!("{last}`"));
    let contradicts = text.starts_with("config.json: `") && text.contains(&format!("{last} = "));
    let below = text.starts_with(&format!("config.json: `{field}.")) && text.ends_with("` is missing");
    let large = text.starts_with("memory: the run needs ") || text.starts_with("config.json: head_layout: columns is ");
    let others = [
        // What replaces them, or what they limit.
        ("/num_attention_heads", "config.json: `num_key_value_heads` must be 2147483647, got 4"),
        ("/rope_scaling/beta_fast", "config.json: rope_table: `beta_slow` must be at most beta_fast, got 1"),
        ("/rope_theta", "config.json: rope_table: `theta` must be more than 1 for YaRN, got 0.5"),
    ];
    let is_other = others.contains(&(pointer, text.as_str()));
    assert!(named || contradicts || below || (large && value == "2147483647") || is_other, "{pointer}: {value}: {text}");
}

/// Each field that a reader reads, with each odd value: a run, or a refusal that names the field. Which
/// fields are read is found out with a word that none of them may have.
#[test]
fn every_field_with_every_odd_value() {
    let (folder, words) = (Folder::new(), words());
    for name in all() {
        let config = config_of(name);
        let with = |pointer: &str, value: &Value| {
            let mut config = config.clone();
            put(&mut config, pointer, Some(value.clone()));
            run_random(&folder, &config.to_string())
        };
        let mut pointers: BTreeSet<String> = words.iter().map(|word| format!("/{word}")).collect();
        pointers.extend(fields_of(&config));
        let mut read = 0;
        for pointer in &pointers {
            let ran = with(pointer, &json!("odd"));
            if ran.code == 0 {
                continue;
            }
            names_the_field(&ran, pointer, "odd");
            read += 1;
            for value in odd_values() {
                let ran = with(pointer, &value);
                if ran.code != 0 {
                    names_the_field(&ran, pointer, &value.to_string());
                }
            }
        }
        assert!(read >= 18, "{name}: only {read} fields are read");
    }
}

/// Fields that most families must have.
const COMMON: [&str; 5] = ["/hidden_size", "/intermediate_size", "/num_attention_heads", "/num_hidden_layers", "/vocab_size"];
/// The numbers of experts and of choices, by the names that families have for them.
const EXPERTS: [&str; 2] = ["/num_experts", "/num_experts_per_tok"];
const LOCAL_EXPERTS: [&str; 2] = ["/num_local_experts", "/num_experts_per_tok"];
const ROUTED_EXPERTS: [&str; 5] =
    ["/n_routed_experts", "/num_experts_per_tok", "/moe_intermediate_size", "/n_shared_experts", "/routed_scaling_factor"];

/// What a family must have besides.
fn required(name: &str) -> BTreeSet<&'static str> {
    let own: &[&[&'static str]] = match name {
        "deepseek_v3" => {
            let of_heads = &["/qk_nope_head_dim", "/qk_rope_head_dim", "/v_head_dim", "/kv_lora_rank"];
            &[&COMMON, &ROUTED_EXPERTS, of_heads, &["/topk_group", "/rope_scaling/factor"]]
        }
        "glm4_moe" => &[&COMMON, &ROUTED_EXPERTS],
        "gpt_oss" => &[&COMMON, &LOCAL_EXPERTS, &["/sliding_window", "/rope_scaling", "/rope_scaling/factor", "/rope_scaling/rope_type"]],
        "granitemoe" | "minimax_m2" => &[&COMMON, &LOCAL_EXPERTS],
        "mixtral-tiny" => &[&COMMON, &LOCAL_EXPERTS, &["/num_key_value_heads"]],
        "grok1" | "olmoe" => &[&COMMON, &EXPERTS],
        "phimoe" => &[&COMMON, &LOCAL_EXPERTS, &["/router_jitter_noise", "/rope_scaling/long_factor", "/rope_scaling/short_factor"]],
        "qwen2_moe" => &[&COMMON, &EXPERTS, &["/moe_intermediate_size", "/shared_expert_intermediate_size"]],
        "qwen3_moe" | "qwen3_moe_nonorm" => &[&COMMON, &EXPERTS, &["/moe_intermediate_size"]],
        "llama-tiny" | "gptneox-tiny" => &[&COMMON],
        "qwen3" => &[&COMMON, &["/head_dim"]],
        "tiny-dbrx-f32" => {
            let top = &["/d_model", "/n_heads", "/n_layers", "/vocab_size", "/attn_config", "/ffn_config"];
            let experts = &["/ffn_config/ffn_hidden_size", "/ffn_config/moe_num_experts", "/ffn_config/moe_top_k"];
            &[top, experts, &["/attn_config/kv_n_heads"]]
        }
        other => panic!("{other} has no list of fields that it must have"),
    };
    own.iter().flat_map(|fields| fields.iter().copied()).collect()
}

/// Each field that is missing: a run with the family's default, or a refusal that says so.
#[test]
fn every_field_that_is_missing() {
    let folder = Folder::new();
    for name in all() {
        let config = config_of(name);
        let mut needed = BTreeSet::new();
        let fields = fields_of(&config);
        for pointer in &fields {
            let mut config = config.clone();
            put(&mut config, pointer, None);
            let ran = run_random(&folder, &config.to_string());
            if ran.code == 0 {
                continue;
            }
            let (text, field) = (refused(&ran), pointer[1..].replace('/', "."));
            let starts = |with: &str| text.starts_with(&format!("config.json: `{with}"));
            let missing = starts(&format!("{field}` is missing")) || starts(&format!("{field}` must be a list of 8 numbers, got 0"));
            let below = starts(&format!("{field}.")) && text.ends_with("` is missing");
            // Without its kind a section says nothing.
            let above = field == "rope_scaling.rope_type" && starts("rope_scaling` is missing");
            assert!(missing || below || above, "{name}, {field}: {text}");
            needed.insert(pointer.as_str());
        }
        assert_eq!(needed, required(name), "{name}");
    }
}

/// Fields that contradict others, or are another model's.
#[test]
fn contradictions() {
    let mut faults = Vec::new();
    for (name, fields, want) in CONTRADICTIONS {
        let mut config = config_of(name);
        merge(&mut config, serde_json::from_str(fields).unwrap());
        let ran = run_random(&Folder::new(), &config.to_string());
        if (ran.code, ran.err.as_str()) != (2, &format!("refused: config.json: {want}\n")) {
            faults.push(format!("{name}, {fields}: exit code {}, {}", ran.code, ran.err));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

const CONTRADICTIONS: &[(&str, &str, &str)] = &[
    ("deepseek_v3", r#"{"num_key_value_heads": 2}"#, "`num_key_value_heads` must be 4, got 2"),
    (
        "deepseek_v3",
        r#"{"qk_rope_head_dim": 15}"#,
        "`qk_rope_head_dim` must rotate an even number of a head's 31 elements, at least 2, got 15",
    ),
    ("deepseek_v3", r#"{"num_experts_per_tok": 17}"#, "`num_experts_per_tok` must be <= n_routed_experts = 16, got 17"),
    ("deepseek_v3", r#"{"num_experts_per_tok": 9}"#, "`num_experts_per_tok` must be <= the experts of topk_group groups = 8, got 9"),
    ("deepseek_v3", r#"{"n_group": 3}"#, "`n_group` must divide n_routed_experts = 16, got 3"),
    ("deepseek_v3", r#"{"n_group": 16}"#, "`n_group` must leave two experts to a group, got 16 groups of 1"),
    ("deepseek_v3", r#"{"topk_group": 5}"#, "`topk_group` must be <= n_group = 4, got 5"),
    (
        "deepseek_v3",
        r#"{"n_shared_experts": 2147483647}"#,
        "`n_shared_experts` must be <= 53687091 of moe_intermediate_size = 40, got 2147483647",
    ),
    ("deepseek_v3", r#"{"n_shared_experts": -1}"#, "`n_shared_experts` must be a whole number from 0 to 2147483647, got -1"),
    ("deepseek_v3", r#"{"first_k_dense_replace": -1}"#, "`first_k_dense_replace` must be a whole number from 0 to 2147483647, got -1"),
    ("deepseek_v3", r#"{"scoring_func": "softmax"}"#, r#"`scoring_func` must be "sigmoid", got "softmax""#),
    ("deepseek_v3", r#"{"topk_method": "group_limited_greedy"}"#, r#"`topk_method` must be "noaux_tc", got "group_limited_greedy""#),
    ("deepseek_v3", r#"{"moe_layer_freq": 2}"#, "`moe_layer_freq` must be 1, got 2"),
    ("deepseek_v3", r#"{"attention_bias": true}"#, "`attention_bias` must be false, got true"),
    ("deepseek_v3", r#"{"rope_scaling": {"type": "yarn"}}"#, "`rope_scaling.factor` is missing"),
    (
        "deepseek_v3",
        r#"{"rope_scaling": {"type": "dynamic", "factor": 2}}"#,
        r#"`rope_scaling.type` must be one of default, linear, llama3, yarn, longrope, got "dynamic""#,
    ),
    ("deepseek_v3", r#"{"rope_scaling": {"type": "yarn", "factor": 0}}"#, "`rope_scaling.factor` must be a positive number, got 0"),
    ("deepseek_v3", r#"{"rope_scaling": {"type": "yarn", "factor": -40}}"#, "`rope_scaling.factor` must be a positive number, got -40"),
    (
        "deepseek_v3",
        r#"{"rope_scaling": {"type": "yarn", "factor": "nan"}}"#,
        r#"`rope_scaling.factor` must be a positive number, got "nan""#,
    ),
    ("deepseek_v3", r#"{"rope_scaling": {"type": "yarn", "factor": 1e39}}"#, "`rope_scaling.factor` must be a positive number, got 1e+39"),
    (
        "deepseek_v3",
        r#"{"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": 1e38}}"#,
        "`rope_scaling.mscale_all_dim` must give scores a finite factor, got 1e38",
    ),
    (
        "deepseek_v3",
        r#"{"rope_scaling": {"type": "yarn", "factor": 3e38, "mscale": 1e38, "mscale_all_dim": 1}}"#,
        "`rope_scaling.mscale` must give cosines and sines a finite factor, got inf",
    ),
    (
        "deepseek_v3",
        r#"{"rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 1, "beta_slow": 32}}"#,
        "rope_table: `beta_slow` must be at most beta_fast, got 32",
    ),
    (
        "glm4_moe",
        r#"{"partial_rotary_factor": 0.01}"#,
        "`partial_rotary_factor` must rotate an even number of a head's 32 elements, at least 2, got 0",
    ),
    (
        "glm4_moe",
        r#"{"partial_rotary_factor": 0.1}"#,
        "`partial_rotary_factor` must rotate an even number of a head's 32 elements, at least 2, got 3",
    ),
    (
        "glm4_moe",
        r#"{"partial_rotary_factor": 1.5}"#,
        "`partial_rotary_factor` must rotate an even number of a head's 32 elements, at least 2, got 48",
    ),
    ("glm4_moe", r#"{"head_dim": 31}"#, "`head_dim` must give heads of even size, got 31"),
    ("glm4_moe", r#"{"num_key_value_heads": 3}"#, "`num_key_value_heads` must divide num_attention_heads = 4, got 3"),
    ("glm4_moe", r#"{"n_group": 2, "topk_group": 3}"#, "`topk_group` must be <= n_group = 2, got 3"),
    ("gpt_oss", r#"{"layer_types": ["full_attention"]}"#, "`layer_types` must have num_hidden_layers = 2 entries, got 1"),
    (
        "gpt_oss",
        r#"{"layer_types": ["full_attention", "linear_attention"]}"#,
        r#"`layer_types` must hold sliding_attention or full_attention, got "linear_attention""#,
    ),
    ("gpt_oss", r#"{"layer_types": ["full_attention", null]}"#, "`layer_types` must hold sliding_attention or full_attention, got null"),
    ("gpt_oss", r#"{"sliding_window": 0}"#, "`sliding_window` must be a whole number from 1 to 2147483647, got 0"),
    ("gpt_oss", r#"{"sliding_window": null}"#, "`sliding_window` must be a whole number from 1 to 2147483647, got null"),
    ("gpt_oss", r#"{"rope_scaling": null}"#, "`rope_scaling` is missing"),
    ("gpt_oss", r#"{"swiglu_limit": -7}"#, "`swiglu_limit` must be a positive number, got -7"),
    ("gpt_oss", r#"{"swiglu_limit": 0}"#, "`swiglu_limit` must be a positive number, got 0"),
    ("gpt_oss", r#"{"num_experts_per_tok": 9}"#, "`num_experts_per_tok` must be <= num_local_experts = 8, got 9"),
    ("gpt_oss", r#"{"num_local_experts": 1025}"#, "`num_local_experts` must be a whole number from 1 to 1024, got 1025"),
    ("gpt_oss", r#"{"rope_theta": 1.0}"#, "rope_table: `theta` must be more than 1 for YaRN, got 1"),
    ("granitemoe", r#"{"logits_scaling": 0}"#, "`logits_scaling` must be a positive number, got 0"),
    ("granitemoe", r#"{"logits_scaling": 1e-39}"#, "`logits_scaling` must have a finite reciprocal, got 1e-39"),
    ("granitemoe", r#"{"residual_multiplier": -0.22}"#, "`residual_multiplier` must be a positive number, got -0.22"),
    ("granitemoe", r#"{"num_attention_heads": 6}"#, "`num_attention_heads` must divide hidden_size = 64, got 6"),
    ("grok1", r#"{"max_attn_value": -30}"#, "`max_attn_value` must be a positive number, got -30"),
    ("grok1", r#"{"attn_output_multiplier": 0}"#, "`attn_output_multiplier` must be a positive number, got 0"),
    ("grok1", r#"{"num_attention_heads": 64}"#, "`num_attention_heads` must give heads of even size, got 1"),
    ("minimax_m2", r#"{"rotary_dim": 34}"#, "`rotary_dim` must rotate an even number of a head's 32 elements, at least 2, got 34"),
    ("minimax_m2", r#"{"rotary_dim": 15}"#, "`rotary_dim` must rotate an even number of a head's 32 elements, at least 2, got 15"),
    ("minimax_m2", r#"{"attn_type_list": [1, 0]}"#, "`attn_type_list` must hold nothing but 1, got 0"),
    ("minimax_m2", r#"{"attn_type_list": ["1", "1"]}"#, "`attn_type_list` must hold nothing but 1, got \"1\""),
    ("minimax_m2", r#"{"qk_norm_type": "per_head"}"#, r#"`qk_norm_type` must be "per_layer", got "per_head""#),
    ("minimax_m2", r#"{"use_routing_bias": false}"#, "`use_routing_bias` must be true, got false"),
    ("minimax_m2", r#"{"shared_intermediate_size": 8}"#, "`shared_intermediate_size` must be 0, got 8"),
    ("minimax_m2", r#"{"scoring_func": "softmax"}"#, r#"`scoring_func` must be "sigmoid", got "softmax""#),
    ("olmoe", r#"{"clip_qkv": -8}"#, "`clip_qkv` must be a positive number, got -8"),
    ("olmoe", r#"{"norm_topk_prob": 1}"#, "`norm_topk_prob` must be true or false, got 1"),
    ("phimoe", r#"{"router_jitter_noise": 0}"#, "`router_jitter_noise` must be a positive number, got 0"),
    ("phimoe", r#"{"router_jitter_noise": -0.01}"#, "`router_jitter_noise` must be a positive number, got -0.01"),
    ("phimoe", r#"{"num_experts_per_tok": 3}"#, "`num_experts_per_tok` must be 2, got 3"),
    ("phimoe", r#"{"tie_word_embeddings": true}"#, "`tie_word_embeddings` must be false, got true"),
    ("phimoe", r#"{"head_dim": 20}"#, "`rope_scaling.short_factor` must be a list of 10 numbers, got 8"),
    (
        "phimoe",
        r#"{"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 0, 1, 1, 1, 1]}}"#,
        "`rope_scaling.short_factor` must hold positive numbers, got 0",
    ),
    (
        "phimoe",
        r#"{"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": ["1", 1, 1, 1, 1, 1, 1, 1]}}"#,
        "`rope_scaling.long_factor` must hold positive numbers, got \"1\"",
    ),
    ("phimoe", r#"{"lm_head_bias": false}"#, "`lm_head_bias` must be true, got false"),
    ("qwen2_moe", r#"{"mlp_only_layers": ["1"]}"#, "`mlp_only_layers` must hold whole numbers, got \"1\""),
    ("qwen2_moe", r#"{"mlp_only_layers": [0.5]}"#, "`mlp_only_layers` must hold whole numbers, got 0.5"),
    ("qwen2_moe", r#"{"mlp_only_layers": [-1]}"#, "`mlp_only_layers` must hold whole numbers, got -1"),
    ("qwen2_moe", r#"{"decoder_sparse_step": 0}"#, "`decoder_sparse_step` must be a whole number from 1 to 2147483647, got 0"),
    ("qwen2_moe", r#"{"use_sliding_window": true}"#, "`use_sliding_window` must be false, got true"),
    (
        "qwen2_moe",
        r#"{"shared_expert_intermediate_size": 0}"#,
        "`shared_expert_intermediate_size` must be a whole number from 1 to 2147483647, got 0",
    ),
    ("qwen3_moe", r#"{"num_experts": 0}"#, "`num_experts` must be a whole number from 1 to 1024, got 0"),
    ("qwen3_moe", r#"{"rope_scaling": "yarn"}"#, "`rope_scaling` must be an object, got \"yarn\""),
    ("qwen3_moe", r#"{"hidden_act": "gelu"}"#, r#"`hidden_act` must be "silu", got "gelu""#),
    ("qwen3", r#"{"head_dim": null}"#, "`head_dim` must be a whole number from 1 to 2147483647, got null"),
    ("qwen3", r#"{"head_dim": 31}"#, "`head_dim` must give heads of even size, got 31"),
    ("qwen3", r#"{"num_key_value_heads": 3}"#, "`num_key_value_heads` must divide num_attention_heads = 4, got 3"),
    ("qwen3", r#"{"use_sliding_window": true, "sliding_window": 4}"#, "`use_sliding_window` must be false, got true"),
    ("qwen3", r#"{"hidden_act": "gelu"}"#, r#"`hidden_act` must be "silu", got "gelu""#),
    ("qwen3", r#"{"model_type": "qwen3_moe"}"#, r#"`model_type` must be "qwen3", got "qwen3_moe""#),
    ("llama-tiny", r#"{"mlp_bias": true}"#, "`mlp_bias` must be false, got true"),
    (
        "llama-tiny",
        r#"{"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [1, 1, 1, 1, 1, 1, 1, 1]},
            "original_max_position_embeddings": 1}"#,
        "`rope_scaling.attention_factor` is missing, and none follows from original_max_position_embeddings = 1",
    ),
    (
        "llama-tiny",
        r#"{"architectures": null, "model_type": "mistral", "sliding_window": 0}"#,
        "`sliding_window` must be a whole number from 1 to 2147483647, got 0",
    ),
    ("llama-tiny", r#"{"rope_scaling": {"rope_type": "linear"}}"#, "`rope_scaling.factor` is missing"),
    ("llama-tiny", r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8}}"#, "`rope_scaling.low_freq_factor` is missing"),
    (
        "llama-tiny",
        r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}"#,
        "rope_table: `high_freq_factor` must be more than low_freq_factor, got 4",
    ),
    (
        "llama-tiny",
        r#"{"rope_parameters": {"rope_type": "linear", "factor": "4"}}"#,
        "`rope_parameters.factor` must be a positive number, got \"4\"",
    ),
    (
        "llama-tiny",
        r#"{"rope_parameters": {"rope_theta": -1}, "rope_theta": null}"#,
        "`rope_parameters.rope_theta` must be a positive number, got -1",
    ),
    ("gptneox-tiny", r#"{"rotary_pct": 0.01}"#, "`rotary_pct` must rotate an even number of a head's 32 elements, at least 2, got 0"),
    (
        "gptneox-tiny",
        r#"{"hidden_act": "relu"}"#,
        r#"`hidden_act` must be one of gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, got "relu""#,
    ),
    ("gptneox-tiny", r#"{"model_type": "gptj"}"#, r#"`model_type` must be "gpt_neox", got "gptj""#),
];

/// Sizes that are whole numbers, and more than any machine holds: nothing is made of that size before that is
/// found out, and no layer is looked at one by one.
#[test]
fn absurd_sizes() {
    let layers = r#""num_hidden_layers": 2147483647"#;
    let last = r#""mlp_only_layers": [2147483646, 18446744073709551615, 2147483645]"#;
    let wide = r#""num_attention_heads": 1, "num_key_value_heads": 1"#;
    for (name, fields) in [
        ("qwen3_moe", format!("{{{layers}}}")),
        ("qwen3_moe", format!(r#"{{{layers}, "decoder_sparse_step": 2147483647}}"#)),
        ("qwen3_moe", format!(r#"{{{layers}, "decoder_sparse_step": 2147483646, {last}}}"#)),
        ("qwen2_moe", format!("{{{layers}, {last}}}")),
        ("deepseek_v3", format!(r#"{{{layers}, "first_k_dense_replace": 2147483647}}"#)),
        ("deepseek_v3", format!(r#"{{{layers}, "first_k_dense_replace": 2147483646}}"#)),
        ("deepseek_v3", r#"{"n_shared_experts": 53687091}"#.into()),
        ("deepseek_v3", format!(r#"{{{wide}, "qk_rope_head_dim": 1073741824}}"#)),
        ("gpt_oss", format!(r#"{{{layers}, "layer_types": null}}"#)),
        ("gpt_oss", format!(r#"{{{wide}, "head_dim": 1073741824}}"#)),
        ("llama-tiny", format!(r#"{{{wide}, "head_dim": 1073741824}}"#)),
        ("qwen3", format!("{{{layers}}}")),
        ("qwen3", format!(r#"{{{wide}, "head_dim": 1073741824}}"#)),
        ("minimax_m2", format!(r#"{{{wide}, "head_dim": 1073741824, "rotary_dim": 1073741824}}"#)),
        ("minimax_m2", format!(r#"{{{layers}, "intermediate_size": 2147483647}}"#)),
        ("granitemoe", r#"{"hidden_size": 2147483640, "intermediate_size": 2147483647}"#.into()),
        ("grok1", r#"{"hidden_size": 1073741824, "num_attention_heads": 1073741824, "head_dim": 2}"#.into()),
        ("gptneox-tiny", r#"{"vocab_size": 2147483647, "hidden_size": 2147483644, "intermediate_size": 2147483647}"#.into()),
    ] {
        let text = refusal_of(name, &fields);
        let large =
            ["memory: the run needs ", "config.json: the model's parameters are more than 2^60", "config.json: head_layout: columns is "];
        assert!(large.iter().any(|start| text.starts_with(start)), "{name}: {fields}: {text}");
    }
    let many: Vec<String> = (0..100_000).map(|l| l.to_string()).collect();
    let text = refusal_of("qwen3_moe", &format!(r#"{{{layers}, "mlp_only_layers": [{}]}}"#, many.join(",")));
    assert!(text.starts_with("memory: the run needs "), "{text}");
}

/// Numbers that JSON does not have, but some writers write.
#[test]
fn numbers_that_are_none() {
    for number in ["NaN", "Infinity", "-Infinity", "1e400", "0x10", "1_000"] {
        for name in all() {
            let field = if name == "tiny-dbrx-f32" { "d_model" } else { "hidden_size" };
            let mut config = config_of(name);
            config[field] = json!("HERE");
            let ran = run_random(&Folder::new(), &config.to_string().replace("\"HERE\"", number));
            assert!(refused(&ran).starts_with("config.json: not a JSON object: "), "{name}, {number}: {}", ran.err);
        }
    }
}

/// Tensors in FP8, and names of MXFP4, are refused where `config.json` does not say that the weights are
/// quantised.
#[test]
fn quantised_tensors_without_a_configuration() {
    let expert = "model.layers.0.mlp.experts.0.gate_proj.weight";
    let text = weights_refused("qwen3_moe", |name, tensor| {
        let quarter = tensor.data()[..tensor.data().len() / 4].to_vec();
        let as_it_is = (tensor.shape().to_vec(), tensor.dtype(), tensor.data().to_vec());
        Some(if name == expert { (tensor.shape().to_vec(), Dtype::F8_E4M3, quarter) } else { as_it_is })
    });
    assert_eq!(text, format!("{MODEL}: tensor `{expert}` must be F32, BF16 or F16, got F8_E4M3"));
    let stacked = "model.layers.0.mlp.experts.gate_up_proj";
    let text = header_refused("gpt_oss", |header| {
        let tensor = header.as_object_mut().unwrap().remove(stacked).unwrap();
        header[format!("{stacked}_blocks")] = tensor;
    });
    assert_eq!(text, format!("{MODEL}: tensor `{stacked}` is missing"));
}

/// The refusal of a checkpoint whose weights were edited.
#[track_caller]
fn weights_refused(name: &str, edit: impl Fn(&str, &TensorView<'_>) -> Edited) -> String {
    let folder = Folder::copy_of(name);
    folder.edit(MODEL, |bytes| *bytes = edited(bytes, edit));
    folder.refused()
}

/// The refusal of a checkpoint whose header of weights was edited.
#[track_caller]
fn header_refused(name: &str, edit: impl FnOnce(&mut Value)) -> String {
    let folder = Folder::copy_of(name);
    folder.edit_header(MODEL, edit);
    folder.refused()
}

/// The tensors of no layer and of the last one, of experts the last one's, with their shapes.
fn tensors_of(name: &str) -> Vec<(String, Vec<usize>)> {
    let file = std::fs::read(checkpoint(name).join(MODEL)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let number = |name: &str, before: &str| name.split_once(before).and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
    let last = |before: &str| tensors.names().into_iter().filter_map(|name| number(name, before)).max();
    let last = [".layers.", ".blocks.", ".experts."].map(|before| (before, last(before)));
    let is_last = |name: &str| last.iter().all(|(before, last)| number(name, before).is_none_or(|number| Some(number) == *last));
    let all = tensors.iter().filter(|(name, _)| is_last(name));
    all.map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec())).collect()
}

/// Each tensor missing, of another type, and in the other order.
#[test]
fn every_tensor_missing_or_of_the_wrong_kind() {
    for name in all() {
        let tensors = tensors_of(name);
        assert!(tensors.len() >= 10, "{name}: {tensors:?}");
        let mut turned = 0;
        for (tensor, shape) in &tensors {
            let text = header_refused(name, |header| {
                let entry = header.as_object_mut().unwrap().remove(tensor).unwrap();
                header["of another name"] = entry;
            });
            assert_eq!(text, format!("{MODEL}: tensor `{tensor}` is missing"), "{name}");
            let text = header_refused(name, |header| header[tensor]["dtype"] = json!("I32"));
            assert_eq!(text, format!("{MODEL}: tensor `{tensor}` must be F32, BF16 or F16, got I32"), "{name}");
            let mut other = shape.clone();
            other.reverse();
            if let [expert, rows, cols] = shape[..] {
                other = vec![expert, cols, rows];
            }
            if other == *shape {
                other.push(1); // a vector, or as many rows as columns
            } else {
                turned += 1;
            }
            let text = header_refused(name, |header| header[tensor]["shape"] = json!(other));
            assert_eq!(text, format!("{MODEL}: tensor `{tensor}` must be {shape:?} by config.json, got {other:?}"), "{name}");
        }
        assert!(turned >= 4, "{name}: only {turned} tensors have another order");
    }
}

/// A configuration that says something else than the tensors.
#[test]
fn configurations_of_other_tensors() {
    for (name, field, value, want) in [
        ("deepseek_v3", "num_hidden_layers", json!(i32::MAX), "tensor `model.layers.3.input_layernorm.weight` is missing"),
        ("deepseek_v3", "q_lora_rank", Value::Null, "tensor `model.layers.0.self_attn.q_proj.weight` is missing"),
        ("deepseek_v3", "first_k_dense_replace", json!(0), "tensor `model.layers.0.mlp.gate.weight` is missing"),
        (
            "deepseek_v3",
            "n_shared_experts",
            json!(2),
            "tensor `model.layers.1.mlp.shared_experts.gate_proj.weight` must be [80, 64] by config.json, got [40, 64]",
        ),
        (
            "glm4_moe",
            "head_dim",
            json!(16),
            "tensor `model.layers.0.self_attn.q_proj.weight` must be [64, 64] by config.json, got [128, 64]",
        ),
        (
            "gpt_oss",
            "intermediate_size",
            json!(32),
            "tensor `model.layers.0.mlp.experts.gate_up_proj` must be [8, 64, 64] by config.json, got [8, 64, 128]",
        ),
        ("granitemoe", "tie_word_embeddings", json!(false), "tensor `lm_head.weight` is missing"),
        ("granitemoe", "attention_bias", json!(true), "tensor `model.layers.0.self_attn.q_proj.bias` is missing"),
        ("grok1", "num_experts", json!(9), "tensor `model.layers.0.moe_block.gate.weight` must be [9, 64] by config.json, got [8, 64]"),
        (
            "minimax_m2",
            "num_key_value_heads",
            json!(4),
            "tensor `model.layers.0.self_attn.k_proj.weight` must be [128, 64] by config.json, got [64, 64]",
        ),
        ("olmoe", "num_hidden_layers", json!(3), "tensor `model.layers.2.input_layernorm.weight` is missing"),
        ("phimoe", "vocab_size", json!(127), "tensor `model.embed_tokens.weight` must be [127, 64] by config.json, got [128, 64]"),
        ("qwen2_moe", "mlp_only_layers", json!([1]), "tensor `model.layers.1.mlp.gate_proj.weight` is missing"),
        ("qwen3_moe", "decoder_sparse_step", json!(2), "tensor `model.layers.0.mlp.gate_proj.weight` is missing"),
        ("qwen3", "attention_bias", json!(true), "tensor `model.layers.0.self_attn.q_proj.bias` is missing"),
        ("qwen3", "head_dim", json!(16), "tensor `model.layers.0.self_attn.q_proj.weight` must be [64, 64] by config.json, got [128, 64]"),
        ("llama-tiny", "hidden_size", json!(32), "tensor `model.embed_tokens.weight` must be [128, 32] by config.json, got [128, 64]"),
        (
            "gptneox-tiny",
            "intermediate_size",
            json!(128),
            "tensor `gpt_neox.layers.0.mlp.dense_h_to_4h.weight` must be [128, 64] by config.json, got [256, 64]",
        ),
    ] {
        let folder = Folder::copy_of(name);
        folder.edit_json("config.json", |config| config[field] = value);
        assert_eq!(folder.refused(), format!("{MODEL}: {want}"), "{name}, {field}");
    }
    // A file may hold more than a model has, such as layers that predict further tokens.
    let folder = Folder::copy_of("deepseek_v3");
    folder.edit_json("config.json", |config| config["num_hidden_layers"] = json!(2));
    assert_eq!(folder.run().code, 0);
}

/// One matrix of another type than the rest: all are of one, but for vectors that are read as f32.
#[test]
fn one_matrix_of_another_type() {
    for (name, tensor, is_refused) in [
        ("gpt_oss", "model.layers.1.self_attn.k_proj.weight", true),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", true),
        ("gpt_oss", "model.layers.0.self_attn.sinks", false),
        ("gpt_oss", "model.layers.0.mlp.router.bias", false),
        ("deepseek_v3", "model.layers.2.mlp.experts.15.down_proj.weight", true),
        ("deepseek_v3", "model.layers.2.mlp.gate.weight", true),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias", false),
        ("gptneox-tiny", "gpt_neox.layers.0.attention.query_key_value.bias", true),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", true),
    ] {
        let folder = Folder::copy_of(name);
        let narrow = |name: &str, view: &TensorView<'_>| {
            let upper = || view.data().chunks_exact(4).flat_map(|value| [value[2], value[3]]).collect();
            let as_it_is = (view.shape().to_vec(), view.dtype(), view.data().to_vec());
            Some(if name == tensor { (view.shape().to_vec(), Dtype::BF16, upper()) } else { as_it_is })
        };
        folder.edit(MODEL, |bytes| *bytes = edited(bytes, narrow));
        if is_refused {
            let text = folder.refused();
            assert!(text.starts_with(&format!("{MODEL}: tensor `{tensor}` must be f32 as `")) && text.ends_with(" is, got bf16"), "{text}");
        } else {
            let ran = folder.run();
            assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{name}, {tensor}");
        }
    }
}
