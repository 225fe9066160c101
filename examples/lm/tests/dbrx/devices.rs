//! The same model on a GPU: the kernels in the emulator, or on hardware where there is some.

use std::sync::Arc;

use dropless::{Device, Error};
use dropless_kit::device;
use dropless_kit::recorder::{Call, Recorder};
use safetensors::SafeTensors;

use crate::emulated::agrees;
use crate::example::options::Where;
use crate::fixture::{Folder, Ran, checkpoint, run, run_into, run_on};
use crate::results::{agree, checkpoints, dump, dump_by, dump_from, dump_of};

const PROMPT: [u32; 3] = [5, 99, 120];

/// Every intermediate result of one layer, in every schedule.
#[test]
fn a_layer_agrees_with_the_cpu() {
    let args = ["--layers", "1", "--generate", "2", "--dump-layers"];
    let want = dump("tiny-dbrx-f32", &PROMPT, &args);
    device::each_schedule(|stream| agree(&dump_by(|args| run_on(stream.device(), args), "tiny-dbrx-f32", &PROMPT, &args), &want));
}

/// Whole models, with prompts in chunks and several sequences.
#[test]
fn models_agree_with_the_cpu() {
    for (name, args) in [("tiny-dbrx-f32", &["--chunk", "2"][..]), ("tiny-mqa", &["--batch", "2"]), ("tiny-top1of8", &[])] {
        let args = [args, &["--generate", "3", "--dump-layers"]].concat();
        let want = dump(name, &PROMPT, &args);
        if !device::hardware_only() {
            let (driver, stream) = device::emulated();
            agree(&dump_by(|args| run_on(stream.device(), args), name, &PROMPT, &args), &want);
            assert!(driver.reports().is_empty());
        }
        if let Some(stream) = device::hardware() {
            agree(&dump_by(|args| run_on(stream.device(), args), name, &PROMPT, &args), &want);
        }
    }
}

/// Every checkpoint against the references in f64 where there is hardware; `emulated` has it without.
#[test]
fn references_hold_on_a_gpu() {
    let Some(stream) = device::hardware() else { return };
    for (name, references) in checkpoints() {
        for reference in ["goldens.safetensors", "decode.safetensors"] {
            agrees(stream.device(), &name, &checkpoint(&references).join(reference));
        }
    }
}

/// A graph gives the bits of its launches where there is hardware; `emulated` has it without.
#[test]
fn a_graph_on_a_gpu_gives_the_bits_of_its_launches() {
    let Some(stream) = device::hardware() else { return };
    for args in [&["--generate", "16"][..], &["--generate", "16", "--batch", "3", "--chunk", "2"]] {
        let by = |args: &[&str]| dump_by(|args| run_on(stream.device(), args), "tiny-dbrx-f32", &PROMPT, args);
        let (graph, launches) = (by(args), by(&[args, &["--dump-layers"]].concat()));
        assert!(graph.iter().all(|(name, values)| launches[name] == *values), "{args:?}");
    }
}

#[test]
fn a_run_says_where_it_ran() {
    let (_, stream) = device::emulated();
    let model = checkpoint("tiny-dbrx-f32");
    let args = ["--model", model.to_str().unwrap(), "--layers", "1", "--tokens", "1", "--generate", "1", "--json"];
    let Ran { code, out, err } = run_on(stream.device(), &args);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("cuda:0; weights f32 (copied), activations f32;") && out.contains("\"device\": \"cuda:0\""), "{out}");
    // The weights are on the device, too, so they are needed there.
    assert!(out.contains(" needed: weights ") && out.contains(" available"), "{out}");
    // And it is said how fast they came there.
    let upload = out.split_once("  upload        ").and_then(|(_, rest)| rest.lines().next());
    assert!(upload.is_some_and(|upload| upload.starts_with("1.30 MiB in ") && upload.ends_with(" GB/s")), "{out}");
    let json: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    let upload = &json["upload"];
    assert!(upload["bytes"] == 1_364_736 && upload["gb_per_s"].as_f64().unwrap() > 0.0 && json["streamed"].is_null(), "{json}");
}

#[test]
fn what_a_gpu_does_not_serve_is_refused() {
    let (_, stream) = device::emulated();
    let model = checkpoint("tiny-dbrx-f32");
    let text = |args: &[&str]| {
        let ran = run_on(stream.device(), &[&["--model", model.to_str().unwrap(), "--tokens", "1"], args].concat());
        assert_eq!((ran.code, ran.out.as_str()), (2, ""));
        ran.err
    };
    assert_eq!(text(&["--threads", "2"]), "refused: --threads is for the CPU, not for cuda:0\n");
}

#[test]
fn a_missing_gpu_is_refused() {
    if device::hardware().is_some() {
        return;
    }
    let ran = run(&["--device", "cuda:7"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(ran.err.starts_with("refused: no CUDA d"), "{}", ran.err); // driver, or device
    for wrong in ["tpu", "cuda:", "cuda:x", "cuda0", "cpu:1", "emulated:1", "auto:0"] {
        let ran = run(&["--device", wrong]);
        assert!(ran.code == 2 && ran.err.contains("must be cpu, cuda, cuda:N, emulated or auto"), "{}", ran.err);
    }
}

/// The emulator as the device, as the command line names it.
#[test]
fn an_emulated_run_says_so() {
    let args = ["--layers", "1", "--generate", "2"];
    let emulated = [&args[..], &["--device", "emulated"]].concat();
    agree(&dump("tiny-dbrx-f32", &PROMPT, &emulated), &dump("tiny-dbrx-f32", &PROMPT, &args));
    let model = checkpoint("tiny-dbrx-f32");
    let args = [&["--model", model.to_str().unwrap(), "--tokens", "1", "--json"], &emulated[..]].concat();
    let Ran { code, out, err } = run(&args);
    assert_eq!((code, err.as_str()), (0, ""));
    let said = ["  run           emulated cuda:0; weights f32 (copied)", "\"device\": \"emulated cuda:0\""];
    assert!(said.iter().all(|said| out.contains(said)), "{out}");
    let ran = run(&[&args[..], &["--threads", "2"]].concat());
    assert_eq!((ran.code, ran.err.as_str()), (2, "refused: --threads is for the CPU, not for emulated cuda:0\n"));
}

/// Random weights are made on the device, with the bits that the CPU gives them.
#[test]
fn random_weights_are_those_of_the_cpu() {
    let config = checkpoint("tiny-dbrx-f32").join("config.json");
    let dump_on = |device: &str| {
        let args = ["--weights", "f32", "--generate", "3", "--dump-layers", "--device", device];
        dump_from(|args| run(args), "--random", &config, &PROMPT, &args)
    };
    let (on_cpu, on_gpu) = (dump_on("cpu"), dump_on("emulated"));
    assert_eq!(on_gpu["embed"], on_cpu["embed"]); // a copy of the weights
    agree(&on_gpu, &on_cpu);
}

/// Layers made of the two of a small checkpoint. No layer has the weights of the one that is two in front of
/// it, whose memory it may be given.
const SIX: [usize; 6] = [0, 1, 1, 0, 0, 1];
/// The same behind a first layer that differs from them.
const SIX_BEHIND_ONE: [usize; 7] = [0, 1, 2, 2, 1, 1, 2];

/// A checkpoint of layers of a small one, and the bytes of a layer and of what is of none. Where there are
/// seven, the first one counts as of none.
fn more_layers(name: &str, prefix: &str, field: &str, sources: &[usize]) -> (Folder, [usize; 2]) {
    let folder = Folder::copy_of(name);
    folder.edit_json("config.json", |config| config[field] = sources.len().into());
    let first = sources.len() - SIX.len();
    let mut bytes = [0; 2];
    folder.edit("model.safetensors", |whole| {
        let mut all = Vec::new();
        let tensors = SafeTensors::deserialize(whole).unwrap();
        for (name, tensor) in tensors.iter() {
            let numbered = name.strip_prefix(prefix).and_then(|rest| rest.split_once('.'));
            let Some((source, rest)) = numbered.and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest))) else {
                bytes[1] += tensor.data().len();
                all.push((name.to_owned(), tensor));
                continue;
            };
            match source {
                source if source < first => bytes[1] += tensor.data().len(),
                _ if rest.ends_with("e_score_correction_bias") => {} // a vector that stays
                _ => bytes[0] += tensor.data().len() / 2,
            }
            let layers = (0..sources.len()).filter(|layer| sources[*layer] == source);
            all.extend(layers.map(|layer| (format!("{prefix}{layer}.{rest}"), tensor.clone())));
        }
        *whole = safetensors::serialize(all, None).unwrap();
    });
    (folder, bytes)
}

/// A checkpoint that does not fit is streamed, and computes what it computes where it fits, bit for bit, also
/// where weights are rounded as they are copied. A limit below two layers is refused with the numbers.
/// DeepSeek-V3's first layer has no experts, and stays.
#[test]
fn streamed_layers_change_no_bit() {
    const REST: usize = 600_000; // more than everything but weights, less than a layer
    let models = [
        ("tiny-dbrx-f32", "transformer.blocks.", "n_layers", &SIX[..], &[0, 3][..], "f32"),
        ("tiny-dbrx-f32", "transformer.blocks.", "n_layers", &SIX, &[1], "bf16"),
        ("mixtral-tiny", "model.layers.", "num_hidden_layers", &SIX, &[1], "f32"),
        ("deepseek_v3", "model.layers.", "num_hidden_layers", &SIX_BEHIND_ONE, &[1], "f32"),
    ];
    for (name, prefix, field, sources, residents, activations) in models {
        let (folder, bytes) = more_layers(name, prefix, field, sources);
        let [layer, outside] = bytes.map(|bytes| if activations == "bf16" { bytes / 2 } else { bytes });
        let (count, first) = (sources.len(), sources.len() - SIX.len());
        let args = ["--generate", "2", "--dump-layers", "--json", "--device", "emulated", "--activations", activations];
        let whole = dump_of(|args| run(args), folder.path(), &PROMPT, &args);
        for resident in residents.iter().copied() {
            let limit = (outside + (resident + 2) * layer + REST.min(layer - 1)).to_string();
            let mut out = String::new();
            let run = |args: &[&str]| {
                let ran = run(args);
                out.clone_from(&ran.out);
                ran
            };
            let streamed = dump_of(run, folder.path(), &PROMPT, &[&args[..], &["--memory-limit", &limit]].concat());
            assert_eq!(streamed, whole, "{name}, {resident} layers resident");
            let plan = format!("  streamed      {} of {count} layers are copied in every step (", 6 - resident);
            assert!(out.contains(&plan) && out.contains(" expected: "), "{out}");
            let json: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
            let want = serde_json::json!({
                "resident_layers": first + resident,
                "streamed_layers": 6 - resident,
                "step_bytes": (6 - resident) * layer,
            });
            assert_eq!(json["streamed"], want);
        }
        let limit = (outside + layer + REST.min(layer - 1)).to_string();
        let model = folder.path().to_str().unwrap();
        let args = ["--model", model, "--tokens", "1", "--device", "emulated", "--activations", activations];
        let ran = run(&[&args[..], &["--memory-limit", &limit]].concat());
        let said = ["refused: memory: the run needs ", "with its layers streamed, ", " are available; try "];
        assert!(ran.code == 2 && ran.out.is_empty() && said.iter().all(|said| ran.err.contains(said)), "{}", ran.err);
    }
}

/// Every upload is ordered after what the step did before, and the step after the upload: by each of the
/// threads' streams, for each resident matrix and for each streamed layer.
#[test]
fn streamed_layers_are_joined() {
    let (folder, [layer, outside]) = more_layers("tiny-dbrx-f32", "transformer.blocks.", "n_layers", &SIX);
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    let limit = (outside + 3 * layer + layer / 2).to_string();
    let args = ["--model", folder.path().to_str().unwrap(), "--tokens", "1", "--generate", "1", "--memory-limit", &limit];
    let ran = run_on(&device, &args);
    assert!(
        ran.code == 0
            && ran.out.contains("  streamed      5 of 6 layers are copied in every step (")
            && ran.out.contains("); 1 stays on the GPU"),
        "{}{}",
        ran.out,
        ran.err
    );
    let streams = Device::cpu().threads().min(8);
    let waits = driver.calls().iter().filter(|call| **call == Call::Wait).count();
    let matrices = 3 + 8; // of no layer, and of the first one
    assert_eq!(waits, (matrices + 5) * 2 * streams);
}

/// Where nothing is said but `auto`: the first GPU that the kernels run on, or the CPU and the reason.
#[test]
fn auto_takes_what_there_is() {
    let model = checkpoint("tiny-dbrx-f32");
    let args = ["--model", model.to_str().unwrap(), "--layers", "1", "--tokens", "1", "--generate", "1", "--device", "auto", "--json"];
    let ran_with = |open: &dyn Fn(u32) -> Result<Device, Error>| {
        let open = |place: Where, threads: Option<usize>| match place {
            Where::Cuda(ordinal) => open(ordinal),
            _ => crate::example::open(place, threads),
        };
        let mut out = Vec::new();
        let ran = run_into(&mut out, &args, |args, console| crate::example::run_on(&open, args, console));
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        String::from_utf8(out).unwrap()
    };
    let (none, other) = (|ordinal| Error::NoDevice { ordinal, count: 2 }, Error::Arch { have: (8, 0), need: (9, 0) });
    let why = |out: &str| {
        assert!(out.contains("\"device\": \"cpu\""), "{out}");
        let (_, rest) = out.split_once("  auto          on the CPU, as no GPU can be used: ").unwrap();
        rest.lines().next().unwrap().to_owned()
    };
    assert_eq!(why(&ran_with(&|ordinal| Err(none(ordinal)))), none(0).to_string());
    let two_others = |ordinal| Err(if ordinal < 2 { other.clone() } else { none(ordinal) });
    assert_eq!(why(&ran_with(&two_others)), other.to_string());
    let (_, stream) = device::emulated();
    let second = |ordinal| if ordinal == 0 { Err(other.clone()) } else { Ok(stream.device().clone()) };
    let out = ran_with(&second);
    assert!(out.contains("\"device\": \"cuda:0\"") && !out.contains("as no GPU"), "{out}");
}
