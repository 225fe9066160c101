//! Bad input: exit code 2, a sentence that names file, tensor, field, wanted and got; nothing written, no panic.

use dropless_kit::fill::Random;
use serde_json::{Value, json};

use crate::fixture::{Folder, checkpoint, refused, run, with_header};

const TINY: &str = "tiny-dbrx-f32";
const SHARDED: &str = "tiny-dbrx-f32-sharded";
const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Refusals of runs of the whole tiny checkpoint.
#[track_caller]
fn refusal_of(args: &[&str]) -> String {
    let folder = checkpoint(TINY);
    let text = refused(&run(&[&["--model", folder.to_str().expect("text")], args].concat()));
    text.replace(&format!("{}/", folder.display()), "")
}

/// The refusal after an edit of config.json.
#[track_caller]
fn config(edit: impl FnOnce(&mut Value)) -> String {
    let folder = Folder::copy_of(TINY);
    folder.edit_json("config.json", edit);
    folder.refused()
}

/// The refusal after an edit of the header of model.safetensors.
#[track_caller]
fn header(edit: impl FnOnce(&mut Value)) -> String {
    let folder = Folder::copy_of(TINY);
    folder.edit_header(MODEL, edit);
    folder.refused()
}

const NORM: &str = "transformer.norm_f.weight";
const EMBEDDING: &str = "transformer.wte.weight";
const ROUTER: &str = "transformer.blocks.1.ffn.router.layer.weight";

#[test]
fn config_missing_or_malformed() {
    let folder = Folder::copy_of(TINY);
    std::fs::remove_file(folder.file("config.json")).unwrap();
    assert_eq!(folder.refused(), "config.json: not found");
    for (text, want) in [
        ("", "config.json: not a JSON object: EOF while parsing a value at line 1 column 0"),
        ("[1, 2]", "config.json: not a JSON object: invalid type: sequence, expected an object at line 1 column 0"),
        ("{\"d_model\": 64", "config.json: not a JSON object: EOF while parsing an object at line 1 column 14"),
        ("{\"d_model\": 64, \"d_model\": 65}", "config.json: not a JSON object: `d_model` stands twice at line 1 column 30"),
    ] {
        std::fs::write(folder.file("config.json"), text).unwrap();
        assert_eq!(folder.refused(), want);
    }
    std::fs::write(folder.file("config.json"), [0xff, 0xfe]).unwrap();
    assert_eq!(folder.refused(), "config.json: stream did not contain valid UTF-8");
    assert_eq!(run(&["--model", "/nowhere", "--tokens", "1"]).err, "refused: /nowhere/config.json: not found\n");
}

#[test]
fn config_fields_missing() {
    for name in ["n_layers", "d_model", "n_heads", "vocab_size"] {
        assert_eq!(config(|config| drop(config.as_object_mut().unwrap().remove(name))), format!("config.json: `{name}` is missing"));
    }
    for name in ["ffn_hidden_size", "moe_num_experts", "moe_top_k"] {
        let text = config(|config| drop(config["ffn_config"].as_object_mut().unwrap().remove(name)));
        assert_eq!(text, format!("config.json: `ffn_config.{name}` is missing"));
    }
    let text = config(|config| config["attn_config"] = Value::Null);
    assert_eq!(text, "config.json: `attn_config.kv_n_heads` is missing");
}

#[test]
fn config_fields_out_of_range() {
    let ffn = |name: &str, value: Value| config(|config| config["ffn_config"][name] = value);
    let attention = |name: &str, value: Value| config(|config| config["attn_config"][name] = value);
    let top = |name: &str, value: Value| config(|config| config[name] = value);

    assert_eq!(ffn("moe_top_k", json!(17)), "config.json: `ffn_config.moe_top_k` must be <= moe_num_experts = 16, got 17");
    assert_eq!(ffn("moe_top_k", json!(0)), "config.json: `ffn_config.moe_top_k` must be a whole number from 1 to 2147483647, got 0");
    assert_eq!(
        ffn("moe_num_experts", json!(1025)),
        "config.json: `ffn_config.moe_num_experts` must be a whole number from 1 to 1024, got 1025"
    );
    assert_eq!(
        ffn("ffn_hidden_size", json!(-1)),
        "config.json: `ffn_config.ffn_hidden_size` must be a whole number from 1 to 2147483647, got -1"
    );
    for (value, got) in [(json!(0), "0"), (json!(-2.5), "-2.5"), (json!("one"), "\"one\""), (json!(1e300), "1e+300")] {
        let want = format!("config.json: `ffn_config.moe_normalize_expert_weights` must be a positive number, got {got}");
        assert_eq!(ffn("moe_normalize_expert_weights", value), want);
    }

    assert_eq!(attention("kv_n_heads", json!(3)), "config.json: `attn_config.kv_n_heads` must divide n_heads = 4, got 3");
    assert_eq!(attention("kv_n_heads", json!(8)), "config.json: `attn_config.kv_n_heads` must divide n_heads = 4, got 8");
    assert_eq!(attention("clip_qkv", json!(-8)), "config.json: `attn_config.clip_qkv` must be a positive number, got -8");
    assert_eq!(attention("rope_theta", json!(0)), "config.json: `attn_config.rope_theta` must be a positive number, got 0");

    assert_eq!(top("n_heads", json!(5)), "config.json: `n_heads` must divide d_model = 64, got 5");
    assert_eq!(top("n_heads", json!(64)), "config.json: `n_heads` must give heads of even size, got d_model / n_heads = 1");
    assert_eq!(top("n_layers", json!("two")), "config.json: `n_layers` must be a whole number from 1 to 2147483647, got \"two\"");
    assert_eq!(top("d_model", json!(6.5)), "config.json: `d_model` must be a whole number from 1 to 2147483647, got 6.5");
    assert_eq!(top("attn_config", json!([8])), "config.json: `attn_config` must be an object, got [8]");
    assert_eq!(top("model_type", json!("mixtral")), "config.json: `model_type` must be \"dbrx\", got \"mixtral\"");
    assert_eq!(top("tie_word_embeddings", json!(true)), "config.json: `tie_word_embeddings` must be false, got true");
    let long = top("vocab_size", json!("x".repeat(1000)));
    assert!(long.len() < 220 && long.contains("x...x"), "{long}");

    let huge = config(|config| {
        (config["d_model"], config["n_heads"], config["ffn_config"]["ffn_hidden_size"]) = (json!(1 << 30), json!(1 << 10), json!(1 << 30));
        config["attn_config"]["kv_n_heads"] = json!(1 << 10);
    });
    assert_eq!(huge, "config.json: the model's parameters are more than 2^60, which no machine holds");
    let wide = config(|config| {
        (config["d_model"], config["n_heads"], config["attn_config"]["kv_n_heads"]) = (json!(2_147_483_646), json!(1), json!(1));
    });
    assert_eq!(wide, "config.json: head_layout: columns is 6442450938, must be <= 4294967295");
}

/// Fields that would make it another model than the one that is computed.
#[test]
fn config_of_another_model() {
    let refused = |section: &str, name: &str, value: Value, want: &str| {
        let text = config(|config| if section.is_empty() { config[name] = value.clone() } else { config[section][name] = value.clone() });
        let dot = if section.is_empty() { "" } else { "." };
        assert_eq!(text, format!("config.json: `{section}{dot}{name}` must be {want}, got {value}"));
    };
    let others = [json!("gelu"), json!(["gelu"]), json!({}), json!({"name": "gelu"}), json!({"name": "silu", "beta": 2}), json!(0)];
    for value in others {
        refused("ffn_config", "ffn_act_fn", value, "{\"name\":\"silu\"}");
    }
    for value in [json!(true), json!(1), json!("true"), json!("false"), json!([0])] {
        refused("", "tie_word_embeddings", value, "false");
    }
    for section in ["", "attn_config"] {
        refused(section, "rope_scaling", json!({"type": "linear", "factor": 2}), "null");
        for value in [json!("alibi"), json!("multiquery_attention"), json!({})] {
            refused(section, "attn_type", value, "\"grouped_query_attention\"");
        }
    }
    let text = config(|config| config["quantization_config"] = json!({"quant_method": "fp8"}));
    assert_eq!(text, "config.json: `quantization_config.weight_block_size` is missing");
    for name in ["rope_type", "type"] {
        let text = config(|config| config["rope_parameters"] = json!({ name: "yarn" }));
        assert_eq!(text, format!("config.json: `rope_parameters.{name}` must be \"default\", got \"yarn\""));
    }
}

/// What the same fields hold in files of this model, or may hold.
#[test]
fn config_of_this_model() {
    let folder = Folder::copy_of(TINY);
    folder.edit_json("config.json", |config| {
        config["ffn_config"]["ffn_act_fn"] = json!({"name": "silu"});
        config["attn_config"]["attn_type"] = json!("grouped_query_attention");
        config["attn_config"]["attn_pdrop"] = json!(0.0);
        config["rope_parameters"] = json!({"rope_theta": 500000.0, "rope_type": "default"});
        config["num_key_value_heads"] = json!(8); // stale in one public file
        config["auto_map"] = json!({"AutoConfig": "configuration_dbrx.DbrxConfig"});
        config["router_aux_loss_coef"] = json!(0.05);
        for name in ["rope_scaling", "quantization_config", "attn_type", "tie_word_embeddings"] {
            config[name] = Value::Null;
        }
    });
    assert_eq!(folder.run().code, 0);
    folder.edit_json("config.json", |config| config["ffn_config"]["ffn_act_fn"] = Value::Null);
    assert_eq!(folder.run().code, 0);
}

#[test]
fn keys_that_stand_twice_below_the_top() {
    let folder = Folder::copy_of(TINY);
    folder.edit("config.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("\"moe_top_k\": 4", "\"moe_top_k\": 4, \"moe_top_k\": 2").into_bytes();
    });
    assert!(folder.refused().starts_with("config.json: not a JSON object: `moe_top_k` stands twice at line "));
    let folder = Folder::copy_of(SHARDED);
    folder.edit(INDEX, |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let entry = "\"lm_head.weight\": \"model-00002-of-00006.safetensors\", ";
        *bytes = text.replace("\"weight_map\": {", &format!("\"weight_map\": {{{entry}")).into_bytes();
    });
    assert!(folder.refused().starts_with(&format!("{INDEX}: not a JSON object: `lm_head.weight` stands twice at line ")));
}

#[test]
fn positions_beyond_the_model() {
    let ids = |count: usize| vec!["1"; count].join(",");
    let text = refusal_of(&["--tokens", &ids(129), "--generate", "0"]);
    assert_eq!(text, "a prompt of 129 tokens and 0 generated ones take 129 positions, the model has max_seq_len = 128");
    let text = refusal_of(&["--tokens", "1,2", "--generate", "128"]);
    assert_eq!(text, "a prompt of 2 tokens and 128 generated ones take 129 positions, the model has max_seq_len = 128");
    let text = refusal_of(&["--random-tokens", "1000000", "--generate", "1"]);
    assert_eq!(text, "a prompt of 1000000 tokens and 1 generated ones take 1000000 positions, the model has max_seq_len = 128");
    let folder = checkpoint(TINY);
    let ran = run(&["--model", folder.to_str().unwrap(), "--tokens", "1,2", "--generate", "127"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
}

/// Something else where a text is read: a pipe that nobody writes to, or bytes without an end.
#[cfg(unix)]
#[test]
fn texts_that_are_no_file_or_have_no_end() {
    let pipe_at = |file: &std::path::Path| {
        let made = std::process::Command::new("mkfifo").arg(file).status();
        assert!(made.expect("mkfifo").success());
    };
    for (model, name) in [(TINY, "config.json"), (SHARDED, INDEX)] {
        let folder = Folder::copy_of(model);
        let file = folder.file(name);
        std::fs::remove_file(&file).unwrap();
        pipe_at(&file);
        assert_eq!(folder.refused(), format!("{name}: is a device or a pipe, not a file"));
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert_eq!(folder.refused(), format!("{name}: is a device or a pipe, not a file"));
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(folder.refused(), format!("{name}: is a directory"));
    }
    let folder = Folder::copy_of(TINY);
    std::fs::write(folder.file("config.json"), " ".repeat(1_000_001)).unwrap();
    assert_eq!(folder.refused(), "config.json: must have at most 1000000 bytes, and has more");

    let text = refusal_of(&["--tokens-file", "/dev/zero"]);
    assert_eq!(text, "/dev/zero: must have at most 100000000 bytes, and has more");
    let pipe = folder.file("pipe");
    pipe_at(&pipe);
    std::thread::scope(|scope| {
        scope.spawn(|| std::fs::write(&pipe, "1 2\n300").unwrap());
        let text = refusal_of(&["--tokens-file", pipe.to_str().unwrap()]);
        assert_eq!(text, "token 2 of the prompt is 300, must be < vocab_size = 256");
    });
}

/// Names and words of files reach the terminal, so they must neither command nor flood it.
#[test]
fn texts_of_files_are_printable_and_short() {
    let commands = "\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}5A\u{202e}";
    let shown = "\\u{1b}[2J\\u{1b}]0;title\\u{7}\\u{9b}5A\\u{202e}";
    let tame = |text: &str| {
        assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}') && text.len() < 700, "{} bytes: {text:?}", text.len());
        text.to_owned()
    };
    let moved = |name: &str| {
        tame(&header(|header| {
            let norm = header.as_object_mut().unwrap().remove(NORM).unwrap();
            header[name] = norm;
            header[name]["data_offsets"] = json!([0, 3]);
        }))
    };
    assert!(moved(commands).contains(&format!("tensor `{shown}`: `data_offsets` must span 256 bytes")));
    let long = moved(&"n".repeat(2_000_000));
    assert!(long.contains("n...n") && long.contains("n`: `data_offsets` must span"), "{long}");
    for (field, value) in [
        ("dtype", json!("d".repeat(1_000_000))),
        ("dtype", json!(commands)),
        ("shape", json!(vec![1; 300_000])),
        ("shape", json!(vec![u64::MAX; 300_000])),
    ] {
        tame(&header(|header| header[ROUTER][field] = value));
    }
    tame(&header(|header| header[ROUTER] = json!("v".repeat(1_000_000))));
    tame(&config(|config| config["n_layers"] = json!(commands)));
    tame(&config(|config| config["model_type"] = json!("m".repeat(100_000))));
    let index = |edit: &dyn Fn(&mut Value)| {
        let folder = Folder::copy_of(SHARDED);
        folder.edit_json(INDEX, edit);
        tame(&folder.refused())
    };
    let text = index(&|index| index["weight_map"][commands] = json!("../x"));
    assert_eq!(text, format!("{INDEX}: `weight_map.{shown}` must lie in the checkpoint's folder, got \"../x\""));
    let text = index(&|index| index["weight_map"]["lm_head.weight"] = json!(commands));
    assert_eq!(text, format!("{shown}: shard not found; {INDEX} expects `lm_head.weight` in it"));
    index(&|index| index["weight_map"]["w".repeat(1_000_000)] = json!("x".repeat(300)));
    index(&|index| index["weight_map"]["lm_head.weight"] = json!("x".repeat(1_000_000)));

    let folder = Folder::new();
    let file = folder.file("ids").display().to_string();
    for word in [commands.to_owned(), "7".repeat(5_000_000)] {
        std::fs::write(&file, word).unwrap();
        tame(&refusal_of(&["--tokens-file", &file]));
    }
    if cfg!(unix) {
        tame(&refused(&run(&["--model", &format!("/nowhere/{commands}"), "--tokens", "1"])));
    }
}

#[test]
fn an_index_that_disagrees_with_its_shards() {
    let index = |edit: &dyn Fn(&mut Value)| {
        let folder = Folder::copy_of(SHARDED);
        folder.edit_json(INDEX, |index| edit(&mut index["weight_map"]));
        folder.refused()
    };
    let text = index(&|map| map["ghost"] = json!("model-00001-of-00006.safetensors"));
    assert_eq!(text, format!("{INDEX}: `weight_map.ghost` is model-00001-of-00006.safetensors, which holds no such tensor"));
    let text = index(&|map| drop(map.as_object_mut().unwrap().remove("lm_head.weight")));
    assert_eq!(text, format!("{INDEX}: `weight_map` lacks `lm_head.weight`, which model-00001-of-00006.safetensors holds"));
    let text = index(&|map| map["lm_head.weight"] = json!("model-00002-of-00006.safetensors"));
    let want = "`weight_map.lm_head.weight` is model-00002-of-00006.safetensors, but model-00001-of-00006.safetensors holds that tensor";
    assert_eq!(text, format!("{INDEX}: {want}"));
}

#[test]
fn config_agrees_with_the_tensors() {
    let text = config(|config| config["vocab_size"] = json!(255));
    assert_eq!(text, "model.safetensors: tensor `transformer.wte.weight` must be [255, 64] by config.json, got [256, 64]");
    let text = config(|config| config["n_layers"] = json!(3));
    assert_eq!(text, "model.safetensors: tensor `transformer.blocks.2.norm_attn_norm.norm_1.weight` is missing");
    assert_eq!(refusal_of(&["--tokens", "1", "--layers", "3"]), "--layers is 3, the model has 2");
}

#[test]
fn files_missing() {
    let folder = Folder::copy_of(TINY);
    std::fs::remove_file(folder.file(MODEL)).unwrap();
    assert_eq!(folder.refused(), "DIR: has neither model.safetensors nor model.safetensors.index.json");
    std::fs::create_dir(folder.file(MODEL)).unwrap();
    assert_eq!(folder.refused(), "model.safetensors: is a directory");
}

#[test]
fn shards_missing_or_truncated() {
    let folder = Folder::copy_of(SHARDED);
    let shard = "model-00003-of-00006.safetensors";
    folder.edit(shard, |bytes| bytes.truncate(bytes.len() - 4));
    let text = folder.refused();
    assert_eq!(
        text,
        format!(
            "{shard}: tensor `transformer.blocks.0.norm_attn_norm.norm_2.weight`: ends at byte 446976 of the data, the file holds 446972 (is it truncated?)"
        )
    );
    std::fs::remove_file(folder.file(shard)).unwrap();
    assert_eq!(folder.refused(), format!("{shard}: shard not found; {INDEX} expects `transformer.blocks.0.ffn.experts.mlp.w2` in it"));
}

#[test]
fn index_malformed_or_leading_elsewhere() {
    for path in ["../model-00001-of-00006.safetensors", "/etc/passwd", "a/../../b", "..", "./x"] {
        let folder = Folder::copy_of(SHARDED);
        folder.edit_json(INDEX, |index| index["weight_map"]["lm_head.weight"] = json!(path));
        assert_eq!(folder.refused(), format!("{INDEX}: `weight_map.lm_head.weight` must lie in the checkpoint's folder, got \"{path}\""));
    }
    let folder = Folder::copy_of(SHARDED);
    folder.edit_json(INDEX, |index| index["weight_map"]["lm_head.weight"] = json!(7));
    assert_eq!(folder.refused(), format!("{INDEX}: `weight_map.lm_head.weight` must be a file name, got 7"));
    folder.edit_json(INDEX, |index| index["weight_map"] = json!({}));
    assert_eq!(folder.refused(), format!("{INDEX}: `weight_map` must be an object of tensor and file names"));
    std::fs::write(folder.file(INDEX), "{").unwrap();
    assert_eq!(folder.refused(), format!("{INDEX}: not a JSON object: EOF while parsing an object at line 1 column 1"));
}

#[test]
fn a_tensor_in_two_shards() {
    let folder = Folder::copy_of(SHARDED);
    std::fs::copy(folder.file("model-00001-of-00006.safetensors"), folder.file("model-00007.safetensors")).unwrap();
    folder.edit_json(INDEX, |index| index["weight_map"]["more"] = json!("model-00007.safetensors"));
    assert_eq!(folder.refused(), "model-00007.safetensors: tensor `lm_head.weight` lies in model-00001-of-00006.safetensors as well");
}

#[cfg(unix)]
#[test]
fn weights_that_are_no_file() {
    let folder = Folder::copy_of(TINY);
    std::fs::remove_file(folder.file(MODEL)).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.file(MODEL)).unwrap();
    assert_eq!(folder.refused(), "model.safetensors: is a device or a pipe, not a file");
    std::fs::remove_file(folder.file(MODEL)).unwrap();
    std::fs::create_dir(folder.file(MODEL)).unwrap();
    assert_eq!(folder.refused(), "model.safetensors: is a directory");
}

#[test]
fn header_lengths() {
    let folder = Folder::copy_of(TINY);
    for (bytes, want) in [
        (vec![], "not a safetensors file: it has 0 bytes, the header's length alone takes 8"),
        (vec![1, 0, 0], "not a safetensors file: it has 3 bytes, the header's length alone takes 8"),
        (vec![0xff; 8], "not a safetensors file: the header should have 18446744073709551615 bytes, must be <= 100000000"),
        ([&90u64.to_le_bytes()[..], b"{}"].concat(), "header of 90 bytes does not fit in a file of 10 bytes"),
        ([&2u64.to_le_bytes()[..], &[0xff, 0xff]].concat(), "header is not UTF-8: invalid utf-8 sequence of 1 bytes from index 0"),
        ([&2u64.to_le_bytes()[..], b"{]"].concat(), "header is not valid: key must be a string at line 1 column 2"),
        ([&2u64.to_le_bytes()[..], b"{}", b"1234"].concat(), "the header describes 0 bytes of data, the file holds 4"),
    ] {
        std::fs::write(folder.file(MODEL), bytes).unwrap();
        assert_eq!(folder.refused(), format!("{MODEL}: {want}"));
    }
    let deep = "[".repeat(100_000);
    std::fs::write(folder.file(MODEL), with_header(&format!("{{\"a\":{{\"shape\":{deep}"), &[])).unwrap();
    assert!(folder.refused().starts_with("model.safetensors: header is not valid: recursion limit exceeded"));
}

#[test]
fn offsets_that_overlap_leave_holes_or_run_past_the_end() {
    let at =
        |header: &Value, name: &str| [header[name]["data_offsets"][0].as_u64().unwrap(), header[name]["data_offsets"][1].as_u64().unwrap()];
    // The last two tensors of the file are the final norm and the embedding.
    let text = header(|header| {
        let [begin, end] = at(header, EMBEDDING);
        header[EMBEDDING]["data_offsets"] = json!([begin - 4, end - 4]);
    });
    assert_eq!(
        text,
        "model.safetensors: tensor `transformer.wte.weight`: `data_offsets` overlaps another tensor: must begin at 2532608, got 2532604"
    );
    let text = header(|header| {
        let [begin, end] = at(header, EMBEDDING);
        header[EMBEDDING]["data_offsets"] = json!([begin + 4, end + 4]);
    });
    assert_eq!(
        text,
        "model.safetensors: tensor `transformer.wte.weight`: `data_offsets` leaves a hole: must begin at 2532608, got 2532612"
    );
    let text = header(|header| {
        let [begin, _] = at(header, EMBEDDING);
        (header[EMBEDDING]["data_offsets"], header[EMBEDDING]["shape"]) = (json!([begin, begin + 257 * 64 * 4]), json!([257, 64]));
    });
    assert_eq!(
        text,
        "model.safetensors: tensor `transformer.wte.weight`: ends at byte 2598400 of the data, the file holds 2598144 (is it truncated?)"
    );
    // Offsets so large that a sum with the header's length wraps around the address space.
    let folder = Folder::copy_of(TINY);
    let tensor = |begin: u64, end: u64| json!({"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]});
    let (third, end) = (1u64 << 62, u64::MAX - 7);
    let wrapping =
        json!({"a": tensor(0, third), "b": tensor(third, 2 * third), "c": tensor(2 * third, 3 * third), "d": tensor(3 * third, end)});
    std::fs::write(folder.file(MODEL), with_header(&wrapping.to_string(), &[])).unwrap();
    assert_eq!(folder.refused(), format!("{MODEL}: tensor `d`: ends at byte {end} of the data, the file holds 0 (is it truncated?)"));
}

#[test]
fn tensors_missing_or_of_the_wrong_kind() {
    let text = header(|header| {
        let norm = header.as_object_mut().unwrap().remove(NORM).unwrap();
        header["transformer.norm_g.weight"] = norm;
    });
    assert_eq!(text, "model.safetensors: tensor `transformer.norm_f.weight` is missing");
    let text = header(|header| header[ROUTER]["shape"] = json!([64, 16]));
    assert_eq!(text, format!("model.safetensors: tensor `{ROUTER}` must be [16, 64] by config.json, got [64, 16]"));
    let text = header(|header| header[ROUTER]["dtype"] = json!("I32"));
    assert_eq!(text, format!("model.safetensors: tensor `{ROUTER}` must be F32, BF16 or F16, got I32"));
    let text = header(|header| header[ROUTER]["dtype"] = json!("F6_E2M3"));
    assert_eq!(text, format!("model.safetensors: tensor `{ROUTER}`: `dtype` is F6_E2M3, which is not supported"));
    let text = header(|header| (header[ROUTER]["dtype"], header[ROUTER]["shape"]) = (json!("BF16"), json!([16, 128])));
    assert_eq!(text, format!("model.safetensors: tensor `{ROUTER}` must be [16, 64] by config.json, got [16, 128]"));
    let text = header(|header| header[ROUTER]["shape"] = json!([16, 63]));
    let span = "`data_offsets` must span 4032 bytes for [16, 63] of F32, got [";
    assert!(text.starts_with(&format!("model.safetensors: tensor `{ROUTER}`: {span}")), "{text}");
    let text = header(|header| header[ROUTER]["shape"] = json!([u64::MAX, u64::MAX]));
    assert!(text.ends_with("`shape` [18446744073709551615, 18446744073709551615] of F32 has more than 2^62 bytes"), "{text}");
    for (field, value, want) in [
        ("dtype", json!(4), "`dtype` must be a word"),
        ("shape", json!([16, -64]), "`shape` must be a list of whole numbers"),
        ("shape", json!("16"), "`shape` must be a list of whole numbers"),
        ("data_offsets", json!([0]), "`data_offsets` must be two whole numbers"),
        ("data_offsets", json!([8, 4]), "`data_offsets` must span 4096 bytes for [16, 64] of F32, got [8, 4]"),
    ] {
        assert_eq!(header(|header| header[ROUTER][field] = value), format!("model.safetensors: tensor `{ROUTER}`: {want}"));
    }
    let text = header(|header| header[ROUTER] = json!(3));
    assert!(text.starts_with("model.safetensors: header is not valid: invalid type: integer `3`, expected an object"), "{text}");
}

#[test]
fn tensors_of_two_types() {
    // The final norm as 64 half-precision numbers, the rest of its bytes given to a tensor that nobody asks for.
    let text = header(|header| {
        let [begin, end] = [0, 1].map(|i| header[NORM]["data_offsets"][i].as_u64().unwrap());
        let half = (begin + end) / 2;
        header[NORM] = json!({"dtype": "BF16", "shape": [64], "data_offsets": [begin, half]});
        header["rest"] = json!({"dtype": "BF16", "shape": [64], "data_offsets": [half, end]});
    });
    assert_eq!(text, "model.safetensors: tensor `transformer.norm_f.weight` must be f32 as `transformer.wte.weight` is, got bf16");
}

#[test]
fn names_that_stand_twice() {
    let folder = Folder::copy_of(TINY);
    let tensor = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
    std::fs::write(folder.file(MODEL), with_header(&format!("{{\"a\":{tensor},\"a\":{tensor}}}"), &[0; 4])).unwrap();
    assert_eq!(folder.refused(), "model.safetensors: header is not valid: `a` stands twice at line 1 column 107");
}

#[test]
fn data_at_odd_addresses() {
    let folder = Folder::copy_of(TINY);
    folder.edit(MODEL, |bytes| {
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        bytes.insert(8 + length as usize, b' ');
        bytes[..8].copy_from_slice(&(length + 1).to_le_bytes());
    });
    assert_eq!(folder.refused(), "model.safetensors: tensor `transformer.wte.weight` must begin at a multiple of 4 bytes");
}

#[test]
fn prompts() {
    assert_eq!(refusal_of(&["--tokens", "1,256"]), "token 1 of the prompt is 256, must be < vocab_size = 256");
    assert_eq!(refusal_of(&["--tokens", ""]), "the prompt is empty");
    assert_eq!(refusal_of(&["--tokens", "1,,2"]), "--tokens: `` is not a token id");
    assert_eq!(refusal_of(&["--tokens", "1,two"]), "--tokens: `two` is not a token id");
    assert_eq!(refusal_of(&["--tokens", "4294967296"]), "--tokens: `4294967296` is not a token id");
    assert_eq!(refusal_of(&["--tokens", "1,2,3", "--context", "2"]), "the prompt has 3 tokens, the KV cache holds 2 (--context)");
    assert_eq!(
        refusal_of(&["--tokens", "1,2,3", "--context", "6", "--generate", "5"]),
        "a prompt of 3 tokens and 5 generated ones need a KV cache of 7, it holds 6 (--context)"
    );
    assert_eq!(refusal_of(&[]), "no prompt; give --tokens 1,2,3, --tokens-file FILE, --random-tokens N or --prompt TEXT");

    let folder = Folder::new();
    let file = folder.file("ids").display().to_string();
    assert_eq!(refusal_of(&["--tokens-file", &file]), format!("{file}: not found"));
    for (text, want) in [(" \n", "the prompt is empty".into()), ("1 2\nx", format!("{file}: `x` is not a token id"))] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(refusal_of(&["--tokens-file", &file]), want);
    }
}

#[test]
fn text_without_a_tokenizer() {
    let want = if cfg!(feature = "text") {
        "tokenizer.json: not found; --prompt needs it; or give --tokens 1,2,3"
    } else {
        "--prompt needs the feature `text`: cargo run --release --features text --example dbrx -- ...; or give --tokens 1,2,3"
    };
    assert_eq!(refusal_of(&["--prompt", "Hello"]), want);
    let config = checkpoint(TINY).join("config.json");
    let random = run(&["--random", config.to_str().unwrap(), "--prompt", "Hello"]);
    assert_eq!(refused(&random), "--prompt needs a tokenizer, and random weights have none; give --tokens 1,2,3");
}

#[test]
fn memory_that_is_not_there() {
    let text = refusal_of(&["--tokens", "1", "--memory-limit", "1000"]);
    let (start, rest) = text.split_once(" (KV cache 8.00 KiB, workspace ").expect(&text);
    assert!(start.starts_with("memory: the run needs ") && start.ends_with(" KiB"), "{text}");
    let end = ", logits 1.00 KiB), 1000 B are available; try a smaller --context, --batch or --chunk, or fewer --layers";
    assert!(rest.ends_with(end), "{text}");
    let huge = refusal_of(&["--tokens", "1", "--context", "2000000000", "--batch", "2000000000"]);
    assert_eq!(huge, "memory: the run needs more than 2^63 bytes; try a smaller --context or --batch");

    // Random weights are memory too: those of one real layer do not fit into a gigabyte.
    let folder = Folder::copy_of(TINY);
    folder.edit_json("config.json", |config| {
        (config["d_model"], config["n_heads"], config["vocab_size"]) = (json!(6144), json!(48), json!(100_352));
        (config["attn_config"]["kv_n_heads"], config["ffn_config"]["ffn_hidden_size"]) = (json!(8), json!(10_752));
    });
    let config = folder.file("config.json").display().to_string();
    let limit = (1u64 << 30).to_string();
    let text = refused(&run(&["--random", &config, "--weights", "bf16", "--layers", "1", "--memory-limit", &limit, "--tokens", "1"]));
    assert!(text.contains("(weights 8.37 GiB, KV cache 128 KiB, ") && text.contains("), 1.00 GiB are available; "), "{text}");
}

#[test]
fn options_that_make_no_sense() {
    for args in [
        &["--bogus"][..],
        &["--batch", "0"],
        &["--generate", "-1"],
        &["--threads", "many"],
        &["--threads", "1025"],
        &["--check", "a", "--generate", "2"],
        &["--dump-layers"],
        &["--weights", "f32"],
        &["--device", "tpu"],
        &["--tokens", "1", "--random-tokens", "2"],
        &["--model", "a", "--random", "b"],
    ] {
        let ran = run(args);
        assert_eq!(ran.code, 2, "{args:?}");
        assert!(ran.out.is_empty() && ran.err.starts_with("error: "), "{args:?}: {}", ran.err);
    }
    let help = run(&["--help"]);
    assert_eq!((help.code, help.err.as_str()), (0, ""));
    assert!(help.out.contains("--model <DIR|GGUF>"));
}

#[test]
fn references() {
    let folder = Folder::new();
    let file = folder.file("goldens.safetensors").display().to_string();
    assert_eq!(refusal_of(&["--check", &file]), format!("{file}: not found"));
    std::fs::write(&file, with_header("{}", &[])).unwrap();
    let text = refusal_of(&["--check", &file]);
    assert_eq!(text, format!("{file}: holds no reference results: neither `prompt` nor `p0.input_ids` is there"));
    let prompt = r#"{"p0.input_ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
    std::fs::write(&file, with_header(prompt, &(-1i64).to_le_bytes())).unwrap();
    assert_eq!(refusal_of(&["--check", &file]), format!("{file}: tensor `p0.input_ids` must hold token ids"));
    std::fs::write(&file, with_header(prompt, &300i64.to_le_bytes())).unwrap();
    assert_eq!(refusal_of(&["--check", &file]), "token 0 of the prompt is 300, must be < vocab_size = 256");
}

#[test]
fn a_refused_run_writes_no_dump() {
    let folder = Folder::new();
    let dump = folder.file("dump.safetensors");
    refusal_of(&["--tokens", "1,256", "--dump", dump.to_str().unwrap()]);
    refusal_of(&["--tokens", "1", "--memory-limit", "1000", "--dump", dump.to_str().unwrap()]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn dumps_that_would_replace_something_else() {
    let folder = Folder::copy_of(TINY);
    let ids = folder.file("ids");
    std::fs::write(&ids, "1 2 3").unwrap();
    let dump_to = |name: &str| {
        let (model, file) = (folder.path().display().to_string(), folder.file(name).display().to_string());
        let text = refused(&run(&["--model", &model, "--tokens-file", ids.to_str().unwrap(), "--dump", &file]));
        text.strip_prefix(&file).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    for name in [MODEL, "config.json", "ids", "./ids"] {
        let before = std::fs::read(folder.file(name)).unwrap();
        assert_eq!(dump_to(name), ": cannot be written: the run reads this file");
        assert_eq!(std::fs::read(folder.file(name)).unwrap(), before);
    }
    assert_eq!(dump_to("."), ": cannot be written: is a directory");
    if cfg!(unix) {
        let text = refusal_of(&["--tokens", "1", "--dump", "/dev/null"]);
        assert_eq!(text, "/dev/null: cannot be written: is a device or a pipe, not a file");
    }
}

/// Files with a few damaged bytes are refused, or happen to be valid still; nothing panics.
#[test]
fn damaged_files_never_panic() {
    let (mut random, mut refusals) = (Random::new(71), 0);
    for (file, first, last) in [("config.json", 0, 670), (MODEL, 0, 8), (MODEL, 8, 2000), (INDEX, 0, 1700)] {
        let folder = Folder::copy_of(if file == INDEX { SHARDED } else { TINY });
        let whole = std::fs::read(folder.file(file)).unwrap();
        for _ in 0..100 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random.below(3) {
                let at = first + random.below(last - first);
                bytes[at] = *[b'0', b'9', b'-', b'"', b'{', b']', b',', 0, 0xff, random.bits() as u8].get(random.below(10)).unwrap();
            }
            std::fs::write(folder.file(file), bytes).unwrap();
            let ran = folder.run();
            match ran.code {
                0 => {}
                _ => refusals += refused(&ran).len().min(1),
            }
        }
    }
    assert!(refusals > 200, "only {refusals} of 400 were refused");
}
