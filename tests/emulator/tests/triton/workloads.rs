//! A launch of every image, and in plain Rust what it must compute.
//!
//! Operands are small integers wherever a sum is taken, so that every order of addition gives the same bits
//! and results are compared bit for bit. Results of approximate functions (exp, erf, 1/sqrt) have a tolerance
//! that follows from their own rounding and from what is rounded on the way.

use crate::cases::number::{BF16, Binary, E4M3, E5M2, F16, F32, Mode};
use crate::cases::{Arg, Expect, Format, Want, f32s, scrambled, u32s};
use crate::launch::Work;

/// Type of a tensor's elements.
#[derive(Clone, Copy)]
enum Element {
    Float(Binary),
    Int(usize),
}

const BF: Element = Element::Float(BF16);
const HALF: Element = Element::Float(F16);
const SINGLE: Element = Element::Float(F32);
const FP8: Element = Element::Float(E4M3);

impl Element {
    fn bytes(self) -> usize {
        match self {
            Element::Float(format) => (1 + format.exponent_bits + format.mantissa_bits) as usize / 8,
            Element::Int(bytes) => bytes,
        }
    }

    /// The bytes of `values`, each rounded to nearest.
    fn encode(self, values: &[f64]) -> Vec<u8> {
        let code = |x: f64| match self {
            Element::Float(format) => format.round(x, Mode::Rn).expect("a number"),
            Element::Int(_) => x as i64 as u64,
        };
        values.iter().flat_map(|&x| code(x).to_le_bytes()[..self.bytes()].to_vec()).collect()
    }
}

/// Integers in -limit..=limit that follow no pattern.
fn numbers(count: usize, seed: u64, limit: i64) -> Vec<f64> {
    scrambled(count, seed, limit).into_iter().map(f64::from).collect()
}

fn i32s(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Words without a pattern, of every magnitude.
fn words(count: usize, seed: u64) -> Vec<i32> {
    let word = |(x, i): (f32, usize)| (x as i32).wrapping_mul(0x01F3_5BD1) >> (i % 24);
    scrambled(count, seed, 1 << 20).into_iter().zip(0..).map(word).collect()
}

/// A buffer that starts with `before` and must end with `after`.
fn updated(before: Vec<u8>, after: Vec<u8>) -> Arg {
    Arg::Buffer { before, after: Expect::Bytes(after) }
}

/// A buffer of elements within a distance of these: relative to the value, or absolute.
fn near(format: Format, values: &[f64], relative: f64, absolute: f64) -> Arg {
    Arg::values(format, values.iter().map(|&value| Want::Near { value, relative, absolute }).collect())
}

// Elementwise

pub fn axpy_f32() -> Work {
    let n = 1100;
    let (x, y, a) = (scrambled(n, 1, 1 << 20), scrambled(n, 2, 1 << 20), 0.3f32);
    let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| a.mul_add(*x, *y)).collect();
    Work::of("axpy_f32", [3, 1, 1]).input(f32s(&x)).input(f32s(&y)).output(f32s(&want)).f32(a).i32(n as i32)
}

pub fn gated_silu_bf16() -> Work {
    let n = 700;
    let gate: Vec<f64> = numbers(n, 3, 96).iter().map(|x| x / 16.0).collect();
    let up: Vec<f64> = numbers(n, 4, 128).iter().map(|x| x / 8.0).collect();
    let want: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    // One rounding to 8 bits, half a unit of 2^-7, and f32 before it.
    Work::of("gated_silu_bf16", [2, 1, 1])
        .input(BF.encode(&gate))
        .input(BF.encode(&up))
        .arg(near(Format::Bf16, &want, 2f64.powi(-8) * 1.01, 0.0))
        .i32(n as i32)
}

/// The error function by its Taylor series, good to 1e-12 for |x| < 3.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for i in 1..80 {
        term *= -x * x / f64::from(i);
        sum += term / f64::from(2 * i + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

pub fn gelu_f16() -> Work {
    let x: Vec<f64> = numbers(512, 5, 256).iter().map(|x| x / 64.0).collect();
    let want: Vec<f64> = x.iter().map(|x| x * (1.0 + erf(x / 2f64.sqrt())) / 2.0).collect();
    let half_unit = 2f64.powi(-11);
    // Near -4 the sum of 1 and erf keeps only the last bits of erf: 4 times some 2^-23.
    let want = near(Format::F16, &want, half_unit * 1.01, 2e-6);
    Work::of("gelu_f16", [1, 1, 1]).input(HALF.encode(&x)).arg(want)
}

/// Numbers on, between and beyond those of an 8-bit format, ties among them.
fn to_cast() -> Vec<f32> {
    let scaled = |(x, i): (f32, i32)| x * 2f32.powi(i % 21 - 17);
    let mut x: Vec<f32> = scrambled(512, 6, 4096).into_iter().zip(0..).map(scaled).collect();
    let infinite = [0.0, -0.0, f32::NAN, f32::INFINITY, -f32::INFINITY];
    let large = [448.0, 464.0, 465.0, -480.0, 57344.0, 61440.0, -65536.0];
    x[..5].copy_from_slice(&infinite);
    x[5..12].copy_from_slice(&large);
    x
}

fn cast_to(image: &'static str, format: Binary) -> Work {
    let x = to_cast();
    let code = |x: &f32| format.round_finite(f64::from(*x)).unwrap_or(0x7f) as u8;
    let want: Vec<u8> = x.iter().map(code).collect();
    Work::of(image, [1, 1, 1]).input(f32s(&x)).output(want)
}

pub fn cast_f32_e4m3() -> Work {
    cast_to("cast_f32_e4m3", E4M3)
}

pub fn cast_f32_e5m2() -> Work {
    cast_to("cast_f32_e5m2", E5M2)
}

/// All codes of e4m3.
fn cast_from_e4m3(image: &'static str, format: Format, to: Binary) -> Work {
    let codes: Vec<u8> = (0..=255).collect();
    let want = |code: &u8| to.round(E4M3.value((*code).into()), Mode::Rn).map_or(Want::Nan, Want::Bits);
    let wants = codes.iter().map(want).collect();
    Work::of(image, [1, 1, 1]).input(codes).arg(Arg::values(format, wants))
}

pub fn cast_e4m3_f16() -> Work {
    cast_from_e4m3("cast_e4m3_f16", Format::F16, F16)
}

pub fn cast_e4m3_bf16() -> Work {
    cast_from_e4m3("cast_e4m3_bf16", Format::Bf16, BF16)
}

pub fn integers() -> Work {
    let a = words(512, 7);
    let b: Vec<i32> = words(512, 8).iter().map(|&b| if b == 0 || b == -1 { 77 } else { b }).collect();
    let (mut narrow, mut wide) = (Vec::new(), Vec::new());
    for (&a, &b) in a.iter().zip(&b) {
        let shift = (b & 31) as u32;
        narrow.push((a / b) ^ ((a % b) << 7) ^ (a >> shift) ^ ((a as u32 >> shift) as i32) ^ (!a & b));
        let high = (u64::from(a as u32) * u64::from(b as u32)) >> 32;
        wide.push(i64::from(a) * i64::from(b) / 1000 + high as i64);
    }
    Work::of("integers", [2, 1, 1])
        .input(i32s(&a))
        .input(i32s(&b))
        .output(i32s(&narrow))
        .output(wide.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())
}

/// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.
fn philox_4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        let [_, c1, _, c3] = counter;
        let (from_high, from_low) = ((high >> 32) as u32, (low >> 32) as u32);
        counter = [from_high ^ c1 ^ key[0], high as u32, from_low ^ c3 ^ key[1], low as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

pub fn philox() -> Work {
    let seed = 0x1234_5679;
    let want: Vec<u32> = (0..256).flat_map(|i| philox_4x32([i, 0, 0, 0], [seed, 0])).collect();
    Work::of("philox", [2, 1, 1]).output(u32s(&want)).i32(seed as i32)
}

// Reductions, scans, data movement

pub fn row_sums_f32() -> Work {
    let (rows, columns) = (8, 200);
    let x = scrambled(rows * columns, 9, 1000);
    let want: Vec<f32> = x.chunks(columns).map(|row| row.iter().sum()).collect();
    Work::of("row_sums_f32", [2, 1, 1]).input(f32s(&x)).output(f32s(&want)).i32(columns as i32)
}

pub fn column_sums_f32() -> Work {
    let (rows, columns) = (64, 32);
    let x = scrambled(rows * columns, 10, 1000);
    let want: Vec<f32> = (0..columns).map(|j| x.iter().skip(j).step_by(columns).sum()).collect();
    Work::of("column_sums_f32", [1, 1, 1]).input(f32s(&x)).output(f32s(&want))
}

pub fn arg_max_f32() -> Work {
    let (rows, columns) = (4, 300);
    // Few different values, so that the largest stands in many places.
    let x = scrambled(rows * columns, 11, 30);
    let (mut values, mut places) = (Vec::new(), Vec::new());
    for row in x.chunks(columns) {
        let best = row.iter().copied().fold(f32::MIN, f32::max);
        values.push(best);
        places.push(row.iter().position(|&v| v == best).expect("the maximum is there") as u32);
    }
    let work = Work::of("arg_max_f32", [rows as u32, 1, 1]).input(f32s(&x));
    work.output(f32s(&values)).output(u32s(&places)).i32(columns as i32)
}

pub fn folds_i32() -> Work {
    let x = words(2 * 256, 12);
    let fold = |row: &[i32]| {
        [
            *row.iter().max().expect("a row"),
            *row.iter().min().expect("a row"),
            row.iter().fold(0, |a, b| a ^ b),
            row.iter().fold(0i32, |a, &b| a.wrapping_add(b)),
        ]
    };
    let want: Vec<i32> = x.chunks(256).flat_map(fold).collect();
    Work::of("folds_i32", [2, 1, 1]).input(i32s(&x)).output(i32s(&want))
}

fn softmax(image: &'static str) -> Work {
    let (rows, columns) = (3, 389);
    let x: Vec<f64> = numbers(rows * columns, 13, 160).iter().map(|x| x / 16.0).collect();
    let mut want = Vec::new();
    for row in x.chunks(columns) {
        let largest = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        want.extend(row.iter().map(|x| (x - largest).exp() / sum));
    }
    // The argument of exp2, up to 29, and the factor log2(e) in it are rounded to f32: 2^-20 each.
    let want = near(Format::F32, &want, 2f64.powi(-19), 0.0);
    Work::of(image, [rows as u32, 1, 1]).input(SINGLE.encode(&x)).arg(want).i32(columns as i32)
}

pub fn softmax_f32() -> Work {
    softmax("softmax_f32")
}

/// Two blocks share a row and read each other's maximum and sum.
pub fn softmax_f32_clusters() -> Work {
    softmax("softmax_f32_clusters")
}

pub fn layer_norm_bf16() -> Work {
    let (rows, columns, epsilon) = (3, 500, 1e-5f32);
    let x: Vec<f64> = numbers(rows * columns, 14, 128).iter().map(|x| x / 16.0).collect();
    let weight: Vec<f64> = numbers(columns, 15, 64).iter().map(|x| x / 32.0).collect();
    let bias: Vec<f64> = numbers(columns, 16, 64).iter().map(|x| x / 32.0).collect();
    let mut want = Vec::new();
    for row in x.chunks(columns) {
        let mean = row.iter().sum::<f64>() / columns as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / columns as f64;
        let scale = 1.0 / (variance + f64::from(epsilon)).sqrt();
        want.extend(row.iter().zip(&weight).zip(&bias).map(|((x, w), b)| (x - mean) * scale * w + b));
    }
    // One rounding to 8 bits; absolute where the bias cancels the rest.
    Work::of("layer_norm_bf16", [rows as u32, 1, 1])
        .input(BF.encode(&x))
        .input(BF.encode(&weight))
        .input(BF.encode(&bias))
        .arg(near(Format::Bf16, &want, 2f64.powi(-8) * 1.01, 1e-5))
        .i32(columns as i32)
        .f32(epsilon)
}

pub fn running_sum_i32() -> Work {
    let x = words(2 * 1024, 17);
    let mut want = Vec::new();
    for row in x.chunks(1024) {
        let mut sum = 0i32;
        want.extend(row.iter().map(|&v| {
            sum = sum.wrapping_add(v);
            sum
        }));
    }
    Work::of("running_sum_i32", [2, 1, 1]).input(i32s(&x)).output(i32s(&want))
}

pub fn sort_i32() -> Work {
    let x = words(2 * 256, 18);
    let mut want = x.clone();
    want.chunks_mut(256).for_each(|row| row.sort_unstable());
    Work::of("sort_i32", [2, 1, 1]).input(i32s(&x)).output(i32s(&want))
}

pub fn transpose_f16() -> Work {
    let (rows, columns) = (64, 32);
    let x = numbers(rows * columns, 19, 2048);
    let want: Vec<f64> = (0..rows * columns).map(|at| x[at % rows * columns + at / rows]).collect();
    Work::of("transpose_f16", [1, 1, 1]).input(HALF.encode(&x)).output(HALF.encode(&want))
}

pub fn gather_f32() -> Work {
    let (rows, columns) = (64, 16);
    let x = scrambled(rows * columns, 20, 1 << 20);
    let index: Vec<i32> = words(rows * columns, 21).iter().map(|w| w.rem_euclid(rows as i32)).collect();
    let taken = |(at, &i): (usize, &i32)| x[i as usize * columns + at % columns];
    let want: Vec<f32> = index.iter().enumerate().map(taken).collect();
    Work::of("gather_f32", [1, 1, 1]).input(f32s(&x)).input(i32s(&index)).output(f32s(&want))
}

// Atomics

pub fn histogram() -> Work {
    let (n, bins) = (900, 32);
    let x: Vec<i32> = words(n, 22).iter().map(|w| w.rem_euclid(bins)).collect();
    let before: Vec<i32> = (0..bins).collect();
    let mut after = before.clone();
    x.iter().for_each(|&v| after[v as usize] += 1);
    Work::of("histogram", [4, 1, 1]).input(i32s(&x)).arg(updated(i32s(&before), i32s(&after))).i32(n as i32)
}

pub fn atomics() -> Work {
    let n = 512;
    let x: Vec<i32> = numbers(n, 23, 40).iter().map(|&x| x as i32).collect();
    let index: Vec<i32> = words(n, 24).iter().map(|w| w.rem_euclid(24)).collect();
    let (mut sums, mut largest, mut bits) = ([0.0; 24], [-9; 24], [0; 24]);
    for (&v, &to) in x.iter().zip(&index) {
        sums[to as usize] += f64::from(v);
        largest[to as usize] = v.max(largest[to as usize]);
        bits[to as usize] |= 1 << (v & 31);
    }
    let zeros = [0.0; 24];
    Work::of("atomics", [2, 1, 1])
        .input(i32s(&x))
        .input(i32s(&index))
        .arg(updated(SINGLE.encode(&zeros), SINGLE.encode(&sums)))
        .arg(updated(HALF.encode(&zeros), HALF.encode(&sums)))
        .arg(updated(i32s(&[-9; 24]), i32s(&largest)))
        .arg(updated(i32s(&[0; 24]), i32s(&bits)))
}

pub fn guarded_sum() -> Work {
    let x = words(4 * 128, 25);
    let sum = |column: usize| (0..4).fold(0i32, |sum, row| sum.wrapping_add(x[row * 128 + column]));
    let want: Vec<i32> = (0..128).map(sum).collect();
    let (total, lock) = (updated(i32s(&[0; 128]), i32s(&want)), updated(i32s(&[0]), i32s(&[0])));
    Work::of("guarded_sum", [4, 1, 1]).input(i32s(&x)).arg(total).arg(lock)
}

// Products

/// How the operands of a product lie.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    /// a is [m, k], b is [k, n].
    Nn,
    /// a is [m, k], b is [n, k].
    Nt,
    /// a is [k, m], b is [k, n].
    Tn,
    /// a is [k, m], b is [n, k].
    Tt,
}

/// The two operands of a product of m x n x k and the product, row-major.
struct Product {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

impl Product {
    /// Operands in -limit..=limit, each of a passed through `of_a` first.
    fn new([m, n, k]: [usize; 3], lie: Lie, seed: u64, limit: i64, of_a: fn(f64) -> f64) -> Product {
        let (a, b) = (numbers(m * k, seed, limit), numbers(n * k, seed + 1, limit));
        let a_at = |i, p| if matches!(lie, Lie::Tn | Lie::Tt) { p * m + i } else { i * k + p };
        let b_at = |p, j| if matches!(lie, Lie::Nt | Lie::Tt) { j * k + p } else { p * n + j };
        let mut c = vec![0.0; m * n];
        for (at, sum) in c.iter_mut().enumerate() {
            let (i, j) = (at / n, at % n);
            *sum = (0..k).map(|p| of_a(a[a_at(i, p)]) * b[b_at(p, j)]).sum();
        }
        Product { a, b, c }
    }
}

/// Element types of the operands and of the product.
type Types = (Element, Element);

/// A product through pointers, in tiles of `tile`.
fn matmul(image: &'static str, types: Types, size: [usize; 3], lie: Lie, tile: [usize; 2]) -> Work {
    let product = Product::new(size, lie, 100, 6, |x| x);
    pointers(image, types, size, tile, 1, product)
}

fn pointers(
    image: &'static str,
    (element, out): Types,
    [m, n, k]: [usize; 3],
    [tile_m, tile_n]: [usize; 2],
    parts: u32,
    product: Product,
) -> Work {
    let c = out.encode(&product.c);
    // Where programs add to c, it starts at zero.
    let before = if parts > 1 { vec![0; c.len()] } else { vec![0xD5; c.len()] };
    Work::of(image, [m.div_ceil(tile_m) as u32, n.div_ceil(tile_n) as u32, parts])
        .input(element.encode(&product.a))
        .input(element.encode(&product.b))
        .arg(updated(before, c))
        .i32(m as i32)
        .i32(n as i32)
        .i32(k as i32)
}

pub fn mma_bf16() -> Work {
    matmul("mma_bf16", (BF, SINGLE), [48, 48, 112], Lie::Nt, [32, 32])
}

pub fn mma_f16_nn() -> Work {
    matmul("mma_f16_nn", (HALF, HALF), [21, 45, 75], Lie::Nn, [16, 32])
}

pub fn mma_tf32() -> Work {
    matmul("mma_tf32", (SINGLE, SINGLE), [48, 48, 80], Lie::Nn, [32, 32])
}

pub fn mma_e4m3() -> Work {
    matmul("mma_e4m3", (FP8, SINGLE), [48, 48, 208], Lie::Nt, [32, 32])
}

pub fn mma_s8() -> Work {
    matmul("mma_s8", (Element::Int(1), Element::Int(4)), [48, 48, 208], Lie::Nt, [32, 32])
}

pub fn matmul_nt_bf16() -> Work {
    matmul("matmul_nt_bf16", (BF, BF), [80, 112, 336], Lie::Nt, [64, 64])
}

pub fn matmul_nn_bf16() -> Work {
    matmul("matmul_nn_bf16", (BF, SINGLE), [144, 144, 176], Lie::Nn, [128, 128])
}

pub fn matmul_tn_f16() -> Work {
    matmul("matmul_tn_f16", (HALF, SINGLE), [80, 112, 336], Lie::Tn, [64, 64])
}

pub fn matmul_tt_f16() -> Work {
    matmul("matmul_tt_f16", (HALF, HALF), [80, 48, 336], Lie::Tt, [64, 32])
}

pub fn matmul_nt_e4m3() -> Work {
    matmul("matmul_nt_e4m3", (FP8, SINGLE), [80, 144, 688], Lie::Nt, [64, 128])
}

pub fn matmul_nt_e5m2() -> Work {
    // e5m2 holds the integers up to 8.
    matmul("matmul_nt_e5m2", (Element::Float(E5M2), SINGLE), [80, 112, 336], Lie::Nt, [64, 64])
}

pub fn matmul_nn_tf32() -> Work {
    matmul("matmul_nn_tf32", (SINGLE, SINGLE), [80, 112, 176], Lie::Nn, [64, 64])
}

pub fn matmul_nn_bf16_n8() -> Work {
    matmul("matmul_nn_bf16_n8", (BF, SINGLE), [80, 16, 336], Lie::Nn, [64, 8])
}

pub fn matmul_nn_bf16_n16() -> Work {
    matmul("matmul_nn_bf16_n16", (BF, SINGLE), [80, 32, 336], Lie::Nn, [64, 16])
}

pub fn matmul_nt_bf16_n256() -> Work {
    matmul("matmul_nt_bf16_n256", (BF, SINGLE), [112, 272, 208], Lie::Nt, [128, 256])
}

pub fn matmul_relu_bf16() -> Work {
    let size = [80, 112, 336];
    let product = Product::new(size, Lie::Nt, 102, 6, |x| x.max(0.0));
    pointers("matmul_relu_bf16", (BF, SINGLE), size, [64, 64], 1, product)
}

pub fn matmul_parts_f16() -> Work {
    let size = [75, 77, 250];
    let product = Product::new(size, Lie::Nn, 104, 6, |x| x);
    pointers("matmul_parts_f16", (HALF, SINGLE), size, [64, 64], 3, product)
}

pub fn matmul_int4_bf16() -> Work {
    let [m, n, k] = [64, 128, 256];
    let a = numbers(m * k, 106, 6);
    let b: Vec<i32> = words(k * n, 107).iter().map(|w| w.rem_euclid(16) - 8).collect();
    let scales: Vec<f64> = (0..n as i32).map(|j| 2f64.powi(j % 5 - 2)).collect();
    let pair = |at: usize| (b[at / n * 2 * n + at % n] & 15 | b[(at / n * 2 + 1) * n + at % n] << 4) as u8;
    let packed: Vec<u8> = (0..k / 2 * n).map(pair).collect();
    let term = |at: usize, p: usize| a[at / n * k + p] * f64::from(b[p * n + at % n]);
    let sum = |at: usize| (0..k).map(|p| term(at, p)).sum::<f64>();
    let c: Vec<f64> = (0..m * n).map(|at| sum(at) * scales[at % n]).collect();
    Work::of("matmul_int4_bf16", [1, 2, 1])
        .input(BF.encode(&a))
        .input(packed)
        .input(SINGLE.encode(&scales))
        .output(BF.encode(&c))
        .i32(n as i32)
        .i32(k as i32)
}

/// 23 tokens, two slots each, five experts of which one has no slot and one no weights.
fn moe(image: &'static str, element: Element, out: Element, scaled: bool, block: usize) -> Work {
    let (tokens, top_k, experts, absent, n, k) = (23, 2, 5, 3, 128, 208);
    let num_slots = tokens * top_k;
    let x = numbers(tokens * k, 110, 5);
    let w = numbers(experts * n * k, 111, 5);
    let weights: Vec<f64> = (0..num_slots as i32).map(|slot| 2f64.powi(slot % 5 - 2)).collect();
    let some = [0, 2, 3, 4];
    let chosen: Vec<usize> = words(num_slots, 112).iter().map(|w| some[w.rem_euclid(4) as usize]).collect();
    let (mut slots, mut block_experts) = (Vec::new(), Vec::new());
    for expert in 0..experts {
        let mine: Vec<u32> = (0..num_slots as u32).filter(|&slot| chosen[slot as usize] == expert).collect();
        for rows in mine.chunks(block) {
            slots.extend_from_slice(rows);
            slots.resize(slots.len().next_multiple_of(block), num_slots as u32);
            block_experts.push(if expert == absent { -1 } else { expert as i32 });
        }
    }
    let mut want = Vec::new();
    for slot in 0..num_slots {
        let row = &x[slot / top_k * k..][..k];
        for j in 0..n {
            let column = &w[(chosen[slot] * n + j) * k..][..k];
            let sum: f64 = row.iter().zip(column).map(|(a, b)| a * b).sum();
            let sum = if scaled { sum * weights[slot] } else { sum };
            want.push(if chosen[slot] == absent { 0.0 } else { sum });
        }
    }
    Work::of(image, [block_experts.len() as u32, (n / 64) as u32, 1])
        .input(element.encode(&x))
        .input(element.encode(&w))
        .output(out.encode(&want))
        .input(SINGLE.encode(&weights))
        .input(u32s(&slots))
        .input(i32s(&block_experts))
        .i32(num_slots as i32)
        .i32(n as i32)
        .i32(k as i32)
        .i32(top_k as i32)
}

pub fn moe_bf16() -> Work {
    moe("moe_bf16", BF, BF, true, 64)
}

pub fn moe_e4m3() -> Work {
    moe("moe_e4m3", FP8, SINGLE, false, 16)
}

// Attention

struct Attention {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    /// Each element may be off by what rounding costs: the powers and the result are rounded to the element
    /// type once, by at most `unit` of their size. f32 does the rest.
    out: Vec<Want>,
    scale: f32,
}

impl Attention {
    fn new(heads: usize, length: usize, head: usize, causal: bool, unit: f64) -> Attention {
        let count = heads * length * head;
        let q: Vec<f64> = numbers(count, 120, 8).iter().map(|x| x / 8.0).collect();
        let k: Vec<f64> = numbers(count, 121, 8).iter().map(|x| x / 8.0).collect();
        let v: Vec<f64> = numbers(count, 122, 16).iter().map(|x| x / 16.0).collect();
        let scale = 0.5f32;
        let mut out = Vec::new();
        for row in 0..heads * length {
            let first = row / length * length;
            let seen = if causal { row + 1 } else { first + length };
            let query = &q[row * head..][..head];
            let dot = |key: usize| query.iter().zip(&k[key * head..]).map(|(a, b)| a * b).sum::<f64>();
            let scores: Vec<f64> = (first..seen).map(|key| dot(key) * f64::from(scale)).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let powers: Vec<f64> = scores.iter().map(|s| (s - largest).exp2()).collect();
            let sum: f64 = powers.iter().sum();
            for c in 0..head {
                let terms = powers.iter().zip(first..).map(|(p, key)| p * v[key * head + c] / sum);
                let (value, size) = (terms.clone().sum::<f64>(), terms.map(f64::abs).sum::<f64>());
                let absolute = unit * (size + value.abs()) * 1.02 + 1e-6;
                out.push(Want::Near { value, relative: 0.0, absolute });
            }
        }
        Attention { q, k, v, out, scale }
    }
}

/// Two heads of `length` tokens, `block` of them to a program.
fn attention(image: &'static str, binary: Binary, length: usize, block: usize, given: Attention) -> Work {
    let element = Element::Float(binary);
    Work::of(image, [length.div_ceil(block) as u32, 2, 1])
        .input(element.encode(&given.q))
        .input(element.encode(&given.k))
        .input(element.encode(&given.v))
        .arg(Arg::values(if binary.mantissa_bits == 7 { Format::Bf16 } else { Format::F16 }, given.out))
        .i32(length as i32)
        .f32(given.scale)
}

pub fn attention_f16() -> Work {
    let length = 150;
    let given = Attention::new(2, length, 64, true, 2f64.powi(-11));
    attention("attention_f16", F16, length, 64, given)
}

pub fn attention_bf16_full() -> Work {
    let length = 150;
    let given = Attention::new(2, length, 32, false, 2f64.powi(-8));
    attention("attention_bf16_full", BF16, length, 128, given)
}

pub fn tensor_attention_bf16() -> Work {
    let length = 150;
    let given = Attention::new(1, length, 64, true, 2f64.powi(-8));
    let dims = [length as u64, 64];
    Work::of("tensor_attention_bf16", [3, 1, 1])
        .tensor(Arg::input(BF.encode(&given.q)), &dims)
        .tensor(Arg::input(BF.encode(&given.k)), &dims)
        .tensor(Arg::input(BF.encode(&given.v)), &dims)
        .tensor(Arg::values(Format::Bf16, given.out), &dims)
        .i32(length as i32)
        .f32(given.scale)
}

// Tensor descriptors

/// A product of tensors on `grid` programs.
fn tensor_product(image: &'static str, types: Types, size: [usize; 3], lie: Lie, grid: [usize; 2]) -> Work {
    let (element, out) = types;
    let product = Product::new(size, lie, 130, 6, |x| x);
    let [m, n, k] = size.map(|extent| extent as u64);
    let a = if matches!(lie, Lie::Tn | Lie::Tt) { [k, m] } else { [m, k] };
    let b = if matches!(lie, Lie::Nt | Lie::Tt) { [n, k] } else { [k, n] };
    Work::of(image, [grid[0] as u32, grid[1] as u32, 1])
        .tensor(Arg::input(element.encode(&product.a)), &a)
        .tensor(Arg::input(element.encode(&product.b)), &b)
        .tensor(Arg::output(out.encode(&product.c)), &[m, n])
}

fn tensor_matmul(image: &'static str, types: Types, size: [usize; 3], lie: Lie, tile: [usize; 2]) -> Work {
    let grid = [size[0].div_ceil(tile[0]), size[1].div_ceil(tile[1])];
    tensor_product(image, types, size, lie, grid).i32(size[2] as i32)
}

pub fn tensor_matmul_nt_f16() -> Work {
    tensor_matmul("tensor_matmul_nt_f16", (HALF, HALF), [100, 72, 328], Lie::Nt, [64, 64])
}

pub fn tensor_matmul_nn_bf16() -> Work {
    tensor_matmul("tensor_matmul_nn_bf16", (BF, BF), [150, 72, 328], Lie::Nn, [128, 64])
}

pub fn tensor_matmul_tn_bf16() -> Work {
    tensor_matmul("tensor_matmul_tn_bf16", (BF, SINGLE), [72, 136, 170], Lie::Tn, [64, 128])
}

pub fn tensor_matmul_nt_e4m3() -> Work {
    tensor_matmul("tensor_matmul_nt_e4m3", (FP8, HALF), [100, 72, 656], Lie::Nt, [64, 64])
}

pub fn tensor_matmul_nt_bf16_k32() -> Work {
    tensor_matmul("tensor_matmul_nt_bf16_k32", (BF, BF), [100, 40, 168], Lie::Nt, [64, 32])
}

pub fn tensor_matmul_nt_f16_k16() -> Work {
    tensor_matmul("tensor_matmul_nt_f16_k16", (HALF, HALF), [100, 72, 88], Lie::Nt, [64, 64])
}

pub fn tensor_matmul_nt_bf16_clusters() -> Work {
    tensor_matmul("tensor_matmul_nt_bf16_clusters", (BF, BF), [150, 72, 328], Lie::Nt, [128, 64])
}

/// Six tiles on two programs.
fn tensor_matmul_of_two(image: &'static str) -> Work {
    let size = [180, 104, 328];
    let [m, n, k] = size.map(|extent| extent as i32);
    tensor_product(image, (BF, BF), size, Lie::Nt, [2, 1]).i32(m).i32(n).i32(k)
}

pub fn tensor_matmul_persistent_bf16() -> Work {
    tensor_matmul_of_two("tensor_matmul_persistent_bf16")
}

pub fn tensor_matmul_specialized_bf16() -> Work {
    tensor_matmul_of_two("tensor_matmul_specialized_bf16")
}

/// The bytes of a tensor with this shape whose rows lie `pitch` elements apart; the gaps hold 0xD5.
fn pitched(element: Element, values: &[f64], columns: usize, pitch: usize) -> Vec<u8> {
    let mut bytes = element.encode(values);
    let width = element.bytes();
    if pitch > columns {
        let gap = vec![0xD5; (pitch - columns) * width];
        bytes = bytes.chunks(columns * width).flat_map(|row| [row, &gap].concat()).collect();
    }
    bytes
}

/// x at these places plus one; zero outside the shape.
fn plus_one(x: &[f64], dims: &[i64], index: &[i64]) -> f64 {
    let inside = index.iter().zip(dims).all(|(i, dim)| (0..*dim).contains(i));
    let at = index.iter().zip(dims).fold(0, |at, (i, dim)| at * dim + i);
    1.0 + if inside { x[at as usize] } else { 0.0 }
}

pub fn tensor_copy_1d() -> Work {
    let (n, shift) = (152, -8);
    let x = numbers(n as usize, 140, 1 << 20);
    let want: Vec<f64> = (0..n).map(|i| plus_one(&x, &[n], &[i + shift])).collect();
    Work::of("tensor_copy_1d", [3, 1, 1])
        .tensor(Arg::input(Element::Int(4).encode(&x)), &[n as u64])
        .tensor(Arg::output(Element::Int(4).encode(&want)), &[n as u64])
        .i32(shift as i32)
}

pub fn tensor_copy_2d() -> Work {
    let (rows, columns, pitch, down, right) = (27i64, 104i64, 112usize, -3, 8);
    let x = numbers((rows * columns) as usize, 141, 1000);
    let at = |i: i64| plus_one(&x, &[rows, columns], &[i / columns + down, i % columns + right]);
    let want: Vec<f64> = (0..rows * columns).map(at).collect();
    let (dims, strides) = ([rows as u64, columns as u64], vec![pitch as u64, 1]);
    Work::of("tensor_copy_2d", [2, 2, 1])
        .tensor_with(Arg::input(pitched(HALF, &x, columns as usize, pitch)), &dims, strides.clone())
        .tensor_with(Arg::output(pitched(HALF, &want, columns as usize, pitch)), &dims, strides)
        .i32(down as i32)
        .i32(right as i32)
}

pub fn tensor_copy_3d() -> Work {
    let (planes, rows, columns, down, right) = (3i64, 13i64, 20i64, 2, -4);
    let x = numbers((planes * rows * columns) as usize, 142, 1 << 20);
    let at = |i: i64| {
        let (plane, row, column) = (i / columns / rows, i / columns % rows, i % columns);
        plus_one(&x, &[planes, rows, columns], &[plane, row + down, column + right])
    };
    let want: Vec<f64> = (0..planes * rows * columns).map(at).collect();
    let dims = [planes as u64, rows as u64, columns as u64];
    Work::of("tensor_copy_3d", [2, 2, planes as u32])
        .tensor(Arg::input(Element::Int(4).encode(&x)), &dims)
        .tensor(Arg::output(Element::Int(4).encode(&want)), &dims)
        .i32(down as i32)
        .i32(right as i32)
}

pub fn tensor_copy_4d() -> Work {
    let (pairs, planes, rows, columns, down, right) = (2i64, 3i64, 11i64, 12i64, -2, 4);
    let x = numbers((pairs * planes * rows * columns) as usize, 143, 1 << 20);
    // Element (plane, pair, i, j) of the result.
    let at = |i: i64| {
        let (plane, pair) = (i / columns / rows / pairs, i / columns / rows % pairs);
        let (row, column) = (i / columns % rows, i % columns);
        plus_one(&x, &[pairs, planes, rows, columns], &[pair, plane, row + down, column + right])
    };
    let want: Vec<f64> = (0..pairs * planes * rows * columns).map(at).collect();
    let dims = [pairs, planes, rows, columns].map(|extent| extent as u64);
    let turned = [planes, pairs, rows, columns].map(|extent| extent as u64);
    Work::of("tensor_copy_4d", [2, 2, planes as u32])
        .tensor(Arg::input(SINGLE.encode(&x)), &dims)
        .tensor(Arg::output(SINGLE.encode(&want)), &turned)
        .i32(down as i32)
        .i32(right as i32)
}

pub fn tensor_copy_5d() -> Work {
    let dims = [2i64, 2, 2, 3, 8];
    let (down, right) = (1, -4);
    let x = numbers(dims.iter().product::<i64>() as usize, 144, 1 << 20);
    let at = |i: i64| {
        let (row, plane, cube, block) = (i / 8, i / 24, i / 48, i / 96);
        plus_one(&x, &dims, &[block, cube % 2, plane % 2 + 1, row % 3 + down, i % 8 + right])
    };
    let want: Vec<f64> = (0..dims.iter().product()).map(at).collect();
    Work::of("tensor_copy_5d", [1, 1, 1])
        .tensor(Arg::input(Element::Int(4).encode(&x)), &dims.map(|extent| extent as u64))
        .tensor(Arg::output(Element::Int(4).encode(&want)), &dims.map(|extent| extent as u64))
        .i32(down as i32)
        .i32(right as i32)
}

type Fold = fn(f64, f64) -> f64;

/// Planes folded into `start` everywhere.
fn tensor_fold(image: &'static str, element: Element, tile: [usize; 2], start: f64, fold: Fold) -> Work {
    let (planes, rows, columns) = (3, 27, 44);
    let x = numbers(planes * rows * columns, 145, 1000);
    let column = |at: usize| (0..planes).map(move |plane| plane * rows * columns + at);
    let folded = |at: usize| column(at).fold(start, |sum, at| fold(sum, x[at]));
    let want: Vec<f64> = (0..rows * columns).map(folded).collect();
    let before = element.encode(&vec![start; rows * columns]);
    Work::of(image, [columns.div_ceil(tile[1]) as u32, rows.div_ceil(tile[0]) as u32, planes as u32])
        .tensor(Arg::input(element.encode(&x)), &[planes as u64, rows as u64, columns as u64])
        .tensor(updated(before, element.encode(&want)), &[rows as u64, columns as u64])
}

pub fn tensor_add_f32() -> Work {
    tensor_fold("tensor_add_f32", SINGLE, [16, 32], 3.0, |a, b| a + b)
}

pub fn tensor_max_i32() -> Work {
    tensor_fold("tensor_max_i32", Element::Int(4), [8, 32], -500.0, f64::max)
}
