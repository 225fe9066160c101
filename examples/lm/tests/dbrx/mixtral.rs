//! Mixtral, whose files hold a tensor for each matrix of each expert: against its references, on every
//! device, in every type and in any number of files; and what it refuses.

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::fixture::{Folder, Ran, checkpoint, refused, run};
use crate::results::{agree, dump, dump_of};
use crate::rounded::{NARROW, rewritten};

const TINY: &str = "mixtral-tiny";
const MODEL: &str = "model.safetensors";
const PROMPT: [u32; 7] = [5, 99, 3, 127, 0, 17, 17];

/// The example's own comparison with the references in f64, both files of it.
#[track_caller]
fn references_hold(run: impl Fn(&[&str]) -> Ran) {
    let folder = checkpoint(TINY);
    for (reference, results) in [("goldens.safetensors", 38), ("decode.safetensors", 6)] {
        let file = folder.join(reference);
        let ran = run(&["--model", folder.to_str().unwrap(), "--check", file.to_str().unwrap()]);
        let agrees = ran.out.contains(&format!("  agrees: {results} results within their limits"));
        assert!(ran.code == 0 && agrees, "{}{}", ran.out, ran.err);
    }
}

/// Every intermediate result of every prompt, and a generation of sixteen tokens.
#[test]
fn references_hold_on_the_cpu() {
    references_hold(|args| run(args));
}

/// The router takes the experts of the reference and no others: with any other number of them, nothing
/// agrees.
#[test]
fn references_differ_for_another_model() {
    let file = checkpoint(TINY).join("goldens.safetensors");
    for (field, value) in [("rms_norm_eps", json!(1e-3)), ("rope_theta", json!(10_000.0))] {
        let folder = Folder::copy_of(TINY);
        folder.edit_json("config.json", |config| config[field] = value);
        let ran = run(&["--model", folder.path().to_str().unwrap(), "--check", file.to_str().unwrap()]);
        assert_eq!(ran.code, 1, "{field}: {}", ran.out);
    }
    let folder = Folder::copy_of(TINY);
    folder.edit_json("config.json", |config| config["num_experts_per_tok"] = json!(3));
    let ran = run(&["--model", folder.path().to_str().unwrap(), "--check", file.to_str().unwrap()]);
    let want = "tensor `p0.L0.router_weights` is [5, 2], this model gives [5, 3]";
    assert!(ran.code == 2 && ran.err.contains(want), "{}", ran.err);
}

mod devices {
    use dropless_kit::device;

    use super::*;
    use crate::fixture::run_on;
    use crate::results::{agree_within, dump_by};

    #[test]
    fn references_hold_on_a_gpu() {
        if !device::hardware_only() {
            let (driver, stream) = device::emulated();
            references_hold(|args| run_on(stream.device(), args));
            assert!(driver.reports().is_empty());
        }
        if let Some(stream) = device::hardware() {
            references_hold(|args| run_on(stream.device(), args));
        }
    }

    /// Every intermediate result of one layer, in every schedule.
    #[test]
    fn a_layer_agrees_with_the_cpu() {
        let args = ["--layers", "1", "--generate", "2", "--dump-layers"];
        let want = dump(TINY, &PROMPT[..3], &args);
        device::each_schedule(|stream| {
            agree(&dump_by(|args| run_on(stream.device(), args), TINY, &PROMPT[..3], &args), &want);
        });
    }

    /// The tensor-core kernels round where the CPU does, and add in another order: as if every element were
    /// its neighbour in bf16.
    #[test]
    fn bf16_agrees_with_the_cpu() {
        let [model, _] = NARROW[0].checkpoints(TINY, |_| false);
        let args = ["--layers", "1", "--generate", "2", "--dump-layers", "--activations", "bf16"];
        let want = dump_of(|args| run(args), model.path(), &PROMPT, &args);
        device::each_gpu(|stream| {
            let got = dump_of(|args| run_on(stream.device(), args), model.path(), &PROMPT, &args);
            agree_within(1.0 / 256.0, &got, &want);
        });
    }
}

/// Weights of 16 bits are what they say, so that the same numbers in f32 give the same results.
#[test]
fn weights_of_any_type() {
    let args = ["--generate", "3", "--dump-layers"];
    for [narrow, wide] in NARROW.map(|narrow| narrow.checkpoints(TINY, |_| false)) {
        let of = |folder: &Folder| dump_of(|args| run(args), folder.path(), &PROMPT, &args);
        agree(&of(&narrow), &of(&wide));
    }
}

/// Experts that are spread over files, and any number of threads, change no bit; nor does the way a prompt is
/// cut or what runs beside it, within f32.
#[test]
fn the_same_in_every_arrangement() {
    let args = ["--generate", "4", "--dump-layers"];
    let whole = dump(TINY, &PROMPT, &args);
    let folder = Folder::copy_of(TINY);
    std::fs::remove_file(folder.file(MODEL)).unwrap();
    // In the order of their names the tensors go to the shards in turn, so that each shard has a part of
    // every expert.
    let names: Vec<String> = names();
    let shard = |name: &str| names.iter().position(|other| other == name).unwrap() % 3;
    let file = |shard: usize| format!("model-{}-of-3.safetensors", shard + 1);
    for number in 0..3 {
        let kept = rewritten(TINY, |name, bytes| (shard(name) == number).then(|| (Dtype::F32, bytes.to_vec())));
        std::fs::write(folder.file(&file(number)), kept).unwrap();
    }
    let place = |name: &String| (name.clone(), file(shard(name)).into());
    let index = json!({ "weight_map": names.iter().map(place).collect::<serde_json::Map<_, _>>() });
    std::fs::write(folder.file("model.safetensors.index.json"), index.to_string()).unwrap();
    assert!(dump_of(|args| run(args), folder.path(), &PROMPT, &args) == whole, "shards give other bits");

    assert!(dump(TINY, &PROMPT, &[&args[..], &["--threads", "3"]].concat()) == whole, "threads give other bits");
    for arrangement in [&["--chunk", "3"][..], &["--batch", "3", "--chunk", "5"]] {
        agree(&dump(TINY, &PROMPT, &[&args[..], arrangement].concat()), &whole);
    }
}

/// All tensors, in the order of their names.
fn names() -> Vec<String> {
    let whole = std::fs::read(checkpoint(TINY).join(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let mut names: Vec<String> = tensors.names().into_iter().map(str::to_owned).collect();
    names.sort_unstable();
    names
}

/// The report names the family, and counts what one token uses.
#[test]
fn a_run_says_what_it_runs() {
    let ran = Folder::copy_of(TINY).run();
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.starts_with("Mixtral  "), "{}", ran.out);
    for part in [
        "  experts    2 of 8 x 56 x 64, 8 x 64 x 56       2       172 k  43.0 k   672 KiB\n",
        "  all                                                    214 k  85.3 k   837 KiB\n",
        "4 heads over 2 KV heads of 16, no clip, rope theta 1000000\n",
        "8 of width 56, 2 for each token, weights that add up to 1\n",
    ] {
        assert!(ran.out.contains(part), "`{part}` is not in\n{}", ran.out);
    }
}

/// A configuration as newer releases save it describes the same model; so does one whose defaults are left
/// out.
#[test]
fn all_layouts_of_config_are_read() {
    let described = |edit: &dyn Fn(&Folder)| {
        let folder = Folder::copy_of(TINY);
        edit(&folder);
        let ran = folder.run();
        assert_eq!(ran.code, 0, "{}", ran.err);
        let described = |line: &&str| line.starts_with("  attention ") || line.starts_with("  experts ");
        ran.out.lines().filter(described).collect::<Vec<_>>().join("\n")
    };
    let plain = described(&|_| ());
    let newer = described(&|folder| std::fs::rename(folder.file("config.hf5.json"), folder.file("config.json")).unwrap());
    let short = described(&|folder| {
        folder.edit_json("config.json", |config| {
            for name in ["architectures", "rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "sliding_window"] {
                drop(config.as_object_mut().unwrap().remove(name));
            }
            config["head_dim"] = json!(16);
        });
    });
    assert_eq!((&newer, &short), (&plain, &plain));
}

/// Random weights run in every pair of types, the same numbers whatever the number of threads.
#[test]
fn random_weights_run() {
    let config = checkpoint(TINY).join("config.json");
    for weights in ["f32", "bf16"] {
        let shown = |threads: &str| {
            let source = ["--random", config.to_str().unwrap(), "--weights", weights];
            let ran = run(&[&source[..], &["--random-tokens", "9", "--generate", "4", "--threads", threads]].concat());
            assert_eq!(ran.code, 0, "{}", ran.err);
            let (_, tokens) = ran.out.split_once("Tokens per expert, 9 tokens").expect(&ran.out);
            tokens.split("Figures").next().unwrap().to_owned()
        };
        assert_eq!(shown("1"), shown("3"));
    }
}

/// The refusal after an edit of config.json.
#[track_caller]
fn config(edit: impl FnOnce(&mut Value)) -> String {
    let folder = Folder::copy_of(TINY);
    folder.edit_json("config.json", edit);
    folder.refused()
}

#[test]
fn families_that_are_not_known() {
    let text = config(|config| config["architectures"] = json!(["MambaForCausalLM"]));
    let known = text.strip_prefix("config.json: `architectures` must be one of ").expect(&text);
    let known = known.strip_suffix(", got \"MambaForCausalLM\"").expect(&text);
    assert!(["DbrxForCausalLM", "MixtralForCausalLM"].iter().all(|name| known.split(", ").any(|one| one == *name)), "{text}");
    for value in [json!("mamba"), json!(["mixtral"])] {
        let text = config(|config| (config["architectures"], config["model_type"]) = (Value::Null, value.clone()));
        let ends = text.ends_with(&format!(", got {value}"));
        assert!(ends && text.starts_with("config.json: `model_type` must be one of dbrx, "), "{text}");
    }
    let text = config(|config| {
        for name in ["architectures", "model_type"] {
            drop(config.as_object_mut().unwrap().remove(name));
        }
    });
    assert!(text.starts_with("config.json: `model_type` is missing, must be one of dbrx, "), "{text}");
    // One name of each family.
    let text = config(|config| config["model_type"] = json!("dbrx"));
    assert_eq!(text, "config.json: `model_type` must be \"mixtral\", got \"dbrx\"");
    let text = config(|config| config["architectures"] = json!(["DbrxForCausalLM"]));
    assert_eq!(text, "config.json: `model_type` must be \"dbrx\", got \"mixtral\"");
}

#[test]
fn config_of_another_model() {
    let text = config(|config| config["hidden_act"] = json!("gelu"));
    assert_eq!(text, "config.json: `hidden_act` must be \"silu\", got \"gelu\"");
    let text = config(|config| config["quantization_config"] = json!({"quant_method": "awq"}));
    assert_eq!(text, "config.json: `quantization_config.bits` is missing");
    let text = config(|config| config["rope_parameters"] = json!({ "rope_type": "dynamic" }));
    let known = "default, linear, llama3, yarn, longrope";
    assert_eq!(text, format!("config.json: `rope_parameters.rope_type` must be one of {known}, got \"dynamic\""));
}

#[test]
fn config_fields_missing_or_out_of_range() {
    for name in [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "vocab_size",
    ] {
        let text = config(|config| drop(config.as_object_mut().unwrap().remove(name)));
        assert_eq!(text, format!("config.json: `{name}` is missing"));
    }
    for (name, value, want) in [
        ("num_attention_heads", json!(5), "`num_key_value_heads` must divide num_attention_heads = 5, got 2"),
        ("num_attention_heads", json!(6), "`num_attention_heads` must divide hidden_size = 64, got 6"),
        ("num_key_value_heads", json!(3), "`num_key_value_heads` must divide num_attention_heads = 4, got 3"),
        ("head_dim", json!(7), "`head_dim` must give heads of even size, got 7"),
        ("num_experts_per_tok", json!(9), "`num_experts_per_tok` must be <= num_local_experts = 8, got 9"),
        ("num_local_experts", json!(0.5), "`num_local_experts` must be a whole number from 1 to 1024, got 0.5"),
        ("rms_norm_eps", json!(-1), "`rms_norm_eps` must be a positive number, got -1"),
        ("rope_theta", json!("1e6"), "`rope_theta` must be a positive number, got \"1e6\""),
    ] {
        assert_eq!(config(|config| config[name] = value), format!("config.json: {want}"));
    }
}

#[test]
fn tensors_missing_or_of_the_wrong_kind() {
    let w2 = "model.layers.1.block_sparse_moe.experts.7.w2.weight";
    let header = |edit: &dyn Fn(&mut Value)| {
        let folder = Folder::copy_of(TINY);
        folder.edit_header(MODEL, edit);
        folder.refused()
    };
    let text = header(&|header| {
        let expert = header.as_object_mut().unwrap().remove(w2).unwrap();
        header["model.layers.1.block_sparse_moe.experts.8.w2.weight"] = expert;
    });
    assert_eq!(text, format!("{MODEL}: tensor `{w2}` is missing"));
    // The order of DBRX's `w2`.
    let text = header(&|header| header[w2]["shape"] = json!([56, 64]));
    assert_eq!(text, format!("{MODEL}: tensor `{w2}` must be [64, 56] by config.json, got [56, 64]"));
    let text = header(&|header| (header[w2]["dtype"], header[w2]["shape"]) = (json!("BF16"), json!([64, 112])));
    assert_eq!(text, format!("{MODEL}: tensor `{w2}` must be [64, 56] by config.json, got [64, 112]"));
    let text = config(|config| config["num_local_experts"] = json!(9));
    let missing = "model.layers.0.block_sparse_moe.gate.weight";
    assert_eq!(text, format!("{MODEL}: tensor `{missing}` must be [9, 64] by config.json, got [8, 64]"));
}

#[test]
fn positions_beyond_the_model() {
    let folder = checkpoint(TINY);
    let args = ["--model", folder.to_str().unwrap(), "--random-tokens", "129", "--generate", "0"];
    let text = refused(&run(&args));
    assert!(text.ends_with(" take 129 positions, the model has max_position_embeddings = 128"), "{text}");
}
