//! Every family but DBRX and Mixtral: against references of another implementation, in every type of weights,
//! in any arrangement, and at sizes that no published model has.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::fixture::{Folder, Ran, checkpoint, run};
use crate::results::{Dump, agree, dump_from, dump_of};
use crate::rounded::NARROW;

const MODEL: &str = "model.safetensors";
const GOLDENS: &str = "goldens.safetensors";
const DECODE: &str = "decode.safetensors";
pub const PROMPT: [u32; 7] = [5, 99, 3, 127, 1, 17, 17];

/// A checkpoint of a family.
pub struct Case {
    pub name: &'static str,
    /// Results that have references: of prompts, in the repository and in the full set, and of a generation.
    results: [usize; 3],
    /// Fields of `config.json` by their JSON pointers, and values that make it another model with the same
    /// tensors.
    others: &'static [(&'static str, &'static str)],
    /// What else it may be, as changes of `config.json`.
    variants: &'static [&'static str],
}

const DEEPSEEK_V3: Case = Case {
    name: "deepseek_v3",
    results: [28, 64, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "20000"),
        ("/rope_scaling/factor", "32"),
        ("/rope_scaling/beta_fast", "16"),
        ("/rope_scaling/mscale", "0.7"),
        ("/rope_scaling/mscale_all_dim", "0.7"),
        ("/rope_scaling/original_max_position_embeddings", "1024"),
        ("/rope_scaling", "null"),
        ("/routed_scaling_factor", "2.25"),
        ("/norm_topk_prob", "false"),
        ("/n_group", "2"),
        ("/topk_group", "3"),
    ],
    variants: &[
        r#"{"first_k_dense_replace": 0}"#,
        r#"{"first_k_dense_replace": 2}"#,
        r#"{"first_k_dense_replace": 3}"#,
        r#"{"first_k_dense_replace": 61}"#,
        r#"{"n_shared_experts": 0}"#,
        r#"{"n_shared_experts": null}"#,
        r#"{"n_shared_experts": 3}"#,
        r#"{"q_lora_rank": null}"#,
        r#"{"q_lora_rank": 1, "kv_lora_rank": 1}"#,
        r#"{"n_group": 1, "topk_group": 1}"#,
        r#"{"n_group": 8, "topk_group": 2, "num_experts_per_tok": 4}"#,
        r#"{"n_group": 2, "topk_group": 1, "num_experts_per_tok": 8}"#,
        r#"{"v_head_dim": 24}"#,
        r#"{"v_head_dim": 6, "qk_nope_head_dim": 10, "qk_rope_head_dim": 2}"#,
        r#"{"norm_topk_prob": false, "rope_scaling": null}"#,
    ],
};

const GLM4_MOE: Case = Case {
    name: "glm4_moe",
    results: [28, 76, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "900000"),
        ("/partial_rotary_factor", "0.25"),
        ("/partial_rotary_factor", "1.0"),
        ("/routed_scaling_factor", "2.25"),
        ("/norm_topk_prob", "false"),
        ("/n_group", "4"),
        ("/use_qk_norm", "false"),
    ],
    variants: &[
        r#"{"first_k_dense_replace": 0}"#,
        r#"{"first_k_dense_replace": 3}"#,
        r#"{"n_shared_experts": 0}"#,
        r#"{"n_group": 4, "topk_group": 1}"#,
        r#"{"use_qk_norm": false, "attention_bias": false}"#,
        r#"{"partial_rotary_factor": 1.0}"#,
        r#"{"partial_rotary_factor": 0.0625}"#,
        r#"{"head_dim": null, "num_key_value_heads": null}"#,
    ],
};

const GPT_OSS: Case = Case {
    name: "gpt_oss",
    results: [22, 58, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "140000"),
        ("/rope_scaling/factor", "31"),
        ("/rope_scaling/truncate", "true"),
        ("/rope_scaling/beta_slow", "2"),
        ("/sliding_window", "7"),
        ("/sliding_window", "9"),
        ("/layer_types", r#"["full_attention", "sliding_attention"]"#),
        ("/layer_types", r#"["full_attention", "full_attention"]"#),
        ("/swiglu_limit", "6.5"),
    ],
    variants: &[
        r#"{"sliding_window": 1}"#,
        r#"{"sliding_window": 7}"#,
        r#"{"sliding_window": 1000}"#,
        r#"{"layer_types": null, "num_hidden_layers": 3}"#,
        r#"{"layer_types": ["full_attention"], "num_hidden_layers": 1}"#,
        r#"{"attention_bias": false}"#,
        r#"{"swiglu_limit": 0.125}"#,
        r#"{"head_dim": 2}"#,
        r#"{"head_dim": null}"#,
    ],
};

const GRANITEMOE: Case = Case {
    name: "granitemoe",
    results: [22, 56, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "9000"),
        ("/attention_multiplier", "0.25"),
        ("/embedding_multiplier", "1.0"),
        ("/residual_multiplier", "1.0"),
        ("/logits_scaling", "0.5"),
    ],
    variants: &[r#"{"tie_word_embeddings": false}"#, r#"{"attention_bias": true}"#, r#"{"logits_scaling": null}"#],
};

const GROK1: Case = Case {
    name: "grok1",
    results: [22, 56, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "20000"),
        ("/attn_output_multiplier", "0.5"),
        ("/max_attn_value", "25"),
        ("/embedding_multiplier_scale", "7.5"),
        ("/output_multiplier_scale", "3.5"),
    ],
    variants: &[r#"{"tie_word_embeddings": false}"#, r#"{"max_attn_value": 0.5, "attn_output_multiplier": null}"#, r#"{"head_dim": 6}"#],
};

const MINIMAX_M2: Case = Case {
    name: "minimax_m2",
    results: [22, 58, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "4000000"),
        ("/rotary_dim", "8"),
        ("/rotary_dim", "32"),
        ("/use_qk_norm", "false"),
    ],
    variants: &[
        r#"{"rotary_dim": 2}"#,
        r#"{"rotary_dim": null}"#,
        r#"{"use_qk_norm": false}"#,
        r#"{"attn_type_list": null, "num_hidden_layers": 3}"#,
    ],
};

const OLMOE: Case = Case {
    name: "olmoe",
    results: [22, 58, 2],
    others: &[("/rms_norm_eps", "1e-3"), ("/rope_theta", "9000"), ("/clip_qkv", "2"), ("/norm_topk_prob", "true")],
    variants: &[r#"{"clip_qkv": 0.25}"#, r#"{"attention_bias": true}"#, r#"{"num_key_value_heads": 1}"#, r#"{"norm_topk_prob": true}"#],
};

const PHIMOE: Case = Case {
    name: "phimoe",
    results: [22, 58, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "9000"),
        ("/rope_scaling/short_factor/2", "1.2"),
        ("/rope_scaling/short_mscale", "1.2"),
        ("/original_max_position_embeddings", "20"),
        ("/router_jitter_noise", "0.01"),
        ("/sliding_window", "4"),
    ],
    variants: &[
        r#"{"sliding_window": 1}"#,
        r#"{"sliding_window": null, "rope_scaling": null}"#,
        r#"{"attention_bias": false}"#,
        r#"{"router_jitter_noise": 10}"#,
    ],
};

const QWEN2_MOE: Case = Case {
    name: "qwen2_moe",
    results: [22, 58, 2],
    others: &[("/rms_norm_eps", "1e-3"), ("/rope_theta", "900000"), ("/norm_topk_prob", "true")],
    variants: &[
        r#"{"qkv_bias": false}"#,
        r#"{"mlp_only_layers": [1]}"#,
        r#"{"mlp_only_layers": [0, 1, 0, 77]}"#,
        r#"{"decoder_sparse_step": 2, "num_hidden_layers": 3}"#,
        r#"{"decoder_sparse_step": 5}"#,
        r#"{"shared_expert_intermediate_size": 1}"#,
    ],
};

const QWEN3: Case = Case {
    name: "qwen3",
    results: [14, 14, 2],
    others: &[
        ("/rms_norm_eps", "1e-3"),
        ("/rope_theta", "900000"),
        ("/rope_scaling", r#"{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}"#),
    ],
    variants: &[
        r#"{"attention_bias": true}"#,
        r#"{"tie_word_embeddings": true}"#,
        r#"{"head_dim": 2}"#,
        r#"{"head_dim": 100, "num_attention_heads": 1, "num_key_value_heads": null}"#,
        r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}}"#,
    ],
};

const QWEN3_MOE: Case = Case {
    name: "qwen3_moe",
    results: [22, 58, 2],
    others: &[("/rms_norm_eps", "1e-3"), ("/rope_theta", "900000"), ("/norm_topk_prob", "false")],
    variants: &[
        r#"{"attention_bias": true}"#,
        r#"{"mlp_only_layers": [0]}"#,
        r#"{"mlp_only_layers": [0, 1]}"#,
        r#"{"decoder_sparse_step": 3, "num_hidden_layers": 4, "mlp_only_layers": [2]}"#,
        r#"{"tie_word_embeddings": true}"#,
        r#"{"head_dim": 2}"#,
        r#"{"head_dim": 100, "num_attention_heads": 1, "num_key_value_heads": 1}"#,
    ],
};

const QWEN3_MOE_NONORM: Case = Case {
    name: "qwen3_moe_nonorm",
    results: [22, 58, 2],
    others: &[("/rms_norm_eps", "1e-3"), ("/rope_theta", "900000"), ("/norm_topk_prob", "true")],
    variants: &[],
};

const LLAMA: Case = Case {
    name: "llama-tiny",
    results: [14, 22, 6],
    others: &[("/rms_norm_eps", "1e-3"), ("/rope_theta", "9000"), ("/rope_scaling", r#"{"type": "linear", "factor": 2}"#)],
    variants: &[
        r#"{"attention_bias": true, "tie_word_embeddings": true}"#,
        r#"{"rope_scaling": {"type": "linear", "factor": 4}}"#,
        r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}}"#,
        r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}"#,
        r#"{"head_dim": 6}"#,
    ],
};

const GPT_NEOX: Case = Case {
    name: "gptneox-tiny",
    results: [14, 22, 6],
    others: &[
        ("/layer_norm_eps", "1e-3"),
        ("/rotary_emb_base", "9000"),
        ("/rotary_pct", "0.5"),
        ("/use_parallel_residual", "false"),
        ("/hidden_act", r#""gelu_new""#),
    ],
    variants: &[
        r#"{"use_parallel_residual": false}"#,
        r#"{"attention_bias": false, "hidden_act": "gelu_fast"}"#,
        r#"{"rotary_pct": 1.0, "tie_word_embeddings": true}"#,
    ],
};

/// The tests of each family.
macro_rules! families {
    ($($module:ident $case:ident)*) => {
        $(mod $module {
            use super::*;

            const CASE: &Case = &super::$case;

            #[test]
            fn references_hold_on_the_cpu() {
                CASE.references_hold();
            }

            #[test]
            fn references_differ_for_another_model() {
                CASE.references_differ();
            }

            #[test]
            fn the_newer_layout_of_config_is_read() {
                CASE.newer_layout_holds();
            }

            #[test]
            fn weights_of_16_bits() {
                CASE.types_agree();
            }

            #[test]
            fn odd_sizes_run() {
                CASE.odd_sizes_run();
            }

            #[test]
            fn references_hold_on_a_gpu() {
                devices::references_hold(CASE);
            }
        })*

        pub const ALL: &[&Case] = &[$(&$case),*];
    };
}

families! {
    deepseek_v3 DEEPSEEK_V3
    glm4_moe GLM4_MOE
    gpt_neox GPT_NEOX
    gpt_oss GPT_OSS
    granitemoe GRANITEMOE
    grok1 GROK1
    llama LLAMA
    minimax_m2 MINIMAX_M2
    olmoe OLMOE
    phimoe PHIMOE
    qwen2_moe QWEN2_MOE
    qwen3 QWEN3
    qwen3_moe QWEN3_MOE
    qwen3_moe_nonorm QWEN3_MOE_NONORM
}

/// Every folder of the repository's families is one of them.
#[test]
fn no_checkpoint_is_left_out() {
    let folder = dropless_kit::goldens::root().join("tests/data/families");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    let mut tested: Vec<&str> = ALL.iter().map(|case| case.name).collect();
    names.sort_unstable();
    tested.sort_unstable();
    assert_eq!(names, tested);
}

/// Calls the example on the CPU, also where there is a GPU.
pub fn on_cpu(args: &[&str]) -> Ran {
    run(&[args, &["--device", "cpu"]].concat())
}

/// Runs the example's own comparison of a folder with references.
fn check(run: impl Fn(&[&str]) -> Ran, model: &Path, references: &Path) -> Ran {
    run(&["--model", model.to_str().unwrap(), "--check", references.to_str().unwrap()])
}

/// The same, which must find that many results within their limits.
#[track_caller]
fn holds(run: impl Fn(&[&str]) -> Ran, model: &Path, references: &Path, results: usize) {
    let ran = check(run, model, references);
    let agrees = ran.out.contains(&format!("  agrees: {results} results within their limits"));
    assert!(ran.code == 0 && agrees, "{}, {}, {results} results: {}{}", model.display(), references.display(), ran.out, ran.err);
}

/// A random configuration, run in two arrangements that must agree.
#[track_caller]
fn runs(config: &Value) {
    let folder = Folder::new();
    let file = folder.file("config.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let vocab = config["vocab_size"].as_u64().unwrap() as u32;
    let prompt = PROMPT.map(|id| id % vocab);
    let dump = |args: &[&str]| -> Dump {
        let args = [args, &["--generate", "3", "--dump-layers"]].concat();
        dump_from(on_cpu, "--random", &file, &prompt, &args)
    };
    let whole = dump(&["--threads", "1"]);
    let finite = |(name, (_, values)): (&String, &(_, Vec<f64>))| {
        // A choice of all experts has no next one.
        assert!(name.ends_with("router_gap") || values.iter().all(|value| value.is_finite()), "{name} in {config}");
    };
    whole.iter().for_each(finite);
    agree(&dump(&["--threads", "2", "--chunk", "3", "--batch", "2"]), &whole);
}

impl Case {
    fn folder(&self) -> PathBuf {
        checkpoint(self.name)
    }

    fn config(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder().join("config.json")).unwrap()).unwrap()
    }

    /// Results of prompts that have references where they are read now.
    fn prompt_results(&self) -> usize {
        let own = dropless_kit::goldens::root().join("tests/data");
        self.results[usize::from(!self.folder().starts_with(own))]
    }

    fn references_hold(&self) {
        let folder = self.folder();
        holds(on_cpu, &folder, &folder.join(GOLDENS), self.prompt_results());
        holds(on_cpu, &folder, &folder.join(DECODE), self.results[2]);
    }

    fn references_differ(&self) {
        let folder = Folder::copy_of(self.name);
        for (field, value) in self.others {
            let mut config = self.config();
            set(&mut config, field, serde_json::from_str(value).unwrap());
            for config in [newer(config.clone()), config] {
                std::fs::write(folder.file("config.json"), config.to_string()).unwrap();
                let ran = check(on_cpu, folder.path(), &self.folder().join(GOLDENS));
                assert_eq!(ran.code, 1, "{}, {field}: {value}: {config}: {}{}", self.name, ran.out, ran.err);
            }
        }
    }

    /// Newer releases of transformers save everything of rotary embeddings in one section.
    fn newer_layout_holds(&self) {
        let folder = Folder::copy_of(self.name);
        std::fs::write(folder.file("config.json"), newer(self.config()).to_string()).unwrap();
        holds(on_cpu, folder.path(), &self.folder().join(GOLDENS), self.prompt_results());
        if folder.file("config.hf5.json").exists() {
            std::fs::rename(folder.file("config.hf5.json"), folder.file("config.json")).unwrap();
            holds(on_cpu, folder.path(), &self.folder().join(GOLDENS), self.prompt_results());
        }
    }

    /// Weights of 16 bits are the numbers that they stand for, so that the same numbers in f32 give the same
    /// results; vectors that operations read as f32 may be f32 beside them.
    fn types_agree(&self) {
        let args = ["--generate", "3", "--dump-layers"];
        let whole = std::fs::read(self.folder().join(MODEL)).unwrap();
        let has_vectors = SafeTensors::deserialize(&whole).unwrap().names().into_iter().any(is_vector);
        for narrow in &NARROW {
            for vectors_stay in [false, true].into_iter().filter(|stay| has_vectors || !stay) {
                let folders = narrow.checkpoints(self.name, |tensor| vectors_stay && is_vector(tensor));
                let [narrow, wide] = folders.each_ref().map(|folder| dump_of(on_cpu, folder.path(), &PROMPT, &args));
                agree(&narrow, &wide);
            }
        }
    }

    fn odd_sizes_run(&self) {
        let config = self.config();
        for sizes in &SIZES {
            runs(&sizes.of(&config));
        }
        for variant in self.variants {
            let mut config = config.clone();
            merge(&mut config, serde_json::from_str(variant).unwrap());
            runs(&config);
        }
    }
}

/// What operations read as f32: a file may have it in another type than its matrices.
fn is_vector(tensor: &str) -> bool {
    ["e_score_correction_bias", "sinks", "router.bias"].iter().any(|end| tensor.ends_with(end))
}

/// Sets what a JSON pointer names, which may be a new field of an object.
fn set(config: &mut Value, pointer: &str, value: Value) {
    let (outer, field) = pointer.rsplit_once('/').unwrap();
    let outer = config.pointer_mut(outer).unwrap();
    match field.parse::<usize>() {
        Ok(index) => outer[index] = value,
        Err(_) => outer[field] = value,
    }
}

/// Sets the fields of an object.
pub fn merge(config: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else { panic!("{fields} is no object") };
    fields.into_iter().for_each(|(field, value)| config[&field] = value);
}

/// The layout of newer releases.
fn newer(mut config: Value) -> Value {
    let fields = config.as_object_mut().unwrap();
    let mut parameters = match fields.remove("rope_scaling") {
        Some(Value::Object(scaling)) => scaling,
        _ => serde_json::Map::new(),
    };
    let kind = parameters.remove("type").or(parameters.remove("rope_type")).unwrap_or("default".into());
    parameters.insert("rope_type".into(), kind);
    for (older, name) in [
        ("rope_theta", "rope_theta"),
        ("rotary_emb_base", "rope_theta"),
        ("rotary_pct", "partial_rotary_factor"),
        ("partial_rotary_factor", "partial_rotary_factor"),
    ] {
        if let Some(value) = fields.remove(older) {
            parameters.insert(name.into(), value);
        }
    }
    if let Some(dtype) = fields.remove("torch_dtype") {
        fields.insert("dtype".into(), dtype);
    }
    fields.insert("rope_parameters".into(), parameters.into());
    config
}

/// Sizes of a model, whichever names a family has for them.
struct Sizes {
    layers: usize,
    d: usize,
    heads: [usize; 2],
    head_dim: usize,
    widths: usize,
    /// Their number, and the choices of a token.
    experts: [usize; 2],
    /// Their number, and the choices of a token.
    groups: [usize; 2],
    vocab: usize,
}

const SIZES: [Sizes; 4] = [
    Sizes { layers: 3, d: 36, heads: [3, 1], head_dim: 12, widths: 7, experts: [6, 3], groups: [3, 2], vocab: 131 },
    Sizes { layers: 1, d: 8, heads: [1, 1], head_dim: 8, widths: 1, experts: [1, 1], groups: [1, 1], vocab: 1 },
    Sizes { layers: 2, d: 90, heads: [9, 3], head_dim: 10, widths: 33, experts: [4, 4], groups: [2, 2], vocab: 17 },
    Sizes { layers: 5, d: 24, heads: [6, 6], head_dim: 4, widths: 3, experts: [33, 2], groups: [11, 1], vocab: 3 },
];

impl Sizes {
    fn of(&self, config: &Value) -> Value {
        let mut config = config.clone();
        let Sizes { layers, d, heads: [heads, kv_heads], head_dim, widths, experts: [experts, top_k], groups: [groups, top_groups], vocab } =
            *self;
        let is_latent = config.get("kv_lora_rank").is_some();
        let rotary = (head_dim / 2).next_multiple_of(2);
        for (field, value) in [
            ("num_hidden_layers", layers),
            ("hidden_size", d),
            ("num_attention_heads", heads),
            ("num_key_value_heads", if is_latent { heads } else { kv_heads }),
            ("head_dim", head_dim),
            ("rotary_dim", rotary),
            ("qk_nope_head_dim", widths),
            ("qk_rope_head_dim", rotary),
            ("v_head_dim", head_dim + 1),
            ("q_lora_rank", widths + 2),
            ("kv_lora_rank", widths),
            ("intermediate_size", widths),
            ("moe_intermediate_size", widths + 1),
            ("shared_expert_intermediate_size", widths + 2),
            ("num_experts", experts),
            ("num_local_experts", experts),
            ("n_routed_experts", experts),
            ("num_experts_per_tok", top_k),
            ("n_group", groups),
            ("topk_group", top_groups),
            ("vocab_size", vocab),
        ] {
            if config.get(field).is_some() {
                config[field] = value.into();
            }
        }
        for of_layers in ["layer_types", "attn_type_list"] {
            config.as_object_mut().unwrap().remove(of_layers);
        }
        if config["model_type"] == "phimoe" {
            // Its router chooses two.
            (config["num_local_experts"], config["num_experts_per_tok"]) = (experts.max(2).into(), 2.into());
        }
        for factors in ["short_factor", "long_factor"] {
            if let Some(list) = config.pointer_mut(&format!("/rope_scaling/{factors}")) {
                *list = vec![1.5; head_dim / 2].into();
            }
        }
        for share in ["rotary_pct", "partial_rotary_factor"] {
            if config.get(share).is_some() {
                config[share] = json!(rotary as f64 / head_dim as f64);
            }
        }
        config
    }
}

/// The number of threads changes no bit; nor does the way a prompt is cut or what runs beside it, within f32:
/// of the three that have least in common.
#[test]
fn the_same_in_every_arrangement() {
    let args = ["--generate", "4", "--dump-layers"];
    for case in [&GPT_OSS, &DEEPSEEK_V3, &GPT_NEOX] {
        let prompt: Vec<u32> = (0..19).map(|i| 1 + i * 37 % 127).collect(); // more than a window
        let dump = |arrangement: &[&str]| dump_of(on_cpu, &case.folder(), &prompt, &[&args[..], arrangement].concat());
        let whole = dump(&["--threads", "1"]);
        assert!(dump(&["--threads", "3"]) == whole, "{}: threads give other bits", case.name);
        for arrangement in
            [&["--chunk", "1"][..], &["--chunk", "4"], &["--batch", "3"], &["--batch", "3", "--chunk", "7"], &["--context", "64"]]
        {
            agree(&dump(arrangement), &whole);
        }
    }
}

/// Mistral 7B is Llama with a window, which Llama's configuration has no field for.
#[test]
fn mistral_has_a_window() {
    let references = LLAMA.folder().join(GOLDENS); // of 5 and 19 tokens
    for (window, code) in [("null", 0), ("19", 0), ("18", 1), ("1", 1)] {
        let folder = Folder::copy_of(LLAMA.name);
        let fields = format!(r#"{{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": {window}}}"#);
        folder.edit_json("config.json", |config| merge(config, serde_json::from_str(&fields).unwrap()));
        let ran = check(on_cpu, folder.path(), &references);
        assert_eq!(ran.code, code, "{window}: {}{}", ran.out, ran.err);
        assert!(ran.out.starts_with("Mistral  "), "{}", ran.out);
    }
}

/// The report names each family.
#[test]
fn a_run_says_what_it_runs() {
    for (case, title) in
        [(&DEEPSEEK_V3, "DeepSeek-V3"), (&GPT_OSS, "gpt-oss"), (&GPT_NEOX, "GPT-NeoX"), (&LLAMA, "Llama"), (&QWEN3, "Qwen3")]
    {
        let ran = Folder::copy_of(case.name).run();
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        assert!(ran.out.starts_with(&format!("{title}  ")), "{}", ran.out);
    }
}

mod devices {
    use dropless_kit::compare::relative_l2;
    use dropless_kit::device;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::fixture::run_on;
    use crate::rounded::{Edited, edited};

    /// On the emulated GPU the first prompt and four tokens, 3 s of a core, or everything where the full set
    /// is there, 5 to 10 s. On a GPU everything.
    pub fn references_hold(case: &Case) {
        let folder = case.folder();
        if !device::hardware_only() {
            let (driver, stream) = device::emulated();
            let on_gpu = |args: &[&str]| run_on(stream.device(), args);
            if std::env::var_os("DROPLESS_GOLDENS").is_some() {
                all_hold(case, on_gpu);
            } else {
                let few = few_references(case);
                holds(on_gpu, &folder, &few.file(GOLDENS), case.results[0] / 2);
                holds(on_gpu, &folder, &few.file(DECODE), 2);
            }
            assert!(driver.reports().is_empty());
        }
        if let Some(stream) = device::hardware() {
            all_hold(case, |args| run_on(stream.device(), args));
        }
    }

    fn all_hold(case: &Case, on_gpu: impl Fn(&[&str]) -> Ran) {
        let folder = case.folder();
        holds(&on_gpu, &folder, &folder.join(GOLDENS), case.prompt_results());
        holds(&on_gpu, &folder, &folder.join(DECODE), case.results[2]);
    }

    /// The references of the first prompt and of the first four tokens.
    fn few_references(case: &Case) -> Folder {
        const TOKENS: usize = 4;
        let few = Folder::new();
        let write = |file: &str, edit: &dyn Fn(&str, &TensorView<'_>) -> Edited| {
            let whole = std::fs::read(case.folder().join(file)).unwrap();
            std::fs::write(few.file(file), edited(&whole, edit)).unwrap();
        };
        let rows = |tensor: &TensorView<'_>, rows: usize| {
            let (mut shape, bytes) = (tensor.shape().to_vec(), tensor.data());
            let row_bytes = bytes.len() / shape[0];
            shape[0] = rows;
            Some((shape, tensor.dtype(), bytes[..rows * row_bytes].to_vec()))
        };
        write(GOLDENS, &|name, tensor| rows(tensor, tensor.shape()[0]).filter(|_| name.starts_with("p0.")));
        write(DECODE, &|name, tensor| match name {
            "prompt" => rows(tensor, tensor.shape()[0]),
            "tokens" | "logits" => rows(tensor, TOKENS),
            _ => None,
        });
        few
    }

    /// With bf16 activations on the tensor cores, beside vectors in f32: the same choices as on the CPU, and
    /// results at most twice as far from those with f32 activations as the CPU's are, which adds in another
    /// order and does not round the weights of attention. The last token is not compared, as its logits are.
    fn bf16_is_as_near_as_on_the_cpu(case: &Case) {
        let [model, _] = NARROW[0].checkpoints(case.name, is_vector);
        let args = |activations| ["--generate", "2", "--dump-layers", "--activations", activations];
        let [near, want] = ["f32", "bf16"].map(|activations| dump_of(on_cpu, model.path(), &PROMPT, &args(activations)));
        device::each_gpu(|stream| {
            let got = dump_of(|args| run_on(stream.device(), args), model.path(), &PROMPT, &args("bf16"));
            assert_eq!(got.keys().collect::<Vec<_>>(), near.keys().collect::<Vec<_>>());
            for (name, (shape, near)) in &near {
                let ([got_shape, want_shape], [got, want]) = ([&got[name].0, &want[name].0], [&got[name].1, &want[name].1]);
                assert_eq!([got_shape, want_shape], [shape; 2], "{name}");
                if name == "tokens" {
                    assert_eq!([got[0], want[0]], [near[0]; 2], "{name}");
                } else if ["indices", "counts", "ids"].iter().any(|exact| name.ends_with(exact)) {
                    assert_eq!([got, want], [near; 2], "{name}");
                } else if !name.ends_with("router_gap") {
                    let [got, want] = [got, want].map(|values| relative_l2(values, near));
                    assert!(want > 0.0 || name.ends_with("embed"), "{name}: nothing was rounded");
                    assert!(got <= 2.0 * want, "{name}: {got:e}, on the CPU {want:e}");
                }
            }
        });
    }

    #[test]
    fn bf16_of_deepseek_v3_is_as_near_as_on_the_cpu() {
        bf16_is_as_near_as_on_the_cpu(&DEEPSEEK_V3);
    }

    #[test]
    fn bf16_of_gpt_oss_is_as_near_as_on_the_cpu() {
        bf16_is_as_near_as_on_the_cpu(&GPT_OSS);
    }
}
