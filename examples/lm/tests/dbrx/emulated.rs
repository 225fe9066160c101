//! A GPU's steps as an inference engine makes them: what is launched, what the host waits for, a graph
//! against its launches one by one; and every checkpoint against its references.

use std::path::Path;
use std::sync::{Arc, Mutex};

use dropless::Device;
use dropless_kit::compare::relative_l2;
use dropless_kit::device;
use dropless_kit::emulated::{Calls, Emulated};
use serde_json::{Value, json};

use crate::fixture::{Folder, Ran, checkpoint, run, run_on};
use crate::results::{checkpoints, dump_from};

/// Launches of a layer of a step that decodes: norm, projection to q, k and v, rotation, attention,
/// projection, norm; scores, routing, both halves of the experts, their sum.
const LAYER: usize = 11;
/// Of the rest: embedding, last norm, head, choice.
const OUTSIDE: usize = 4;

/// Runs the tiny checkpoint, which must succeed.
#[track_caller]
fn generate(device: &Device, args: &[&str]) -> Ran {
    let model = checkpoint("tiny-dbrx-f32");
    let ran = run_on(device, &[&["--model", model.to_str().unwrap()], args].concat());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    ran
}

/// What one more token costs: the entries that run, and the host's calls.
fn one_token(driver: &Emulated, device: &Device, args: &[&str]) -> (Vec<String>, [usize; 4]) {
    let so_far = || {
        let Calls { waits, launches, captures, graphs } = driver.calls();
        (driver.launches().len(), [waits, launches, captures, graphs])
    };
    let of = |tokens: &str| {
        let (first, before) = so_far();
        generate(device, &[&["--tokens", "5", "--generate", tokens], args].concat());
        let after = so_far().1;
        let entries: Vec<String> = driver.launches().drain(first..).map(|(entry, _)| entry).collect();
        (entries, std::array::from_fn::<usize, 4, _>(|i| after[i] - before[i]))
    };
    let ((few, before), (many, after)) = (of("2"), of("3"));
    assert_eq!(many[..few.len()], few);
    (many[few.len()..].to_vec(), std::array::from_fn(|i| after[i] - before[i]))
}

/// A token is one graph of eleven launches a layer and four outside, and the host waits once, for the id.
#[test]
fn a_token_is_one_graph_and_one_wait() {
    let (driver, stream) = device::emulated();
    for (batch, layers) in [("1", 2), ("3", 1)] {
        let (entries, calls) = one_token(&driver, stream.device(), &["--batch", batch, "--layers", &layers.to_string()]);
        assert_eq!(entries.len(), layers * LAYER + OUTSIDE, "{entries:?}");
        assert_eq!(calls, [1, 0, 0, 1], "waits, launches, captures, graphs");
    }
    assert!(driver.reports().is_empty());
}

/// The host waits as often for a prompt in three steps as for one in two; the step that decodes is captured
/// once, and launched once before the clocks start.
#[test]
fn a_run_waits_for_what_it_prints() {
    let (driver, stream) = device::emulated();
    let of = |chunk: &str, tokens: &str| {
        let before = driver.calls();
        generate(stream.device(), &["--layers", "1", "--tokens", "5,99,120", "--chunk", chunk, "--generate", tokens]);
        let after = driver.calls();
        (after.waits - before.waits, after.captures - before.captures, after.graphs - before.graphs)
    };
    let (waits, captures, graphs) = of("2", "1");
    assert_eq!((captures, graphs), (0, 0));
    assert_eq!(of("1", "1"), (waits, 0, 0));
    assert_eq!(of("2", "3"), (waits + 2, 1, 3));
    assert!(driver.reports().is_empty());
}

/// What `sample_argmax` is given.
type Logits = Arc<Mutex<Vec<Vec<u8>>>>;

/// From now on keeps the logits of all sequences whenever tokens are chosen.
fn keep_logits(driver: &Emulated) -> Logits {
    let kept = Logits::default();
    let into = kept.clone();
    driver.before_launch(Box::new(move |entry, params, read| {
        if entry == "sample_argmax" {
            let word = |i: usize| u64::from_le_bytes(*params[8 * i..].first_chunk().unwrap());
            let [logits, _ids, tokens, vocab, stride] = std::array::from_fn(word);
            assert_eq!(vocab, stride);
            let mut bytes = vec![0; (4 * tokens * vocab) as usize];
            read(logits, &mut bytes);
            into.lock().unwrap().push(bytes);
        }
    }));
    kept
}

/// A graph gives the bits of its launches one by one, which is how a run that shows its layers decodes: all
/// logits of all sequences, for one and for three, with prompts in chunks.
#[test]
fn a_graph_gives_the_bits_of_its_launches() {
    const TOKENS: usize = 4;
    let (driver, stream) = device::emulated();
    for (batch, layers) in [("1", "2"), ("3", "1")] {
        let logits_by = |way: &[&str], graphs: usize| {
            let (before, logits, folder, tokens) = (driver.calls().graphs, keep_logits(&driver), Folder::new(), TOKENS.to_string());
            let dump = folder.file("dump.safetensors");
            let args = ["--random-tokens", "3", "--batch", batch, "--layers", layers, "--chunk", "2", "--generate", &tokens];
            generate(stream.device(), &[&args[..], &["--dump", dump.to_str().unwrap()], way].concat());
            assert_eq!(driver.calls().graphs - before, graphs);
            let logits = logits.lock().unwrap();
            logits[logits.len() - TOKENS..].to_vec()
        };
        // One before the clocks start, and one for each token but the prompt's.
        let (graph, launches) = (logits_by(&[], TOKENS), logits_by(&["--dump-layers"], 0));
        let mut sequences: Vec<&[u8]> = graph.iter().flat_map(|logits| logits.chunks(4 * 256)).collect();
        sequences.sort_unstable();
        assert!(sequences.windows(2).all(|two| two[0] != two[1]), "logits of two steps or sequences are the same");
        assert!(graph == launches, "a graph gives other bits, {batch} sequences");
    }
    assert!(driver.reports().is_empty());
}

/// What is done before the clocks start changes nothing, and is a figure of its own.
#[test]
fn first_use_leaves_nothing_behind() {
    let args = ["--random-tokens", "5", "--batch", "3", "--layers", "1", "--chunk", "4", "--generate", "3", "--json"];
    let model = checkpoint("tiny-dbrx-f32");
    let on_cpu = run(&[&["--model", model.to_str().unwrap()], &args[..]].concat());
    let on_gpu = generate(device::emulated().1.device(), &args);
    let [of_cpu, of_gpu] = [&on_cpu, &on_gpu].map(|ran| -> Value { serde_json::from_str(ran.out.lines().last().unwrap()).unwrap() });
    let results = |ran: &Ran| {
        let (_, rest) = ran.out.split_once("Tokens per expert, 15 tokens").expect(&ran.out);
        rest.split_once("Figures").unwrap().0.to_owned()
    };
    assert_eq!(results(&on_gpu), results(&on_cpu), "counts and tokens");

    assert!(on_cpu.out.contains(" for each of 3 users") && !on_cpu.out.contains("first use"), "{}", on_cpu.out);
    assert!(on_gpu.out.contains(" for each of 3 users") && on_gpu.out.contains("\n  first use "), "{}", on_gpu.out);
    assert_eq!((&of_cpu["first_use_s"], of_gpu["first_use_s"].as_f64() > Some(0.0)), (&Value::Null, true));
    for figures in [of_cpu, of_gpu] {
        let number = |name: &str| figures[name].as_f64().unwrap();
        let same = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * b, "{a} and {b} in {figures}");
        same(number("prefill_tokens_per_s"), 15.0 / number("prefill_s"));
        same(number("decode_tokens_per_s"), 6.0 / number("decode_s"));
        same(number("decode_tokens_per_s_per_user"), number("decode_tokens_per_s") / 3.0);
    }
}

/// Heads of 64 and 128 in bf16 attend on the tensor cores, prompts and tokens alike: against the CPU with the
/// same weights and f32 activations, within the limit that the example has for logits in bf16. All experts
/// serve each token, so that no rounding chooses others.
#[test]
fn wide_heads_attend_on_the_tensor_cores() {
    if device::hardware_only() {
        return;
    }
    for (head_dim, args) in [(64, ["--batch", "2", "--chunk", "96"]), (128, ["--chunk", "200", "--batch", "1"])] {
        let folder = Folder::copy_of("tiny-dbrx-f32");
        folder.edit_json("config.json", |config| {
            (config["d_model"], config["n_heads"]) = (json!(4 * head_dim), json!(4));
            (config["ffn_config"]["moe_num_experts"], config["ffn_config"]["moe_top_k"]) = (json!(2), json!(2));
            config["max_seq_len"] = json!(512);
        });
        let prompt: Vec<u32> = (0..140).map(|i| i * 37 % 256).collect();
        let of = |run: &dyn Fn(&[&str]) -> Ran, activations| {
            let args = [&args[..], &["--generate", "3", "--weights", "bf16", "--activations", activations]].concat();
            dump_from(run, "--random", &folder.file("config.json"), &prompt, &args)
        };
        let (driver, stream) = device::emulated();
        let (got, want) = (of(&|args| run_on(stream.device(), args), "bf16"), of(&|args| run(args), "f32"));
        assert_eq!(got["tokens"], want["tokens"], "heads of {head_dim}");
        for name in ["logits", "step_logits"] {
            let error = relative_l2(&got[name].1, &want[name].1);
            assert!(error <= 0.03, "heads of {head_dim}, {name}: {error:e}");
        }
        let entries: Vec<String> = driver.launches().into_iter().map(|(entry, _)| entry).collect();
        for entry in [format!("attention_prefill_bf16_{head_dim}"), format!("attention_decode_bf16_{head_dim}")] {
            assert!(entries.contains(&entry), "{entry}");
        }
        assert!(entries.iter().all(|entry| entry != "attention_bf16") && driver.reports().is_empty());
    }
}

/// Runs the example's own comparison of a checkpoint with references, in the type of its weights.
#[track_caller]
pub fn agrees(device: &Device, name: &str, references: &Path) {
    let model = checkpoint(name);
    let activations = if name.ends_with("bf16") { "bf16" } else { "f32" };
    let args = ["--model", model.to_str().unwrap(), "--check", references.to_str().unwrap(), "--activations", activations];
    let ran = run_on(device, &args);
    assert!(ran.code == 0 && ran.out.contains("  agrees: "), "{name}, {}: {}{}", references.display(), ran.out, ran.err);
}

/// Those checkpoints against that file of their references.
fn all_agree(file: &str, chosen: impl Fn(&str) -> bool) {
    if device::hardware_only() {
        return;
    }
    let (driver, stream) = device::emulated();
    for (name, references) in checkpoints().into_iter().filter(|(name, _)| chosen(name)) {
        agrees(stream.device(), &name, &checkpoint(&references).join(file));
    }
    assert!(driver.reports().is_empty());
}

/// Every intermediate result of every prompt of every checkpoint. 14 s of a core for those of the repository;
/// 22 s where `DROPLESS_GOLDENS` names the full set, which has one in bf16 (13 MB, 6 s with its tokens).
#[test]
fn prompts_agree_with_f64() {
    all_agree("goldens.safetensors", |_| true);
}

/// Sixteen greedy tokens, and the logits and the cache behind them. Shards hold what their whole twin does.
/// 24 s of a core; 55 s with the full set.
#[test]
fn generations_agree_with_f64() {
    all_agree("decode.safetensors", |name| !name.ends_with("-sharded"));
}
