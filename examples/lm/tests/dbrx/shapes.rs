//! Checkpoints of sizes that no published model has, in every type of weights, whole and in shards: heads of
//! any even width, odd vocabularies, one expert or many, window and scaling of every kind. The references are
//! those of Hugging Face transformers in f64.

use crate::fixture::{Ran, run};

/// Stored in f32, so that a GPU runs them with activations in f32.
const WIDE: [&str; 15] = [
    "deepseek_v3-halves",
    "deepseek_v3-newer-config",
    "glm4_moe",
    "glm4_moe-newer-config",
    "gpt_neox",
    "gpt_oss",
    "grok1",
    "llama-longrope",
    "llama-yarn",
    "minimax_m2",
    "mistral",
    "olmoe",
    "phimoe",
    "qwen3_moe",
    "qwen3_moe-newer-config",
];
/// Stored in bf16 or f16.
const NARROW: [&str; 5] = ["deepseek_v3", "granitemoe", "llama", "mixtral", "qwen2_moe"];

/// Prompts and a generation agree with the references, by the example's own comparison.
#[track_caller]
fn agrees(run: impl Fn(&[&str]) -> Ran, name: &str) {
    let folder = dropless_kit::goldens::root().join("tests/data/shapes").join(name);
    for file in ["goldens.safetensors", "decode.safetensors"] {
        let ran = run(&["--model", folder.to_str().unwrap(), "--check", folder.join(file).to_str().unwrap()]);
        assert!(ran.code == 0 && ran.out.contains("  agrees: "), "{name}: {}{}", ran.out, ran.err);
    }
}

#[test]
fn any_shape_agrees_on_the_cpu() {
    WIDE.iter().chain(&NARROW).for_each(|name| agrees(|args| run(args), name));
}

/// On a GPU the rows of every matrix begin on 16 bytes, however wide they are. Weights of 16 bits have
/// activations of their type there, and wider limits.
#[test]
fn any_shape_agrees_on_a_gpu() {
    use crate::fixture::run_on;
    use dropless_kit::device;

    if !device::hardware_only() {
        let (driver, stream) = device::emulated();
        WIDE.iter().chain(&NARROW).for_each(|name| agrees(|args| run_on(stream.device(), args), name));
        assert!(driver.reports().is_empty(), "{:?}", driver.reports());
    }
    if let Some(stream) = device::hardware() {
        WIDE.iter().chain(&NARROW).for_each(|name| agrees(|args| run_on(stream.device(), args), name));
    }
}
