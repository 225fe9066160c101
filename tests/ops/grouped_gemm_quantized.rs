//! `grouped_gemm` with quantised weights on every GPU there is: every form, format and length of a group,
//! against the oracle with the weights dequantised.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, Epilogue, GluEpilogue};
use dropless::{
    Bf16, Buffer, DType, Device, ExpertRows, ExpertWeights, F16, Float, Format, QuantizedRows, Routing, RoutingBuffers, ScaleRows, Stream,
    Tiles, grouped_gemm, repack,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options, Schedule, TmaCompletion};
use dropless_kit::fill::{self, Random, integers, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};

use crate::grouped_gemm::{offsets, owners};
use crate::oracle;

/// The class in which a form is used.
const CLASSES: [usize; 4] = [8, 32, 64, usize::MAX];

thread_local! {
    /// The class in which this thread's products are computed.
    static CLASS: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Calls `test` with every form on every GPU.
fn each_form(test: impl Fn(&Stream)) {
    device::each_gpu(|stream| {
        for class in CLASSES {
            CLASS.set(class);
            test(stream);
        }
    });
}

fn classed(rows: ExpertRows<'_>) -> ExpertRows<'_> {
    rows.in_class(CLASS.get())
}

/// Scales of a type; none where they lie in the blocks.
#[derive(Clone)]
pub(crate) enum Scales {
    F32(Vec<f32>),
    Bf16(Vec<Bf16>),
    F16(Vec<F16>),
    E8m0(Vec<u8>),
}

impl Scales {
    fn of(dtype: DType, values: &[f32]) -> Scales {
        match dtype {
            DType::F32 => Scales::F32(values.to_vec()),
            DType::Bf16 => Scales::Bf16(values.iter().map(|value| Bf16::from_f32(*value)).collect()),
            _ => Scales::F16(values.iter().map(|value| F16::from_f32(*value)).collect()),
        }
    }

    fn to_f64(&self) -> Vec<f64> {
        match self {
            Scales::F32(scales) => to_f64(scales),
            Scales::Bf16(scales) => to_f64(scales),
            Scales::F16(scales) => to_f64(scales),
            Scales::E8m0(_) => unreachable!("their oracle takes bytes"),
        }
    }

    /// On the stream's device, for as long as `work` takes.
    fn on<R>(&self, stream: &Stream, rows: usize, work: impl FnOnce(ScaleRows<'_>) -> R) -> R {
        fn place<T: dropless::Element>(stream: &Stream, values: &[T]) -> Buffer<T> {
            Buffer::from_slice(stream, values).unwrap()
        }
        match self {
            Scales::F32(scales) => work(place(stream, scales).rows(rows, scales.len() / rows).unwrap().into()),
            Scales::Bf16(scales) => work(place(stream, scales).rows(rows, scales.len() / rows).unwrap().into()),
            Scales::F16(scales) => work(place(stream, scales).rows(rows, scales.len() / rows).unwrap().into()),
            Scales::E8m0(scales) => work(ScaleRows::E8m0(place(stream, scales).rows(rows, scales.len() / rows).unwrap())),
        }
    }
}

/// What the codes mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Int4 {
        group: usize,
        scales: DType,
        zeros: bool,
    },
    Mxfp4,
    E4m3 {
        block: [usize; 2],
        scales: DType,
    },
    /// Blocks with their scales in them.
    Gguf(Format),
}

/// Weights of E experts, `[E, N, K]`.
#[derive(Clone)]
pub(crate) struct Quantized {
    pub(crate) kind: Kind,
    pub(crate) experts: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Scales,
    pub(crate) zeros: Option<Vec<u8>>,
}

impl Quantized {
    /// Random codes and scales. With `exact`, products of small integers with these weights add up exactly.
    /// A group or a block of `usize::MAX` is all of K.
    pub(crate) fn new(seed: u64, kind: Kind, experts: usize, n: usize, k: usize, exact: bool) -> Quantized {
        let kind = match kind {
            Kind::Int4 { group, scales, zeros } => Kind::Int4 { group: group.min(k), scales, zeros },
            Kind::E4m3 { block: [rows, cols], scales } => Kind::E4m3 { block: [rows, cols.min(k)], scales },
            Kind::Mxfp4 | Kind::Gguf(_) => kind,
        };
        let (mut random, rows) = (Random::new(seed), experts * n);
        let mut bytes = |count: usize| fill::bytes(&mut random, count);
        let (codes, zeros, count) = match kind {
            Kind::Int4 { group, zeros, .. } => {
                let groups = k.div_ceil(group);
                let zeros = zeros.then(|| bytes(rows.div_ceil(8) * groups * 4));
                (bytes(rows * k.div_ceil(8) * 4), zeros, rows * groups)
            }
            Kind::Mxfp4 => (bytes(rows * k / 2), None, rows * k / 32),
            Kind::E4m3 { block, .. } => {
                let codes = bytes(rows * k);
                // For an exact product, multiples of 1/8 from 1 to 3.75; else all numbers.
                let codes = codes.iter().map(|code| match (exact, code & 0x7f) {
                    (true, low) => code & 0x80 | (0x38 + low % 16),
                    (false, 0x7f) => 0x7e,
                    _ => *code,
                });
                (codes.collect(), None, rows.div_ceil(block[0]) * k.div_ceil(block[1]))
            }
            Kind::Gguf(format) => (fill::blocks(&mut random, format, rows * k / format.block_elements()), None, 0),
        };
        let mut scale = || if exact { [0.25, 0.5, 1.0, 2.0][random.below(4)] } else { (0.5 + random.unit()) as f32 * 0.01 };
        let scales = match kind {
            Kind::Int4 { scales, .. } | Kind::E4m3 { scales, .. } => Scales::of(scales, &(0..count).map(|_| scale()).collect::<Vec<_>>()),
            Kind::Mxfp4 => {
                Scales::E8m0((0..count).map(|_| (if exact { 125 } else { 115 }) + random.below(if exact { 4 } else { 10 }) as u8).collect())
            }
            Kind::Gguf(_) => Scales::F32(Vec::new()),
        };
        Quantized { kind, experts, n, k, codes, scales, zeros }
    }

    /// With random exponents of that range.
    pub(crate) fn with_exponents(mut self, seed: u64, range: RangeInclusive<u8>) -> Quantized {
        let mut random = Random::new(seed);
        let Scales::E8m0(exponents) = &mut self.scales else { panic!("no exponents") };
        exponents
            .iter_mut()
            .for_each(|exponent| *exponent = range.start() + random.below(usize::from(range.end() - range.start()) + 1) as u8);
        self
    }

    /// `[E, N, K]`.
    pub(crate) fn values(&self) -> Vec<f64> {
        let Quantized { experts, n, k, codes, scales, zeros, .. } = self;
        let rows = experts * n;
        match (self.kind, scales) {
            (Kind::Int4 { group, .. }, _) => oracle::repack::int4(codes, &scales.to_f64(), zeros.as_deref(), rows, *k, group),
            (Kind::E4m3 { block, .. }, _) => oracle::repack::e4m3(codes, &scales.to_f64(), rows, *k, block),
            (Kind::Mxfp4, Scales::E8m0(exponents)) => oracle::repack::mxfp4(codes, exponents, rows, *k),
            (Kind::Gguf(_), _) => to_f64(&self.decoded()),
            _ => unreachable!("mxfp4 has exponents"),
        }
    }

    /// The same as the CPU decodes them, which `tests/quantized.rs` compares with other code.
    pub(crate) fn decoded(&self) -> Vec<f32> {
        self.rows(&device::cpu(1), |rows| rows.to_f32().unwrap())
    }

    /// In checkpoint order on the stream's device.
    pub(crate) fn rows<R>(&self, stream: &Stream, work: impl FnOnce(QuantizedRows<'_>) -> R) -> R {
        let rows = self.experts * self.n;
        let codes = Buffer::from_slice(stream, &self.codes).unwrap();
        let codes = codes.rows(rows, self.codes.len() / rows).unwrap();
        let zeros = self.zeros.as_ref().map(|zeros| Buffer::from_slice(stream, zeros).unwrap());
        let scale_rows = match self.kind {
            Kind::E4m3 { block, .. } => rows.div_ceil(block[0]),
            _ => rows,
        };
        self.scales.on(stream, scale_rows, |scales| {
            work(match (self.kind, scales) {
                (Kind::Int4 { group, .. }, scales) => {
                    let weights = QuantizedRows::int4(codes, scales, self.k, group).unwrap();
                    let packed = rows.div_ceil(8);
                    zeros.as_ref().map_or(weights, |zeros| weights.with_zeros(zeros.rows(packed, zeros.len() / packed).unwrap()).unwrap())
                }
                (Kind::E4m3 { block, .. }, scales) => QuantizedRows::e4m3(codes, scales, block).unwrap(),
                (Kind::Gguf(format), _) => QuantizedRows::gguf(format, codes, self.k).unwrap(),
                (Kind::Mxfp4, ScaleRows::E8m0(exponents)) => QuantizedRows::mxfp4(codes, exponents).unwrap(),
                _ => unreachable!("mxfp4 has exponents"),
            })
        })
    }

    /// In the order that the products take.
    pub(crate) fn on<R>(&self, stream: &Stream, work: impl FnOnce(ExpertWeights<'_>) -> R) -> R {
        self.rows(stream, |rows| {
            let weights = ExpertWeights::nk(rows, self.experts).unwrap();
            if matches!(self.kind, Kind::Int4 { .. } | Kind::Mxfp4) { repacked(stream, weights, work) } else { work(weights) }
        })
    }
}

/// The same weights in tiles.
pub(crate) fn repacked<R>(stream: &Stream, weights: ExpertWeights<'_>, work: impl FnOnce(ExpertWeights<'_>) -> R) -> R {
    let tiles = Tiles::of(&weights).unwrap();
    let buffer = |[rows, bytes]: [usize; 2]| Buffer::<u8>::zeros(stream, rows * bytes).unwrap();
    let (mut codes, mut scales, mut zeros) = (buffer(tiles.codes()), buffer(tiles.scales()), tiles.zeros().map(buffer));
    let [rows, bytes] = tiles.codes();
    let [scale_bytes, zero_bytes] = [tiles.scales()[1], tiles.zeros().map_or(0, |zeros| zeros[1])];
    repack::repack(
        stream,
        weights,
        &mut codes.rows_mut(rows, bytes).unwrap(),
        &mut scales.rows_mut(rows, scale_bytes).unwrap(),
        zeros.as_mut().map(|zeros| zeros.rows_mut(rows, zero_bytes).unwrap()).as_mut(),
    )
    .unwrap();
    let zeros = zeros.as_ref().map(|zeros| zeros.rows(rows, zero_bytes).unwrap());
    let all = QuantizedRows::tiles(tiles, codes.rows(rows, bytes).unwrap(), scales.rows(rows, scale_bytes).unwrap(), zeros).unwrap();
    work(ExpertWeights::nk(all, tiles.num_experts()).unwrap())
}

/// The output of rows in expert order, computed twice into different poison.
fn product<O: Float + Bits>(stream: &Stream, x: &[Bf16], w: ExpertWeights<'_>, sizes: &[u32]) -> Vec<O> {
    let offsets = offsets(sizes);
    let rows = offsets[sizes.len()] as usize;
    let x = Guarded::with(stream, x, rows, w.k(), 8);
    let offsets = Buffer::from_slice(stream, &offsets).unwrap();
    // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
    let owned = classed(unsafe { ExpertRows::from_raw(offsets.rows(1, sizes.len() + 1).unwrap(), rows, rows).unwrap() });
    guard::run::<O>(stream, rows, w.n(), |y| grouped_gemm::nt(stream, x.view(), w, owned, y).unwrap())
}

/// What it should be, and the sums of magnitudes that bound its error.
fn want(x: &[Bf16], w: &[f64], sizes: &[u32], n: usize, k: usize) -> [Vec<f64>; 2] {
    let owner = owners(&offsets(sizes));
    let all: Vec<usize> = (0..owner.len()).collect();
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let x = to_f64(x);
    [oracle::grouped_gemm::nt(&x, w, &all, &owner, n, k), oracle::grouped_gemm::nt(&abs(&x), &abs(w), &all, &owner, n, k)]
}

pub(crate) const fn int4(group: usize, scales: DType, zeros: bool) -> Kind {
    Kind::Int4 { group, scales, zeros }
}

pub(crate) const fn e4m3(block: [usize; 2], scales: DType) -> Kind {
    Kind::E4m3 { block, scales }
}

/// Small integers add up exactly: every index, edge and stage is right.
fn edges(kind: Kind, sizes: &[u32], n: usize, k: usize) {
    let rows = sizes.iter().sum::<u32>() as usize;
    let (x, w) = (integers::<Bf16>(1, rows * k), Quantized::new(2, kind, sizes.len(), n, k, true));
    let [want, _] = want(&x, &w.values(), sizes, n, k);
    each_form(|stream| {
        let got = w.on(stream, |w| product::<f32>(stream, &x, w, sizes));
        let wrong = got.iter().zip(&want).position(|(got, want)| f64::from(*got) != *want);
        let wrong = wrong.map(|at| (at / n, at % n, got[at], want[at]));
        assert_eq!(wrong, None, "{kind:?}, class {}, {sizes:?} N={n} K={k}: (row, column, got, want)", CLASS.get());
    });
}

/// Int4 with every length of a group, type of scale and form of a kernel, with and without zero points; then
/// the other formats.
const KINDS: [Kind; 10] = [
    int4(32, DType::Bf16, false),
    int4(32, DType::F32, true),
    int4(64, DType::F16, false),
    int4(64, DType::Bf16, true),
    int4(128, DType::F16, true),
    int4(128, DType::F32, false),
    int4(96, DType::Bf16, true),
    int4(usize::MAX, DType::Bf16, true),
    Kind::Mxfp4,
    e4m3([8, 128], DType::F32),
];

/// Rows of an expert around the edges of the forms' tiles, and experts without any.
#[test]
fn edges_of_rows_in_tiles() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        edges(kind, &[0, 1, 9, 0, 33], 40, 160);
        if i % 5 == 3 {
            edges(kind, &[65, 0, 129], 8, 96);
        }
    }
    edges(Kind::Mxfp4, &[0, 0, 140, 0], 40, 64); // all rows to one
    edges(int4(128, DType::Bf16, false), &[2; 16], 8, 32);
}

/// Outputs around the edges of panels and tiles.
#[test]
fn edges_of_columns_in_tiles() {
    for n in [8, 32, 72, 248, 256, 264] {
        edges(int4(64, DType::Bf16, n % 16 == 0), &[3], n, 64);
        edges(Kind::Mxfp4, &[9], n, 64);
        edges(e4m3([32, 128], DType::Bf16), &[3], n, 64);
    }
    edges(e4m3([128, 128], DType::Bf16), &[1, 2], 128, 64);
}

/// k around the edges of steps and stages.
#[test]
fn edges_of_k_in_tiles() {
    for k in [32, 128, 288, 1120] {
        edges(Kind::Mxfp4, &[2], 16, k);
        edges(int4(32, DType::Bf16, false), &[2], 16, k);
        edges(int4(64, DType::Bf16, true), &[2], 16, k);
        edges(int4(128, DType::Bf16, false), &[2], 16, k);
        edges(int4(384, DType::F32, true), &[2], 16, k);
        edges(e4m3([48, 256], DType::Bf16), &[2], 16, k);
    }
    edges(e4m3([1, usize::MAX], DType::F32), &[2], 16, 720);
    for k in [8, 72] {
        edges(int4(128, DType::Bf16, true), &[5], 16, k); // no multiple of 32
        edges(e4m3([128, 128], DType::Bf16), &[5], 16, 2 * k);
    }
}

/// k beyond what a ring holds.
#[test]
fn rings_in_tiles_turn() {
    edges(Kind::Mxfp4, &[1], 8, 5184);
    edges(int4(128, DType::Bf16, true), &[1], 8, 5184);
    edges(int4(32, DType::F32, true), &[1], 8, 4160);
    edges(e4m3([128, 128], DType::F32), &[1], 8, 3200);
}

/// One block after the other, and several, take all tiles, in any order of threads and copies.
#[test]
fn any_number_of_blocks_takes_every_tile_in_any_schedule() {
    if device::hardware_only() {
        return; // asks for devices of other sizes
    }
    for (sm_count, schedule) in [(1, Schedule::Reverse), (3, Schedule::Random(1))] {
        let options = Options { sm_count, schedule, tma: TmaCompletion::Random, ..Options::default() };
        let driver = Arc::new(Emulated::new(options));
        let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
        let sizes = [1, 9, 0, 20];
        for kind in [int4(128, DType::Bf16, true), int4(32, DType::Bf16, false), Kind::Mxfp4, e4m3([8, 128], DType::F32)] {
            let (n, k) = (136, 352);
            let (x, w) = (integers::<Bf16>(1, 30 * k), Quantized::new(2, kind, 4, n, k, true));
            let [want, _] = want(&x, &w.values(), &sizes, n, k);
            let want: Vec<_> = want.iter().map(|want| *want as f32).collect();
            for class in CLASSES {
                CLASS.set(class);
                same_bits(&w.on(&stream, |w| product::<f32>(&stream, &x, w, &sizes)), &want);
            }
        }
        assert_eq!(driver.reports(), [""; 0]);
    }
}

fn against_oracle<O: Float + Bits>(w: &Quantized) {
    let (sizes, n, k) = ([10, 0, 5], w.n, w.k);
    let x = normal::<Bf16>(1, 15 * k, 1.0);
    let [want, sums] = want(&x, &w.values(), &sizes, n, k);
    each_form(|stream| {
        let got = w.on(stream, |w| product::<O>(stream, &x, w, &sizes));
        within(&got, &want, n, |i| sum_bound::<O>(want[i], k, sums[i]));
    });
}

#[test]
fn rounded_outputs_in_tiles() {
    for kind in KINDS {
        let w = Quantized::new(3, kind, 3, 40, 288, false);
        against_oracle::<Bf16>(&w);
        against_oracle::<f32>(&w);
    }
}

/// Powers of two as far apart as f32 holds their products, and those whose products are subnormal.
#[test]
fn powers_of_two_of_any_size_in_tiles() {
    let w = Quantized::new(4, Kind::Mxfp4, 3, 40, 192, false);
    for range in [0..=240, 0..=4, 100..=140, 236..=240] {
        against_oracle::<f32>(&w.clone().with_exponents(5, range));
    }
}

/// An exponent of 255 is NaN and makes all results of its output NaN; so does a code of e4m3 that is NaN.
#[test]
fn weights_that_are_no_numbers_in_tiles() {
    let (n, k, sizes) = (40, 160, [3, 2]);
    let x = normal::<Bf16>(1, 5 * k, 1.0);
    let mut powers = Quantized::new(4, Kind::Mxfp4, 2, n, k, false);
    let mut bytes = Quantized::new(4, e4m3([8, 128], DType::F32), 2, n, k, false);
    let clean = [powers.clone(), bytes.clone()];
    let Scales::E8m0(exponents) = &mut powers.scales else { unreachable!() };
    exponents[(n + 7) * (k / 32) + 3] = 255;
    (bytes.codes[(n + 7) * k + 100], bytes.codes[(n + 9) * k]) = (0x7f, 0xff);
    each_form(|stream| {
        for (clean, dirty) in clean.iter().zip([&powers, &bytes]) {
            let run = |w: &Quantized| w.on(stream, |w| product::<f32>(stream, &x, w, &sizes));
            let (clean, got) = (run(clean), run(dirty));
            for (i, (clean, got)) in clean.iter().zip(&got).enumerate() {
                let is_nan = i / n >= 3 && (i % n == 7 || i % n == 9 && matches!(dirty.kind, Kind::E4m3 { .. }));
                assert!(if is_nan { got.is_nan() } else { got.to_bits() == clean.to_bits() }, "{i}: {got}, {clean}");
            }
        }
    });
}

/// Both products, a gate and biases, and rows gathered by the kernel.
fn glu(kind: Kind, tokens: usize, top_k: usize, n: usize, k: usize, general: Option<Glu>) {
    let experts = 4;
    let x = normal::<Bf16>(4, tokens * k, 1.0);
    let [gate, up] = [5, 6].map(|seed| Quantized::new(seed, kind, experts, n, k, false));
    let biases = [7, 8].map(|seed| normal::<f32>(seed, experts * n, 1.0));
    let mut random = Random::new(3);
    let ids: Vec<u32> = (0..tokens)
        .flat_map(|_| {
            let first = random.below(3);
            (0..top_k).map(move |i| ((first + i) % 3) as u32)
        })
        .collect();
    each_form(|stream| {
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
        let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
        let owner = owners(&routing.offsets().to_vec(stream).unwrap());
        let input: Vec<usize> = routing.row_to_slot().to_vec(stream).unwrap().iter().map(|slot| *slot as usize / top_k).collect();
        let sums = |w: &Quantized, bias: &[f32]| {
            let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
            let (x, w) = (to_f64(&x), w.values());
            let bias = |i: usize| if general.is_some() { f64::from(bias[owner[i / n] * n + i % n]) } else { 0.0 };
            let values = oracle::grouped_gemm::nt(&x, &w, &input, &owner, n, k).into_iter().enumerate().map(|(i, sum)| sum + bias(i));
            let sizes = oracle::grouped_gemm::nt(&abs(&x), &abs(&w), &input, &owner, n, k);
            let values: Vec<f64> = values.collect();
            let errors: Vec<f64> = (0..values.len()).map(|i| sum_bound::<f32>(values[i], k + 1, sizes[i] + bias(i).abs())).collect();
            [values, errors]
        };
        let ([gates, gate_errors], [ups, up_errors]) = (sums(&gate, &biases[0]), sums(&up, &biases[1]));
        let glu = general.unwrap_or(Glu::Silu);
        let want: Vec<f64> = gates.iter().zip(&ups).map(|(gate, up)| oracle::activation::glu(*gate, *up, glu)).collect();
        let bound = |i: usize| {
            let up = ups[i].abs() + up_errors[i] + 1.0;
            1.2 * gate_errors[i] * up + gates[i].abs() * up_errors[i] + sum_bound::<Bf16>(want[i], 36, gates[i].abs() * up)
        };
        let x = Guarded::with(stream, &x, tokens, k, 8);
        let bias_rows = biases.each_ref().map(|bias| Guarded::with(stream, bias, experts, n, 0));
        let got = gate.on(stream, |gate| {
            up.on(stream, |up| {
                guard::run::<Bf16>(stream, ids.len(), n, |h| {
                    let rows = classed(routing.gathered_rows());
                    match general {
                        None => grouped_gemm::glu_nt(stream, x.view(), gate, up, rows, h).unwrap(),
                        Some(glu) => {
                            let biases = bias_rows.each_ref().map(|bias| Bias::new(bias.view()));
                            let epilogue = GluEpilogue::default().with_glu(glu).with_biases(biases);
                            grouped_gemm::glu(stream, x.view(), gate, up, rows, &epilogue, h).unwrap();
                        }
                    }
                })
            })
        });
        within(&got, &want, n, bound);
    });
}

#[test]
fn gates_of_gathered_rows_in_tiles() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        glu(kind, [1, 9, 20][i % 3], 2, [40, 136, 72][i % 3], 160, [None, Some(Glu::GPT_OSS)][i % 2]);
    }
    glu(Kind::Mxfp4, 70, 2, 40, 64, Some(Glu::GPT_OSS));
    glu(int4(32, DType::Bf16, false), 70, 2, 40, 64, None);
}

#[test]
fn biases_and_activations_in_tiles() {
    let (n, k, sizes) = (72, 96, [9u32, 0, 20]);
    let (x, bias) = (normal::<Bf16>(1, 29 * k, 1.0), normal::<Bf16>(2, 3 * n, 1.0));
    for kind in [int4(32, DType::Bf16, true), Kind::Mxfp4, e4m3([8, 128], DType::F32)] {
        let w = Quantized::new(3, kind, 3, n, k, false);
        let ([sums, sizes_of_sums], owner) = (want(&x, &w.values(), &sizes, n, k), owners(&offsets(&sizes)));
        let values: Vec<f64> = sums.iter().enumerate().map(|(i, sum)| sum + f64::from(bias[owner[i / n] * n + i % n].to_f32())).collect();
        let want: Vec<f64> = values.iter().map(|value| oracle::activation::activate(*value, Activation::Silu)).collect();
        each_form(|stream| {
            let (x, bias) = (Guarded::with(stream, &x, 29, k, 0), Guarded::with(stream, &bias, 3, n, 0));
            let offsets = Buffer::from_slice(stream, &offsets(&sizes)).unwrap();
            let epilogue = Epilogue::default().with_bias(Bias::new(bias.view())).with_activation(Activation::Silu);
            // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
            let rows = classed(unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 29, 29).unwrap() });
            let got = w.on(stream, |w| {
                guard::run::<f32>(stream, 29, n, |y| grouped_gemm::linear(stream, x.view(), w, rows, &epilogue, y).unwrap())
            });
            within(&got, &want, n, |i| {
                let error = sum_bound::<f32>(values[i], k + 1, sizes_of_sums[i] + values[i].abs());
                1.2 * error + sum_bound::<f32>(want[i], 36, want[i].abs().max(values[i].abs() * 0.1))
            });
        });
    }
}

/// A row's bits are the same alone and anywhere among other rows; a NaN in one row reaches no other.
#[test]
fn a_row_in_tiles_depends_on_itself_and_the_weights() {
    let (n, k) = (24, 96);
    let mut others = normal::<Bf16>(1, 131 * k, 1.0);
    others[7] = Bf16::from_f32(f32::NAN);
    let row = normal::<Bf16>(3, k, 1.0);
    // Row `at` of all, of expert 1, whose rows begin after those of expert 0.
    let with_row = |at: usize| [&others[..at * k], &row, &others[at * k..130 * k]].concat();
    for kind in [int4(32, DType::Bf16, true), int4(128, DType::Bf16, false), Kind::Mxfp4, e4m3([8, 128], DType::F32)] {
        let w = Quantized::new(2, kind, 3, n, k, false);
        each_form(|stream| {
            let run = |x: &[Bf16], sizes: [u32; 3], at: usize| {
                let y = w.on(stream, |w| product::<Bf16>(stream, x, w, &sizes));
                if at > 0 {
                    assert!(y[..n].iter().all(|y| y.to_f32().is_nan()));
                }
                assert!(y[at * n..].iter().all(|y| at == 0 || !y.to_f32().is_nan()));
                y[at * n..(at + 1) * n].to_vec()
            };
            let alone = run(&row, [0, 1, 0], 0);
            for (sizes, at) in [([0, 131, 0], 130), ([3, 100, 28], 67), ([130, 1, 0], 130)] {
                same_bits(&run(&with_row(at), sizes, at), &alone);
            }
        });
    }
}

/// Where no expert owns more than 64 rows, each byte of codes, scales and zero points is loaded once.
#[test]
fn every_byte_in_tiles_is_loaded_once() {
    if device::hardware_only() {
        return; // counts the emulator's bytes
    }
    let (n, k, experts) = (264, 352, 3);
    for kind in
        [int4(32, DType::Bf16, true), int4(64, DType::F32, false), int4(128, DType::Bf16, true), Kind::Mxfp4, e4m3([8, 128], DType::F32)]
    {
        let w = Quantized::new(2, kind, experts, n, k, false);
        for (class, rows) in [(8, 8), (32, 9), (64, 64)] {
            CLASS.set(class);
            let (driver, stream) = device::emulated();
            let x = normal::<Bf16>(1, rows * k, 1.0);
            let before = driver.launches().len();
            let panels = experts * n.div_ceil(32);
            let padded = k.next_multiple_of(64);
            // Two experts own rows, the third none.
            let mut want: Vec<usize> = w.on(&stream, |w| {
                product::<f32>(&stream, &x, w, &[rows as u32 - 1, 0, 1]);
                match kind {
                    Kind::Int4 { group, scales, zeros } => {
                        let groups = padded.div_ceil(group);
                        let zeros = if zeros { panels * 32 * groups } else { 0 };
                        vec![panels * 16 * padded, panels * 32 * groups * scales.size_bytes(), zeros]
                    }
                    Kind::Mxfp4 => vec![panels * 16 * padded, panels * padded],
                    Kind::E4m3 { .. } | Kind::Gguf(_) => vec![experts * n * k],
                }
            });
            want.iter_mut().for_each(|bytes| *bytes = *bytes / 3 * 2);
            want.retain(|bytes| *bytes > 0);
            want.sort();
            let launches = driver.launches();
            let (_, stats) = launches[before..].iter().find(|(entry, _)| entry.starts_with("grouped_gemm_nt_bf16_")).unwrap();
            let mut got: Vec<usize> = stats.traffic.iter().map(|buffer| buffer.bulk_loaded as usize).filter(|bytes| *bytes > 0).collect();
            got.sort();
            // The rows are loaded in boxes, too, and once for each tile.
            want.iter().for_each(|bytes| assert!(got.contains(bytes), "{kind:?}, class {class}: {got:?} without {bytes} of {want:?}"));
            assert_eq!(got.len(), want.len() + 1, "{kind:?}, class {class}: {got:?}, {want:?}");
        }
    }
}

/// Gate and up of one tensor, packed or in turn, are repacked as two matrices; halves of tiles are views.
#[test]
fn parts_in_tiles_are_what_their_outputs_are() {
    let (n, k, experts) = (64, 96, 2);
    let x = normal::<Bf16>(1, 5 * k, 1.0);
    for kind in [int4(32, DType::F16, true), Kind::Mxfp4, e4m3([32, 128], DType::F32)] {
        let w = Quantized::new(2, kind, experts, n, k, false);
        device::each_gpu(|stream| {
            CLASS.set(8);
            let all = w.on(stream, |w| product::<f32>(stream, &x, w, &[3, 2]));
            let part = |cols: &dyn Fn(usize) -> bool| (0..all.len()).filter(|i| cols(i % n)).map(|i| all[i]).collect::<Vec<_>>();
            w.rows(stream, |rows| {
                let w = ExpertWeights::nk(rows, experts).unwrap();
                let run = |w: ExpertWeights<'_>| {
                    let product = |w: ExpertWeights<'_>| product::<f32>(stream, &x, w, &[3, 2]);
                    if matches!(kind, Kind::E4m3 { .. }) { product(w) } else { repacked(stream, w, product) }
                };
                let ([first, second], [even, odd]) = (w.halves().unwrap(), w.interleaved().unwrap());
                same_bits(&run(first), &part(&|col| col < n / 2));
                same_bits(&run(second), &part(&|col| col >= n / 2));
                same_bits(&run(even), &part(&|col| col % 2 == 0));
                same_bits(&run(odd), &part(&|col| col % 2 == 1));
            });
            w.on(stream, |w| {
                let [first, second] = w.halves().unwrap();
                same_bits(&product::<f32>(stream, &x, first, &[3, 2]), &part(&|col| col < n / 2));
                same_bits(&product::<f32>(stream, &x, second, &[3, 2]), &part(&|col| col >= n / 2));
            });
        });
    }
}

/// Tiles are read by the tensor cores' forms alone; the order of a checkpoint is served whatever they ask.
#[test]
fn what_kernels_do_not_take_is_named() {
    fn refusal<T: Float + Bits>(stream: &Stream, w: ExpertWeights<'_>) -> String {
        let x = normal::<T>(1, w.k(), 1.0);
        let x = Guarded::with(stream, &x, 1, w.k(), 0);
        let rows = ExpertRows::dense(1).unwrap();
        guard::refused::<f32>(stream, 1, w.n(), |y| grouped_gemm::nt(stream, x.view(), w, rows, y))
    }
    device::each_gpu(|stream| {
        for kind in [int4(32, DType::Bf16, true), Kind::Mxfp4] {
            let w = Quantized::new(1, kind, 1, 32, 64, false);
            let text = w.on(stream, |w| refusal::<Bf16>(stream, w.interleaved().unwrap()[1]));
            assert!(text.starts_with("grouped_gemm: `w` in tiles, of its outputs every 2 from 1 on is not supported here"), "{text}");
            let wanted = |name| {
                format!(
                    "grouped_gemm: `w` in tiles with rows of type {name} is not supported here; \
                     supported: bf16; others take weights in the order of a checkpoint"
                )
            };
            assert_eq!(w.on(stream, |w| refusal::<F16>(stream, w)), wanted("f16"));
            assert_eq!(w.on(stream, |w| refusal::<f32>(stream, w)), wanted("f32"));
        }
        let narrow = Quantized::new(1, Kind::Mxfp4, 1, 12, 64, false);
        assert_eq!(
            narrow.on(stream, |w| refusal::<Bf16>(stream, w)),
            "grouped_gemm: `w` in tiles with [N, K] of [12, 64] is not supported here; \
             supported: multiples of 8; others take the order of a checkpoint"
        );
        let [gate, up] = [int4(32, DType::Bf16, true), int4(32, DType::F16, true)].map(|kind| Quantized::new(1, kind, 1, 32, 64, false));
        let x = Guarded::with(stream, &normal::<Bf16>(1, 64, 1.0), 1, 64, 0);
        let rows = ExpertRows::dense(1).unwrap();
        let text = gate.on(stream, |gate| {
            up.on(stream, |up| guard::refused::<Bf16>(stream, 1, 32, |h| grouped_gemm::glu_nt(stream, x.view(), gate, up, rows, h)))
        });
        assert_eq!(
            text,
            "grouped_gemm: two types of weights, tiles of int4 with f16 scales of groups of 32, zero points is not supported here; \
             supported: tiles of int4 with bf16 scales of groups of 32, zero points"
        );
    });
    let cpu = device::cpu(1);
    let w = Quantized::new(1, Kind::Mxfp4, 1, 32, 64, false);
    let text = w.on(&cpu, |w| refusal::<Bf16>(&cpu, w));
    assert_eq!(text, "grouped_gemm: `w` in tiles is not supported here; supported: weights in the order of a checkpoint");
}
