//! The results of whole runs: every intermediate against f64 references, and the properties that must hold whatever the values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dropless_kit::compare::{max_abs, relative_l2};
use dropless_kit::goldens::{self, Goldens};
use safetensors::{Dtype, SafeTensors};

use crate::fixture::{Folder, Ran, checkpoint, run, run_into};

/// Limits of runs with f32 activations.
const REL_L2: f64 = 5e-6;
const LOGITS_MAX_ABS: f64 = 1e-4;
/// Results that every layer of a dump holds.
const OF_LAYER: [&str; 16] = [
    "norm_1",
    "qkv_preclip",
    "qkv",
    "q_rope",
    "k_rope",
    "attn_ctx",
    "attn_out",
    "resid_mid",
    "norm_2",
    "router_logits",
    "router_weights",
    "expert_indices",
    "expert_counts",
    "router_gap",
    "ffn_out",
    "hidden",
];

/// The checkpoints there are, with the folder that holds their references: sharded ones have those of their whole twin.
pub fn checkpoints() -> Vec<(String, String)> {
    let folder = goldens::path("dbrx");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    assert!(names.len() >= 5, "{names:?}");
    names.into_iter().map(|name| (name.clone(), name.trim_end_matches("-sharded").to_owned())).collect()
}

/// A dump, widened: shape and values by name.
pub type Dump = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Runs a checkpoint and reads its dump.
#[track_caller]
pub fn dump(name: &str, prompt: &[u32], args: &[&str]) -> Dump {
    dump_by(|args| run(args), name, prompt, args)
}

/// The same with another way to run it.
#[track_caller]
pub fn dump_by(run: impl FnOnce(&[&str]) -> Ran, name: &str, prompt: &[u32], args: &[&str]) -> Dump {
    dump_of(run, &checkpoint(name), prompt, args)
}

/// The same of any folder.
#[track_caller]
pub fn dump_of(run: impl FnOnce(&[&str]) -> Ran, model: &Path, prompt: &[u32], args: &[&str]) -> Dump {
    dump_from(run, "--model", model, prompt, args)
}

/// The same of what an argument names.
#[track_caller]
pub fn dump_from(run: impl FnOnce(&[&str]) -> Ran, source: &str, model: &Path, prompt: &[u32], args: &[&str]) -> Dump {
    let folder = Folder::new();
    let file = folder.file("dump.safetensors");
    let tokens: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let common = [source, model.to_str().unwrap(), "--tokens", &tokens.join(","), "--dump", file.to_str().unwrap()];
    let ran = run(&[&common, args].concat());
    assert_eq!(ran.code, 0, "{}: {}{}", model.display(), ran.out, ran.err);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "something was left beside the dump");
    let bytes = std::fs::read(file).unwrap();
    let widen = |tensor: safetensors::tensor::TensorView<'_>| match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        Dtype::I64 => tensor.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        other => panic!("{other:?} in a dump"),
    };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, tensor)| (name.to_owned(), (tensor.shape().to_vec(), widen(tensor)))).collect()
}

/// The same results within f32, ids and counts exactly.
#[track_caller]
pub fn agree(got: &Dump, want: &Dump) {
    agree_within(REL_L2, got, want);
}

/// The same results within a relative error, ids and counts exactly.
#[track_caller]
pub fn agree_within(limit: f64, got: &Dump, want: &Dump) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, (shape, want)) in want {
        assert_eq!(got[name].0, *shape, "{name}");
        if ["indices", "counts", "ids", "tokens"].iter().any(|exact| name.ends_with(exact)) {
            assert_eq!(got[name].1, *want, "{name}");
        } else if !name.ends_with("router_gap") {
            let error = relative_l2(&got[name].1, want);
            assert!(error <= limit, "{name}: {error:e}");
        }
    }
}

/// Every intermediate result of every prompt of every checkpoint, with f32 activations.
#[test]
fn intermediates_agree_with_f64() {
    for (name, references) in checkpoints() {
        let want = Goldens::open(PathBuf::from("dbrx").join(references).join("goldens.safetensors"));
        let layers = (0..).take_while(|layer| want.has(&format!("p0.L{layer}.norm_1"))).count();
        for prompt in (0..).map(|i| format!("p{i}.")).take_while(|prompt| want.has(&format!("{prompt}input_ids"))) {
            let got = dump(&name, &want.u32(&format!("{prompt}input_ids")), &["--generate", "0", "--dump-layers"]);
            let of_layers = (0..layers).flat_map(|layer| OF_LAYER.map(|result| format!("L{layer}.{result}")));
            let of_model = ["embed", "final_norm", "logits", "input_ids"].map(str::to_owned);
            for result in of_layers.chain(of_model) {
                let (shape, got) = &got[&result];
                let (full, at) = (format!("{prompt}{result}"), format!("{name}: {prompt}{result}"));
                assert_eq!(*shape, want.shape(&full), "{at}");
                let want = want.f64(&full);
                if ["indices", "counts", "ids"].iter().any(|exact| result.ends_with(exact)) {
                    assert_eq!(*got, want, "{at}");
                } else if result.ends_with("router_gap") {
                    // A difference of two logits, which have the error.
                    assert!(max_abs(got, &want) <= 1e-4, "{at}: {:e}", max_abs(got, &want));
                } else {
                    assert!(relative_l2(got, &want) <= REL_L2, "{at}: {:e}", relative_l2(got, &want));
                }
                if result == "logits" {
                    assert!(max_abs(got, &want) <= LOGITS_MAX_ABS, "{at}: {:e}", max_abs(got, &want));
                }
            }
        }
    }
}

/// Sixteen greedy tokens exactly, the logits that decided them, and the cache they leave.
#[test]
fn generation_agrees_with_f64() {
    for (name, references) in checkpoints() {
        let want = Goldens::open(PathBuf::from("dbrx").join(references).join("decode.safetensors"));
        let got = dump(&name, &want.u32("prompt"), &["--generate", "16", "--dump-layers"]);
        assert_eq!(got["tokens"].1, want.f64("tokens"), "{name}");
        for result in want.names().into_iter().filter(|result| result == "logits" || result.starts_with("cache.")) {
            let ours = if result == "logits" { "step_logits" } else { &result };
            let (at, want_shape, want) = (format!("{name}: {result}"), want.shape(&result), want.f64(&result));
            let (shape, got) = &got[ours];
            assert_eq!(*shape, want_shape, "{at}");
            assert!(relative_l2(got, &want) <= REL_L2, "{at}: {:e}", relative_l2(got, &want));
            assert!(result != "logits" || max_abs(got, &want) <= LOGITS_MAX_ABS, "{at}: {:e}", max_abs(got, &want));
        }
    }
}

/// The example's own comparison, of every checkpoint there is; of bf16 ones with bf16 activations as well.
#[test]
fn checks_pass() {
    for (name, references) in checkpoints() {
        for reference in ["goldens.safetensors", "decode.safetensors"] {
            let (model, file) = (checkpoint(&name), checkpoint(&references).join(reference));
            let args = ["--model", model.to_str().unwrap(), "--check", file.to_str().unwrap()];
            // Rounding flips experts of the other checkpoints, so that nothing can be said about them.
            let types: &[&str] = if name.ends_with("bf16") { &["f32", "bf16"] } else { &["f32"] };
            for activations in types {
                let ran = run(&[&args[..], &["--activations", activations]].concat());
                assert_eq!(ran.code, 0, "{name}: {}{}", ran.out, ran.err);
                assert!(ran.out.contains("  agrees: "), "{name}: {}", ran.out);
            }
        }
    }
}

/// Runs the tiny checkpoint's own comparison against an edited copy of its references.
fn check_edited(reference: &str, edit: impl FnOnce(&mut [u8])) -> Ran {
    let folder = Folder::new();
    let mut bytes = std::fs::read(checkpoint("tiny-dbrx-f32").join(reference)).unwrap();
    edit(&mut bytes);
    std::fs::write(folder.file(reference), bytes).unwrap();
    let (model, file) = (checkpoint("tiny-dbrx-f32"), folder.file(reference));
    run(&["--model", model.to_str().unwrap(), "--check", file.to_str().unwrap()])
}

/// Where a tensor's data begin in its file.
fn offset_of(file: &[u8], name: &str) -> usize {
    let tensors = SafeTensors::deserialize(file).unwrap();
    tensors.tensor(name).unwrap().data().as_ptr().addr() - file.as_ptr().addr()
}

#[test]
fn checks_fail_where_they_must() {
    for (name, value) in [("p1.L1.ffn_out", 1e30), ("p0.logits", f64::NAN), ("p2.embed", 1.0)] {
        let ran = check_edited("goldens.safetensors", |bytes| {
            let at = offset_of(bytes, name);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        });
        let want = format!("results differ: 1 of 99 results are beyond their limits, `{name}` first\n");
        assert_eq!((ran.code, ran.err.as_str()), (1, want.as_str()), "{}", ran.out);
    }
    let ran = check_edited("goldens.safetensors", |bytes| {
        let at = offset_of(bytes, "p2.L0.expert_indices");
        bytes[at] ^= 1;
    });
    assert_eq!((ran.code, ran.err.contains("`p2.L0.expert_indices` first")), (1, true), "{}", ran.err);
    let ran = check_edited("decode.safetensors", |bytes| {
        let at = offset_of(bytes, "tokens");
        bytes[at + 8] ^= 1;
    });
    assert_eq!((ran.code, ran.err.contains("`tokens` first")), (1, true), "{}", ran.err);
}

/// The default run: a report, a verdict, and one line of JSON that is the last.
#[test]
fn the_default_run_reports_and_agrees() {
    let ran = run(&["--json"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    for part in ["experts    3 of 16 x 96 x 64", "  layer 1 ", "Next tokens\n  ", " tokens/s", "all 16 equal", "  agrees: 5 results"] {
        assert!(ran.out.contains(part), "`{part}` is not in\n{}", ran.out);
    }
    assert!(!ran.out.contains('\x1b'), "colours where nobody looks");
    let figures: serde_json::Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    assert_eq!((&figures["prefill_tokens"], &figures["decode_tokens"]), (&65.into(), &15.into()));
    assert_eq!(
        (&figures["device"], &figures["dtypes"]["weights"], &figures["dtypes"]["activations"]),
        (&"cpu".into(), &"f32".into(), &"f32".into())
    );
    for key in ["prefill_s", "decode_s", "load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_per_user"] {
        assert!(figures[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(figures["first_use_s"].is_null(), "a CPU has no first use");
    for key in ["peak_rss_bytes", "peak_anonymous_bytes"] {
        assert!(figures[key].is_null() || figures[key].as_u64().unwrap() > 0, "{key}");
    }
    // Nothing is copied where the weights are used as they lie.
    assert!(["upload", "streamed"].iter().all(|key| figures[*key].is_null()));
    assert_eq!(figures.as_object().unwrap().len(), 15);
}

/// A configuration as newer releases save it describes the same model.
#[test]
fn both_layouts_of_config_are_read() {
    for (name, _) in checkpoints().into_iter().filter(|(name, references)| name == references) {
        let folder = Folder::copy_of(&name);
        let plain = folder.run();
        std::fs::rename(folder.file("config.hf5.json"), folder.file("config.json")).unwrap();
        let newer = folder.run();
        assert_eq!((plain.code, newer.code), (0, 0), "{}{}", plain.err, newer.err);
        let described = |ran: &Ran| ran.out.split("Figures").next().unwrap().to_owned();
        let without_memory = |text: String| text.lines().filter(|line| !line.starts_with("  memory")).collect::<Vec<_>>().join("\n");
        assert_eq!(without_memory(described(&plain)), without_memory(described(&newer)), "{name}");
    }
}

const PROMPT: [u32; 7] = [5, 99, 3, 250, 0, 17, 17];

/// The number of threads and the shards change no bit; nor does the way the prompt is cut or what runs beside it, within f32.
#[test]
fn the_same_in_every_arrangement() {
    let whole = dump("tiny-dbrx-f32", &PROMPT, &["--generate", "6", "--dump-layers"]);
    for threads in ["1", "3"] {
        let got = dump("tiny-dbrx-f32", &PROMPT, &["--generate", "6", "--dump-layers", "--threads", threads]);
        assert!(got == whole, "{threads} threads give other bits");
    }
    assert!(dump("tiny-dbrx-f32-sharded", &PROMPT, &["--generate", "6", "--dump-layers"]) == whole, "shards give other bits");
    for args in [&["--chunk", "1"][..], &["--chunk", "3"], &["--batch", "3"], &["--batch", "3", "--chunk", "5"], &["--context", "100"]] {
        let got = dump("tiny-dbrx-f32", &PROMPT, &[&["--generate", "6", "--dump-layers"], args].concat());
        assert_eq!(got.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>(), "{args:?}");
        for (name, (shape, values)) in &whole {
            assert_eq!(got[name].0, *shape, "{args:?}: {name}");
            assert!(relative_l2(&got[name].1, values) <= REL_L2, "{args:?}: {name}");
        }
        assert_eq!(got["tokens"], whole["tokens"], "{args:?}");
    }
}

/// Random weights run in every pair of types, the same numbers whatever the number of threads.
#[test]
fn random_weights_run_in_all_types() {
    let config = checkpoint("tiny-dbrx-f32").join("config.json");
    for weights in ["f32", "bf16"] {
        for activations in ["f32", "bf16"] {
            let types = ["--weights", weights, "--activations", activations];
            let args = ["--random", config.to_str().unwrap(), "--random-tokens", "9", "--generate", "4", "--batch", "2", "--layers", "1"];
            let shown = |threads: &str| {
                let ran = run(&[&args[..], &types, &["--threads", threads]].concat());
                assert_eq!(ran.code, 0, "{}", ran.err);
                let (_, tokens) = ran.out.split_once("Tokens per expert, 18 tokens").expect(&ran.out);
                tokens.split("Figures").next().unwrap().to_owned()
            };
            assert_eq!(shown("1"), shown("3"));
        }
    }
}

/// A dump without layers holds the prompt's logits and the course of the generation, and no more.
#[test]
fn dumps_hold_what_was_asked_for() {
    let got = dump("tiny-dbrx-f32", &PROMPT, &["--generate", "2"]);
    let shapes: Vec<(&str, &[usize])> = got.iter().map(|(name, (shape, _))| (name.as_str(), shape.as_slice())).collect();
    assert_eq!(shapes, [("input_ids", &[7][..]), ("logits", &[7, 256]), ("step_logits", &[2, 256]), ("tokens", &[2])]);
    assert_eq!(got["logits"].1[6 * 256..], got["step_logits"].1[..256]);
    let got = dump("tiny-dbrx-f32", &PROMPT[..1], &["--generate", "0"]);
    assert_eq!(got.keys().collect::<Vec<_>>(), ["input_ids", "logits"]);
}

/// A pipe that was closed, as by `head`.
struct Closed;

impl std::io::Write for Closed {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Where nobody reads on, a run ends without a word; one that writes a file goes on.
#[test]
fn a_closed_pipe_is_no_failure() {
    let ran = run_into(&mut Closed, &["--json"], crate::example::run);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let got = dump_by(|args| run_into(&mut Closed, args, crate::example::run), "tiny-dbrx-f32", &PROMPT, &["--generate", "2"]);
    assert_eq!(got["tokens"].0, [2]);
}

/// A dump may be read by whoever may read other new files, and a file that is replaced keeps its mode.
#[cfg(unix)]
#[test]
fn a_dump_has_the_mode_of_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let (folder, model) = (Folder::new(), checkpoint("tiny-dbrx-f32"));
    let (file, other) = (folder.file("dump.safetensors"), folder.file("other"));
    let mode = |file: &PathBuf| std::fs::metadata(file).unwrap().permissions().mode();
    std::fs::write(&other, "").unwrap();
    let write = || run(&["--model", model.to_str().unwrap(), "--tokens", "1", "--generate", "0", "--dump", file.to_str().unwrap()]);
    assert_eq!(write().code, 0);
    assert_eq!(mode(&file), mode(&other));
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!((write().code, mode(&file) & 0o777), (0, 0o640));
}

#[test]
fn the_version_is_known() {
    let ran = run(&["--version"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, concat!("dbrx ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn a_dump_that_cannot_be_written() {
    let model = checkpoint("tiny-dbrx-f32");
    let ran = run(&["--model", model.to_str().unwrap(), "--tokens", "1", "--dump", "/nowhere/dump.safetensors"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert_eq!(ran.err, "refused: /nowhere/dump.safetensors: cannot be written: /nowhere is not a folder\n");
}

/// Text goes in and comes out where a tokenizer is there.
#[cfg(feature = "text")]
#[test]
fn text_is_a_prompt() {
    let folder = Folder::copy_of("tiny-dbrx-f32");
    let words: BTreeMap<String, u32> = (0..256).map(|id| (format!("w{id}"), id)).collect();
    let model = serde_json::json!({"type": "WordLevel", "vocab": words, "unk_token": "w0"});
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model});
    std::fs::write(folder.file("tokenizer.json"), tokenizer.to_string()).unwrap();
    let of = |prompt: &[&str]| run(&[&["--model", folder.path().to_str().unwrap(), "--generate", "4"], prompt].concat());
    let (text, ids) = (of(&["--prompt", "w5 w99 w3"]), of(&["--tokens", "5,99,3"]));
    assert_eq!((text.code, ids.code), (0, 0), "{}{}", text.err, ids.err);
    let next = |ran: &Ran| ran.out.split("Next tokens").nth(1).and_then(|rest| rest.lines().nth(1)).unwrap().trim().to_owned();
    assert_eq!(next(&text), next(&ids));
    assert!(next(&text).split(' ').count() == 4 && next(&text).starts_with('w'), "{}", next(&text));
}
