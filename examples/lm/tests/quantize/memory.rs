//! How much memory a conversion takes; and that `--plan` says what runs take, and what files hold.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use dropless_lm::families;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::converted;
use crate::fixture::{Folder, checkpoint, run};
use crate::results::tensors;
use crate::rounded::NARROW;

/// The system's allocator, which counts what each thread has, and the most that it had.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that ends has none.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator with the arguments that it came with. What is done
// besides allocates nothing: the cells are constants at first and need no drop.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // Both may be there for a while.
        count(bytes as isize);
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.realloc(place, layout, bytes) }
    }
}

/// The small DBRX with wide experts: 6 tensors of 8 MiB.
fn wide() -> Folder {
    let folder = Folder::copy_of("tiny-dbrx-f32");
    folder.edit_json("config.json", |config| {
        config["d_model"] = json!(512);
        config["ffn_config"]["ffn_hidden_size"] = json!(1024);
        config["ffn_config"]["moe_num_experts"] = json!(4);
    });
    let config = families::read_config(&folder.file("config.json")).unwrap_or_else(|error| panic!("{error:?}"));
    let mut seed = 1u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 * 1e-9 - 0.008
    };
    let mut all: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for spec in config.family.specs(&config) {
        let bytes = (0..spec.shape.iter().product()).flat_map(|_| next().to_le_bytes()).collect();
        all.insert(spec.name(), (spec.shape.clone(), bytes));
    }
    let views = all.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(folder.file("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

/// At most twice the largest tensor: the codes of one matrix, the floats of 128 rows, and some tables.
#[test]
fn no_more_than_two_tensors_are_in_memory() {
    let (model, folder) = (wide(), Folder::new());
    let largest = tensors(model.path()).values().map(|tensor| tensor.bytes.len()).max().unwrap();
    assert_eq!(largest, 8 << 20);
    for target in ["fp8", "mxfp4", "int4"] {
        MOST.set(HELD.get());
        let before = HELD.get();
        converted(model.path(), &folder.file(target), &["--to", target, "--only", "projections", "--threads", "1"]);
        let most = (MOST.get() - before) as usize;
        let (codes, floats) = (1024 * 512, 4 * 128 * 1024);
        assert!(most <= 2 * largest && most <= codes + 2 * floats + (1 << 18), "{target}: {most} bytes at once");
        assert!(most >= codes / 2 + floats, "{target}: {most} bytes were counted");
    }
}

/// What `--plan` says, as a program reads it.
fn plan(source: &[&str], args: &[&str]) -> Value {
    let ran = run(&[source, &["--plan", "--json"], args].concat());
    assert!(ran.code == 0 && ran.err.is_empty(), "{}{}", ran.out, ran.err);
    let json: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    json["plan"].clone()
}

/// Of a GPU's plan, the row of a format.
fn row<'a>(plan: &'a Value, gpu: usize, format: &str) -> &'a Value {
    plan[gpu]["formats"].as_array().unwrap().iter().find(|row| row["weights"] == format).unwrap()
}

/// A run is given what the plan says, and not a byte less.
#[test]
fn a_plan_is_what_a_run_needs() {
    for name in ["tiny-dbrx-f32", "mixtral-tiny", "gpt_oss", "deepseek_v3", "llama-tiny"] {
        let config = checkpoint(name).join("config.json");
        let source = ["--random", config.to_str().unwrap()];
        for (batch, context, chunk) in [("1", "40", "512"), ("3", "17", "16")] {
            let sizes = ["--batch", batch, "--context", context, "--chunk", chunk];
            let need = row(&plan(&source, &sizes), 0, "bf16")["need_bytes"].as_u64().unwrap();
            let types = ["--weights", "bf16", "--activations", "bf16", "--random-tokens", context, "--generate", "0"];
            let limited = |bytes: u64| run(&[&source[..], &sizes, &types, &["--memory-limit", &bytes.to_string()]].concat());
            let (enough, short) = (limited(need), limited(need - 1));
            assert!(enough.code == 0, "{name}: {}{}", enough.out, enough.err);
            assert!(short.code == 2 && short.err.contains("memory: the run needs"), "{name}: {}", short.err);
        }
    }
}

/// Weights in a plan are the bytes of all tensors that a conversion writes.
#[test]
fn a_plan_is_what_files_hold() {
    let folder = Folder::new();
    for name in ["tiny-dbrx-f32", "mixtral-tiny", "gpt_oss", "granitemoe", "deepseek_v3", "llama-tiny"] {
        let [model, _] = NARROW[0].checkpoints(name, |_| false);
        let model = model.path();
        let plan = plan(&["--model", model.to_str().unwrap()], &[]);
        let bytes = |folder: &Path| tensors(folder).values().map(|tensor| tensor.bytes.len() as u64).sum::<u64>();
        assert_eq!(row(&plan, 1, "bf16")["weights_bytes"], bytes(model), "{name}");
        for target in ["fp8", "mxfp4", "int4"] {
            let out = folder.file(&format!("{name}-{target}"));
            let only = if name == "llama-tiny" { "projections" } else { "experts" };
            converted(model, &out, &["--to", target, "--only", only]);
            assert_eq!(row(&plan, 1, target)["weights_bytes"], bytes(&out), "{name} in {target}");
        }
    }
}

/// Counted by hand: all of DBRX is on one 80 GB GPU in 4 bits, and on one of 141 GB in 8.
#[test]
fn dbrx_is_on_one_gpu() {
    let (layers, experts, d, f, vocab, kv) = (40u64, 16, 6144, 10_752, 100_352, 8 * 128);
    let file = dropless_kit::goldens::root().join("examples/configs/dbrx.json");
    let plan = plan(&["--random", file.to_str().unwrap()], &[]);
    let of_experts = layers * experts * 3 * d * f;
    let of_layer = d * (d + 2 * kv) + d * d + experts * d + 2 * d;
    let rest = 2 * (2 * vocab * d + layers * of_layer + d);
    let shapes = layers * 3 * 3 * 8; // of 40 times w1, v1 and w2: three sizes of 8 bytes
    let weights = [
        ("bf16", 2 * of_experts + rest),
        ("fp8", of_experts + of_experts / (128 * 128) * 4 + rest),
        ("mxfp4", of_experts / 2 + of_experts / 32 + rest),
        ("int4", of_experts / 2 + of_experts / 128 * 2 + shapes + rest),
    ];
    for (format, bytes) in weights {
        for gpu in 0..2 {
            let row = row(&plan, gpu, format);
            assert_eq!(row["weights_bytes"], bytes, "{format}");
            assert_eq!(row["kv_cache_bytes"], layers * 2 * kv * 2 * 4096);
            let parts = ["weights_bytes", "kv_cache_bytes", "workspace_bytes", "logits_bytes"];
            let total: u64 = parts.iter().map(|part| row[part].as_u64().unwrap()).sum();
            assert_eq!(row["need_bytes"], total);
            let available = plan[gpu]["bytes"].as_u64().unwrap();
            assert_eq!(row["fits"], total <= available, "{format}");
        }
    }
    let fits = |gpu, format| row(&plan, gpu, format)["fits"].as_bool().unwrap();
    assert_eq!(["bf16", "fp8", "mxfp4", "int4"].map(|format| fits(0, format)), [false, false, true, true]);
    assert_eq!(["bf16", "fp8", "mxfp4", "int4"].map(|format| fits(1, format)), [false, true, true, true]);
    assert_eq!(row(&plan, 0, "int4")["longest_context"], 32_768);
}

/// One more token, or one more sequence, does not fit.
#[test]
fn the_largest_context_and_batch_are_the_largest() {
    let file = dropless_kit::goldens::root().join("examples/configs/dbrx.json");
    let source = ["--random", file.to_str().unwrap()];
    let fits = |args: &[&str], gpu: &str| {
        let ran = run(&[&source[..], &[gpu, "--json"], args].concat());
        let json: Value = serde_json::from_str(ran.out.lines().last().unwrap_or_default()).unwrap();
        row(&json["plan"], 0, "int4").clone()
    };
    let gpu = "--plan=73GiB";
    let row = fits(&[], gpu);
    let (longest, most) = (row["longest_context"].as_u64().unwrap(), row["most_sequences"].as_u64().unwrap());
    assert!((4096..32_768).contains(&longest) && most > 1, "{row}");
    let with = |name: &str, number: u64| fits(&[name, &number.to_string()], gpu)["fits"].clone();
    assert_eq!([with("--context", longest), with("--context", longest + 1)], [json!(true), json!(false)]);
    assert_eq!([with("--batch", most), with("--batch", most + 1)], [json!(true), json!(false)]);
    let none = fits(&[], "--plan=70GB");
    assert_eq!((&none["longest_context"], &none["most_sequences"], &none["fits"]), (&json!(0), &json!(0), &json!(false)));
}

#[test]
fn plans_that_are_refused() {
    let file = dropless_kit::goldens::root().join("examples/configs/dbrx.json");
    let source = ["--random", file.to_str().unwrap()];
    let refusal = |args: &[&str]| {
        let ran = run(&[&source[..], args].concat());
        assert!(ran.code == 2 && ran.out.is_empty(), "{}", ran.out);
        ran.err
    };
    assert!(refusal(&["--plan", "--context", "32769"]).contains("--context is 32769, the model has 32768 positions"));
    assert!(refusal(&["--plan", "--layers", "41"]).contains("--layers is 41, the model has 40"));
    for size in ["--plan=0", "--plan=-3GB", "--plan=x", "--plan=1e30GiB", "--plan=NaN"] {
        assert!(refusal(&[size]).contains("must be a size, as 80GB, 79.1GiB or a number of bytes"));
    }
    assert!(refusal(&["--plan", "--tokens", "1"]).contains("cannot be used with"));
}
