//! Codes of one value each: every code and tie of a format, and weights that another quantiser made, which
//! give its bytes again where its scale follows from them.

use dropless::{Bf16, F16, Float, QuantizedRows, Rows};
use dropless_kit::goldens;
use dropless_lm::quantize::encode::{e2m1, e4m3, encode};
use dropless_lm::target::Target;
use safetensors::{Dtype, SafeTensors};

/// Bytes of codes and scales of a matrix.
fn encoded(target: Target, values: &[f32], [n, k]: [usize; 2]) -> [Vec<u8>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for rows in values.chunks(128 * k) {
        let n = rows.len() / k;
        let (mut codes, mut scales) = (vec![0; n * target.row_bytes(k)], vec![0; target.scale_bytes(n, k)]);
        encode(target, rows, k, &mut codes, &mut scales).unwrap();
        all[0].extend(codes);
        all[1].extend(scales);
    }
    assert_eq!(values.len(), n * k);
    all
}

/// Each code gives itself, and between two neighbours the even one begins at half.
#[test]
fn every_code_of_fp8_and_its_ties() {
    let codes: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    let one = [1.0f32];
    let row = QuantizedRows::e4m3(Rows::from_slice(&codes, 1, codes.len()).unwrap(), Rows::from_slice(&one, 1, 1).unwrap(), [1, 512]);
    let values = row.unwrap().to_f32().unwrap();
    for (code, value) in codes.iter().zip(&values) {
        assert_eq!(e4m3(f64::from(*value)), *code, "{value}");
    }
    for pair in codes.windows(2).filter(|pair| pair[0] < 0x7e) {
        let middle = f64::from(values[usize::from(pair[0])] + values[usize::from(pair[1])]) / 2.0;
        let even = pair[usize::from(pair[0] % 2)];
        let (below, above) = (f64::from_bits(middle.to_bits() - 1), f64::from_bits(middle.to_bits() + 1));
        assert_eq!([e4m3(below), e4m3(middle), e4m3(above)], [pair[0], even, pair[1]], "{middle}");
        assert_eq!(e4m3(-middle), even | 0x80);
    }
    assert_eq!([448.0, 449.0, 465.0, 1e300, f64::INFINITY].map(e4m3), [0x7e; 5]);
}

#[test]
fn every_code_of_mxfp4_and_its_ties() {
    let values = [0.0f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (code, value) in values.iter().enumerate() {
        assert_eq!([e2m1(*value), e2m1(-value)], [code as u8, code as u8 | 8]);
    }
    for code in 0..7u8 {
        let middle = (values[usize::from(code)] + values[usize::from(code) + 1]) / 2.0;
        let (below, above) = (f32::from_bits(middle.to_bits() - 1), f32::from_bits(middle.to_bits() + 1));
        assert_eq!([e2m1(below), e2m1(middle), e2m1(above)], [code, code + code % 2, code + 1], "{middle}");
    }
    assert_eq!([6.0, 7.0, 1e6].map(e2m1), [7; 3]);
}

/// Blocks at the ends of what floats can be: scales stay normal numbers, and values are within half a step.
#[test]
fn the_smallest_and_the_largest_weights() {
    let (tiny, huge) = (f32::from_bits(1), 2f32.powi(126));
    for target in Target::ALL {
        for size in [tiny, f32::MIN_POSITIVE, 1e-30, 1.0, 1e30, huge] {
            let row: Vec<f32> = (0..128).map(|i| size * (i as f32 / 127.0) * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let (mut codes, mut scales) = (vec![0; target.row_bytes(128)], vec![0; target.scale_bytes(1, 128)]);
            let errors = encode(target, &row, 128, &mut codes, &mut scales).unwrap();
            // The smallest scale of FP8 and INT4 is 2^-126, of whose steps half may be lost.
            let share = if target == Target::Fp8 { 1.0 / 27.0 } else { 0.26 };
            let bound = (f64::from(size) * share).max(2f64.powi(-127));
            assert!(errors.largest <= bound, "{} of {size:e}: {:e}", target.name(), errors.largest);
            assert!(errors.squares.is_finite() && errors.of_weights.is_finite());
        }
        let zeros = encoded(target, &[0.0; 128], [1, 128]);
        let (code, scale): (u8, &[u8]) = match target {
            Target::Fp8 => (0, &1f32.to_le_bytes()),
            Target::Mxfp4 => (0, &[127; 4]),
            Target::Int4 => (0x88, &0x3f80u16.to_le_bytes()),
        };
        assert!(zeros[0].iter().all(|byte| *byte == code) && zeros[1] == scale, "{zeros:?}");
    }
}

/// Weights that are no multiple of 8 end in codes of zeros.
#[test]
fn int4_fills_up_its_last_word() {
    let [codes, scales] = encoded(Target::Int4, &[7.0, -7.0, 1.0], [1, 3]);
    assert_eq!((codes, scales), (vec![0x1f, 0x89, 0x88, 0x88], 0x3f80u16.to_le_bytes().to_vec()));
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

    /// Names that end so.
    fn names(&self, end: &str) -> Vec<String> {
        self.tensors().names().into_iter().filter(|name| name.ends_with(end)).map(str::to_owned).collect()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensors().tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data().to_vec()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap().shape().to_vec()
    }

    /// As floats, of any type.
    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        let words = || tensor.data().as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        match tensor.dtype() {
            Dtype::F32 => tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::BF16 => words().map(|bits| Bf16(bits).to_f32()).collect(),
            Dtype::F16 => words().map(|bits| F16(bits).to_f32()).collect(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// Blocks whose largest code is 448 have their scale back, to the last bit of its rounding, and then all
/// codes.
#[test]
fn fp8_blocks_of_others_give_their_bytes_again() {
    let file = File::open("fp8_block128");
    let mut blocks = 0;
    for name in file.names("gate_proj.weight") {
        let (codes, scales) = (file.bytes(&name), file.floats(&format!("{name}_scale_inv")));
        let &[n, k] = file.shape(&name).as_slice() else { panic!("{name}") };
        let (rows, cols) = (n.div_ceil(128), k.div_ceil(128));
        let matrix = QuantizedRows::e4m3(Rows::from_slice(&codes, n, k).unwrap(), Rows::from_slice(&scales, rows, cols).unwrap(), [128; 2]);
        let [again, scales_again] = encoded(Target::Fp8, &matrix.unwrap().to_f32().unwrap(), [n, k]);
        let scales_again: Vec<f32> = scales_again.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        for block in 0..rows * cols {
            let (top, left) = (block / cols * 128, block % cols * 128);
            let places = (top..n.min(top + 128)).flat_map(|row| (left..k.min(left + 128)).map(move |col| row * k + col));
            if !places.clone().any(|place| codes[place] & 0x7f == 0x7e) {
                continue;
            }
            blocks += 1;
            let off = scales[block].to_bits().abs_diff(scales_again[block].to_bits());
            // The product of a scale of few bits and 448 is exact.
            let is_exact = scales[block].to_bits().trailing_zeros() >= 16;
            assert!(off <= u32::from(!is_exact), "{name}, block {block}: {:e} and {:e}", scales[block], scales_again[block]);
            assert!(places.clone().all(|place| codes[place] == again[place]), "{name}, block {block}");
        }
    }
    assert!(blocks >= 8, "{blocks}");
}

/// Blocks whose largest code is 4 or 6 have their exponent back, and all codes. Others have the same values.
#[test]
fn mxfp4_blocks_of_others_give_their_bytes_again() {
    let file = File::open("mxfp4_gpt_oss");
    let (mut blocks, mut same) = (0, 0);
    for name in file.names("_proj_blocks") {
        let scales_name = name.replace("_blocks", "_scales");
        let (codes, scales) = (file.bytes(&name), file.bytes(&scales_name));
        let (n, k) = (scales.len() / file.shape(&scales_name)[2], 32 * file.shape(&scales_name)[2]);
        let read = |codes: &[u8], scales: &[u8]| {
            let scales = Rows::from_slice(scales, n, k / 32).unwrap();
            QuantizedRows::mxfp4(Rows::from_slice(codes, n, k / 2).unwrap(), scales).unwrap().to_f32().unwrap()
        };
        let values = read(&codes, &scales);
        let [again, scales_again] = encoded(Target::Mxfp4, &values, [n, k]);
        let all = codes.chunks(16).zip(again.chunks(16)).zip(scales.iter().zip(&scales_again));
        for ((codes, again), (scale, scale_again)) in all {
            blocks += 1;
            if codes.iter().flat_map(|byte| [byte & 7, byte >> 4 & 7]).any(|code| code >= 6) {
                same += 1;
                assert_eq!((codes, scale), (again, scale_again), "{name}");
            }
        }
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(values), bits(read(&again, &scales_again)), "{name}");
    }
    assert!(same >= 100 && same < blocks, "{same} of {blocks}");
}

/// Groups of 128 with a bf16 scale whose largest code is 7 or -8 have it back, and all codes.
#[test]
fn int4_groups_of_others_give_their_bytes_again() {
    let file = File::open("int4_compressed_tensors");
    let (mut groups, mut same) = (0, 0);
    for name in file.names("weight_packed") {
        let part = |suffix: &str| name.replace("_packed", suffix);
        let shape = file.shape(&part("_scale"));
        let is_bf16 = file.tensors().tensor(&part("_scale")).unwrap().dtype() == Dtype::BF16;
        let k = 8 * file.shape(&name)[1];
        if !is_bf16 || shape[1] != k.div_ceil(128) {
            continue;
        }
        let (codes, scales) = (file.bytes(&name), file.floats(&part("_scale")));
        let n = shape[0];
        let values: Vec<f32> = {
            let scales = Rows::from_slice(&scales, n, shape[1]).unwrap();
            QuantizedRows::int4(Rows::from_slice(&codes, n, k / 2).unwrap(), scales, k, 128).unwrap().to_f32().unwrap()
        };
        let [again, scales_again] = encoded(Target::Int4, &values, [n, k]);
        let scales_again = scales_again.as_chunks().0.iter().map(|bytes| Bf16(u16::from_le_bytes(*bytes)).to_f32());
        let all = codes.chunks(64).zip(again.chunks(64)).zip(scales.iter().zip(scales_again));
        for ((codes, again), (scale, scale_again)) in all {
            groups += 1;
            if codes.iter().flat_map(|byte| [byte & 15, byte >> 4]).any(|code| code == 0 || code == 15) {
                same += 1;
                assert_eq!((codes, *scale), (again, scale_again), "{name}");
            }
        }
    }
    assert!(same >= 100, "{same} of {groups}");
}
