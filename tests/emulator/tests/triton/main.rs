//! Kernels that Triton compiled: the code of a compiler that knows nothing of this emulator, and that runs on
//! hardware.
//!
//! Every image runs under the standard schedules with the detectors on, and must give the right numbers.
//! Where Triton breaks a rule of the PTX ISA that hardware lets pass, [`BREACHES`] names the images and the
//! one detector that is off for them; an image that does not trip its detector may not be listed there.
//! [`MUTANTS`] are images with one fault put in, each of which must be seen.

#[path = "../cases/mod.rs"]
mod cases;
mod launch;
#[path = "../runner/mod.rs"]
mod runner;
mod workloads;

use launch::{Image, Work};
use ptx_emulator::{Detector, Detectors, Fault, Options, Report};
use runner::Failure;
use std::fs;

/// A rule that Triton's code breaks.
struct Breach {
    /// What reports it, and is off for these images.
    detector: Detector,
    /// Whether a report is of this breach.
    is: fn(&Report) -> bool,
    /// What mends it: instructions of this name are followed by that text. The mended image runs with the
    /// detector on.
    mend: Option<(&'static str, &'static str)>,
    images: &'static [&'static str],
}

const BREACHES: &[Breach] = &[
    // A fence must stand between the init of an mbarrier and a bulk copy that signals it, because the copy
    // belongs to another proxy. Triton leaves it out.
    Breach {
        detector: Detector::ProxyFence,
        is: |report| report.fault == Fault::MissingProxyFence && report.message.contains("signals mbarrier"),
        mend: Some(("mbarrier.init", "fence.mbarrier_init.release.cluster;")),
        images: &[
            "tensor_matmul_nt_f16",
            "tensor_matmul_nn_bf16",
            "tensor_matmul_tn_bf16",
            "tensor_matmul_nt_e4m3",
            "tensor_matmul_nt_bf16_k32",
            "tensor_matmul_nt_f16_k16",
            "tensor_matmul_nt_bf16_clusters",
            "tensor_matmul_persistent_bf16",
            "tensor_matmul_specialized_bf16",
            "tensor_attention_bf16",
            "tensor_copy_1d",
            "tensor_copy_2d",
            "tensor_copy_3d",
            "tensor_copy_4d",
            "tensor_copy_5d",
            "tensor_add_f32",
            "tensor_max_i32",
        ],
    },
    // Threads that hold the same value write it to the same word of shared memory, by one instruction. The
    // memory model calls that a race even for equal values. `Race` stays on: see `unequal_writes`.
    Breach {
        detector: Detector::EqualWrites,
        is: |report| {
            let says = |words| report.message.contains(words);
            let both_write = says(": write by ") && says("earlier write by ");
            report.fault == Fault::DataRace && both_write && report.place == report.other
        },
        mend: None,
        images: &[
            "row_sums_f32",
            "column_sums_f32",
            "arg_max_f32",
            "folds_i32",
            "softmax_f32",
            "softmax_f32_clusters",
            "layer_norm_bf16",
            "sort_i32",
            "histogram",
            "tensor_matmul_specialized_bf16",
            "tensor_copy_1d",
        ],
    },
];

/// An image, a text in it, what replaces that text everywhere, and the faults that may be reported. A mutant that
/// runs to its end must leave wrong numbers; one without faults here must do so under every schedule.
const MUTANTS: &[(&str, &str, &str, &[Fault])] = &[
    // Two parameters swapped: a for b.
    ("matmul_nt_bf16", "%rd2, [matmul_param_0]", "%rd2, [matmul_param_1]", &[]),
    // TMA coordinates swapped.
    ("tensor_copy_2d", "[%rd1, {%r3, %r4}]", "[%rd1, {%r4, %r3}]", &[Fault::Tma]),
    ("tensor_add_f32", "[%rd2, {%r3, %r4}]", "[%rd2, {%r4, %r3}]", &[]),
    // wgmma descriptors: 512 bytes from eight rows to the next for 1024; swizzle of 64 bytes for 128.
    ("tensor_matmul_nn_bf16", "4611686293305294848", "4611686155866341376", &[]),
    ("tensor_matmul_nn_bf16", "4611686293305294848", "9223372311732682752", &[Fault::SwizzleMismatch]),
    // b read as if it were transposed.
    ("tensor_matmul_nn_bf16", ", 1, 1, 0, 1;", ", 1, 1, 0, 0;", &[Fault::DataRace]),
    // One 8-bit format for the other.
    ("tensor_matmul_nt_e4m3", ".e4m3.e4m3", ".e4m3.e5m2", &[]),
    // Matrices of b not transposed.
    ("mma_f16_nn", "ldmatrix.sync.aligned.m8n8.x4.trans", "ldmatrix.sync.aligned.m8n8.x4", &[]),
    // Synchronisation taken out or loosened.
    ("matmul_nt_bf16", "fence.proxy.async.shared::cta;", "", &[Fault::MissingProxyFence]),
    ("matmul_nt_bf16", "cp.async.wait_group \t2;", "cp.async.wait_group \t4;", &[Fault::DataRace]),
    // No barrier behind that wait: each of the four warps has waited for its own copies alone.
    ("matmul_nt_bf16", "wait_group \t2;\n\tbar.sync \t0;", "wait_group \t2;", &[Fault::DataRace]),
    ("matmul_nt_bf16", "wgmma.fence.sync.aligned;", "", &[Fault::WgmmaFence]),
    ("tensor_matmul_nn_bf16", "wgmma.wait_group.sync.aligned 0;", "", &[Fault::WgmmaRegister]),
    ("tensor_matmul_nn_bf16", "], 24576;", "], 16384;", &[Fault::DataRace, Fault::Deadlock]),
    ("tensor_copy_2d", "cp.async.bulk.wait_group \t0;", "", &[Fault::ExitState]),
];

fn limited(options: Options) -> Options {
    Options { step_limit: 20_000_000, ..options }
}

fn image(name: &str) -> Image {
    let found = launch::manifest().into_iter().find(|image| image.name == name);
    found.unwrap_or_else(|| panic!("manifest.txt has no `{name}`"))
}

/// The breaches of an image.
fn breaches(image: &str) -> impl Iterator<Item = &'static Breach> {
    BREACHES.iter().filter(move |breach| breach.images.contains(&image))
}

/// All detectors but those of the image's breaches; `keep` stays on.
fn detectors(image: &str, keep: Option<Detector>) -> Detectors {
    let off = breaches(image).map(|breach| breach.detector).filter(|&detector| Some(detector) != keep);
    off.fold(Detectors::all(), Detectors::without)
}

/// Launches under every standard schedule; each must leave the right numbers.
fn right(work: &Work, image: &Image, ptx: &str, detectors: Detectors) {
    for options in Options::standard(runner::seeds(8)) {
        let when = format!("{} under {:?}, {:?}, {detectors:?}", image.name, options.schedule, options.tma);
        match work.launch(image, ptx, limited(Options { detectors, ..options })) {
            Err(failure) => panic!("{when}: {failure}"),
            Ok(outputs) => {
                if let Some(difference) = runner::disagreement(&work.case, &outputs) {
                    panic!("{when}: {difference}");
                }
            }
        }
    }
}

/// `ptx`, where the store of line `line` writes the thread's number for each of its 32-bit values.
fn unequal(ptx: &str, line: u32) -> String {
    let mut lines: Vec<String> = ptx.lines().map(str::to_owned).collect();
    let store = &mut lines[line as usize - 1];
    let (place, values) = store.split_once("], ").expect("an address and what is written there");
    let numbers = vec!["number"; values.split(',').count()].join(", ");
    let numbers = if values.starts_with('{') { format!("{{{numbers}}}") } else { numbers };
    *store = format!("{{ .reg .b32 number; mov.u32 number, %tid.x; {place}], {numbers}; }}");
    lines.join("\n")
}

/// `ptx` with `text` behind every instruction whose line holds `name`.
fn followed(ptx: &str, name: &str, text: &str) -> String {
    let mut out = String::new();
    for line in ptx.lines() {
        out += line;
        out += if line.contains(name) { text } else { "" };
        out += "\n";
    }
    out
}

fn judged(work: Work) {
    let name = work.case.image;
    let (image, ptx) = (image(name), launch::ptx(name));
    right(&work, &image, &ptx, detectors(name, None));
    for breach in breaches(name) {
        let detectors = detectors(name, Some(breach.detector));
        match work.launch(&image, &ptx, limited(Options { detectors, ..Options::default() })) {
            Err(Failure::Report(report)) if (breach.is)(&report) => {}
            Err(other) => panic!("{name} trips {:?} otherwise: {other}", breach.detector),
            Ok(_) => panic!("{name} does not trip {:?}: take it off the list", breach.detector),
        }
        if let Some((instruction, text)) = breach.mend {
            right(&work, &image, &followed(&ptx, instruction, text), detectors);
        }
    }
}

/// Where an image's threads write equal values to one place, unequal ones are a race still.
#[test]
fn unequal_writes() {
    let images = BREACHES.iter().filter(|breach| breach.detector == Detector::EqualWrites).flat_map(|breach| breach.images);
    for name in images {
        let (work, image, ptx) = (workload(name), image(name), launch::ptx(name));
        let strict = Options { detectors: detectors(name, Some(Detector::EqualWrites)), ..Options::default() };
        let Err(Failure::Report(equal)) = work.launch(&image, &ptx, limited(strict)) else { panic!("{name} is silent") };
        let line = equal.place.as_ref().expect("a race has a place").ptx_line;
        for options in Options::standard(2) {
            let options = limited(Options { detectors: detectors(name, None), ..options });
            match work.launch(&image, &unequal(&ptx, line), options) {
                Err(Failure::Report(report)) if report.fault == Fault::DataRace => {
                    assert_eq!(report.place.as_ref().map(|place| place.ptx_line), Some(line), "{name}: {report}");
                }
                Err(failure) => panic!("{name}: {failure}"),
                Ok(_) => panic!("{name}, line {line}: not seen"),
            }
        }
    }
}

/// Every mutant is seen under every standard schedule, and each report that the table names by at least one.
#[test]
fn mutants() {
    let mut amiss = Vec::new();
    for (name, from, to, seen) in MUTANTS {
        let (work, image, ptx) = (workload(name), image(name), launch::ptx(name));
        assert!(ptx.contains(from), "{name} has no `{from}`");
        let ptx = ptx.replace(from, to);
        let mut reported = Vec::new();
        for options in Options::standard(2) {
            let when = format!("{name}, `{from}` -> `{to}`, under {:?}, {:?}", options.schedule, options.tma);
            let options = limited(Options { detectors: detectors(name, None), ..options });
            match work.launch(&image, &ptx, options) {
                Ok(outputs) if runner::disagreement(&work.case, &outputs).is_some() => {}
                Ok(_) => amiss.push(format!("{when}: not seen")),
                Err(Failure::Report(report)) if seen.contains(&report.fault) => reported.push(report.fault),
                Err(failure) => amiss.push(format!("{when}: {failure}")),
            }
        }
        if let Some(fault) = seen.iter().find(|fault| !reported.contains(fault)) {
            amiss.push(format!("{name}, `{from}` -> `{to}`: never reported as {fault:?}"));
        }
    }
    assert!(amiss.is_empty(), "{}", amiss.join("\n"));
}

macro_rules! images {
    ($($image:ident),* $(,)?) => {
        $(
            #[test]
            fn $image() {
                judged(workloads::$image());
            }
        )*

        fn workload(image: &str) -> Work {
            match image {
                $(stringify!($image) => workloads::$image(),)*
                _ => panic!("{image} has no workload"),
            }
        }

        #[test]
        fn none_is_forgotten() {
            let tested = [$(stringify!($image)),*];
            let run = [$(workloads::$image().case.image),*];
            assert_eq!(run, tested, "a test runs another image than its name says");
            let listed: Vec<String> = launch::manifest().into_iter().map(|image| image.name).collect();
            assert_eq!(listed, tested, "manifest.txt and the tests, in the manifest's order");
            let mut files: Vec<String> = fs::read_dir(launch::folder().join("ptx"))
                .expect("ptx/ is there")
                .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
                .collect();
            files.sort_unstable();
            let mut wanted: Vec<String> = tested.iter().map(|name| format!("{name}.ptx")).collect();
            wanted.sort_unstable();
            assert_eq!(files, wanted, "ptx/ and the tests");
            let breaking = BREACHES.iter().flat_map(|breach| breach.images);
            for name in breaking {
                assert!(tested.contains(name), "a table names {name}, which is no image");
            }
        }
    };
}

images! {
    axpy_f32,
    gated_silu_bf16,
    gelu_f16,
    cast_f32_e4m3,
    cast_f32_e5m2,
    cast_e4m3_f16,
    cast_e4m3_bf16,
    integers,
    philox,
    row_sums_f32,
    column_sums_f32,
    arg_max_f32,
    folds_i32,
    softmax_f32,
    softmax_f32_clusters,
    layer_norm_bf16,
    running_sum_i32,
    sort_i32,
    transpose_f16,
    gather_f32,
    histogram,
    atomics,
    guarded_sum,
    mma_bf16,
    mma_f16_nn,
    mma_tf32,
    mma_e4m3,
    mma_s8,
    matmul_nt_bf16,
    matmul_nn_bf16,
    matmul_tn_f16,
    matmul_tt_f16,
    matmul_nt_e4m3,
    matmul_nt_e5m2,
    matmul_nn_tf32,
    matmul_nn_bf16_n8,
    matmul_nn_bf16_n16,
    matmul_nt_bf16_n256,
    matmul_relu_bf16,
    matmul_parts_f16,
    matmul_int4_bf16,
    moe_bf16,
    moe_e4m3,
    attention_f16,
    attention_bf16_full,
    tensor_matmul_nt_f16,
    tensor_matmul_nn_bf16,
    tensor_matmul_tn_bf16,
    tensor_matmul_nt_e4m3,
    tensor_matmul_nt_bf16_k32,
    tensor_matmul_nt_f16_k16,
    tensor_matmul_nt_bf16_clusters,
    tensor_matmul_persistent_bf16,
    tensor_matmul_specialized_bf16,
    tensor_attention_bf16,
    tensor_copy_1d,
    tensor_copy_2d,
    tensor_copy_3d,
    tensor_copy_4d,
    tensor_copy_5d,
    tensor_add_f32,
    tensor_max_i32,
}
