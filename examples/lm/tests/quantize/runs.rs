//! What was written runs: a quantised checkpoint gives the logits of the same model with the values that its
//! bytes stand for.

use std::path::Path;

use dropless_kit::goldens::root;
use dropless_lm::target::Target;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::converted;
use crate::fixture::{Folder, Ran, checkpoint, run};
use crate::results::{config, matrices, read_again, tensors};

/// A checkpoint of floats with the values of a quantised one, in the shapes and the order of the first.
fn restored(model: &Path, out: &Path, num_experts: usize, target: Target) -> Folder {
    let folder = Folder::new();
    std::fs::copy(model.join("config.json"), folder.file("config.json")).unwrap();
    let (before, mut after) = (tensors(model), tensors(out));
    let mut all: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in &before {
        if after.get(name).is_some_and(|kept| kept == tensor) {
            all.push((name.clone(), tensor.shape.clone(), tensor.floats().into_iter().flat_map(f32::to_le_bytes).collect()));
            continue;
        }
        let (shape, _) = matrices(name, tensor, num_experts, false).unwrap();
        let (values, _) = read_again(target, name, &shape, &mut after);
        let &[.., n, k] = shape.as_slice() else { panic!("{shape:?}") };
        let is_turned = *tensor.shape.last().unwrap() == n && (name.ends_with("w2") || name.contains("_proj") && shape.len() == 3);
        let values: Vec<f32> = match is_turned {
            false => values,
            true => {
                values.chunks(n * k).flat_map(|expert| (0..k).flat_map(move |col| (0..n).map(move |row| expert[row * k + col]))).collect()
            }
        };
        all.push((name.clone(), tensor.shape.clone(), values.into_iter().flat_map(f32::to_le_bytes).collect()));
    }
    let views = all.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(folder.file("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

/// The logits of a prompt.
fn logits(model: &Path, args: &[&str]) -> Vec<f32> {
    logits_by(|args| run(args), model, args)
}

fn logits_by(run: impl FnOnce(&[&str]) -> Ran, model: &Path, args: &[&str]) -> Vec<f32> {
    let folder = Folder::new();
    let file = folder.file("logits.safetensors");
    let prompt = "1,2,3,20,24,17,9,10,5,6,7,8";
    let fixed = ["--model", model.to_str().unwrap(), "--tokens", prompt, "--generate", "0", "--dump", file.to_str().unwrap()];
    let ran = run(&[&fixed[..], args].concat());
    assert!(ran.code == 0, "{}{}", ran.out, ran.err);
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.tensor("logits").unwrap().data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The largest difference over the largest logit.
fn off(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    got.iter().zip(want).fold(0.0f32, |most, (got, want)| most.max((got - want).abs())) / largest
}

#[track_caller]
fn runs(model: &Path, name: &str) {
    let fields = config(model);
    let fields = [&fields, &fields["ffn_config"]];
    let names = ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"];
    let number = fields.iter().find_map(|fields| names.iter().find_map(|name| fields[*name].as_u64())).unwrap_or(1);
    for target in Target::ALL {
        for only in ["experts", "projections"] {
            let folder = Folder::new();
            let out = folder.file("out");
            let args = ["--to", target.name(), "--only", only];
            let ran = crate::convert(&[&["--model", model.to_str().unwrap(), "--out", out.to_str().unwrap()], &args[..]].concat());
            if ran.err.contains("nothing to quantise") {
                assert!(target == Target::Mxfp4 || only == "experts", "{name} in {}, {only}", target.name());
                continue;
            }
            assert!(ran.code == 0, "{name}: {}", ran.err);
            let want = logits(restored(model, &out, number as usize, target).path(), &[]);
            let exact = off(&logits(&out, &["--exact-activations"]), &want);
            assert!(exact < 3e-5, "{name} in {}, {only}: {exact:e}", target.name());
            // Inputs of 8 bits may choose other experts in models as small and as random as these.
            assert!(logits(&out, &[]).iter().all(|logit| logit.is_finite()), "{name} in {}, {only}", target.name());
        }
    }
}

#[test]
fn quantised_checkpoints_give_the_logits_of_their_values() {
    for name in ["tiny-dbrx-f32", "mixtral-tiny", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama-tiny"] {
        runs(&checkpoint(name), name);
    }
}

/// Of sizes that no published model has; experts of DBRX in shards.
#[test]
fn odd_shapes_and_shards_run() {
    for name in ["granitemoe", "mixtral", "gpt_oss", "olmoe"] {
        runs(&root().join("tests/data/shapes").join(name), name);
    }
    let folder = Folder::new();
    let (whole, shards) = (folder.file("whole"), folder.file("shards"));
    converted(&checkpoint("tiny-dbrx-f32"), &whole, &["--to", "int4"]);
    converted(&checkpoint("tiny-dbrx-f32-sharded"), &shards, &["--to", "int4"]);
    assert_eq!(logits(&whole, &[]), logits(&shards, &[]));
}

/// DBRX whose experts are INT4, on an emulated GPU with bf16 activations: repacked there, and within the
/// limit that the example has for logits in 16 bits. All experts serve each token, so that no rounding chooses
/// others.
#[test]
fn int4_is_repacked_on_a_gpu() {
    use dropless_kit::compare::relative_l2;

    let (model, folder) = (Folder::copy_of("tiny-dbrx-f32"), Folder::new());
    model.edit_json("config.json", |config| config["ffn_config"]["moe_top_k"] = 16.into());
    let out = folder.file("out");
    converted(model.path(), &out, &["--to", "int4", "--only", "experts"]);
    let (driver, stream) = dropless_kit::device::emulated();
    let on_gpu = |args: &[&str]| crate::fixture::run_on(stream.device(), args);
    let got = logits_by(on_gpu, &out, &["--activations", "bf16", "--layers", "1"]);
    let want = logits(&out, &["--exact-activations", "--layers", "1"]);
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|value| f64::from(*value)).collect() };
    let error = relative_l2(&wide(&got), &wide(&want));
    assert!(error <= 0.03, "{error:e}");
    let entries: Vec<String> = driver.launches().into_iter().map(|(entry, _)| entry).collect();
    assert_eq!(entries.iter().filter(|entry| entry.as_str() == "repack_int4").count(), 3, "w1, v1 and w2: {entries:?}");
    assert!(entries.iter().any(|entry| entry.starts_with("grouped_gemm_glu_nt_bf16_int4_few")), "{entries:?}");
    assert_eq!(driver.reports(), [""; 0]);
}
