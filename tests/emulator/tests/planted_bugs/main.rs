//! The planted bugs: each variant of a small kernel must be reported as `kernels/README.md` says, under every standard
//! schedule, and its clean twin must stay silent and right.
//!
//! A fault must be placed at a line that carries `// report <bug>` in the kernel's source.

#[path = "../cases/mod.rs"]
mod cases;
#[path = "../runner/mod.rs"]
mod runner;
mod workloads;

use cases::Case;
use ptx_emulator::{
    Detector, Detectors, Fault, Gpu, Interleave, L2Promotion, OobFill, Options, Place, Report, Schedule, TensorMapDesc, TmaCompletion,
};
use runner::Failure;
use std::fs;

/// What the report of a bug must be.
struct Expected {
    /// At least one schedule reports one of these, with `says` in its text.
    must: &'static [Fault],
    says: &'static str,
    /// What other schedules may report instead, because the same bug shows earlier there.
    may: &'static [Fault],
    /// No schedule lets it pass.
    always: bool,
}

impl Expected {
    const fn always(must: &'static [Fault], says: &'static str) -> Expected {
        Expected { must, says, may: &[], always: true }
    }

    const fn or(self, may: &'static [Fault]) -> Expected {
        Expected { may, ..self }
    }
}

/// Far more steps than any of the launches takes, and few enough to end a hang soon.
fn limited(options: Options) -> Options {
    Options { step_limit: 5_000_000, ..options }
}

/// The fixed orders with both completions, and eight random ones.
fn schedules() -> Vec<Options> {
    Options::standard(8).into_iter().map(limited).collect()
}

fn image(case: &Case, bug: Option<u32>) -> String {
    let suffix = bug.map_or(String::new(), |bug| format!(".bug_{bug}"));
    let path = runner::kernels().join("ptx").join(format!("{}{suffix}.ptx", case.image));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Lines of the kernel's source marked for `bug`.
fn marked(kernel: &str, bug: u32) -> Vec<u32> {
    let source = fs::read_to_string(runner::kernels().join(format!("{kernel}.cu"))).expect("every kernel has its source");
    let marks = |line: &str| line.split_once("// report ").is_some_and(|(_, list)| list.split(' ').any(|n| n == bug.to_string()));
    source.lines().zip(1..).filter(|(line, _)| marks(line)).map(|(_, number)| number).collect()
}

/// Whether a place is one of `lines` of the kernel's own file, directly or as the call site of a wrapper.
fn stands_at(place: &Option<Place>, kernel: &str, lines: &[u32]) -> bool {
    let Some(place) = place else { return false };
    let here = place.short();
    lines.iter().any(|line| {
        let wanted = format!("{kernel}.cu:{line}");
        here == wanted || place.inlined_at.as_deref().is_some_and(|at| at == wanted)
    })
}

/// Runs the planted variant under every schedule and holds each report against the table.
fn reported(bug: u32, case: Case, expected: Expected) {
    let ptx = image(&case, Some(bug));
    let lines = marked(case.image, bug);
    assert!(!lines.is_empty(), "{}.cu marks no line for bug {bug}", case.image);
    let (mut as_said, mut other) = (0, Vec::<Box<Report>>::new());
    for options in schedules() {
        let run = format!("bug {bug} in {} under {:?}, {:?}", case.image, options.schedule, options.tma);
        let report = match runner::launch(&case, &ptx, options.clone()) {
            Err(Failure::Report(report)) => report,
            Err(Failure::Setup(why)) => panic!("{run}: {why}"),
            Ok(_) if expected.always => panic!("{run}: no report"),
            Ok(_) => continue,
        };
        // What a report says suffices to see it again.
        if matches!(report.schedule, Schedule::Random(_)) {
            let again = Options { schedule: report.schedule, tma: report.tma, ..options };
            match runner::launch(&case, &ptx, again) {
                Err(Failure::Report(second)) => assert_eq!(second, report, "{run}: the replay differs"),
                other => panic!("{run}: the replay gives {other:?}"),
            }
        }
        if expected.must.contains(&report.fault) && report.message.contains(expected.says) {
            let found = stands_at(&report.place, case.image, &lines) || stands_at(&report.other, case.image, &lines);
            assert!(found, "{run}: placed elsewhere than at lines {lines:?} of {}.cu:\n{report}", case.image);
            as_said += 1;
        } else {
            assert!(expected.may.contains(&report.fault), "{run}: unexpected {:?}:\n{report}", report.fault);
            other.push(report);
        }
    }
    let others = other.iter().map(|report| report.to_string()).collect::<Vec<_>>().join("\n");
    assert!(as_said > 0, "bug {bug} in {}: never reported as {:?} with `{}`\n{others}", case.image, expected.must, expected.says);
}

/// Runs a variant that no detector can know to be wrong: nothing is reported and the numbers differ.
fn wrong_numbers(bug: u32, case: Case) -> Vec<Vec<u8>> {
    let ptx = image(&case, Some(bug));
    let mut last = Vec::new();
    for options in schedules() {
        let run = format!("bug {bug} in {} under {:?}, {:?}", case.image, options.schedule, options.tma);
        last = runner::launch(&case, &ptx, options).unwrap_or_else(|e| panic!("{run}: {e}"));
        assert!(runner::disagreement(&case, &last).is_some(), "{run}: the numbers are right");
    }
    last
}

macro_rules! bugs {
    ($($test:ident: $number:literal in $workload:ident => $expected:expr;)*) => {$(
        #[test]
        fn $test() {
            reported($number, workloads::$workload(), $expected);
        }
    )*};
}

use Fault::{
    Barrier, Collective, DataRace, Deadlock, Divergence, ExitState, InterBlockRace, Mbarrier, Misaligned, MissingProxyFence, OutOfBounds,
    SwizzleMismatch, Uninitialised, UnwrittenRegister, WgmmaFence, WgmmaRegister,
};

bugs! {
    bug_01_gating_off_by_one: 1 in gating => Expected::always(&[OutOfBounds], "out-of-bounds 4-byte read at global buffer of 640 bytes, offset 640").or(&[OutOfBounds]);
    bug_02_permute_without_barrier: 2 in permute => Expected::always(&[DataRace], "unordered with earlier");
    bug_03_gemm_row_past_the_expert: 3 in gemm => Expected::always(&[OutOfBounds, InterBlockRace], "");
    bug_04_no_barrier_after_init: 4 in gemm => Expected::always(&[Mbarrier, DataRace], "");
    bug_05_producer_ignores_empty: 5 in gemm => Expected::always(&[Mbarrier, Deadlock], "").or(&[DataRace]);
    bug_06_expects_too_few_bytes: 6 in gemm => Expected::always(&[DataRace, Deadlock], "").or(&[Mbarrier, Uninitialised]);
    bug_07_phase_never_flips: 7 in gemm => Expected::always(&[Deadlock], "parity 0").or(&[DataRace, Mbarrier]);
    bug_09_descriptor_swizzle: 9 in gemm => Expected::always(&[SwizzleMismatch], "64B swizzle");
    bug_10_no_wgmma_fence: 10 in gemm => Expected::always(&[WgmmaFence], "");
    bug_11_stage_released_early: 11 in gemm => Expected::always(&[DataRace], "unordered with").or(&[Deadlock]);
    bug_12_multicast_ignores_peer: 12 in cluster_gemm => Expected::always(&[DataRace], "unordered with");
    bug_13_cta_leaves_early: 13 in cluster_gemm => Expected { must: &[Mbarrier], says: "exited", may: &[], always: false };
    bug_14_store_without_fence: 14 in tma_store => Expected::always(&[MissingProxyFence], "TMA store");
    bug_15_store_without_barrier: 15 in tma_store => Expected::always(&[DataRace], "TMA store").or(&[MissingProxyFence, Uninitialised]);
    bug_16_store_not_waited_for: 16 in tma_store => Expected::always(&[ExitState], "");
    bug_17_misaligned_vector: 17 in vector_copy => Expected::always(&[Misaligned], "16-byte");
    bug_18_local_index: 18 in local_array => Expected::always(&[OutOfBounds], "local");
    bug_19_return_before_barrier: 19 in block_sum => Expected::always(&[Deadlock], "barrier 0");
    bug_20_half_warp_shuffle: 20 in warp_pairs => Expected::always(&[Collective], "");
    bug_21_two_barrier_sites: 21 in block_sum => Expected::always(&[Barrier], "");
    bug_22_barrier_counts: 22 in named_barriers => Expected::always(&[Barrier], "");
    bug_23_uninitialised_shared: 23 in block_sum => Expected::always(&[Uninitialised], "shared");
    bug_24_shared_overrun: 24 in block_sum => Expected::always(&[OutOfBounds], "shared");
    bug_25_no_syncwarp: 25 in warp_pairs => Expected::always(&[DataRace], "").or(&[Uninitialised]);
    bug_26_shuffle_is_no_barrier: 26 in warp_pairs => Expected::always(&[DataRace], "").or(&[Uninitialised]);
    bug_27_two_blocks_one_word: 27 in block_total => Expected::always(&[InterBlockRace], "");
    bug_30_accumulator_before_wait: 30 in tile_product => Expected::always(&[WgmmaRegister], "");
    bug_31_aligned_under_a_branch: 31 in tile_product => Expected::always(&[Divergence], "");
    bug_36_one_group_short: 36 in warp_gemm => Expected::always(&[DataRace], "unordered with");
    bug_37_init_without_fence: 37 in gemm => Expected::always(&[MissingProxyFence], "mbarrier");
    bug_38_one_warp_waits_for_four: 38 in gemm => Expected::always(&[DataRace], "do not know of it");
    bug_39_writers_do_not_meet: 39 in tile_product => Expected::always(&[DataRace], "do not know of it");
    bug_40_another_thread_fences_the_init: 40 in gemm => Expected::always(&[MissingProxyFence], "mbarrier");
    bug_41_accumulators_nobody_cleared: 41 in tile_product => Expected::always(&[UnwrittenRegister], "nothing wrote it");
    bug_32_wgmma_without_proxy_fence: 32 in tile_product => Expected::always(&[MissingProxyFence], "wgmma");
}

/// A stride of 512 between groups of eight rows reads wrong columns, from the ninth on.
#[test]
fn bug_08_descriptor_stride() {
    let case = workloads::gemm();
    let outputs = wrong_numbers(8, workloads::gemm());
    let cases::Arg::Buffer { after: cases::Expect::Bytes(want), .. } = &case.args[3] else { panic!("argument 3 is y") };
    for tile in 0..2 {
        for row in 0..64 {
            let at = (row * 128 + tile * 64) * 4;
            assert_eq!(outputs[3][at..at + 32], want[at..at + 32], "row {row}: the first eight columns of a tile are right");
        }
    }
}

#[test]
fn bug_28_swapped_coordinates() {
    wrong_numbers(28, workloads::gemm());
}

#[test]
fn bug_29_swapped_descriptors() {
    wrong_numbers(29, workloads::gemm());
}

/// Exactly the two swapped fields come back wrong.
#[test]
fn bug_33_swapped_fields() {
    let outputs = wrong_numbers(33, workloads::abi_echo());
    let word = |i: usize| u64::from_le_bytes(outputs[16][8 * i..8 * i + 8].try_into().expect("eight bytes"));
    assert_eq!((word(16), word(17), word(18), word(23)), (101, 303, 202, 168));
}

/// An instruction outside the model is refused when the image is loaded, with its text, file and line.
#[test]
fn bug_34_unknown_opcode() {
    let ptx = image(&workloads::vector_copy(), None);
    let (at, line) =
        ptx.lines().zip(1..).find_map(|(text, line)| text.contains("st.global.v4").then_some((text, line))).expect("it stores a vector");
    for unknown in ["frobnicate.u32 %r1, %r2;", "fma.rn.f32x2 %rd1, %rd1, %rd1, %rd1;", "st.global.v4.sideways.f32 [%rd1], %f1;"] {
        let error = Gpu::new(Options::default()).load("vector_copy.ptx", ptx.replace(at, unknown)).expect_err(unknown);
        assert_eq!((error.file.as_str(), error.line), ("vector_copy.ptx", line), "{error}");
        let opcode = unknown.split(' ').next().expect("an opcode");
        assert!(error.message.contains(opcode), "{error}");
    }
}

/// A box wider than the swizzle span is refused by the encoder, with both numbers in reach.
#[test]
fn bug_35_box_wider_than_the_swizzle() {
    let mut gpu = Gpu::new(Options::default());
    let address = gpu.alloc(128 * 64 * 2).expect("16 KiB fit");
    let desc = TensorMapDesc {
        element: ptx_emulator::ElementType::Bf16,
        address,
        dims: &[128, 64],
        strides: &[256],
        box_dims: &[128, 64],
        element_strides: &[],
        interleave: Interleave::None,
        swizzle: ptx_emulator::Swizzle::B128,
        l2_promotion: L2Promotion::None,
        oob_fill: OobFill::Zeros,
    };
    let error = gpu.encode_tensor_map(&desc).expect_err("256 bytes are no row of 128");
    assert_eq!((error.got, error.rule.contains("swizzle")), (256, true), "{error}");
    gpu.encode_tensor_map(&TensorMapDesc { box_dims: &[64, 64], ..desc }).expect("128 bytes are");
}

/// A detector that is switched off says nothing, and takes no other with it.
#[test]
fn detectors_can_be_switched_off_one_by_one() {
    let table = [
        (Detector::Race, 2, workloads::permute(), DataRace),
        (Detector::Race, 27, workloads::block_total(), InterBlockRace),
        (Detector::Uninitialised, 23, workloads::block_sum(), Uninitialised),
        (Detector::ProxyFence, 14, workloads::tma_store(), MissingProxyFence),
        (Detector::Swizzle, 9, workloads::gemm(), SwizzleMismatch),
        (Detector::WgmmaRegisters, 10, workloads::gemm(), WgmmaFence),
        (Detector::WgmmaRegisters, 30, workloads::tile_product(), WgmmaRegister),
        (Detector::ExitState, 16, workloads::tma_store(), ExitState),
        (Detector::UnwrittenRegisters, 41, workloads::tile_product(), UnwrittenRegister),
        // Whole warps at each of the two barriers; lanes of one warp are told apart in any case.
        (Detector::BarrierSite, 21, workloads::block_sum_of(192), Barrier),
    ];
    for (detector, bug, case, fault) in table {
        let ptx = image(&case, Some(bug));
        for off in Detectors::EACH {
            let options = limited(Options { detectors: Detectors::all().without(off), ..Options::default() });
            let result = runner::launch(&case, &ptx, options);
            let seen = matches!(&result, Err(Failure::Report(report)) if report.fault == fault);
            assert_eq!(seen, off != detector, "bug {bug} without {off:?}: {result:?}");
        }
    }
}

/// Every kernel without its bugs: silent and right under the standard schedules and many random ones (`EMULATOR_SEEDS`).
mod clean {
    use super::*;

    fn silent(case: Case) {
        let ptx = image(&case, None);
        let mut runs = Options::standard(runner::seeds(108));
        runs.push(Options { schedule: Schedule::InOrder, tma: TmaCompletion::Random, ..Options::default() });
        runs.push(Options { schedule: Schedule::Reverse, tma: TmaCompletion::Random, ..Options::default() });
        for options in runs.into_iter().map(limited) {
            let run = format!("{} under {:?}, {:?}", case.image, options.schedule, options.tma);
            if let Err(why) = runner::run(&case, &ptx, options) {
                panic!("{run}: {why}");
            }
        }
    }

    /// Clusters on several host threads: silent and right as well.
    #[test]
    fn several_workers() {
        for case in workloads::all() {
            for workers in [2, 4] {
                let options = limited(Options { workers, ..Options::default() });
                runner::run(&case, &image(&case, None), options)
                    .unwrap_or_else(|why| panic!("{} with {workers} workers: {why}", case.image));
            }
        }
    }

    macro_rules! clean {
        ($($kernel:ident),* $(,)?) => {
            $(
                #[test]
                fn $kernel() {
                    silent(workloads::$kernel());
                }
            )*

            #[test]
            fn none_is_forgotten() {
                let tested = [$(stringify!($kernel)),*];
                for case in workloads::all() {
                    assert!(tested.contains(&case.image), "{} has no clean test", case.image);
                }
                for entry in fs::read_dir(runner::kernels()).expect("kernels/ is there") {
                    let path = entry.expect("readable").path();
                    if path.extension().is_some_and(|e| e == "cu") {
                        let stem = path.file_stem().expect("a name").to_string_lossy().into_owned();
                        assert!(tested.contains(&stem.as_str()), "{stem}.cu has no clean test");
                    }
                }
            }
        };
    }
    clean!(
        gating,
        permute,
        gemm,
        cluster_gemm,
        gather_gemm,
        tile_product,
        tma_store,
        vector_copy,
        local_array,
        block_sum,
        warp_pairs,
        named_barriers,
        block_total,
        last_block,
        abi_echo,
        pipelined_gemm,
        fp8_gemm,
        attention_tile,
        warp_gemm,
        math,
        persistent_gemm
    );
}
