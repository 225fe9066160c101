//! Bad input: malformed and truncated images, absurd sizes, launches beyond the limits, kernels that never end.
//!
//! Each must be refused or stopped with a sentence that holds the numbers concerned; none may panic, hang or allocate
//! what an image merely asks for.

use ptx_emulator::{Fault, Gpu, Kernel, Launch, MemoryError, Options, Report};
use std::fs;
use std::path::PathBuf;

fn image(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels").join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An entry `k` with one pointer and this body.
fn entry(body: &str) -> String {
    format!(".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n{body}\n\tret;\n}}\n")
}

/// Holds each text against the words its refusal must contain; all that fail are listed at once.
fn refused(texts: &[(String, &str)]) {
    let mut wrong = Vec::new();
    for (text, names) in texts {
        match Gpu::new(Options::default()).load("bad.ptx", text).map(|_| ()) {
            Ok(()) => wrong.push(format!("loads:\n{text}")),
            Err(error) if !error.to_string().contains(names) => wrong.push(format!("`{error}` names no `{names}`:\n{text}")),
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn load_error(text: impl AsRef<[u8]>) -> String {
    match Gpu::new(Options::default()).load("bad.ptx", text.as_ref()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("this loads: {}", String::from_utf8_lossy(text.as_ref()).chars().take(400).collect::<String>()),
    }
}

/// A device with `steps` warp instructions to spend and the entry `k` of a text.
fn device(text: &str, steps: u64) -> (Gpu, Kernel, u64) {
    let mut gpu = Gpu::new(Options { step_limit: steps, ..Options::default() });
    let module = gpu.load("k.ptx", text).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("k").expect("it has an entry k");
    let buffer = gpu.alloc(1024).expect("a kilobyte is there");
    gpu.write(buffer, &[0; 1024]).expect("the buffer is that long");
    (gpu, kernel, buffer)
}

/// Runs the body with one warp and returns its report.
fn report(body: &str) -> Box<Report> {
    let (mut gpu, kernel, buffer) = device(&entry(body), 100_000);
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() };
    gpu.launch(&kernel, &launch).expect_err("the launch fails")
}

#[test]
fn truncated_images_are_refused_with_a_line() {
    for name in ["ptx/vector_copy.ptx", "ptx/gemm.ptx", "ptx/cluster_gemm.ptx"] {
        let text = image(name);
        let lines = text.lines().count() as u32;
        // Inside the kernel every cut leaves something open.
        let body = text.find('{').expect("a body");
        let end = text.rfind('}').expect("its end");
        for cut in (body..end).step_by(211) {
            let error = Gpu::new(Options::default()).load("cut.ptx", &text[..cut]).map(|_| ()).expect_err("half a kernel is none");
            assert!(error.line <= lines + 1 && !error.message.is_empty(), "{name} cut at {cut}: {error}");
        }
        for cut in (0..body).step_by(17) {
            let _ = Gpu::new(Options::default()).load("cut.ptx", &text[..cut]);
        }
    }
}

/// Single bytes replaced: whatever loads is launched with few steps. No verdict is wanted, only an end.
#[test]
fn damaged_images_do_not_panic() {
    let text = image("ptx/warp_pairs.ptx").into_bytes();
    for (at, byte) in (0..text.len()).flat_map(|at| [b'{', b';', b'9', b'%', 0xFF].map(|byte| (at, byte))).step_by(3) {
        let mut damaged = text.clone();
        damaged[at] = byte;
        let mut gpu = Gpu::new(Options { step_limit: 2_000, ..Options::default() });
        let Ok(module) = gpu.load("damaged.ptx", &damaged) else { continue };
        let Ok(kernel) = module.kernel("warp_pairs") else { continue };
        let (x, y) = (gpu.alloc(512).expect("room"), gpu.alloc(512).expect("room"));
        gpu.write(x, &[7; 512]).expect("in bounds");
        let params: Vec<u8> = [x.to_le_bytes(), y.to_le_bytes()].concat();
        let _ = gpu.launch(&kernel, &Launch { grid: [2, 1, 1], block: [64, 1, 1], params: &params, ..Launch::default() });
    }
}

#[test]
fn malformed_text_is_refused_with_its_cause() {
    let texts = [
        // (text, what the message must name)
        (String::new(), ".version"),
        ("not ptx at all".into(), ""),
        (entry("\tadd.u32 %r1, %r2, %r3;"), "%r"),
        (entry("\t.reg .b32 %r<4>;\n\tadd.u32 %r1, %r2;"), "add.u32"),
        (entry("\t.reg .b32 %r<4>;\n\tadd.u33 %r1, %r2, %r3;"), "add.u33"),
        (entry("\t.reg .b32 %r<4>;\n\t.reg .f32 %f<4>;\n\tshl.f32 %f1, %f2, %r1;"), "shl.f32"),
        (entry("\tbra nowhere;"), "nowhere"),
        (entry("\t.reg .b32 %r<4>;\n\tld.global.u32 %r1, [q];"), "q"),
        (entry("\t.reg .b64 %d<4>;\n\tld.param.u64 %d1, [q];"), "q"),
        (entry("\tcall missing;"), "missing"),
        (entry("\t{{"), ""),
        (entry("\t.reg .b32 %r<4>;\n\tmov.u32 %r1, 99999999999999999999999;"), "99999999999999999999999"),
        (entry("\t.reg .b32 %r<4>\n\tmov.u32 %r1, 3;"), ""),
        (entry("\tx: x: ret;"), "x"),
        (entry("\t.reg .b32 %r<4>;\n\tsetmaxnreg.inc.sync.aligned.u32 7;"), "7"),
        (entry("\t.reg .b32 %r<4>;\n\tbar.sync 16;"), "16"),
    ];
    refused(&texts);
    assert!(load_error([b'.', 0xC3, 0x28]).contains("UTF-8"));
    // A string of openings, and a chain of signs, neither of which may use up the stack.
    load_error(entry(&"{".repeat(200_000)));
    load_error(entry(&format!("\t.reg .b32 %r<4>;\n\tmov.u32 %r1, {}1;", "-".repeat(200_000))));
    load_error(entry(&format!("\t.reg .b32 %r<4>;\n\tmov.u32 %r1, {}1;", "(".repeat(200_000))));
    load_error("/*".repeat(100_000));
    load_error("\"".repeat(100_001));
}

#[test]
fn absurd_sizes_are_refused_not_allocated() {
    let sizes = [
        (entry("\t.reg .b32 %r<4000000000>;"), "4000000000"),
        (entry("\t.reg .b32 %r<99999999999999999999>;"), "99999999999999999999"),
        (entry("\t.shared .align 16 .b8 s[300000];"), "300000"),
        (entry("\t.shared .align 16 .b8 s[1099511627776];"), "1099511627776"),
        (entry("\t.shared .align 16 .b8 s[18446744073709551615];"), "18446744073709551615"),
        (entry("\t.local .align 16 .b8 l[1099511627776];"), "1099511627776"),
        (entry("\t.shared .align 3 .b8 s[16];"), "3"),
        (".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .align 8 .b8 p[40000])\n{\n\tret;\n}\n".into(), "40000"),
        (".version 8.4\n.target sm_90a\n.address_size 64\n.global .align 4 .b8 g[1152921504606846976];\n.visible .entry k()\n{\n\tret;\n}\n".into(), ""),
    ];
    refused(&sizes);
}

#[test]
fn launches_beyond_the_limits_are_refused() {
    let (mut gpu, kernel, buffer) = device(&entry(""), 1000);
    let params = buffer.to_le_bytes();
    let base = Launch { grid: [1, 1, 1], block: [32, 1, 1], params: &params, ..Launch::default() };
    gpu.launch(&kernel, &base).expect("the plain launch is fine");
    let refused = [
        (Launch { grid: [0, 1, 1], ..base }, "0"),
        (Launch { block: [32, 0, 1], ..base }, "0"),
        (Launch { grid: [1 << 31, 1, 1], ..base }, "2147483648"),
        (Launch { grid: [1, 65536, 1], ..base }, "65536"),
        (Launch { grid: [1, 1, 65536], ..base }, "65536"),
        (Launch { block: [1025, 1, 1], ..base }, "1025"),
        (Launch { block: [1, 1025, 1], ..base }, "1025"),
        (Launch { block: [1, 1, 65], ..base }, "65"),
        (Launch { block: [64, 32, 1], ..base }, "2048"),
        (Launch { block: [u32::MAX, u32::MAX, u32::MAX], ..base }, "4294967295"),
        (Launch { cluster: Some([17, 1, 1]), grid: [17, 1, 1], ..base }, "17"),
        (Launch { cluster: Some([2, 1, 1]), grid: [3, 1, 1], ..base }, "3"),
        (Launch { cluster: Some([0, 1, 1]), ..base }, "0"),
        (Launch { shared_bytes: 49_153, ..base }, "49153"),
        (Launch { shared_bytes: u32::MAX, ..base }, "4294967295"),
        (Launch { params: &params[..7], ..base }, "7"),
        (Launch { params: &[0; 16], ..base }, "16"),
        (Launch { params: &[], ..base }, "0"),
    ];
    for (launch, number) in refused {
        let report = gpu.launch(&kernel, &launch).expect_err("beyond a limit");
        assert_eq!(report.fault, Fault::Launch, "{report}");
        assert!(report.message.contains(number), "`{}` does not say {number}", report.message);
    }
    let mut kernel = kernel;
    assert!(kernel.set_max_dynamic_shared(232_449).expect_err("beyond the multiprocessor").to_string().contains("232449"));
    kernel.set_max_dynamic_shared(232_448).expect("the whole of it");
    gpu.launch(&kernel, &Launch { shared_bytes: 232_448, ..base }).expect("the whole of it");
}

#[test]
fn the_declared_block_size_is_a_limit() {
    let text = entry("").replace("(.param .u64 p)", "(.param .u64 p)\n.maxntid 64, 1, 1");
    let (mut gpu, kernel, buffer) = device(&text, 1000);
    let launch = Launch { grid: [1, 1, 1], block: [96, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() };
    let report = gpu.launch(&kernel, &launch).expect_err("96 threads are more than 64");
    assert!(report.fault == Fault::Launch && report.message.contains("96") && report.message.contains("64"), "{report}");
}

#[test]
fn a_missing_entry_lists_those_there_are() {
    let mut gpu = Gpu::new(Options::default());
    let module = gpu.load("k.ptx", entry("")).expect("it loads");
    let error = module.kernel("other").expect_err("there is no such entry").to_string();
    assert!(error.contains("other") && error.contains('k'), "{error}");
}

#[test]
fn endless_loops_end_at_the_step_limit() {
    let report = report("again:\n\tbra again;");
    assert_eq!(report.fault, Fault::StepLimit, "{report}");
    assert!(report.message.contains("100000"), "{report}");
}

#[test]
fn endless_recursion_ends() {
    let text = ".version 8.4\n.target sm_90a\n.address_size 64\n.func f()\n{\n\t.local .align 4 .b8 frame[64];\n\tcall f;\n\tret;\n}\n.visible .entry k(.param .u64 p)\n{\n\tcall f;\n\tret;\n}\n";
    let (mut gpu, kernel, buffer) = device(text, 10_000_000);
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() };
    let report = gpu.launch(&kernel, &launch).expect_err("no stack is deep enough");
    assert_eq!(report.fault, Fault::Stack, "{report}");
}

#[test]
fn faults_of_single_instructions() {
    let faults = [
        ("\ttrap;", Fault::Trap, ""),
        ("\t.reg .b64 a;\n\t.reg .b32 x;\n\tmov.u64 a, 0;\n\tld.global.u32 x, [a];", Fault::OutOfBounds, "0x0"),
        ("\t.reg .b64 a;\n\t.reg .b32 x;\n\tld.param.u64 a, [p];\n\tld.global.u32 x, [a+1024];", Fault::OutOfBounds, "offset 1024"),
        ("\t.reg .b64 a;\n\t.reg .b32 x;\n\tld.param.u64 a, [p];\n\tld.global.u32 x, [a+1018];", Fault::Misaligned, "4-byte"),
        ("\t.reg .b64 a;\n\t.reg .b32 x;\n\tld.param.u64 a, [p];\n\tst.global.u32 [a+-4], 1;", Fault::OutOfBounds, "4-byte write"),
        ("\t.reg .b32 x;\n\tmov.u32 x, 0;\n\tst.shared.u32 [x], x;", Fault::OutOfBounds, "shared"),
        ("\t.reg .b64 a;\n\tmov.u64 a, 64;\n\tst.local.u32 [a], 3;", Fault::OutOfBounds, "local"),
        ("\t.reg .b32 x;\n\tmov.u32 x, %tid.x;\n\tt: .branchtargets one, two;\n\tbrx.idx x, t;\n\tone:\n\ttwo:", Fault::BadOperand, "2"),
        ("\t.reg .b32 x;\n\tmov.u32 x, 33;\n\tbar.sync x;", Fault::Barrier, "33"),
        ("\t.reg .b32 x;\n\tmov.u32 x, 31;\n\tbarrier.sync 1, x;", Fault::Barrier, "31"),
    ];
    for (body, fault, names) in faults {
        let report = report(body);
        assert_eq!(report.fault, fault, "{report}");
        assert!(report.message.contains(names), "`{}` names no `{names}`", report.message);
        let place = report.place.expect("a fault of an instruction has a place");
        assert!(place.ptx_line > 0 && place.function == "k", "{place}");
    }
}

/// Bytes that no encoder made are not a tensor map.
#[test]
fn a_forged_tensor_map_is_refused() {
    let text = ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .align 128 .b8 map[128])\n{\n\t.shared .align 128 .b8 tile[1024];\n\t.shared .align 8 .b64 cell;\n\t.reg .b32 to, bar, x;\n\t.reg .b64 desc;\n\t\
                mov.u32 to, tile;\n\tmov.u32 bar, cell;\n\tmov.u32 x, 0;\n\tmov.b64 desc, map;\n\tcvta.param.u64 desc, desc;\n\tmbarrier.init.shared::cta.b64 [bar], 1;\n\t\
                cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [to], [desc, {x, x}], [bar];\n\tret;\n}\n";
    let mut gpu = Gpu::new(Options::default());
    let kernel = gpu.load("k.ptx", text).expect("it loads").kernel("k").expect("it has an entry k");
    for byte in [0u8, 0xFF, 0x41] {
        let report = gpu
            .launch(&kernel, &Launch { grid: [1, 1, 1], block: [1, 1, 1], params: &[byte; 128], ..Launch::default() })
            .expect_err("no map");
        assert_eq!(report.fault, Fault::Tma, "{report}");
    }
}

#[test]
fn memory_calls_check_their_ranges() {
    let mut gpu = Gpu::new(Options { memory_limit: 1 << 20, ..Options::default() });
    let buffer = gpu.alloc(100).expect("it fits");
    assert!(gpu.write(buffer, &[0; 101]).is_err());
    assert!(gpu.write(buffer + 99, &[0; 2]).is_err());
    assert!(gpu.write(buffer.wrapping_sub(1), &[0; 1]).is_err());
    assert!(gpu.write(u64::MAX, &[0; 8]).is_err());
    assert!(gpu.read(buffer, &mut [0; 101]).is_err());
    assert!(gpu.fill(buffer, 1, u64::MAX).is_err());
    assert!(gpu.copy(buffer, buffer + 50, 51).is_err());
    assert!(gpu.free(buffer + 1).is_err());
    assert!(matches!(gpu.alloc(2 << 20), Err(MemoryError::OutOfMemory { need_bytes, .. }) if need_bytes >= 2 << 20));
    assert!(gpu.alloc(u64::MAX).is_err());
    gpu.free(buffer).expect("it is live");
    assert!(gpu.free(buffer).is_err(), "freed twice");
    assert!(gpu.read(buffer, &mut [0; 1]).is_err(), "read after free");
    let empty = gpu.alloc(0).expect("nothing always fits");
    gpu.write(empty, &[]).expect("nothing into nothing");
}

/// A huge buffer with few touched pages costs little, and addresses beyond 4 GiB in it are right.
#[test]
fn offsets_beyond_32_bits() {
    let size = 6u64 << 30;
    let far = size - 64;
    let (mut gpu, kernel, _) = device(
        &entry(&format!(
            "\t.reg .b64 a;\n\t.reg .b32 x;\n\tld.param.u64 a, [p];\n\tadd.u64 a, a, {far};\n\tmov.u32 x, %tid.x;\n\tst.global.u32 [a+16], 77;"
        )),
        1000,
    );
    let buffer = gpu.alloc(size).expect("80 GiB are claimed");
    gpu.launch(&kernel, &Launch { grid: [1, 1, 1], block: [1, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() })
        .expect("in bounds");
    let mut word = [0; 4];
    gpu.read(buffer + far + 16, &mut word).expect("in bounds");
    assert_eq!(word, 77u32.to_le_bytes());
}

/// What lies next to the forms that run is refused by name.
#[test]
fn forms_beyond_the_model_are_refused() {
    let registers = ".reg .b32 r<8>;\n.reg .b64 d<8>;\n.reg .f64 f<8>;\n.reg .b16 h<4>;\n.reg .pred q;\nmov.pred q, 0;";
    let sums = |n: usize| (0..n).map(|i| format!("%s{i}")).collect::<Vec<_>>().join(", ");
    let wgmma = |shape: &str, types: &str, n: usize| {
        format!(".reg .b32 %s<128>;\nwgmma.mma_async.sync.aligned.{shape}.{types} {{{}}}, d0, d1, q;", sums(n))
    };
    let bodies = [
        (wgmma("m64n40k32", "s32.s8.s8", 20), "m64n40k32"),
        (wgmma("m64n16k16", "s32.s8.s8", 8), "m64n16k16"),
        (wgmma("m64n8k256", "s32.b1.b1.and.popc", 4), "m64n8k256"),
        (wgmma("m64n8k16", "f32.tf32.tf32", 4), "m64n8k16"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64.rz {f0, f1}, {f2}, {f3}, {f4, f5};".to_owned(), "f64"),
        ("tensormap.replace.tile.swizzle_mode.global.b1024.b32 [d0], 4;".to_owned(), "swizzle_mode.global.b1024.b32 with 4"),
        ("tensormap.replace.tile.elemtype.global.b1024.b32 [d0], 13;".to_owned(), "elemtype.global.b1024.b32 with 13"),
        ("tensormap.replace.tile.interleave_layout.global.b1024.b32 [d0], 1;".to_owned(), "interleave_layout.global.b1024.b32 with 1"),
        ("tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [d0], 0;".to_owned(), "swizzle_atomicity"),
        ("tensormap.replace.tile.global_stride.global.b1024.b32 [d0], 0, r0;".to_owned(), "global_stride"),
        ("tensormap.replace.tile.box_dim.global.b1024.b32 [d0], 5, r0;".to_owned(), "0..=4"),
        ("fence.proxy.tensormap::generic.acquire.gpu [d0], 64;".to_owned(), "128..=128"),
        ("cvt.sat.bf16.f16 h0, h1;".to_owned(), "cvt.sat.bf16.f16"),
        ("cvt.rn.relu.f16.bf16 h0, h1;".to_owned(), "cvt.rn.relu.f16.bf16"),
    ];
    refused(&bodies.map(|(body, names)| (entry(&format!("{registers}\n{body}")), names)));
    let on_device = |field: &str| {
        format!(
            ".reg .b64 at;\nld.param.u64 at, [p];\n.reg .pred first;\n.reg .b32 i;\nmov.u32 i, %tid.x;\nsetp.eq.u32 first, i, 0;\n\
             @first tensormap.replace.tile.{field};"
        )
    };
    for (field, said) in [
        ("element_stride.global.b1024.b32 [at], 0, 2", "`element_stride 0` other than 1 is not implemented, got 2"),
        ("global_address.global.b1024.b64 [at], 24", "`global_address` must be non-zero and a multiple of 16, got 24"),
        ("box_dim.global.b1024.b32 [at], 1, 257", "`box_dim 1` must be in 1..=256, got 257"),
        ("rank.global.b1024.b32 [at], 5", "`rank` must be in 0..=4"),
    ] {
        let report = report(&on_device(field));
        assert!(report.fault == Fault::Tma && report.message.contains(said), "{field}: {report}");
    }
}
