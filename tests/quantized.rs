//! Quantised weights as numbers: bit for bit those of the code that owns each format, for any bytes those of
//! the formulas, and refusals of what does not belong together.
//!
//! `tests/data/quant` has the raw tensors of checkpoints and their values. `DROPLESS_GOLDENS` may name the
//! full set.

use dropless::quantized::{Awq, Gptq};
use dropless::{
    Bf16, Buffer, Element, Error, ExpertWeights, F16, Float, Format, QuantizedRows, Rows, ScaleRows, Stream, Tiles, TokenIds, embedding,
};
use dropless_kit::{device, goldens, oracle};
use proptest::collection::vec;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Asserts equal bits; a NaN may have any.
#[track_caller]
fn same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(same, "{what}: element {i} is {got:e} ({:#x}), not {want:e} ({:#x})", got.to_bits(), want.to_bits());
    }
}

/// Asserts that the CPU decodes these numbers, and so does every GPU there is.
#[track_caller]
fn decode_to(weights: &QuantizedRows<'_>, want: &[f32], what: &str) {
    same(&weights.to_f32().unwrap(), want, what);
    device::each_gpu(|stream| same(&on_gpu(stream, weights), want, what));
}

/// All rows, as a GPU looks them up.
fn on_gpu(stream: &Stream, weights: &QuantizedRows<'_>) -> Vec<f32> {
    let [n, k] = weights.dims();
    let codes = Placed::new(stream, weights.codes());
    let zeros = weights.zeros().map(|zeros| Placed::new(stream, zeros));
    let lookup = |table: QuantizedRows<'_>| {
        let (ids, mut buffer) = ((0..n as u32).collect::<Vec<_>>(), Buffer::zeros(stream, n).unwrap());
        let ids = TokenIds::from_host(stream, &ids, n, &mut buffer).unwrap();
        let mut y = Buffer::<f32>::zeros(stream, n * k.next_multiple_of(4)).unwrap();
        let mut y = y.rows_mut(n, k.next_multiple_of(4)).unwrap().col_range(0..k).unwrap();
        embedding::lookup(stream, ids, table, &mut y).unwrap();
        y.as_rows().to_vec(stream).unwrap()
    };
    let with = |scales: ScaleRows<'_>, block: [usize; 2]| match weights.format() {
        Format::E4m3 => lookup(QuantizedRows::e4m3(codes.rows(), scales, block).unwrap()),
        _ => {
            let rows = QuantizedRows::int4(codes.rows(), scales, k, block[1]).unwrap();
            lookup(zeros.as_ref().map_or(rows, |zeros| rows.with_zeros(zeros.rows()).unwrap()))
        }
    };
    match weights.scales() {
        None => lookup(QuantizedRows::gguf(weights.format(), codes.rows(), k).unwrap()),
        Some((ScaleRows::F32(scales), block)) => with(Placed::new(stream, scales).rows().into(), block),
        Some((ScaleRows::Bf16(scales), block)) => with(Placed::new(stream, scales).rows().into(), block),
        Some((ScaleRows::F16(scales), block)) => with(Placed::new(stream, scales).rows().into(), block),
        Some((ScaleRows::E8m0(scales), _)) => lookup(QuantizedRows::mxfp4(codes.rows(), Placed::new(stream, scales).rows()).unwrap()),
        Some((other, _)) => panic!("scales of {:?}", other.dtype()),
    }
}

/// A matrix of the host on a device.
struct Placed<T>(Buffer<T>, [usize; 2]);

impl<T: Element> Placed<T> {
    fn new(stream: &Stream, rows: Rows<'_, T>) -> Placed<T> {
        Placed(Buffer::from_slice(stream, &rows.to_vec(&device::cpu(1)).unwrap()).unwrap(), rows.dims())
    }

    fn rows(&self) -> Rows<'_, T> {
        self.0.rows(self.1[0], self.1[1]).unwrap()
    }
}

/// A file of goldens.
struct File(Vec<u8>);

impl File {
    fn open(name: &str) -> File {
        File(std::fs::read(goldens::path(format!("quant/{name}.safetensors"))).unwrap())
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    fn get(&self, name: &str) -> TensorView<'_> {
        self.tensors().tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.get(name).data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn words(&self, name: &str) -> Vec<u32> {
        assert_eq!(self.get(name).dtype(), Dtype::I32, "{name}");
        self.get(name).data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    /// Elements of 16 or 32 bits, in memory that is aligned for them.
    fn scales(&self, name: &str) -> Scales {
        let tensor = self.get(name);
        let shape = match tensor.shape() {
            [] => [1, 1],
            [count] => [*count, 1],
            [.., rows, cols] => [*rows, *cols],
        };
        let halves = || tensor.data().as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        match tensor.dtype() {
            Dtype::F32 => Scales::F32(self.floats(name), shape),
            Dtype::BF16 => Scales::Bf16(halves().map(Bf16).collect(), shape),
            Dtype::F16 => Scales::F16(halves().map(F16).collect(), shape),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// The numbers of its cases.
    fn cases(&self) -> Vec<usize> {
        (0..).take_while(|case| self.has(&format!("c{case}.dequant"))).collect()
    }

    /// The values of a case, and the shape of each matrix.
    fn want(&self, case: usize) -> (Vec<f32>, [usize; 3]) {
        let name = format!("c{case}.dequant");
        let shape = match self.get(&name).shape() {
            [n, k] => [1, *n, *k],
            [e, n, k] => [*e, *n, *k],
            other => panic!("{other:?}"),
        };
        (self.floats(&name), shape)
    }
}

/// Scales of any type.
enum Scales {
    F32(Vec<f32>, [usize; 2]),
    Bf16(Vec<Bf16>, [usize; 2]),
    F16(Vec<F16>, [usize; 2]),
}

impl Scales {
    fn rows(&self) -> ScaleRows<'_> {
        fn rows<T: Float>(values: &[T], [rows, cols]: [usize; 2]) -> ScaleRows<'_> {
            Rows::from_slice(values, rows, cols).unwrap().into()
        }
        match self {
            Scales::F32(values, shape) => rows(values, *shape),
            Scales::Bf16(values, shape) => rows(values, *shape),
            Scales::F16(values, shape) => rows(values, *shape),
        }
    }

    fn cols(&self) -> usize {
        self.rows().dims()[1]
    }
}

#[test]
fn fp8_in_blocks() {
    let file = File::open("fp8_block128");
    for case in file.cases() {
        let (want, [experts, n, k]) = file.want(case);
        for (expert, want) in want.chunks_exact(n * k).enumerate() {
            let name = format!("c{case}.experts.{expert}.gate_proj.weight");
            let (codes, scales) = (file.get(&name), file.scales(&format!("{name}_scale_inv")));
            let weights = QuantizedRows::e4m3(Rows::from_slice(codes.data(), n, k).unwrap(), scales.rows(), [128, 128]).unwrap();
            weights.check_scales().unwrap();
            decode_to(&weights, want, &name);
        }
        assert!(experts > 0);
    }
    assert_eq!(file.cases().len(), 4);
    let codes = file.get("e4m3_codes");
    let one = [1.0f32];
    let weights = QuantizedRows::e4m3(Rows::from_slice(codes.data(), 1, 256).unwrap(), Rows::from_slice(&one, 1, 1).unwrap(), [1, 256]);
    decode_to(&weights.unwrap(), &file.floats("e4m3_values"), "all codes");
}

#[test]
fn fp8_with_a_scale_for_the_tensor_or_for_each_output() {
    let file = File::open("fp8_tensor_channel");
    for case in file.cases() {
        let (want, [_, n, k]) = file.want(case);
        let (codes, scales) = (file.get(&format!("c{case}.proj.weight")), file.scales(&format!("c{case}.proj.weight_scale")));
        let block = if scales.rows().dims() == [1, 1] { [n, k] } else { [1, k] };
        let weights = QuantizedRows::e4m3(Rows::from_slice(codes.data(), n, k).unwrap(), scales.rows(), block).unwrap();
        decode_to(&weights, &want, &format!("case {case}"));
    }
    assert_eq!(file.cases().len(), 3);
}

#[test]
fn mxfp4_of_gpt_oss() {
    let file = File::open("mxfp4_gpt_oss");
    for case in file.cases() {
        let (want, [experts, n, k]) = file.want(case);
        let [codes, exponents] = ["blocks", "scales"].map(|what| file.get(&format!("c{case}.experts.gate_up_proj_{what}")));
        let codes = Rows::from_slice(codes.data(), experts * n, k / 2).unwrap();
        let weights = QuantizedRows::mxfp4(codes, Rows::from_slice(exponents.data(), experts * n, k / 32).unwrap()).unwrap();
        weights.check_scales().unwrap();
        decode_to(&weights, &want, &format!("case {case}"));
    }
    assert_eq!(file.cases().len(), 3);
    // Every code, with scales from one end to the other.
    let (codes, exponents, want) = (file.get("table.blocks"), file.get("table.scales"), file.floats("table.values"));
    for (exponent, want) in exponents.data().iter().zip(want.chunks_exact(32)) {
        let codes = Rows::from_slice(codes.data(), 1, 16).unwrap();
        let weights = QuantizedRows::mxfp4(codes, Rows::from_slice(std::slice::from_ref(exponent), 1, 1).unwrap()).unwrap();
        decode_to(&weights, want, &format!("exponent {exponent}"));
    }
}

#[test]
fn int4_of_compressed_tensors() {
    let file = File::open("int4_compressed_tensors");
    for case in file.cases() {
        let (want, [_, n, k]) = file.want(case);
        let name = |what: &str| format!("c{case}.proj.weight_{what}");
        let (codes, scales) = (file.get(&name("packed")), file.scales(&name("scale")));
        let group = k / scales.cols();
        let weights = QuantizedRows::int4(Rows::from_slice(codes.data(), n, k / 2).unwrap(), scales.rows(), k, group).unwrap();
        let zeros = file.has(&name("zero_point")).then(|| file.get(&name("zero_point")));
        let weights = match &zeros {
            Some(zeros) => weights.with_zeros(Rows::from_slice(zeros.data(), n / 8, 4 * scales.cols()).unwrap()).unwrap(),
            None => weights,
        };
        weights.check_scales().unwrap();
        decode_to(&weights, &want, &format!("case {case}"));
    }
    assert_eq!(file.cases().len(), 4);
}

#[test]
fn int4_of_gptq_and_awq() {
    let mut in_order = Vec::new();
    for (name, count) in [("int4_gptq", 3), ("int4_awq", 2)] {
        let file = File::open(name);
        for case in file.cases() {
            let (want, [_, n, k]) = file.want(case);
            let [codes, zeros] = ["qweight", "qzeros"].map(|what| file.words(&format!("c{case}.proj.{what}")));
            let scales = file.scales(&format!("c{case}.proj.scales"));
            let groups = scales.rows().dims()[0];
            let zeros = Rows::from_slice(&zeros, groups, n / 8).unwrap();
            let what = format!("{name}, case {case}");
            if name == "int4_awq" {
                let awq = Awq::new(Rows::from_slice(&codes, k, n / 8).unwrap(), zeros, scales.rows(), k / groups).unwrap();
                awq.check_scales().unwrap();
                assert_eq!(awq.dims(), [n, k]);
                same(&awq.to_f32().unwrap(), &want, &what);
                decode_to(&awq.to_int4().unwrap().rows().unwrap(), &want, &what);
                continue;
            }
            let of_inputs = file.words(&format!("c{case}.proj.g_idx"));
            let gptq = Gptq::new(Rows::from_slice(&codes, k / 8, n).unwrap(), zeros, scales.rows(), k / groups).unwrap();
            let gptq = gptq.with_groups(&of_inputs).unwrap();
            gptq.check_scales().unwrap();
            assert_eq!(gptq.dims(), [n, k]);
            same(&gptq.to_f32().unwrap(), &want, &what);
            in_order.push(gptq.is_in_order());
            match gptq.to_int4() {
                Ok(int4) => {
                    // Symmetric ones have no zero points of their own.
                    assert_eq!(int4.zeros().is_none(), case == 0, "{what}");
                    decode_to(&int4.rows().unwrap(), &want, &what);
                }
                Err(error) => assert!(error.is_unsupported() && !gptq.is_in_order(), "{what}: {error}"),
            }
        }
        assert_eq!(file.cases().len(), count, "{name}");
    }
    assert_eq!(in_order, [true, true, false]);
}

#[test]
fn blocks_of_gguf() {
    let formats = [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::GgufMxfp4, Format::Q5K];
    let file = File::open("gguf_blocks");
    for case in file.cases() {
        let (want, [experts, n, k]) = file.want(case);
        let (format, data) = (formats[case / 2], file.get(&format!("c{case}.data")));
        let bytes = k / format.block_elements() * format.block_bytes();
        let weights = QuantizedRows::gguf(format, Rows::from_slice(data.data(), experts * n, bytes).unwrap(), k).unwrap();
        decode_to(&weights, &want, &format!("{}, case {case}", format.name()));
    }
    assert_eq!(file.cases().len(), 11);
}

/// One block by the formulas of the formats' documentation, element by element.
fn block_of(format: Format, b: &[u8]) -> Vec<f32> {
    let half = |at: usize| F16(u16::from_le_bytes([b[at], b[at + 1]])).to_f32();
    // The low nibbles of sixteen bytes are the first elements, the high ones the others.
    let split = |bytes: &[u8], i: usize| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 };
    let bit = |at: usize, i: usize| (b[at + i / 8] >> (i % 8) & 1) << 4;
    let k_factors = |s: usize| {
        let b = &b[4..16];
        if s < 4 { (b[s] & 63, b[s + 4] & 63) } else { ((b[s + 4] & 15) | (b[s - 4] >> 6) << 4, (b[s + 4] >> 4) | (b[s] >> 6) << 4) }
    };
    let k_value = |i: usize, q: u8| {
        let (scale, least) = k_factors(i / 32);
        half(0) * f32::from(scale) * f32::from(q) - half(2) * f32::from(least)
    };
    let k_nibble = |codes: &[u8], i: usize| codes[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
    let element = |i: usize| match format {
        Format::Q8_0 => half(0) * f32::from(b[2 + i] as i8),
        Format::Q4_0 => half(0) * (f32::from(split(&b[2..], i)) - 8.0),
        Format::Q4_1 => half(0) * f32::from(split(&b[4..], i)) + half(2),
        Format::Q5_0 => half(0) * (f32::from(split(&b[6..], i) | bit(2, i)) - 16.0),
        Format::Q5_1 => half(0) * f32::from(split(&b[8..], i) | bit(4, i)) + half(2),
        Format::GgufMxfp4 => (e2m1(split(&b[1..], i)) + 0.0) * power(b[0]), // no zero has a sign
        Format::Q4K => k_value(i, k_nibble(&b[16..], i)),
        Format::Q5K => k_value(i, k_nibble(&b[48..], i) | (b[16 + i % 32] >> (i / 32) & 1) << 4),
        Format::Q6K => {
            let (h, t, j) = (i / 128, i % 128 / 32, i % 32);
            let low = b[64 * h + 32 * (t & 1) + j] >> (4 * (t / 2)) & 15;
            let q = low | (b[128 + 32 * h + j] >> (2 * t) & 3) << 4;
            half(208) * f32::from(b[192 + 8 * h + 2 * t + j / 16] as i8) * (f32::from(q) - 32.0)
        }
        other => panic!("{} has no blocks", other.name()),
    };
    (0..format.block_elements()).map(element).collect()
}

/// Whether the numbers that a block's elements are multiplied by are finite.
fn has_finite_scales(format: Format, block: &[u8]) -> bool {
    let halves: &[usize] = match format {
        Format::GgufMxfp4 => return block[0] != 255,
        Format::Q6K => &[208],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        _ => &[0],
    };
    halves.iter().all(|at| F16(u16::from_le_bytes([block[*at], block[at + 1]])).to_f32().is_finite())
}

fn e2m1(code: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// `2^(exponent - 127)`.
fn power(exponent: u8) -> f32 {
    if exponent == 255 { f32::NAN } else { 2f64.powi(i32::from(exponent) - 127) as f32 }
}

/// Any bytes for `rows` rows of `blocks` blocks of a format of GGUF.
fn gguf() -> impl Strategy<Value = (Format, usize, usize, Vec<u8>)> {
    let formats: Vec<Format> = Format::ALL.into_iter().filter(|format| !format.has_scales_apart()).collect();
    (proptest::sample::select(formats), 1..4usize, 0..4usize).prop_flat_map(|(format, rows, blocks)| {
        (Just(format), Just(rows), Just(blocks), vec(any::<u8>(), rows * blocks * format.block_bytes()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 256 } else { 1024 }))]

    #[test]
    fn any_blocks_are_those_of_the_formula((format, rows, blocks, bytes) in gguf()) {
        let k = blocks * format.block_elements();
        let weights = QuantizedRows::gguf(format, Rows::from_slice(&bytes, rows, blocks * format.block_bytes()).unwrap(), k).unwrap();
        let want: Vec<f32> = bytes.chunks_exact(format.block_bytes()).flat_map(|block| block_of(format, block)).collect();
        same(&weights.to_f32().unwrap(), &want, format.name());
        // A scale that is no number is refused, and nothing else.
        let first = bytes.chunks_exact(format.block_bytes()).position(|block| !has_finite_scales(format, block));
        let refused = weights.check_scales().err().map(|error| match error {
            Error::NotFinite { row, block, .. } => row * blocks + block,
            other => panic!("{other}"),
        });
        prop_assert_eq!(refused, first, "{}", format.name());
        prop_assert!(weights.row_range(0..rows + 1).is_err() && weights.dequantize(rows, &mut vec![0.0; k]).is_err());
        prop_assert!(QuantizedRows::gguf(format, weights.codes(), k + 1).is_err());
    }

    #[test]
    fn any_fp8_is_that_of_the_formula(
        (n, k, block, codes, scales) in (1..20usize, 1..40usize, [1..9usize, 1..17usize]).prop_flat_map(|(n, k, block)| {
            let blocks = n.div_ceil(block[0]) * k.div_ceil(block[1]);
            (Just(n), Just(k), Just(block), vec(any::<u8>(), n * k), vec(any::<u16>(), blocks))
        }),
    ) {
        let [rows, cols] = [n.div_ceil(block[0]), k.div_ceil(block[1])];
        let codes_of = Rows::from_slice(&codes, n, k).unwrap();
        let want = |scale: &dyn Fn(u16) -> f32| -> Vec<f32> {
            let value = |i: usize| oracle::quantize::value(codes[i]) as f32 * scale(scales[i / k / block[0] * cols + i % k / block[1]]);
            (0..n * k).map(value).collect()
        };
        let bf16: Vec<Bf16> = scales.iter().map(|bits| Bf16(*bits)).collect();
        let f16: Vec<F16> = scales.iter().map(|bits| F16(*bits)).collect();
        let f32: Vec<f32> = scales.iter().map(|bits| f32::from_bits(u32::from(*bits) << 13)).collect();
        let got = |scales: ScaleRows<'_>| QuantizedRows::e4m3(codes_of, scales, block).unwrap().to_f32().unwrap();
        same(&got(Rows::from_slice(&bf16, rows, cols).unwrap().into()), &want(&|bits| Bf16(bits).to_f32()), "bf16");
        same(&got(Rows::from_slice(&f16, rows, cols).unwrap().into()), &want(&|bits| F16(bits).to_f32()), "f16");
        same(&got(Rows::from_slice(&f32, rows, cols).unwrap().into()), &want(&|bits| f32::from_bits(u32::from(bits) << 13)), "f32");
        prop_assert!(QuantizedRows::e4m3(codes_of, Rows::from_slice(&bf16[1..], 1, bf16.len() - 1).unwrap(), block).is_err());
    }

    #[test]
    fn any_mxfp4_is_that_of_the_formula(
        (n, blocks, codes, exponents) in (1..5usize, 1..5usize)
            .prop_flat_map(|(n, blocks)| (Just(n), Just(blocks), vec(any::<u8>(), n * blocks * 16), vec(any::<u8>(), n * blocks))),
    ) {
        let value = |i: usize| e2m1(codes[i / 2] >> (4 * (i % 2))) * power(exponents[i / 32]);
        let want: Vec<f32> = (0..n * blocks * 32).map(value).collect();
        let exponents_of = Rows::from_slice(&exponents, n, blocks).unwrap();
        let weights = QuantizedRows::mxfp4(Rows::from_slice(&codes, n, blocks * 16).unwrap(), exponents_of).unwrap();
        same(&weights.to_f32().unwrap(), &want, "mxfp4");
        let first = exponents.iter().position(|exponent| *exponent == 255);
        let refused = weights.check_scales().err().map(|error| match error {
            Error::NotFinite { row, block, .. } => row * blocks + block,
            other => panic!("{other}"),
        });
        prop_assert_eq!(refused, first);
    }

    #[test]
    fn any_gptq_and_awq_are_those_of_the_formula(input in input_major()) {
        let InputMajor { n, k, group, codes, zeros, scales, groups } = &input;
        let (n, k, group, count) = (*n, *k, *group, k.div_ceil(*group));
        let zeros_of = Rows::from_slice(zeros, count, n / 8).unwrap();
        let scales_of = Rows::from_slice(scales, count, n).unwrap();
        let gptq = Gptq::new(Rows::from_slice(codes, k / 8, n).unwrap(), zeros_of, scales_of, group).unwrap();
        let value = |n_at: usize, k_at: usize, g: usize| {
            let code = codes[k_at / 8 * n + n_at] >> (4 * (k_at % 8)) & 15;
            let zero = ((zeros[g * (n / 8) + n_at / 8] >> (4 * (n_at % 8)) & 15) + 1) & 15;
            (code as f32 - zero as f32) * scales[g * n + n_at].to_f32()
        };
        let want: Vec<f32> = (0..n * k).map(|i| value(i / k, i % k, i % k / group)).collect();
        same(&gptq.to_f32().unwrap(), &want, "gptq");
        same(&gptq.to_int4().unwrap().rows().unwrap().to_f32().unwrap(), &want, "gptq repacked");
        let want: Vec<f32> = (0..n * k).map(|i| value(i / k, i % k, groups[i % k] as usize)).collect();
        same(&gptq.with_groups(groups).unwrap().to_f32().unwrap(), &want, "gptq by activations");
        let finite = scales.iter().all(|scale| scale.to_f32().is_finite());
        prop_assert_eq!(gptq.check_scales().is_ok(), finite);

        // The same words, read as AWQ.
        let awq = Awq::new(Rows::from_slice(codes, k, n / 8).unwrap(), zeros_of, scales_of, group).unwrap();
        let at = |word: u32, n: usize| word >> (4 * [0, 4, 1, 5, 2, 6, 3, 7][n % 8]) & 15;
        let value = |n_at: usize, k_at: usize| {
            let (code, g) = (at(codes[k_at * (n / 8) + n_at / 8], n_at), k_at / group);
            (code as f32 - at(zeros[g * (n / 8) + n_at / 8], n_at) as f32) * scales[g * n + n_at].to_f32()
        };
        let want: Vec<f32> = (0..n * k).map(|i| value(i / k, i % k)).collect();
        same(&awq.to_f32().unwrap(), &want, "awq");
        same(&awq.to_int4().unwrap().rows().unwrap().to_f32().unwrap(), &want, "awq repacked");
        prop_assert_eq!(awq.check_scales().is_ok(), finite);
    }
}

/// Random words as GPTQ and AWQ have them.
#[derive(Debug)]
struct InputMajor {
    n: usize,
    k: usize,
    group: usize,
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<F16>,
    groups: Vec<u32>,
}

fn input_major() -> impl Strategy<Value = InputMajor> {
    (1..4usize, 1..7usize, 1..8usize).prop_flat_map(|(n, k, group)| {
        let (n, k, group) = (8 * n, 8 * k, 8 * group);
        let count = k.div_ceil(group);
        let scales = vec(any::<u16>().prop_map(F16), count * n);
        (vec(any::<u32>(), k / 8 * n), vec(any::<u32>(), count * n / 8), scales, vec(0..count as u32, k))
            .prop_map(move |(codes, zeros, scales, groups)| InputMajor { n, k, group, codes, zeros, scales, groups })
    })
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let (words, scales) = ([0u32; 64], [F16(0); 64]);
    let rows = |rows, cols| Rows::from_slice(&words[..rows * cols], rows, cols).unwrap();
    let halves = |rows, cols| Rows::from_slice(&scales[..rows * cols], rows, cols).unwrap();
    let gptq = |codes, zeros, scales, group| Gptq::new(codes, zeros, scales, group).map(|_| ()).unwrap_err().to_string();
    let awq = |codes, zeros, scales, group| Awq::new(codes, zeros, scales, group).map(|_| ()).unwrap_err().to_string();
    let op = "expert_weights: ";
    for (got, want) in [
        // 16 inputs of 8 outputs in 2 groups.
        (gptq(rows(2, 8), rows(1, 1), halves(2, 8), 8), "`zeros` must be [groups, N / 8] = [2, 1], got [1, 1]"),
        (gptq(rows(2, 8), rows(2, 1), halves(2, 4), 8), "`scales` must be [groups, N] = [2, 8], got [2, 4]"),
        (gptq(rows(2, 8), rows(2, 1), halves(2, 8), 0), "`group` must be a multiple of 8, or all of K, got 0"),
        (gptq(rows(2, 8), rows(2, 1), halves(2, 8), 12), "`group` must be a multiple of 8, or all of K, got 12"),
        (gptq(rows(2, 7), rows(2, 1), halves(2, 7), 8), "`codes` must be [N, K] in whole words of 8 = [8, 16], got [7, 16]"),
        (awq(rows(16, 1), rows(2, 2), halves(2, 8), 8), "`zeros` must be [groups, N / 8] = [2, 1], got [2, 2]"),
        (awq(rows(12, 1), rows(2, 1), halves(2, 8), 8), "`codes` must be [N, K] in whole words of 8 = [8, 16], got [8, 12]"),
    ] {
        assert_eq!(got, format!("{op}{want}"));
    }
    let gptq = Gptq::new(rows(2, 8), rows(2, 1), halves(2, 8), 8).unwrap();
    let groups = |groups: &[u32]| gptq.with_groups(groups).map(|_| ()).unwrap_err().to_string();
    assert_eq!(groups(&[0; 15]), format!("{op}`groups` must be [K] = [16], got [15]"));
    let mut one = [0u32; 16];
    one[3] = u32::MAX;
    assert_eq!(groups(&one), format!("{op}`groups[3]` is 4294967295, must be < 2"));
    let by_activations = gptq.with_groups(&[1; 16]).map(|gptq| gptq.to_int4().map(|_| ()).unwrap_err().to_string());
    let want = "GPTQ's order by activations is not supported here; supported: groups of neighbouring inputs";
    assert_eq!(by_activations.unwrap(), format!("{op}{want}"));
    // Of no rows there may be more columns than fit in the address space.
    let none = |cols| Rows::from_slice(&[0u8; 0], 0, cols).unwrap();
    let blocks = Format::ALL.into_iter().filter(|format| !format.has_scales_apart());
    for refused in blocks.map(|format| QuantizedRows::gguf(format, none(0), usize::MAX)).chain([
        QuantizedRows::mxfp4(none(isize::MAX as usize), none(0)),
        QuantizedRows::int4(none(0), halves(0, 1), usize::MAX, usize::MAX),
        QuantizedRows::e4m3(none(isize::MAX as usize), halves(0, 1), [1, usize::MAX]),
    ]) {
        assert!(matches!(refused.err(), Some(Error::TooLarge { .. })));
    }
    let wide = QuantizedRows::mxfp4(none(1 << 59), none(1 << 55)).unwrap();
    assert!(matches!(Tiles::of(&ExpertWeights::nk(wide, 1).unwrap()), Err(Error::TooLarge { .. })));
    // And of no columns more rows than one can count.
    let codes = Rows::from_slice(&[0u8; 0], 1 << 60, 0).unwrap();
    let no_scales = Rows::from_slice(&[F16(0); 0], 1 << 60, 0).unwrap();
    QuantizedRows::e4m3(codes, no_scales, [1, 1]).unwrap().check_scales().unwrap();
    let mut bad = scales;
    bad[13] = F16(0x7c00);
    let awq = Awq::new(rows(16, 1), rows(2, 1), Rows::from_slice(&bad[..16], 2, 8).unwrap(), 8).unwrap();
    let want = "`scales` must be finite numbers, that of row 5, block 1 is not";
    assert_eq!(awq.check_scales().unwrap_err().to_string(), format!("{op}{want}"));
}
