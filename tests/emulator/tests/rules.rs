//! Rules as the hardware has them, at their edges: what shipped code relies on passes, and what lies just
//! beyond is reported.

use ptx_emulator::{
    Detector, Detectors, ElementType, Fault, Gpu, Interleave, L2Promotion, Launch, OobFill, Options, Report, Schedule, Swizzle,
    TensorMapDesc, TmaCompletion,
};

/// A module around its text.
fn module(text: &str) -> String {
    format!(".version 8.4\n.target sm_90a\n.address_size 64\n{text}")
}

/// Runs the entry `k` of a module with one buffer, filled with `before`, as its last parameter; gives the
/// buffer afterwards.
fn run(text: &str, threads: u32, params: &[u8], before: &[u8], options: Options) -> Result<Vec<u8>, Box<Report>> {
    run_shared(text, threads, params, before, 0, options)
}

/// The same with `shared` bytes of dynamic shared memory.
fn run_shared(text: &str, threads: u32, params: &[u8], before: &[u8], shared: u32, options: Options) -> Result<Vec<u8>, Box<Report>> {
    let mut gpu = Gpu::new(Options { step_limit: 100_000, ..options });
    let module = gpu.load("k.ptx", module(text)).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("k").expect("it has an entry k");
    let buffer = gpu.alloc(before.len() as u64).expect("there is memory");
    gpu.write(buffer, before).expect("the buffer is that long");
    let params = [params, &buffer.to_le_bytes()].concat();
    let launch = Launch { grid: [1, 1, 1], block: [threads, 1, 1], params: &params, shared_bytes: shared, ..Launch::default() };
    gpu.launch(&kernel, &launch)?;
    let mut after = vec![0; before.len()];
    gpu.read(buffer, &mut after).expect("the buffer is that long");
    Ok(after)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

/// `ptxas` rounds the static part up to the greatest alignment among the module's external arrays, at least
/// 16, for every entry.
#[test]
fn dynamic_shared_memory_is_aligned_as_declared() {
    let text = |externs: &str| {
        format!(
            "{externs}\n.visible .entry k(.param .u64 out)\n{{\n\t.shared .align 4 .b8 fixed[20];\n\t.reg .b32 r;\n\t.reg .b64 to;\n\
             \tld.param.u64 to, [out];\n\tmov.u32 r, dynamic;\n\tst.global.u32 [to], r;\n\tmov.u32 r, fixed;\n\tst.global.u32 [to+4], r;\n\tret;\n}}\n"
        )
    };
    let one = |align: u32| format!(".extern .shared .align {align} .b8 dynamic[];");
    let cases = [
        (one(4), 0x20),
        (one(16), 0x20),
        (one(128), 0x80),
        (one(1024), 0x400),
        (format!("{}\n.extern .shared .align 256 .b8 another[];", one(16)), 0x100),
    ];
    for (externs, distance) in cases {
        let after = run_shared(&text(&externs), 1, &[], &[0; 8], 64, Options::default()).unwrap_or_else(|e| panic!("{externs}: {e}"));
        assert_eq!(words(&after), [0x400 + distance, 0x400], "{externs}");
    }
    // The rounding counts as shared memory of the block.
    let mut gpu = Gpu::new(Options::default());
    let module = gpu.load("k.ptx", module(&text(&one(1024)))).expect("it loads");
    let mut kernel = module.kernel("k").expect("it has an entry k");
    kernel.set_max_dynamic_shared(232_448 - 1024).expect("1024 bytes and these are all there are");
    kernel.set_max_dynamic_shared(232_448 - 1024 + 16).expect_err("the static part takes 1024 bytes");
}

const LOAD_AND_STORE: &str = r"
.extern .shared .align 1024 .b8 tile[];
.visible .entry k(.param .align 64 .b8 map[128], .param .align 64 .b8 target[128], .param .u32 offset, .param .u64 out)
{
	.reg .pred p;
	.reg .b32 base, bar, i, from, word;
	.reg .b64 desc, to, at;
	ld.param.u32 base, [offset];
	mov.u32 i, tile;
	add.u32 base, base, i;
	add.u32 bar, i, 4096;
	ld.param.u64 to, [out];
	mov.b64 desc, map;
	cvta.param.u64 desc, desc;
	mov.u32 i, %tid.x;
	setp.ne.u32 p, i, 0;
	@p bra begun;
	mbarrier.init.shared::cta.b64 [bar], 1;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 1024;
	mov.u32 i, 0;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [base], [desc, {i, i}], [bar];
begun:
	bar.sync 0;
wait:
	mbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;
	@!p bra wait;
	mov.u32 i, %tid.x;
	shl.b32 i, i, 2;
	cvt.u64.u32 at, i;
	add.u64 at, at, to;
dump:
	add.u32 from, base, i;
	ld.shared.b32 word, [from];
	st.global.b32 [at], word;
	add.u64 at, at, 128;
	add.u32 i, i, 128;
	setp.lt.u32 p, i, 1024;
	@p bra dump;
	mov.u32 i, %tid.x;
	setp.ne.u32 p, i, 0;
	@p bra done;
	mov.b64 desc, target;
	cvta.param.u64 desc, desc;
	mov.u32 i, 0;
	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [desc, {i, i}], [base];
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group 0;
done:
	ret;
}
";

/// A tile of TMA must begin on 128 bytes. Only the `Swizzle` detector asks that it begin where its swizzle does:
/// the hardware swizzles by address, wherever the tile begins.
#[test]
fn tiles_may_begin_at_any_128_bytes() {
    let source: Vec<u8> = (0..1024u32).map(|i| (i * 37 + i / 128 * 11 + 5) as u8).collect();
    let attempt = |swizzle: Swizzle, offset: u32, detectors: Detectors, tma: TmaCompletion| {
        let mut gpu = Gpu::new(Options { step_limit: 100_000, detectors, tma, ..Options::default() });
        let module = gpu.load("k.ptx", module(LOAD_AND_STORE)).unwrap_or_else(|e| panic!("{e}"));
        let kernel = module.kernel("k").expect("it has an entry k");
        let [from, to, out] = [0; 3].map(|_| gpu.alloc(1024).expect("there is memory"));
        gpu.write(from, &source).expect("the buffer is that long");
        let row = swizzle.span().max(32);
        let mut params = Vec::new();
        for address in [from, to] {
            let desc = TensorMapDesc {
                element: ElementType::Bf16,
                address,
                dims: &[u64::from(row) / 2, 1024 / u64::from(row)],
                strides: &[row.into()],
                box_dims: &[row / 2, 1024 / row],
                element_strides: &[],
                interleave: Interleave::None,
                swizzle,
                l2_promotion: L2Promotion::None,
                oob_fill: OobFill::Zeros,
            };
            params.extend(gpu.encode_tensor_map(&desc).expect("a good map").0);
        }
        params.extend(u64::from(offset).to_le_bytes());
        params.extend(out.to_le_bytes());
        gpu.launch(&kernel, &Launch { grid: [1, 1, 1], block: [32, 1, 1], params: &params, shared_bytes: 4104, ..Launch::default() })?;
        let [mut picture, mut stored] = [(); 2].map(|()| vec![0; 1024]);
        gpu.read(out, &mut picture).expect("the buffer is that long");
        gpu.read(to, &mut stored).expect("the buffer is that long");
        Ok::<_, Box<Report>>((picture, stored))
    };
    let free = Detectors::all().without(Detector::Swizzle);
    for (swizzle, chunks, period) in [(Swizzle::None, 0, 128), (Swizzle::B32, 1, 256), (Swizzle::B64, 3, 512), (Swizzle::B128, 7, 1024)] {
        for tma in [TmaCompletion::Eager, TmaCompletion::Lazy] {
            for offset in (0..1024).step_by(128) {
                let run = format!("{swizzle} at {offset}, {tma:?}");
                let place = |at: usize| (at + offset as usize) ^ ((at + offset as usize) >> 7 & chunks) << 4;
                let (picture, stored) = attempt(swizzle, offset, free, tma).unwrap_or_else(|e| panic!("{run}: {e}"));
                // A swizzle moves pieces of 16 bytes within their 128 bytes, so that all of them stay in the tile.
                assert!((0..1024).all(|at| picture[place(at) - offset as usize] == source[at]), "{run}");
                assert_eq!(stored, source, "{run}");
                match attempt(swizzle, offset, Detectors::all(), tma) {
                    Ok(_) => assert!(offset.is_multiple_of(period), "{run}: no report"),
                    Err(report) => {
                        let said = report.fault == Fault::Misaligned && report.message.contains(&format!("aligned to {period} bytes"));
                        assert!(said && !offset.is_multiple_of(period), "{run}: {report}");
                    }
                }
            }
            for offset in [16, 64, 1024 + 112] {
                let report = attempt(swizzle, offset, Detectors::none(), tma).expect_err("TMA wants 128 bytes");
                assert!(report.fault == Fault::Misaligned && report.message.contains("aligned to 128 bytes"), "{report}");
            }
        }
    }
}

/// Warps may meet at a barrier from different lines, as a producer and its consumers do. At an aligned barrier
/// of the whole block, such as `__syncthreads`, all must come from one line.
#[test]
fn only_aligned_barriers_want_one_line() {
    let text = |barrier: &str| {
        format!(
            ".file 1 \"roles.cu\"\n.visible .entry k(.param .u64 out)\n{{\n\t.shared .align 4 .b8 word[4];\n\
             \t.reg .pred p, first;\n\t.reg .b32 r, i, at;\n\t.reg .b64 to;\n\
             \tmov.u32 at, word;\n\tmov.u32 i, %tid.x;\n\tand.b32 r, i, 31;\n\tsetp.eq.u32 first, r, 0;\n\
             \tsetp.lt.u32 p, i, 32;\n\t@p bra producer;\n\
             \t.loc 1 20 1\n\t{barrier}\n\tld.shared.u32 r, [at];\n\tld.param.u64 to, [out];\n\
             \t@first st.global.u32 [to], r;\n\tret;\n\
             producer:\n\t.loc 1 10 1\n\t@first st.shared.u32 [at], 7;\n\t{barrier}\n\tret;\n}}\n"
        )
    };
    for options in Options::standard(4) {
        for free in ["barrier.sync 1;", "barrier.sync 0;", "barrier.cta.sync 7;", "bar.sync 2, 64;", "barrier.sync.aligned 3, 64;"] {
            let after = run(&text(free), 64, &[], &[0; 4], options.clone()).unwrap_or_else(|e| panic!("{free}: {e}"));
            assert_eq!(words(&after), [7], "{free}");
        }
        for one in ["bar.sync 0;", "bar.sync 1;", "barrier.sync.aligned 0;", "barrier.cta.sync.aligned 3;"] {
            let report = run(&text(one), 64, &[], &[0; 4], options.clone()).expect_err(one);
            assert!(report.fault == Fault::Barrier && report.message.contains("two lines meet"), "{one}: {report}");
            let off = Options { detectors: Detectors::all().without(Detector::BarrierSite), ..options.clone() };
            run(&text(one), 64, &[], &[0; 4], off).unwrap_or_else(|e| panic!("{one}: {e}"));
        }
    }
}

/// A write to the source of a bulk store before the wait is reported as that: the write is the place, the store
/// the earlier access.
#[test]
fn a_store_overwritten_before_it_is_read_says_so() {
    let text = |before: &str, after: &str| {
        format!(
            ".visible .entry k(.param .u64 out)\n{{\n\t.shared .align 128 .b8 tile[128];\n\t.reg .pred first, other;\n\t.reg .b32 i, at;\n\t.reg .b64 to;\n\
             \tld.param.u64 to, [out];\n\tmov.u32 at, tile;\n\tmov.u32 i, %tid.x;\n\tsetp.eq.u32 first, i, 0;\n\tsetp.eq.u32 other, i, 3;\n\
             \tshl.b32 i, i, 2;\n\tadd.u32 at, at, i;\n\tst.shared.u32 [at], i;\n\tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n\t{before}\n\
             \t@first cp.async.bulk.global.shared::cta.bulk_group [to], [at], 128;\n\t@first cp.async.bulk.commit_group;\n\t{after}\n\
             \t@first cp.async.bulk.wait_group 0;\n\tret;\n}}\n"
        )
    };
    let run = |text: &str, options: Options| run(text, 32, &[], &[0; 128], options);
    for options in Options::standard(4) {
        run(&text("", ""), options.clone()).unwrap_or_else(|e| panic!("{e}"));
        for (change, thread) in [
            ("@other st.shared.u32 [at], 9;", 3),
            ("@first st.shared.u32 [at], 9;", 0),
            ("bar.warp.sync -1;\n\t@other st.shared.u32 [at], 9;", 3),
        ] {
            let report = run(&text("", change), options.clone()).expect_err(change);
            let said = format!("by thread {thread} before the TMA store had read it");
            assert!(report.fault == Fault::DataRace && report.message.contains(&said), "{change}: {report}");
            assert_eq!(report.thread, Some([thread, 0, 0]), "{report}");
            let texts = [&report.place, &report.other].map(|place| place.as_ref().expect("both sides are known").ptx_text.clone());
            assert!(texts[0].contains("st.shared.u32 [at], 9;") && texts[1].contains("cp.async.bulk.global"), "{report}");
        }
        // A write before the store that nothing orders is an ordinary race.
        let report = run(&text("@other st.shared.u32 [at], 9;", ""), options.clone()).expect_err("a race");
        assert!(report.message.contains("unordered with earlier write by thread 3"), "{report}");
    }
}

/// Without `EqualWrites` threads may write the same bytes to the same place of shared memory by one instruction, and
/// nothing more.
#[test]
fn equal_writes() {
    let text = |store: &str, body: &str| {
        format!(
            ".visible .entry k(.param .u64 out)\n{{\n\t.shared .align 4 .b8 word[4];\n\t.reg .pred p;\n\t.reg .b32 r, i, at;\n\t.reg .b64 to;\n\
             \tld.param.u64 to, [out];\n\tmov.u32 at, word;\n\tmov.u32 i, %tid.x;\n\tsetp.eq.u32 p, i, 3;\n\
             \t{store}\n\tbar.sync 0;\n\t{body}\n\tret;\n}}\n"
        )
    };
    let lenient = Detectors::all().without(Detector::EqualWrites);
    let one = "st.shared.u32 [at], 7;";
    let cases = [
        // Lanes of a warp, and warps.
        (text(one, "ld.shared.u32 r, [at];"), true),
        (text("and.b32 r, i, 0;\n\tst.shared.u32 [at], r;", ""), true),
        // Other values: of every thread, or of one; bytes that stay the same do not count.
        (text("st.shared.u32 [at], i;", ""), false),
        (text("selp.u32 r, 8, 7, p;\n\tst.shared.u32 [at], r;", ""), false),
        // Another instruction, and a read.
        (text("@p st.shared.u32 [at], 7;\n\t@!p st.shared.u32 [at], 7;", ""), false),
        (text("st.shared.u32 [at], 7;\n\tld.shared.u32 r, [at];", ""), false),
        // Global memory.
        (text("st.global.u32 [to], 7;", ""), false),
    ];
    for options in Options::standard(4) {
        for (text, let_be) in &cases {
            let run = |detectors: Detectors| run(text, 64, &[], &[0; 4], Options { detectors, ..options.clone() });
            let report = run(Detectors::all()).expect_err(text);
            assert_eq!(report.fault, Fault::DataRace, "{text}: {report}");
            match run(lenient) {
                Ok(_) => assert!(let_be, "{text}: no report"),
                Err(report) => assert!(!let_be && report.fault == Fault::DataRace, "{text}: {report}"),
            }
            // Each of the two detectors has its own races.
            let other = run(Detectors::all().without(Detector::Race));
            assert!(other.is_err_and(|report| report.fault == Fault::DataRace) || !let_be, "{text}: no report");
        }
    }
}

/// Between an `mbarrier.init` and a bulk copy that signals it there must be a `fence.mbarrier_init` of the same
/// thread, or a `fence.proxy.async` of any thread on the path.
#[test]
fn who_may_fence_an_init() {
    let text = |own: &str, others: &str| {
        format!(
            ".visible .entry k(.param .u64 out)\n{{\n\t.shared .align 128 .b8 tile[128];\n\t.shared .align 8 .b8 bar[8];\n\t.reg .pred p, first, second;\n\t.reg .b32 i, at, b;\n\t.reg .b64 to;\n\
             \tld.param.u64 to, [out];\n\tmov.u32 at, tile;\n\tmov.u32 b, bar;\n\tmov.u32 i, %tid.x;\n\tsetp.eq.u32 first, i, 0;\n\tsetp.eq.u32 second, i, 1;\n\
             \t@first mbarrier.init.shared::cta.b64 [b], 1;\n\t{own}\n\tbar.sync 0;\n\t{others}\n\tbar.sync 0;\n\
             \t@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 128;\n\
             \t@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [to], 128, [b];\n\
             wait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [b], 0;\n\t@!p bra wait;\n\tret;\n}}\n"
        )
    };
    let init = "fence.mbarrier_init.release.cluster;";
    let proxy = "fence.proxy.async.shared::cta;";
    let cases = [
        (format!("@first {init}"), String::new(), true),
        (init.to_owned(), String::new(), true),
        (String::new(), format!("@first {init}"), true),
        (String::new(), format!("@second {proxy}"), true),
        (format!("@second {init}"), String::new(), false),
        (String::new(), format!("@second {init}"), false),
        (String::new(), String::new(), false),
    ];
    for (own, others, fenced) in cases {
        for schedule in [Schedule::InOrder, Schedule::Reverse, Schedule::Random(5)] {
            let options = Options { schedule, ..Options::default() };
            match run(&text(&own, &others), 32, &[], &[0; 128], options) {
                Ok(_) => assert!(fenced, "`{own}`, `{others}`: no report"),
                Err(report) => assert!(!fenced && report.fault == Fault::MissingProxyFence, "`{own}`, `{others}`: {report}"),
            }
        }
    }
}

/// Each lane's register counts for itself. The result of arithmetic on an unwritten register is unwritten; any
/// other read of one is a fault.
#[test]
fn registers_nobody_wrote() {
    let text = |body: &str| {
        format!(
            ".func (.param .b32 r) half(.param .b32 x)\n{{\n\t.reg .b32 a, b;\n\t.reg .pred p;\n\tld.param.b32 a, [x];\n\tsetp.gt.u32 p, a, 15;\n\
             \t@p mov.u32 b, 4;\n\t@p add.u32 a, b, 1;\n\tst.param.b32 [r], a;\n\tret;\n}}\n\
             .visible .entry k(.param .u64 out)\n{{\n\t.reg .b32 a, b, c, d, i;\n\t.reg .b16 h, l;\n\t.reg .b64 to, w;\n\t.reg .pred p, q, u;\n\
             \tmov.u32 i, %tid.x;\n\tsetp.lt.u32 p, i, 16;\n\tld.param.u64 to, [out];\n\tmad.wide.u32 to, i, 8, to;\n{body}\n\tret;\n}}\n"
        )
    };
    let call = "{\n.param .b32 from;\n.param .b32 back;\nst.param.b32 [from], i;\ncall (back), half, (from);\nld.param.b32 d, [back];\n}";
    let silent = [
        "@p mov.u32 a, 3;\n@p add.u32 b, a, 1;\n@p st.global.u32 [to], b;",
        "@p bra one;\nmov.u32 a, 3;\nbra met;\none:\nmov.u32 a, 4;\nmet:\nst.global.u32 [to], a;",
        // Results of unwritten registers that nothing reads.
        "mov.u32 b, a;\nmov.b64 w, {a, b};\nmov.b64 {c, d}, w;\nmov.b32 {h, l}, a;\nmov.pred q, u;\nadd.u32 c, a, 1;\nsetp.lt.u32 q, c, d;",
        "@p mov.u32 a, 3;\nadd.u32 b, a, 1;\nselp.b32 b, b, i, p;\nst.global.u32 [to], b;",
        "@p mov.u32 a, 3;\nadd.u32 b, a, 1;\n@p st.global.u32 [to], b;",
        "@p setp.lt.u32 u, i, 8;\nand.pred q, p, u;\n@q st.global.u32 [to], i;",
        "@!p setp.lt.u32 u, i, 24;\nor.pred q, u, p;\n@q st.global.u32 [to], i;",
        "@p mov.u32 a, 3;\nsetp.lt.and.u32 q, a, 8, p;\n@q st.global.u32 [to], i;",
        // The first time round the loop takes the other value.
        "setp.ne.u32 q, i, i;\nmov.u32 c, 0;\nloop:\n@q st.global.u32 [to], a;\nmov.u32 a, c;\nadd.u32 c, c, 1;\nsetp.gt.u32 q, c, 0;\nsetp.lt.u32 p, c, 4;\n@p bra loop;",
        "setp.eq.u32 q, i, i;\n@q mov.u32 a, 3;\nst.global.u32 [to], a;",
        call,
    ];
    let faults = [
        ("st.global.u32 [to], a;", "a", 0),
        ("@p mov.u32 a, 3;\nst.global.u32 [to], a;", "a", 16),
        ("@!p mov.u32 a, 3;\n@p st.global.u32 [to], a;", "a", 0),
        ("@p bra one;\nmov.u32 a, 3;\none:\nst.global.u32 [to], a;", "a", 0),
        ("@!p bra one;\nmov.u32 a, 3;\none:\nst.global.u32 [to], a;", "a", 16),
        ("@u st.global.u32 [to], i;", "u", 0),
        ("@u bra one;\none:\nadd.u32 a, i, 1;", "u", 0),
        ("@p setp.eq.u32 u, i, 3;\nselp.b32 b, 1, 2, u;\nst.global.u32 [to], b;", "b", 16),
        ("add.u64 w, w, 4;\nst.global.u32 [w], i;", "w", 0),
        ("shfl.sync.bfly.b32 b, a, 1, 31, -1;", "a", 0),
        ("mov.u32 b, a;\nadd.u32 c, b, 1;\nst.global.u32 [to], c;", "c", 0),
        ("mov.b64 w, {i, a};\nst.global.u64 [to], w;", "w", 0),
        ("mov.b64 w, {i, a};\nmov.b64 {c, d}, w;\nst.global.u32 [to], d;", "d", 0),
        ("@p mov.u32 a, 3;\nselp.b32 b, i, a, p;\nst.global.u32 [to], b;", "b", 16),
        ("@u mov.u32 i, 3;\nst.global.u32 [to], i;", "i", 0),
        ("mov.pred q, u;\n@q st.global.u32 [to], i;", "q", 0),
        ("@p setp.lt.u32 u, i, 8;\nor.pred q, p, u;\n@q st.global.u32 [to], i;", "q", 16),
        ("@p mov.u32 a, 3;\nsetp.lt.or.u32 q, a, 8, p;\n@q st.global.u32 [to], i;", "q", 16),
        ("mov.u32 c, 0;\nloop:\nst.global.u32 [to], a;\nmov.u32 a, c;\nadd.u32 c, c, 1;\nsetp.lt.u32 p, c, 4;\n@p bra loop;", "a", 0),
    ];
    for options in Options::standard(4) {
        for body in silent {
            run(&text(body), 32, &[], &[0; 256], options.clone()).unwrap_or_else(|e| panic!("{body}: {e}"));
        }
        let mistaken = text(call).replace("@p add.u32 a, b, 1;", "add.u32 a, b, 1;");
        let faults = faults.map(|(body, name, lane)| (text(body), name, lane)).into_iter().chain([(mistaken, "a", 0)]);
        for (text, name, first) in faults {
            let off = Options { detectors: Detectors::all().without(Detector::UnwrittenRegisters), ..options.clone() };
            let report = run(&text, 32, &[], &[0; 256], options.clone()).expect_err(&text);
            let said = report.message == format!("register {name} is read, but nothing wrote it or what it is made of");
            assert!(report.fault == Fault::UnwrittenRegister && said && report.lane == first, "{text}: {report}");
            if let Err(report) = run(&text, 32, &[], &[0; 256], off) {
                assert_ne!(report.fault, Fault::UnwrittenRegister, "{text}: {report}");
            }
        }
    }
}

/// One box of 16 words to or from memory, at a coordinate.
const COPY_A_ROW: &str = r"
.extern .shared .align 128 .b8 tile[];
.visible .entry k(.param .align 64 .b8 map[128], .param .u32 first)
{
	.reg .pred p;
	.reg .b32 base, bar, x, i;
	.reg .b64 desc;
	ld.param.u32 x, [first];
	mov.u32 base, tile;
	mov.b64 desc, map;
	cvta.param.u64 desc, desc;
	mov.u32 i, 0;
fill:
	add.u32 bar, base, i;
	st.shared.u32 [bar], 7;
	add.u32 i, i, 4;
	setp.lt.u32 p, i, 64;
	@p bra fill;
	add.u32 bar, base, 64;
	fence.proxy.async.shared::cta;
	COPY
	ret;
}
";
const LOAD_A_ROW: &str = r"
	mbarrier.init.shared::cta.b64 [bar], 1;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;
	cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [base], [desc, {x}], [bar];
wait:
	mbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;
	@!p bra wait;";
const STORE_A_ROW: &str =
    "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [desc, {x}], [base];\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;";

/// Runs the copy on a tensor of `words` words in a buffer of 64, and gives the buffer.
fn copy_a_row(copy: &str, words: u64, first: i32) -> Result<Vec<u8>, Box<Report>> {
    let mut gpu = Gpu::new(Options { step_limit: 100_000, ..Options::default() });
    let module = gpu.load("k.ptx", module(&COPY_A_ROW.replace("COPY", copy))).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("k").expect("it has an entry k");
    let address = gpu.alloc(256).expect("there is memory");
    gpu.write(address, &[0; 256]).expect("the buffer is that long");
    let desc = TensorMapDesc {
        element: ElementType::U32,
        address,
        dims: &[words],
        strides: &[],
        box_dims: &[16],
        element_strides: &[],
        interleave: Interleave::None,
        swizzle: Swizzle::None,
        l2_promotion: L2Promotion::None,
        oob_fill: OobFill::Zeros,
    };
    let mut params = gpu.encode_tensor_map(&desc).expect("a good map").0.to_vec();
    params.extend(first.to_le_bytes());
    gpu.launch(&kernel, &Launch { grid: [1, 1, 1], block: [1, 1, 1], params: &params, shared_bytes: 128, ..Launch::default() })?;
    let mut after = vec![0; 256];
    gpu.read(address, &mut after).expect("the buffer is that long");
    Ok(after)
}

/// A copy that begins elsewhere is an illegal instruction on an H100.
#[test]
fn tensor_copies_begin_on_16_bytes_of_a_row() {
    for copy in [LOAD_A_ROW, STORE_A_ROW] {
        for first in [0, 4, 60, 64, 100] {
            copy_a_row(copy, 64, first).unwrap_or_else(|e| panic!("{first}: {e}"));
        }
        for first in [1, 2, 63] {
            let report = copy_a_row(copy, 64, first).expect_err("no multiple of four words");
            let bytes = format!("{} bytes into a row", 4 * first);
            assert!(report.fault == Fault::Tma && report.message.contains(&bytes), "{report}");
        }
    }
}

/// A load may begin before the tensor; such a store is an illegal instruction on an H100.
#[test]
fn tensor_stores_do_not_begin_before_the_tensor() {
    copy_a_row(LOAD_A_ROW, 64, -4).unwrap_or_else(|e| panic!("{e}"));
    let report = copy_a_row(STORE_A_ROW, 64, -4).expect_err("before the tensor");
    assert!(report.fault == Fault::Tma && report.message.contains("coordinate -4"), "{report}");
}

/// Where a row ends within 16 bytes, an H100 stores all 16.
#[test]
fn tensor_stores_end_by_16_bytes() {
    for (words, stored) in [(64, 16), (16, 16), (13, 16), (12, 12), (9, 12), (1, 4)] {
        let after = copy_a_row(STORE_A_ROW, words, 0).unwrap_or_else(|e| panic!("{words}: {e}"));
        let want: Vec<u32> = (0..64).map(|i| if i < stored { 7 } else { 0 }).collect();
        assert_eq!(self::words(&after), want, "{words} words");
    }
}

/// Without clusters the copy is an illegal instruction on an H100.
#[test]
fn copies_from_shared_to_shared_memory_want_a_cluster() {
    let text = r"
.visible .entry k(.param .u64 out)
{
	.shared .align 128 .b8 from[16];
	.shared .align 128 .b8 to[16];
	.shared .align 8 .b64 bar;
	.reg .b32 a, b, c;
	mov.u32 a, from;
	mov.u32 b, to;
	mov.u32 c, bar;
	mbarrier.init.shared::cta.b64 [c], 1;
	fence.mbarrier_init.release.cluster;
	cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [b], [a], 16, [c];
	ret;
}
";
    let report = run(text, 1, &[], &[0; 4], Options::default()).expect_err("no cluster");
    assert!(report.fault == Fault::Tma && report.message.contains("without clusters"), "{report}");
}

/// An asynchronous store arrives when its mbarrier says so, and not before.
#[test]
fn asynchronous_stores_are_waited_for() {
    let text = |wait: &str| {
        format!(
            "
.visible .entry k(.param .u64 out)
{{
	.shared .align 8 .b64 bar;
	.shared .align 4 .b32 word;
	.reg .pred p;
	.reg .b32 at, there, barrier, remote, value;
	.reg .b64 to;
	ld.param.u64 to, [out];
	mov.u32 at, word;
	mov.u32 barrier, bar;
	mbarrier.init.shared::cta.b64 [barrier], 1;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], 4;
	mapa.shared::cluster.u32 there, at, 0;
	mapa.shared::cluster.u32 remote, barrier, 0;
	st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], 7, [remote];
{wait}
	ld.shared.u32 value, [at];
	st.global.u32 [to], value;
	ret;
}}
"
        )
    };
    let wait = "wait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [barrier], 0;\n\t@!p bra wait;";
    for options in Options::standard(2) {
        let after = run(&text(wait), 1, &[], &[0; 4], options.clone()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(words(&after), [7]);
        let report = run(&text(""), 1, &[], &[0; 4], options).expect_err("nobody waits");
        assert!(matches!(report.fault, Fault::DataRace | Fault::Uninitialised), "{report}");
    }
}
