//! Quantised checkpoints on a GPU: what is copied there, repacked and rounded, against references and against
//! the CPU; how much memory it takes; and what is refused.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use dropless::Device;
use dropless_kit::compare::relative_l2;
use dropless_kit::device;
use dropless_kit::recorder::{Call, Recorder};
use serde_json::Value;

use crate::families::on_cpu;
use crate::fixture::{Ran, checkpoint, refused, run, run_on};
use crate::quantized::{EXACT, holds_by, published};
use crate::results::{agree, dump_by, dump_of};
use crate::rounded::NARROW;

/// The example's own limit of logits that are rounded to 16 bits, in relative L2.
const ROUNDED: f64 = 0.03;
/// FP8 has three bits of mantissa: rounding moves a number by at most 2^-4 of itself, and a sum of many such
/// numbers of both signs about as far.
const FP8: f64 = 0.0625;
const PROMPT: [u32; 4] = [5, 90, 17, 1];

/// Runs on an emulated GPU, which must find nothing wrong, and gives the entries that were launched.
fn emulated<T>(run: impl FnOnce(&Device) -> T) -> (T, Vec<String>) {
    let (driver, stream) = device::emulated();
    let result = run(stream.device());
    assert_eq!(driver.reports(), [""; 0]);
    (result, driver.launches().into_iter().map(|(entry, _)| entry).collect())
}

/// Whether an entry with that beginning was launched.
fn launched(entries: &[String], beginning: &str) -> bool {
    entries.iter().any(|entry| entry.starts_with(beginning))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// With f32 activations as they are, and weights as they lie: within the limits that the CPU has, all tokens
/// equal.
#[test]
fn references_hold_with_f32_activations() {
    for (name, references, results) in [
        ("gpt_oss_mxfp4", "goldens.safetensors", 22),
        ("gpt_oss_mxfp4", "decode.safetensors", 2),
        ("qwen3_moe_fp8", "goldens.safetensors", 12),
        ("qwen3_moe_fp8", "decode.safetensors", 2),
        ("gguf_qwen3moe", "goldens.safetensors", 12),
    ] {
        let args = [EXACT, "--activations", "f32"];
        let (_, entries) = emulated(|device| holds_by(|args| run_on(device, args), name, references, &args, results));
        assert!(!launched(&entries, "repack_"), "{name}");
    }
}

/// With bf16 activations the experts of gpt-oss are repacked, and give what the CPU gives with f32, but for
/// rounding.
#[test]
fn repacked_mxfp4_agrees_with_the_cpu() {
    let model = published("gpt_oss_mxfp4");
    let args = ["--generate", "2"];
    let (got, entries) = emulated(|device| dump_of(|args| run_on(device, args), &model, &PROMPT, &args));
    let want = dump_of(on_cpu, &model, &PROMPT, &[&args[..], &[EXACT]].concat());
    assert_eq!(got["tokens"], want["tokens"]);
    for name in ["logits", "step_logits"] {
        let error = relative_l2(&got[name].1, &want[name].1);
        assert!(error <= ROUNDED, "{name}: {error:e}");
    }
    let count = |name: &str| entries.iter().filter(|entry| entry.as_str() == name).count();
    assert_eq!((count("repack_mxfp4"), count("repack_mxfp4_scales")), (4, 4), "{entries:?}");
    assert!(launched(&entries, "grouped_gemm_nt_bf16_mxfp4_few"), "{entries:?}");
}

/// FP8 experts round the rows of a long prompt to FP8, unless activations are to be taken as they are; a
/// token's row is always taken as it is.
#[test]
fn fp8_experts_round_many_rows() {
    let model = published("qwen3_moe_fp8");
    let prompt: Vec<u32> = (0..65).map(|i| i * 37 % 128).collect();
    let of = |prompt: &[u32], args: &[&str]| emulated(|device| dump_of(|args| run_on(device, args), &model, prompt, args));
    let ((rounded, of_rounded), (exact, of_exact)) = (of(&prompt, &["--generate", "0"]), of(&prompt, &["--generate", "0", EXACT]));
    assert!(launched(&of_rounded, "quantize_bf16_to_e4m3") && !launched(&of_exact, "quantize_"), "{of_rounded:?} {of_exact:?}");
    assert!(!launched(&of(&prompt[..4], &["--generate", "1"]).1, "quantize_"));
    let want = dump_of(on_cpu, &model, &prompt, &["--generate", "0", EXACT]);
    for (got, limit) in [(&exact, ROUNDED), (&rounded, FP8)] {
        let error = relative_l2(&got["logits"].1, &want["logits"].1);
        assert!(error <= limit, "{error:e}");
    }
    assert!(rounded["logits"] != exact["logits"]);
}

/// Floats of another type than activations are rounded as they are copied: f32 weights give the bits of
/// weights that were bf16 in the file.
#[test]
fn floats_become_the_type_of_activations() {
    let [narrow, _] = NARROW[0].checkpoints("tiny-dbrx-f32", |_| false);
    let args = ["--activations", "bf16", "--layers", "1", "--generate", "2"];
    let (of_f32, _) = emulated(|device| dump_by(|args| run_on(device, args), "tiny-dbrx-f32", &PROMPT, &args));
    let (of_bf16, _) = emulated(|device| dump_of(|args| run_on(device, args), narrow.path(), &PROMPT, &args));
    assert!(of_f32 == of_bf16);
    let (wide, _) = emulated(|device| {
        let args = ["--activations", "f32", "--layers", "1", "--generate", "2"];
        dump_of(|args| run_on(device, args), narrow.path(), &PROMPT, &args)
    });
    let want = dump_of(on_cpu, narrow.path(), &PROMPT, &["--layers", "1", "--generate", "2"]);
    agree(&wide, &want);
    let model = checkpoint("tiny-dbrx-f32");
    let (ran, _) = emulated(|device| {
        let args = ["--model", text(&model), "--tokens", "1", "--layers", "1", "--generate", "1", "--activations", "bf16"];
        run_on(device, &args)
    });
    assert!(ran.out.contains("; weights f32 (copied, floats as bf16), activations bf16; "), "{}", ran.out);
}

/// What a run says of weights on a GPU.
#[test]
fn a_run_says_how_weights_are_copied() {
    let said = |name: &str, args: &[&str]| {
        let model = published(name);
        let ran = emulated(|device| run_on(device, &[&["--model", text(&model), "--tokens", "1,2", "--generate", "1"], args].concat())).0;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        let line = |label: &str| ran.out.lines().find(|line| line.starts_with(label)).unwrap().to_owned();
        (line("  run "), line("  upload "))
    };
    let (run, upload) = said("gpt_oss_mxfp4", &[]);
    assert!(run.contains("; weights mxfp4, bf16 (copied), activations bf16 as they are; "), "{run}");
    assert!(upload.ends_with(" GB/s; 4 matrices repacked"), "{upload}");
    let (run, _) = said("gguf_qwen3moe", &[]);
    assert!(run.contains(" (copied, floats as f16), activations f16 as they are; "), "{run}");
    let (run, upload) = said("qwen3_moe_fp8", &[]);
    assert!(run.contains("; weights e4m3, bf16 (copied), activations bf16, in FP8 where experts multiply many rows; "), "{run}");
    assert!(upload.ends_with(" GB/s"), "{upload}");
    let (run, _) = said("qwen3_moe_fp8", &[EXACT]);
    assert!(run.contains(", activations bf16 as they are; "), "{run}");
}

/// Bytes on a made-up GPU after each allocation and each return of one, up to the first step.
fn held_while_loading(args: &[&str]) -> Vec<i64> {
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    run_on(&device, args);
    let is_step = |call: &Call| matches!(call, Call::Launch { entry, .. } if entry.starts_with("embedding"));
    let (mut sizes, mut held, mut all) = (HashMap::new(), 0, vec![0]);
    for call in driver.calls().iter().take_while(|call| !is_step(call)) {
        match call {
            Call::Alloc { address, bytes } => {
                sizes.insert(*address, *bytes as i64);
                held += *bytes as i64;
            }
            Call::Free { address, .. } => held -= sizes[address],
            _ => {}
        }
        all.push(held);
    }
    all
}

/// Of weights that are repacked, one matrix at a time is there twice.
#[test]
fn one_matrix_is_there_twice() {
    let model = published("gpt_oss_mxfp4");
    let held = held_while_loading(&["--model", text(&model), "--tokens", "1", "--generate", "1"]);
    let (mut least_later, mut most_returned) = (i64::MAX, 0);
    for bytes in held.iter().rev() {
        least_later = least_later.min(*bytes);
        most_returned = most_returned.max(bytes - least_later);
    }
    // Gate and up of 8 experts: 192 outputs of 64 bytes of codes and 4 exponents.
    assert_eq!(most_returned, 8 * 192 * (64 + 4));
}

/// A run needs what `--plan` says, and not a byte less; and a plan of a quantised checkpoint is of its files.
#[test]
fn a_plan_of_a_quantised_checkpoint_is_what_a_run_needs() {
    for (name, activations) in [("gpt_oss_mxfp4", "bf16"), ("qwen3_moe_fp8", "bf16"), ("gguf_qwen3moe", "f32")] {
        let model = published(name);
        let sizes = ["--model", text(&model), "--context", "4"];
        let ran = run(&[&sizes[..], &["--plan", "--json", "--activations", activations]].concat());
        assert!(ran.code == 0 && ran.err.is_empty(), "{name}: {}{}", ran.out, ran.err);
        assert!(ran.out.contains("H100 80 GB") && ran.out.contains("H200 141 GB"), "{}", ran.out);
        let json: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
        let rows = json["plan"][0]["formats"].as_array().unwrap();
        assert_eq!((rows.len(), &rows[0]["weights"]), (1, &"checkpoint".into()));
        let need = rows[0]["need_bytes"].as_u64().unwrap();
        let of = |bytes: u64| -> Ran {
            let limit = bytes.to_string();
            let args = ["--tokens", "1,2,3,4", "--generate", "0", "--memory-limit", &limit, "--activations", activations];
            // A driver that computes nothing.
            let device = Device::with_driver(Arc::new(Recorder::default()), 0).unwrap();
            run_on(&device, &[&sizes[..], &args].concat())
        };
        let text = refused(&of(need - 1));
        assert!(text.starts_with("memory: the run needs ") && text.ends_with("; layers of quantised weights are not streamed"), "{text}");
        assert!(!of(need).err.contains("memory: "), "{name}");
    }
    let of_bytes = |name: &str, activations: &str| {
        let ran = run(&["--model", text(&published(name)), "--plan", "--json", "--activations", activations]);
        let json: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
        json["plan"][0]["formats"][0]["weights_bytes"].as_u64().unwrap()
    };
    let file = std::fs::read(published("qwen3_moe_fp8").join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let held: usize = tensors.iter().map(|(_, tensor)| tensor.data().len()).sum();
    assert_eq!(of_bytes("qwen3_moe_fp8", "bf16"), held as u64);
    assert!(of_bytes("qwen3_moe_fp8", "f32") > held as u64);
}

/// Random weights are made in one type with activations.
#[test]
fn random_weights_of_another_type_are_refused() {
    let config = checkpoint("tiny-dbrx-f32").join("config.json");
    let (_, stream) = device::emulated();
    let args = ["--random", text(&config), "--tokens", "1", "--activations", "bf16"];
    let ran = run_on(stream.device(), &args);
    assert_eq!(refused(&ran), "random weights are f32, activations bf16: a GPU takes both of one type; see --weights");
}
