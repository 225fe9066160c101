//! Speed of the emulator: thread instructions per second with and without detectors, and the time of one wgmma, alone and as part of a
//! whole kernel.
//!
//! `cargo bench -p ptx-emulator`. The targets are 100 M thread instructions/s on one core without detectors and 30 M with them on
//! integer and f32 code, and 30 us per `wgmma.m64n128k16`. Each case is checked before it is timed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ptx_emulator::{Detectors, ElementType, Gpu, Interleave, Kernel, L2Promotion, Launch, OobFill, Options, Stats, Swizzle, TensorMapDesc};

/// A loop of integer and f32 arithmetic, with a store at the end.
const ARITHMETIC: &str = r"
.version 8.4
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out) {
    .reg .pred %p; .reg .b32 %r<12>; .reg .f32 %f<8>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    cvt.rn.f32.u32 %f1, %r1; mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f3F000000;
    mov.u32 %r5, 0; mov.u32 %r6, %r4;
loop:
    mad.lo.u32 %r6, %r6, 1664525, 1013904223;
    shr.u32 %r7, %r6, 9;
    xor.b32 %r6, %r6, %r7;
    fma.rn.f32 %f2, %f2, %f3, %f1;
    add.f32 %f4, %f2, %f1;
    mul.f32 %f1, %f4, %f3;
    and.b32 %r8, %r6, 255;
    cvt.rn.f32.u32 %f5, %r8;
    add.f32 %f2, %f2, %f5;
    setp.gt.f32 %p, %f2, 0f447A0000;
    selp.f32 %f2, 0f3F800000, %f2, %p;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p, %r5, 200;
    @%p bra loop;
    mul.wide.u32 %rd2, %r4, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r6;
    ret;
}";

/// A block-wide tree reduction through shared memory, from and to global memory: accesses and barriers.
const MEMORY: &str = r"
.version 8.4
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out) {
    .reg .pred %p; .reg .b32 %r<12>; .reg .f32 %f<4>; .reg .b64 %rd<4>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r2, 8; add.u32 %r3, %r3, %r1;
    mul.wide.u32 %rd2, %r3, 4; add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r4, tile; shl.b32 %r5, %r1, 2; add.u32 %r5, %r4, %r5;
    mov.u32 %r9, 0;
again:
    ld.global.f32 %f1, [%rd3];
    st.shared.f32 [%r5], %f1;
    mov.u32 %r6, 512;
tree:
    bar.sync 0;
    add.u32 %r7, %r5, %r6;
    shr.u32 %r8, %r6, 2;
    setp.ge.u32 %p, %r1, %r8;
    @%p bra skip;
    ld.shared.f32 %f2, [%r7];
    ld.shared.f32 %f1, [%r5];
    add.f32 %f1, %f1, %f2;
    st.shared.f32 [%r5], %f1;
skip:
    shr.u32 %r6, %r6, 1;
    setp.gt.u32 %p, %r6, 3;
    @%p bra tree;
    bar.sync 0;
    ld.shared.f32 %f1, [tile];
    bar.sync 0;
    st.global.f32 [%rd3], %f1;
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p, %r9, 4;
    @%p bra again;
    ret;
}";

/// 64 products of 64 x 128 x 16 in groups of 4, on tiles in shared memory.
fn wgmma() -> String {
    let regs: Vec<String> = (0..64).map(|i| format!("%f{i}")).collect();
    let product = format!("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {{{}}}, %rd4, %rd5, 1, 1, 1, 0, 0;\n", regs.join(", "));
    let clear: String = regs.iter().map(|r| format!("mov.f32 {r}, 0f00000000;\n")).collect();
    format!(
        r"
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .u64 out) {{
    .reg .pred %p; .reg .b32 %r<12>; .reg .f32 %f<64>; .reg .b64 %rd<8>;
    mov.u32 %r1, %tid.x; mov.u32 %r2, smem; shl.b32 %r3, %r1, 4; add.u32 %r3, %r2, %r3;
    mov.u32 %r4, 0; mov.u32 %r5, 0x3f803f80;
fill:
    st.shared.v4.b32 [%r3], {{%r5, %r5, %r5, %r5}};
    add.u32 %r3, %r3, 2048; add.u32 %r4, %r4, 1;
    setp.lt.u32 %p, %r4, 12;
    @%p bra fill;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {clear}
    shr.u32 %r6, %r2, 4; cvt.u64.u32 %rd1, %r6;
    or.b64 %rd4, %rd1, 0x4000004000010000;
    add.s64 %rd5, %rd4, 512;
    mov.u32 %r4, 0;
loop:
    wgmma.fence.sync.aligned;
    {product}{product}{product}{product}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p, %r4, 16;
    @%p bra loop;
    ld.param.u64 %rd6, [out];
    mul.wide.u32 %rd7, %r1, 4; add.s64 %rd6, %rd6, %rd7;
    st.global.f32 [%rd6], %f0;
    ret;
}}"
    )
}

/// A whole kernel of the common form: persistent blocks in clusters of two, TMA with multicast, tiles of 128 x 256 x 64.
const GEMM: &str = include_str!("../kernels/ptx/persistent_gemm.ptx");

struct Case {
    gpu: Gpu,
    kernel: Kernel,
    /// Where the result is.
    buffer: u64,
    grid: u32,
    block: u32,
    shared_bytes: u32,
    params: Vec<u8>,
}

impl Case {
    fn new(ptx: &str, grid: u32, block: u32, shared_bytes: u32, options: Options) -> Case {
        let mut gpu = Gpu::new(options);
        let module = gpu.load("bench.ptx", ptx).expect("the image loads");
        let kernel = module.kernel("k").expect("entry k");
        let bytes = u64::from(grid * block) * 4;
        let buffer = gpu.alloc(bytes).expect("room");
        gpu.fill(buffer, 0, bytes).expect("inside");
        Case { gpu, kernel, buffer, grid, block, shared_bytes, params: buffer.to_le_bytes().to_vec() }
    }

    /// 256 x 256 x 256 in bf16, all ones: one tile for each of two CTAs, four steps, 64 products of 64 x 256 x 16.
    fn gemm(options: Options) -> Case {
        const SIZE: u64 = 256;
        let mut gpu = Gpu::new(options);
        let module = gpu.load("persistent_gemm.ptx", GEMM).expect("the image loads");
        let mut kernel = module.kernel("persistent_gemm").expect("its entry");
        let shared_bytes = 3 * 49152 + 65536 + 48;
        kernel.set_max_dynamic_shared(shared_bytes).expect("what a block may have");
        let ones: Vec<u8> = [0x80, 0x3f].repeat((SIZE * SIZE) as usize);
        let (mut params, mut buffer) = (Vec::new(), 0);
        for tile_rows in [128, 128, 64] {
            buffer = gpu.alloc(2 * SIZE * SIZE).expect("room");
            gpu.write(buffer, &ones).expect("inside");
            let map = gpu.encode_tensor_map(&TensorMapDesc {
                element: ElementType::Bf16,
                address: buffer,
                dims: &[SIZE, SIZE],
                strides: &[2 * SIZE],
                box_dims: &[64, tile_rows],
                element_strides: &[],
                interleave: Interleave::None,
                swizzle: Swizzle::B128,
                l2_promotion: L2Promotion::None,
                oob_fill: OobFill::Zeros,
            });
            params.extend(map.expect("a valid map").0);
        }
        params.extend([1u32, 1, SIZE as u32 / 64].iter().flat_map(|v| v.to_le_bytes()));
        params.resize(params.len().next_multiple_of(128), 0);
        Case { gpu, kernel, buffer, grid: 2, block: 384, shared_bytes, params }
    }

    fn run(&mut self) -> Stats {
        let launch = Launch {
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            shared_bytes: self.shared_bytes,
            params: &self.params,
            ..Launch::default()
        };
        self.gpu.launch(&self.kernel, &launch).unwrap_or_else(|r| panic!("{r}"))
    }
}

fn detectors() -> [(&'static str, Detectors); 2] {
    [("plain", Detectors::none()), ("detectors", Detectors::all())]
}

fn speed(c: &mut Criterion) {
    for (name, ptx) in [("arithmetic", ARITHMETIC), ("shared_reduction", MEMORY)] {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for (mode, detectors) in detectors() {
            let mut case = Case::new(ptx, 8, 256, 0, Options { detectors, ..Options::default() });
            let stats = case.run();
            group.throughput(Throughput::Elements(stats.thread_instructions));
            group.bench_function(BenchmarkId::from_parameter(mode), |b| b.iter(|| case.run()));
        }
        let mut case = Case::new(ptx, 8, 256, 0, Options { workers: 2, ..Options::default() });
        group.bench_function(BenchmarkId::from_parameter("detectors, 2 workers"), |b| b.iter(|| case.run()));
        group.finish();
    }
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("wgmma_m64n128k16");
    group.sample_size(10);
    for (mode, detectors) in detectors() {
        let mut case = Case::new(&wgmma(), 1, 128, 24 << 10, Options { detectors, ..Options::default() });
        let stats = case.run();
        assert_eq!(stats.wgmmas, 64);
        let mut out = [0; 4];
        case.gpu.read(case.buffer, &mut out).expect("inside");
        assert_eq!(f32::from_le_bytes(out), 64.0 * 16.0, "64 products of 16 ones");
        group.throughput(Throughput::Elements(stats.wgmmas));
        group.bench_function(BenchmarkId::from_parameter(mode), |b| b.iter(|| case.run()));
    }
    group.finish();
    let mut group = c.benchmark_group("gemm_256x256x256");
    group.sample_size(10);
    for (mode, detectors) in detectors() {
        let mut case = Case::gemm(Options { detectors, ..Options::default() });
        let stats = case.run();
        assert_eq!(stats.wgmmas, 64);
        let mut out = vec![0; 2 * 256 * 256];
        case.gpu.read(case.buffer, &mut out).expect("inside");
        assert!(out.chunks(2).all(|b| b == [0x80, 0x43]), "256 everywhere");
        group.throughput(Throughput::Elements(stats.wgmmas));
        group.bench_function(BenchmarkId::from_parameter(mode), |b| b.iter(|| case.run()));
    }
    group.finish();
}

/// Seconds this process has run, where Linux tells.
fn processor_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? / 1e9)
}

/// The same cases in processor time, which a busy machine does not stretch.
fn processor_time(_: &mut Criterion) {
    for (mode, detectors) in detectors() {
        let options = Options { detectors, ..Options::default() };
        for (name, mut case) in [
            ("arithmetic", Case::new(ARITHMETIC, 8, 256, 0, options.clone())),
            ("shared_reduction", Case::new(MEMORY, 8, 256, 0, options.clone())),
            ("wgmma_m64n128k16", Case::new(&wgmma(), 1, 128, 24 << 10, options.clone())),
            ("gemm_256x256x256, m64n256k16", Case::gemm(options.clone())),
        ] {
            let stats = case.run();
            const RUNS: u32 = 40;
            let Some(start) = processor_seconds() else { return };
            (0..RUNS).for_each(|_| drop(case.run()));
            let seconds = (processor_seconds().unwrap_or(start) - start) / f64::from(RUNS);
            if stats.wgmmas > 0 {
                println!("{name}, {mode}: {:.1} us of processor time per wgmma", seconds * 1e6 / stats.wgmmas as f64);
            } else {
                println!(
                    "{name}, {mode}: {:.0} M thread instructions per second of processor time",
                    stats.thread_instructions as f64 / seconds / 1e6
                );
            }
        }
    }
}

criterion_group!(benches, speed, products, processor_time);
criterion_main!(benches);
