//! Products with quantised weights of every format in the order of a checkpoint, on every GPU there is: the
//! plain form, which gives the bits of the f32 product with the decoded weights. `grouped_gemm_quantized` tests
//! what the tensor cores multiply.

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, Epilogue, GluEpilogue};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::{
    Bf16, Buffer, DType, ExpertRows, ExpertWeights, F16, Float, Format, QuantizedRows, Routing, RoutingBuffers, Stream, TokenIds,
    WeightRows, Workspace, embedding, grouped_gemm,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};

use crate::grouped_gemm::{offsets, owners};
use crate::grouped_gemm_quantized::{Kind, Quantized, Scales, e4m3, int4};
use crate::oracle;

const ALL: usize = usize::MAX;

/// Every format; those whose scales lie apart with blocks of several sizes, and scales of every type.
const KINDS: [Kind; 16] = [
    e4m3([1, ALL], DType::F32),
    e4m3([3, 5], DType::Bf16),
    e4m3([12, 32], DType::F16),
    Kind::Mxfp4,
    int4(32, DType::F32, true),
    int4(24, DType::Bf16, false),
    int4(ALL, DType::F16, true),
    Kind::Gguf(Format::Q8_0),
    Kind::Gguf(Format::Q4_0),
    Kind::Gguf(Format::Q4_1),
    Kind::Gguf(Format::Q5_0),
    Kind::Gguf(Format::Q5_1),
    Kind::Gguf(Format::Q4K),
    Kind::Gguf(Format::Q5K),
    Kind::Gguf(Format::Q6K),
    Kind::Gguf(Format::GgufMxfp4),
];

/// A width of the format: no multiple of 8 or of 32 where there is one.
fn ragged(kind: Kind) -> usize {
    match kind {
        Kind::E4m3 { .. } => 77,
        Kind::Int4 { .. } => 59,
        Kind::Mxfp4 => 96,
        Kind::Gguf(format) => (96 / format.block_elements()).max(1) * format.block_elements(),
    }
}

/// Outputs of an expert: whole blocks of scales and of zero points where experts are stacked.
fn outputs(kind: Kind) -> usize {
    match kind {
        Kind::E4m3 { .. } => 36,
        Kind::Int4 { zeros: true, .. } => 40,
        _ => 35,
    }
}

/// Weights in the order of a checkpoint, and the same decoded, on one device.
fn both<R>(stream: &Stream, w: &Quantized, work: impl FnOnce(ExpertWeights<'_>, ExpertWeights<'_>) -> R) -> R {
    let floats = Buffer::from_slice(stream, &w.decoded()).unwrap();
    let floats = ExpertWeights::nk(floats.rows(w.experts * w.n, w.k).unwrap(), w.experts).unwrap();
    w.rows(stream, |rows| work(ExpertWeights::nk(rows, w.experts).unwrap(), floats))
}

/// Rows of experts of these sizes.
fn owned<'a>(offsets: &'a Buffer<u32>, sizes: &[u32]) -> ExpertRows<'a> {
    let rows = sizes.iter().sum::<u32>() as usize;
    // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
    unsafe { ExpertRows::from_raw(offsets.rows(1, sizes.len() + 1).unwrap(), rows, rows).unwrap() }
}

fn product<T: Float + Bits, O: Float + Bits>(stream: &Stream, x: &[T], w: ExpertWeights<'_>, sizes: &[u32]) -> Vec<O> {
    let rows = sizes.iter().sum::<u32>() as usize;
    let (x, offsets) = (Guarded::with(stream, x, rows, w.k(), 8), Buffer::from_slice(stream, &offsets(sizes)).unwrap());
    guard::run::<O>(stream, rows, w.n(), |y| grouped_gemm::nt(stream, x.view(), w, owned(&offsets, sizes), y).unwrap())
}

fn widened<T: Float>(x: &[T]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

fn rounded<T: Float>(x: &[f32]) -> Vec<T> {
    x.iter().map(|x| T::from_f32(*x)).collect()
}

/// The bits of the f32 product of the same numbers, rounded once to `T` or not at all.
fn bits_of_floats<T: Float + Bits>(stream: &Stream, kind: Kind, sizes: &[u32], n: usize, k: usize) {
    let w = Quantized::new(7, kind, sizes.len(), n, k, false);
    let x = normal::<T>(1, sizes.iter().sum::<u32>() as usize * k, 1.0);
    both(stream, &w, |quantized, floats| {
        let want = product::<f32, f32>(stream, &widened(&x), floats, sizes);
        same_bits(&product::<T, f32>(stream, &x, quantized, sizes), &want);
        same_bits(&product::<T, T>(stream, &x, quantized, sizes), &rounded::<T>(&want));
    });
}

/// Experts without rows, with one and with more than a tile; all rows to one; widths that end within a tile.
#[test]
fn every_format_gives_the_bits_of_its_decoded_weights() {
    device::each_gpu(|stream| {
        for kind in KINDS {
            bits_of_floats::<f32>(stream, kind, &[0, 33, 1, 0, 7], outputs(kind), ragged(kind));
            bits_of_floats::<Bf16>(stream, kind, &[3, 0, 6], outputs(kind), ragged(kind));
            bits_of_floats::<F16>(stream, kind, &[0, 0, 9], outputs(kind), ragged(kind));
        }
    });
}

/// Widths and numbers of outputs around the edges of runs, tiles and blocks.
#[test]
fn edges_of_every_format() {
    let (driver, stream) = device::emulated();
    for k in [1, 7, 8, 9, 31, 33, 129] {
        bits_of_floats::<F16>(&stream, e4m3([1, 3], DType::F32), &[2], 3, k);
        bits_of_floats::<F16>(&stream, e4m3([128, 128], DType::Bf16), &[2], 33, k);
        bits_of_floats::<F16>(&stream, int4(ALL, DType::Bf16, true), &[2], 1, k);
        bits_of_floats::<F16>(&stream, int4(8, DType::F16, false), &[2], 31, k);
    }
    for n in [1, 31, 32, 33, 65] {
        bits_of_floats::<Bf16>(&stream, Kind::Mxfp4, &[2], n, 32);
        bits_of_floats::<Bf16>(&stream, Kind::Gguf(Format::Q8_0), &[2], n, 64);
        bits_of_floats::<Bf16>(&stream, Kind::Gguf(Format::Q6K), &[2], n, 512);
    }
    assert_eq!(driver.reports(), [""; 0]);
}

fn against_oracle<T: Float + Bits, O: Float + Bits>(stream: &Stream, kind: Kind) {
    let (sizes, n, k) = ([5, 0, 2], outputs(kind), ragged(kind));
    let w = Quantized::new(3, kind, 3, n, k, false);
    let (x, owner) = (normal::<T>(1, 7 * k, 1.0), owners(&offsets(&sizes)));
    let (numbers, values, all) = (to_f64(&x), w.values(), (0..7).collect::<Vec<_>>());
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let want = oracle::grouped_gemm::nt(&numbers, &values, &all, &owner, n, k);
    let magnitudes = oracle::grouped_gemm::nt(&abs(&numbers), &abs(&values), &all, &owner, n, k);
    let got = w.rows(stream, |rows| product::<T, O>(stream, &x, ExpertWeights::nk(rows, 3).unwrap(), &sizes));
    within(&got, &want, n, |i| sum_bound::<O>(want[i], k, magnitudes[i]));
}

#[test]
fn every_format_is_multiplied_right() {
    device::each_gpu(|stream| {
        for kind in KINDS {
            against_oracle::<f32, f32>(stream, kind);
            against_oracle::<Bf16, Bf16>(stream, kind);
            against_oracle::<Bf16, f32>(stream, kind);
            against_oracle::<F16, F16>(stream, kind);
            against_oracle::<F16, f32>(stream, kind);
        }
    });
}

/// Both products with a gate and biases, rows gathered by the kernel: the bits of f32 again.
fn gated<T: Float + Bits>(stream: &Stream, kinds: [Kind; 2], glu: Glu, n: usize, k: usize) {
    let (tokens, top_k, experts) = (9, 2, 3);
    let [gate, up] = [0, 1].map(|i| Quantized::new(5 + i as u64, kinds[i], experts, n, k, false));
    let (x, biases) = (normal::<T>(4, tokens * k, 1.0), [7, 8].map(|seed| normal::<T>(seed, experts * n, 1.0)));
    let ids: Vec<u32> = (0..tokens as u32).flat_map(|t| [t % 2, 2]).collect();
    let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
    let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
    fn run<A: Float + Bits>(
        stream: &Stream,
        x: &[A],
        [gate, up]: [ExpertWeights<'_>; 2],
        biases: &[Vec<A>; 2],
        glu: Glu,
        routing: &Routing<'_>,
    ) -> Vec<A> {
        let x = Guarded::with(stream, x, x.len() / gate.k(), gate.k(), 8);
        let biases = biases.each_ref().map(|bias| Guarded::with(stream, bias, gate.num_experts(), gate.n(), 0));
        let epilogue = GluEpilogue::default().with_glu(glu).with_biases(biases.each_ref().map(|bias| Bias::new(bias.view())));
        let rows = routing.gathered_rows();
        guard::run::<A>(stream, rows.rows(), gate.n(), |h| {
            grouped_gemm::glu(stream, x.view(), gate, up, rows, &epilogue, h).unwrap();
        })
    }
    both(stream, &gate, |gate, float_gate| {
        both(stream, &up, |up, float_up| {
            let wide = biases.each_ref().map(|bias| widened(bias));
            let want = run::<f32>(stream, &widened(&x), [float_gate, float_up], &wide, glu, &routing);
            same_bits(&run::<T>(stream, &x, [gate, up], &biases, glu, &routing), &rounded::<T>(&want));
        });
    });
}

#[test]
fn gates_of_every_format() {
    device::each_gpu(|stream| {
        for (i, kind) in KINDS.into_iter().enumerate() {
            let glu = [Glu::Silu, Glu::GPT_OSS][i % 2];
            match i % 3 {
                0 => gated::<f32>(stream, [kind; 2], glu, outputs(kind), ragged(kind)),
                1 => gated::<Bf16>(stream, [kind; 2], glu, outputs(kind), ragged(kind)),
                _ => gated::<F16>(stream, [kind; 2], glu, outputs(kind), ragged(kind)),
            }
        }
    });
}

/// A gate and an up of two formats, and of two kinds of one format that the tensor cores serve each by itself.
#[test]
fn a_gate_may_be_of_another_format_than_its_up() {
    device::each_gpu(|stream| {
        let kinds = [Kind::Gguf(Format::Q4K), Kind::Gguf(Format::Q6K), Kind::Mxfp4, int4(64, DType::F16, false)];
        for (i, kind) in kinds.into_iter().enumerate() {
            gated::<Bf16>(stream, [kind, kinds[(i + 1) % 4]], Glu::Silu, 40, 256);
        }
        let scales = [DType::F32, DType::Bf16].map(|scales| e4m3([8, 128], scales));
        gated::<Bf16>(stream, scales, Glu::Silu, 40, 256);
    });
}

#[test]
fn biases_and_activations_of_every_format() {
    let (driver, stream) = device::emulated();
    fn run<T: Float + Bits>(stream: &Stream, x: &[T], w: ExpertWeights<'_>, bias: &[T]) -> Vec<f32> {
        let (x, bias) = (Guarded::with(stream, x, 3, w.k(), 0), Guarded::with(stream, bias, 1, w.n(), 0));
        let epilogue = Epilogue::default().with_bias(Bias::new(bias.view())).with_activation(Activation::GeluTanh);
        let rows = ExpertRows::dense(3).unwrap();
        guard::run::<f32>(stream, 3, w.n(), |y| grouped_gemm::linear(stream, x.view(), w, rows, &epilogue, y).unwrap())
    }
    fn holds<T: Float + Bits>(stream: &Stream, kind: Kind) {
        let (n, k) = (outputs(kind), ragged(kind));
        let w = Quantized::new(3, kind, 1, n, k, false);
        let (x, bias) = (normal::<T>(1, 3 * k, 1.0), normal::<T>(2, n, 1.0));
        both(stream, &w, |quantized, floats| {
            same_bits(&run(stream, &x, quantized, &bias), &run(stream, &widened(&x), floats, &widened(&bias)));
        });
    }
    for kind in KINDS {
        holds::<f32>(&stream, kind);
        holds::<Bf16>(&stream, kind);
        holds::<F16>(&stream, kind);
    }
    assert_eq!(driver.reports(), [""; 0]);
}

/// Parts of a stack, and matrices of their own with gaps between them, give what the whole gives.
#[test]
fn parts_are_those_outputs() {
    let (driver, stream) = device::emulated();
    let sizes = [2, 0, 3];
    for kind in [e4m3([8, 5], DType::F16), Kind::Mxfp4, int4(24, DType::Bf16, true), int4(ALL, DType::F32, false), KINDS[9], KINDS[12]] {
        // 24 outputs an expert, of which every second matrix is used: experts with gaps.
        let w = Quantized::new(2, kind, 5, 24, ragged(kind), false);
        let x = normal::<F16>(1, 5 * w.k, 1.0);
        w.rows(&stream, |rows| {
            let each = [0, 2, 4].map(|e| WeightRows::from(rows.row_range(24 * e..24 * (e + 1)).unwrap()));
            let (first, middle) = (ExpertWeights::nk_each(&each).unwrap(), rows.row_range(48..96).unwrap());
            let whole = product::<F16, f32>(&stream, &x, first, &sizes);
            let part = |of: &dyn Fn(usize) -> bool| (0..whole.len()).filter(|i| of(i % 24)).map(|i| whole[i]).collect::<Vec<_>>();
            let ([low, high], [even, odd]) = (first.halves().unwrap(), first.interleaved().unwrap());
            same_bits(&product::<F16, f32>(&stream, &x, odd, &sizes), &part(&|n| n % 2 == 1));
            same_bits(&product::<F16, f32>(&stream, &x, even, &sizes), &part(&|n| n % 2 == 0));
            same_bits(&product::<F16, f32>(&stream, &x, low, &sizes), &part(&|n| n < 12));
            if !matches!(kind, Kind::E4m3 { .. }) {
                same_bits(&product::<F16, f32>(&stream, &x, high, &sizes), &part(&|n| n >= 12));
            }
            let [_, odd] = odd.interleaved().unwrap();
            same_bits(&product::<F16, f32>(&stream, &x, odd, &sizes), &part(&|n| n % 4 == 3));
            // A stack that begins within another.
            let stack = ExpertWeights::nk(middle, 2).unwrap();
            let third = product::<F16, f32>(&stream, &x[..2 * w.k], stack, &[2, 0]);
            let alone = ExpertWeights::nk(rows.row_range(48..72).unwrap(), 1).unwrap();
            same_bits(&third, &product::<F16, f32>(&stream, &x[..2 * w.k], alone, &[2]));
        });
    }
    assert_eq!(driver.reports(), [""; 0]);
}

/// A row's bits are the same alone and among others; a NaN in one row reaches no other.
#[test]
fn a_row_depends_on_itself_and_the_weights() {
    device::each_gpu(|stream| {
        for kind in [KINDS[1], KINDS[5], KINDS[12]] {
            let w = Quantized::new(2, kind, 2, outputs(kind), ragged(kind), false);
            let mut x = normal::<F16>(1, 40 * w.k, 1.0);
            x[7] = F16::from_f32(f32::NAN);
            w.rows(stream, |rows| {
                let weights = ExpertWeights::nk(rows, 2).unwrap();
                let all = product::<F16, F16>(stream, &x, weights, &[3, 37]);
                assert!(all[..w.n].iter().all(|y| y.to_f32().is_nan()));
                for row in [3, 34, 39] {
                    let alone = product::<F16, F16>(stream, &x[row * w.k..][..w.k], weights, &[0, 1]);
                    same_bits(&alone, &all[row * w.n..][..w.n]);
                    assert!(alone.iter().all(|y| !y.to_f32().is_nan()));
                }
            });
        }
    });
}

/// Scales that are no numbers, and an exponent of 255, make their output NaN and no other.
#[test]
fn weights_that_are_no_numbers_reach_their_output_alone() {
    device::each_gpu(|stream| {
        for kind in KINDS {
            let (n, k, bad) = (outputs(kind), ragged(kind), 5);
            let clean = Quantized::new(4, kind, 1, n, k, false);
            let mut dirty = clean.clone();
            let row = |len: usize| bad * (len / n);
            match (&mut dirty.scales, kind) {
                (_, Kind::Gguf(Format::GgufMxfp4)) => dirty.codes[bad * (k / 32) * 17] = 255,
                (_, Kind::Gguf(format)) => {
                    let at = if format == Format::Q6K { 209 } else { 1 };
                    let block = row(dirty.codes.len());
                    dirty.codes[block + at] = 0x7e;
                }
                (_, Kind::E4m3 { .. }) => dirty.codes[bad * k + k / 2] = 0xff,
                (Scales::F32(scales), _) => {
                    let at = row(scales.len());
                    scales[at] = f32::NAN
                }
                (Scales::Bf16(scales), _) => {
                    let at = row(scales.len());
                    scales[at] = Bf16(0x7fc0)
                }
                (Scales::F16(scales), _) => {
                    let at = row(scales.len());
                    scales[at] = F16(0x7e00)
                }
                (Scales::E8m0(scales), _) => {
                    let at = row(scales.len());
                    scales[at] = 255
                }
            }
            let x = normal::<f32>(1, 2 * k, 1.0);
            let run = |w: &Quantized| w.rows(stream, |rows| product::<f32, f32>(stream, &x, ExpertWeights::nk(rows, 1).unwrap(), &[2]));
            for (i, (clean, got)) in run(&clean).iter().zip(run(&dirty)).enumerate() {
                let is_nan = i % n == bad;
                assert!(if is_nan { got.is_nan() } else { got.to_bits() == clean.to_bits() }, "{kind:?}, {i}: {got}, {clean}");
            }
        }
    });
}

/// Rows of a table as the device decodes them, times a factor.
fn looked_up<A: Float + Bits>(stream: &Stream, table: QuantizedRows<'_>, ids: &[u32], scale: f32) -> Vec<A> {
    let [rows, cols] = table.dims();
    let mut buffer = Buffer::zeros(stream, ids.len()).unwrap();
    let tokens = TokenIds::from_host(stream, ids, rows, &mut buffer).unwrap();
    guard::run::<A>(stream, ids.len(), cols, |y| embedding::lookup_scaled(stream, tokens, table, scale, y).unwrap())
}

/// Equal bits; a NaN may have any.
#[track_caller]
fn same_numbers(got: &[f32], want: &[f32], what: &str) {
    let differ = got.iter().zip(want).position(|(got, want)| got.to_bits() != want.to_bits() && !(got.is_nan() && want.is_nan()));
    assert_eq!((differ.map(|at| (at, got[at], want[at])), got.len()), (None, want.len()), "{what}: (element, got, want)");
}

/// Any bytes at all, scales of every size and none included, are the numbers that the CPU decodes.
#[test]
fn any_bytes_are_the_numbers_that_the_cpu_decodes() {
    let (driver, stream) = device::emulated();
    for (seed, kind) in (20..).zip(KINDS) {
        let (n, k) = (37, 3 * ragged(kind));
        let mut random = Random::new(seed);
        let mut w = Quantized::new(seed, kind, 1, n, k, false);
        w.codes.iter_mut().for_each(|code| *code = random.bits() as u8);
        match &mut w.scales {
            Scales::F32(scales) => scales.iter_mut().for_each(|scale| *scale = f32::from_bits(random.bits() as u32)),
            Scales::Bf16(scales) => scales.iter_mut().for_each(|scale| *scale = Bf16(random.bits() as u16)),
            Scales::F16(scales) => scales.iter_mut().for_each(|scale| *scale = F16(random.bits() as u16)),
            Scales::E8m0(scales) => scales.iter_mut().zip([0, 1, 2, 254, 255, 127].iter().cycle()).for_each(|(scale, e)| *scale = *e),
        }
        if kind == Kind::Gguf(Format::GgufMxfp4) {
            let exponents = [0, 1, 2, 254, 255, 127].iter().cycle();
            w.codes.chunks_exact_mut(17).zip(exponents).for_each(|(block, exponent)| block[0] = *exponent);
        }
        let (ids, want) = ((0..n as u32).collect::<Vec<_>>(), w.decoded());
        let what = format!("{kind:?}");
        w.rows(&stream, |table| {
            same_numbers(&looked_up(&stream, table, &ids, 1.0), &want, &what);
            // Rows of a part of the table, and in any order.
            let part = table.row_range(11..37).unwrap();
            let some = looked_up(&stream, part, &[25, 0, 3, 0], 1.0);
            for (i, row) in [36, 11, 14, 11].into_iter().enumerate() {
                same_numbers(&some[i * k..][..k], &want[row * k..][..k], &what);
            }
        });
    }
    assert_eq!(driver.reports(), [""; 0]);
}

/// With a factor, and rounded: the product in f32, rounded once.
#[test]
fn a_quantised_table_is_looked_up() {
    fn holds<A: Float + Bits>(stream: &Stream, kind: Kind) {
        let w = Quantized::new(6, kind, 1, 9, ragged(kind), false);
        let (ids, decoded) = ([8, 0, 3, 8], w.decoded());
        for scale in [1.0f32, 12.3] {
            let want: Vec<f32> = ids.iter().flat_map(|id| &decoded[*id as usize * w.k..][..w.k]).map(|x| scale * x).collect();
            same_bits(&w.rows(stream, |table| looked_up::<A>(stream, table, &ids, scale)), &rounded::<A>(&want));
        }
    }
    device::each_gpu(|stream| {
        for kind in KINDS {
            holds::<f32>(stream, kind);
            holds::<Bf16>(stream, kind);
            holds::<F16>(stream, kind);
        }
    });
}

/// A layer whose experts are quantised gives the bits of the layer with the decoded weights.
#[test]
fn a_layer_gives_the_bits_of_its_decoded_weights() {
    let (driver, stream) = device::emulated();
    let (tokens, top_k, experts) = (3, 2, 3);
    let mxfp4 = Kind::Gguf(Format::GgufMxfp4);
    let q8_0 = Kind::Gguf(Format::Q8_0);
    for (kind, down_kind, [d, f]) in [
        (e4m3([12, 32], DType::F16), e4m3([1, ALL], DType::F32), [36, 60]),
        (int4(24, DType::Bf16, true), int4(ALL, DType::F16, false), [40, 56]),
        (mxfp4, q8_0, [64, 96]),
        (q8_0, Kind::Gguf(Format::Q5K), [32, 256]),
    ] {
        let [gate, up] = [1, 2].map(|seed| Quantized::new(seed, kind, experts, f, d, false));
        let down = Quantized::new(3, down_kind, experts, d, f, false);
        let (x, router) = (normal::<f32>(4, tokens * d, 1.0), normal::<f32>(5, experts * d, 0.2));
        let (x, router) = (Guarded::with(&stream, &x, tokens, d, 0), Guarded::with(&stream, &router, experts, d, 0));
        let plan = Plan::<f32>::new(Shape::new(d, f, experts, top_k), tokens).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let mut forward = |of_layer: Experts<'_>| {
            let mut buffers = RoutingBuffers::new(&stream, tokens, top_k, experts).unwrap();
            let weights = Weights::new(router.view(), of_layer);
            guard::run::<f32>(&stream, tokens, d, |y| {
                moe::forward(&stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
            })
        };
        both(&stream, &gate, |gate, float_gate| {
            both(&stream, &up, |up, float_up| {
                both(&stream, &down, |down, float_down| {
                    let want = forward(Experts::gated(float_gate, float_up, float_down));
                    assert!(want.iter().any(|y| *y != 0.0));
                    same_bits(&forward(Experts::gated(gate, up, down)), &want);
                });
            });
        });
    }
    assert_eq!(driver.reports(), [""; 0]);
}

/// Matrices of one product whose scales are of two kinds, which no kernel tells apart.
#[test]
fn matrices_of_two_kinds_are_refused() {
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &normal::<f32>(1, 2 * 64, 1.0), 2, 64, 0);
        let offsets = Buffer::from_slice(stream, &offsets(&[1, 1])).unwrap();
        let [narrow, wide] = [32, 64].map(|group| Quantized::new(1, int4(group, DType::F32, false), 1, 32, 64, false));
        narrow.rows(stream, |narrow| {
            wide.rows(stream, |wide| {
                let each = [WeightRows::from(narrow), WeightRows::from(wide)];
                let w = ExpertWeights::nk_each(&each).unwrap();
                let text = guard::refused::<f32>(stream, 2, 32, |y| grouped_gemm::nt(stream, x.view(), w, owned(&offsets, &[1, 1]), y));
                let want = "grouped_gemm: `w` with other scales, or other rows of blocks of them, at matrix 1 is not supported here; \
                            supported: scales of one kind, for all experts alike";
                assert_eq!(text, want);
            });
        });
    });
}
