//! The same model on a GPU: the kernels in the emulator, or on hardware where there is some.
#![cfg(feature = "cuda")]

use dropless::Stream;
use dropless_kit::device;

use crate::fixture::{Ran, checkpoint, run, run_on};
use crate::results::{agree, dump, dump_by};

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

/// Against the references in f64, through the example's own comparison: every prompt, and a generation of sixteen tokens.
#[test]
fn references_hold_on_a_gpu() {
    let folder = checkpoint("tiny-dbrx-f32");
    for reference in ["goldens.safetensors", "decode.safetensors"] {
        let file = folder.join(reference);
        let agrees = |stream: &Stream| {
            let ran = run_on(stream.device(), &["--model", folder.to_str().unwrap(), "--check", file.to_str().unwrap()]);
            assert!(ran.code == 0 && ran.out.contains("  agrees: "), "{}{}", ran.out, ran.err);
        };
        if !device::hardware_only() {
            let (driver, stream) = device::emulated();
            agrees(&stream);
            assert!(driver.reports().is_empty());
        }
        if let Some(stream) = device::hardware() {
            agrees(&stream);
        }
    }
}

#[test]
fn a_run_says_where_it_ran() {
    let (_, stream) = device::emulated();
    let model = checkpoint("tiny-dbrx-f32");
    let args = ["--model", model.to_str().unwrap(), "--layers", "1", "--tokens", "1", "--generate", "1", "--json"];
    let Ran { code, out, err } = run_on(stream.device(), &args);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("cuda:0; weights f32 (mapped), activations f32;") && out.contains("\"device\": \"cuda:0\""), "{out}");
    // The weights are on the device, too, so they are needed there.
    assert!(out.contains(" needed: weights ") && out.contains(" available"), "{out}");
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
    let types = "refused: weights are f32, activations bf16: kernels take both of one type; see --activations\n";
    assert_eq!(text(&["--activations", "bf16"]), types);
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
    for wrong in ["tpu", "cuda:", "cuda:x", "cuda0", "cpu:1"] {
        let ran = run(&["--device", wrong]);
        assert!(ran.code == 2 && ran.err.contains("must be cpu, cuda or cuda:N"), "{}", ran.err);
    }
}
