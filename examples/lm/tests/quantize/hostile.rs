//! What is refused: exit code 2, a text that names the file, the tensor and the numbers, and nothing left
//! behind.

use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use crate::fixture::{Folder, Ran, checkpoint, refused};
use crate::rounded::{rewritten, with_weights};
use crate::{convert, converted};

const W1: &str = "transformer.blocks.1.ffn.experts.mlp.w1";
const W2: &str = "transformer.blocks.1.ffn.experts.mlp.w2";

fn try_to(model: &Path, out: &Path, args: &[&str]) -> Ran {
    convert(&[&["--model", model.to_str().unwrap(), "--out", out.to_str().unwrap()], args].concat())
}

/// The text of a refusal, without the names of folders, after which the output's folder holds nothing.
#[track_caller]
fn refusal(model: &Path, args: &[&str]) -> String {
    let folder = Folder::new();
    let ran = try_to(model, &folder.file("out"), args);
    assert_eq!(ran.code, 2, "{}{}", ran.out, ran.err);
    assert!(!ran.out.contains("written"), "{}", ran.out);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left");
    let text = ran.err.strip_prefix("refused: ").unwrap_or_else(|| panic!("not a refusal: {}", ran.err));
    text.trim_end().replace(&format!("{}/", model.display()), "")
}

/// The small DBRX with one other weight.
fn with_weight(name: &str, at: usize, weight: f32) -> Folder {
    let bytes = rewritten("tiny-dbrx-f32", |tensor, bytes| {
        let mut bytes = bytes.to_vec();
        if tensor == name {
            bytes[4 * at..4 * at + 4].copy_from_slice(&weight.to_le_bytes());
        }
        Some((Dtype::F32, bytes))
    });
    with_weights("tiny-dbrx-f32", bytes)
}

#[test]
fn weights_that_are_no_numbers() {
    let text = |name: &str, at, weight, target| refusal(with_weight(name, at, weight).path(), &["--to", target, "--threads", "2"]);
    let most = "weights must be finite, and at most 8.507059e37";
    for target in ["fp8", "mxfp4", "int4"] {
        // w1 and w2 are [16 * 96, 64]; w2 is turned around expert by expert.
        let got = text(W1, 64 * 1000 + 63, f32::NAN, target);
        assert_eq!(got, format!("model.safetensors: tensor `{W1}` is NaN at [1000, 63]; {most}"));
        let got = text(W2, 64 * 1535 + 7, f32::INFINITY, target);
        assert_eq!(got, format!("model.safetensors: tensor `{W2}` is inf at [1535, 7]; {most}"));
        let got = text(W2, 5, f32::NEG_INFINITY, target);
        assert_eq!(got, format!("model.safetensors: tensor `{W2}` is -inf at [0, 5]; {most}"));
        let got = text(W1, 0, -1e38, target);
        assert_eq!(got, format!("model.safetensors: tensor `{W1}` is -1e38 at [0, 0]; {most}"));
    }
    // What is copied may hold anything.
    let (model, folder) = (with_weight("transformer.wte.weight", 3, f32::NAN), Folder::new());
    converted(model.path(), &folder.file("out"), &["--to", "fp8"]);
}

#[test]
fn what_exists_is_not_written_over() {
    let (model, folder) = (checkpoint("tiny-dbrx-f32"), Folder::new());
    let args = ["--to", "int4"];
    let text = |out: &Path| refused(&try_to(&model, out, &args)).replace(&format!("{}/", folder.path().display()), "");
    let [there, file, cut] = ["there", "file", "cut"].map(|name| folder.file(name));
    std::fs::create_dir(&there).unwrap();
    std::fs::write(&file, "mine").unwrap();
    std::fs::create_dir(folder.file("cut.part")).unwrap();
    std::fs::write(folder.file("cut.part/model.safetensors"), "half").unwrap();
    assert_eq!(text(&there), "there: exists; the result needs a folder of its own");
    assert_eq!(text(&file), "file: exists; the result needs a folder of its own");
    assert_eq!(text(&cut), "cut.part: exists; it is what a run left that was cut off, or another one is writing it");
    assert_eq!(text(&folder.file("no/such/place")), "no/such/place.part: cannot be created: not found");
    assert!(refused(&try_to(&model, Path::new("/"), &args)).ends_with("is no name for a new folder"));
    assert!(refused(&try_to(&model, &model, &args)).ends_with("exists; the result needs a folder of its own"));
    assert_eq!(std::fs::read(folder.file("cut.part/model.safetensors")).unwrap(), b"half");
    assert_eq!(std::fs::read_dir(&there).unwrap().count(), 0);
}

#[test]
fn models_that_are_no_unquantised_checkpoint() {
    let args = ["--to", "fp8"];
    let model = Folder::copy_of("tiny-dbrx-f32");
    model.edit_json("config.json", |config| config["quantization_config"] = json!({ "quant_method": "fp8" }));
    let text = refusal(model.path(), &args);
    assert_eq!(text, "config.json: `quantization_config` must be missing: these weights are quantised already");
    let model = Folder::copy_of("tiny-dbrx-f32");
    model.edit("config.json", |bytes| *bytes = b"[1]".to_vec());
    assert_eq!(refusal(model.path(), &args), "config.json: not a JSON object");
    let model = Folder::copy_of("tiny-dbrx-f32");
    model.edit("model.safetensors", |bytes| bytes.truncate(bytes.len() - 5));
    assert!(refusal(model.path(), &args).contains("is it truncated?"));
    let model = Folder::copy_of("tiny-dbrx-f32-sharded");
    std::fs::remove_file(model.file("model-00003-of-00006.safetensors")).unwrap();
    assert!(refusal(model.path(), &args).contains("shard not found"));
    assert_eq!(refusal(Folder::new().path(), &args), "config.json: not found");
}

#[test]
fn nothing_to_quantise() {
    let shapes = dropless_kit::goldens::root().join("tests/data/shapes/mixtral");
    let text = refusal(&shapes, &["--to", "mxfp4"]);
    let name = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
    assert_eq!(text, format!("nothing to quantise: MXFP4 needs a multiple of 32 inputs, `{name}` has 38"));
    let text = refusal(&checkpoint("llama-tiny"), &["--to", "mxfp4"]);
    assert_eq!(text, "nothing to quantise: the model has no experts; see --only projections");
}

/// A tensor that is no part of the model has the name of one that would be written.
#[test]
fn names_that_would_stand_twice() {
    let model = Folder::copy_of("tiny-dbrx-f32");
    model.edit_header("model.safetensors", |header| {
        let end = header["transformer.wte.weight"]["data_offsets"][1].clone();
        header[format!("{W1}_packed")] = json!({ "dtype": "U8", "shape": [0], "data_offsets": [end, end] });
    });
    let text = refusal(model.path(), &["--to", "int4"]);
    assert_eq!(text, format!("model.safetensors: tensor `{W1}_packed` is one that quantising another one gives"));
}

#[test]
fn command_lines() {
    for args in [&[][..], &["--to", "q4"], &["--to", "fp8", "--only", "attention"], &["--to", "int4", "--threads", "0"]] {
        let ran = try_to(&checkpoint("tiny-dbrx-f32"), Path::new("never"), args);
        assert!(ran.code == 2 && ran.err.starts_with("error: ") && !Path::new("never").exists(), "{}", ran.err);
    }
    let ran = convert(&["--help"]);
    assert!(ran.code == 0 && ran.out.contains("--only <experts|projections>"), "{}", ran.out);
}
