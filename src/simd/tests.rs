//! Every instruction set of this machine against the portable one, on the same inputs.

use super::gemm::NR;
use super::vector::{Kernel, LANES, Simd};
use super::*;
use crate::dtype::{Bf16, F16, Float};

/// Numbers of all sizes that a type has, and the ones that are none.
fn samples<T: Float>(n: usize, seed: u32) -> Vec<T> {
    let mut bits = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        bits ^= bits << 13;
        bits ^= bits >> 17;
        bits ^= bits << 5;
        bits
    };
    let special = [0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-41, 3.4e38, 65520.0, 6e-8, 1.0 + 1.0 / 256.0];
    (0..n).map(|i| T::from_f32(if i < special.len() { special[i] } else { f32::from_bits(next() & 0xbfff_ffff) })).collect()
}

/// Numbers near 1.
fn tame(n: usize, seed: u32) -> Vec<f32> {
    samples::<f32>(n, seed).iter().map(|x| (x.to_bits() % 2001) as f32 / 1000.0 - 1.0).collect()
}

fn others() -> Vec<(&'static str, Level)> {
    Level::all().into_iter().filter(|(name, _)| *name != "portable").collect()
}

const PORTABLE: Level = Level::Portable(portable::Portable::HERE);

/// A kernel that a level and a reference both run.
fn same<K: Kernel<Output = Vec<f32>>>(kernel: impl Fn() -> K, near: impl Fn(f32, f32) -> bool) {
    let want = PORTABLE.run(kernel());
    for (name, level) in others() {
        let got = level.run(kernel());
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let equal = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(equal || near(*got, *want), "{name}, element {i}: got {got:e}, want {want:e}");
        }
    }
}

/// Each operation on bytes, many seen through dot products.
struct OnBytes<'a>(&'a [u8; 64], &'a [i8; 64]);

impl Kernel for OnBytes<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let OnBytes(bytes, x) = self;
        let (halves, quarters) = (bytes.as_chunks::<32>().0, bytes.as_chunks::<16>().0);
        let offsets = |factor: i32| std::array::from_fn(|i| factor * x[4 * i..4 * i + 4].iter().map(|x| i32::from(*x)).sum::<i32>());
        let table = std::array::from_fn(|i| (7 * i as u8 + 3) % 128);
        let nibbles = simd.nibbles_of_two([&quarters[1], &quarters[3]]);
        let unsigned = [
            nibbles,
            simd.nibbles(&halves[1]),
            simd.look_up(&table, nibbles),
            simd.sextets(bytes, &halves[1], false),
            simd.sextets(bytes, &halves[0], true),
        ];
        let mut out: Vec<f32> = unsigned.into_iter().flat_map(|codes| simd.to_array(simd.dot_unsigned(codes, x, &offsets(-9)))).collect();
        let signed = simd.dot_signed(simd.bytes([&halves[1], &halves[0]]), x, &offsets(-128));
        out.extend(simd.to_array(signed));
        for lanes in [[0, 0, 1, 1], [6, 7, 6, 7], [12, 13, 14, 15], [3, 2, 9, 8]] {
            out.extend(simd.to_array(simd.spread(signed, lanes)));
        }
        let [a, b] = [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes")));
        out.extend(simd.to_array(simd.interleaved(a, b)));
        // No power is negative.
        out.extend(simd.to_array(simd.half_powers(a))[..8].iter().map(|power| if power.is_nan() { -1.0 } else { *power }));
        quarters.iter().for_each(|quarter| out.extend(simd.to_array(simd.widen(quarter))));
        let mut all = simd.to_bytes(unsigned[0]).to_vec();
        all.extend(simd.fifths(a as u32));
        (0..8).for_each(|bit| all.extend(simd.fifths_of(&halves[0], bit)));
        out.extend(all.into_iter().map(f32::from));
        out
    }
}

#[test]
fn bytes_are_multiplied_exactly_on_every_level() {
    for seed in 0..200u32 {
        let byte = |i: usize, salt: u32| samples::<f32>(12 + i, seed + salt).last().expect("a sample").to_bits().to_le_bytes()[1];
        let extreme = |i: usize, byte: u8| if seed < 8 { [0x80, 0x7f, 0xff, 0][(i + seed as usize) % 4] } else { byte };
        let bytes = std::array::from_fn(|i| extreme(i, byte(i, 0)));
        let x = std::array::from_fn(|i| (extreme(i + 1, byte(i, 1000)) as i8).max(-127));
        let want = PORTABLE.run_bytes(OnBytes(&bytes, &x));
        for (name, level) in others() {
            assert_eq!(level.run_bytes(OnBytes(&bytes, &x)), want, "{name}");
            assert_eq!(level.run(OnBytes(&bytes, &x)), want, "{name}");
        }
    }
}

struct Convert<'a, X, Y>(&'a [X], std::marker::PhantomData<Y>);

impl<X: Float, Y: Float> Kernel for Convert<'_, X, Y> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![Y::default(); self.0.len()];
        for (to, from) in out.as_chunks_mut().0.iter_mut().zip(self.0.as_chunks().0) {
            simd.store(simd.load(from), to);
        }
        out.iter().map(|y| y.to_f32()).collect()
    }
}

fn conversions<X: Float, Y: Float>() {
    let x = samples::<X>(64 * LANES, X::DTYPE.size_bytes() as u32);
    same(|| Convert::<X, Y>(&x, std::marker::PhantomData), |_, _| false);
}

#[test]
fn conversions_are_exact_on_every_level() {
    conversions::<f32, f32>();
    conversions::<f32, Bf16>();
    conversions::<f32, F16>();
    conversions::<Bf16, f32>();
    conversions::<F16, f32>();
    conversions::<F16, Bf16>();
}

/// Each operation of a vector, one after the other.
struct Arithmetic<'a>(&'a [f32], &'a [f32]);

impl Kernel for Arithmetic<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![];
        for (a, b) in self.0.as_chunks().0.iter().zip(self.1.as_chunks().0) {
            let (a, b) = (simd.load::<f32>(a), simd.load::<f32>(b));
            let small = simd.round(simd.mul(b, simd.splat(100.0)));
            let results = [
                simd.add(a, b),
                simd.sub(a, b),
                simd.mul(a, b),
                simd.div(a, b),
                simd.max(a, b),
                simd.min(a, b),
                small,
                simd.pow2(simd.max(simd.splat(-126.0), simd.min(simd.splat(127.0), small))),
            ];
            results.iter().for_each(|v| out.extend(simd.to_array(*v)));
            out.extend([simd.sum(b), simd.max_lane(b)]);
            let four = [simd.sub(a, b), b, simd.mul(b, b), simd.max(b, simd.splat(0.0))];
            out.extend(simd.sums(four));
            out.extend(four.map(|v| simd.sum(v)));
        }
        out
    }
}

#[test]
fn arithmetic_is_the_same_on_every_level() {
    let (a, b) = (samples::<f32>(64 * LANES, 3), tame(64 * LANES, 4));
    same(|| Arithmetic(&a, &b), |got, want| got == want); // of zeros the sign may differ
}

struct Exp<'a>(&'a [f32]);

impl Kernel for Exp<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        self.0.as_chunks::<LANES>().0.iter().flat_map(|x| simd.to_array(simd.exp(simd.load(x)))).collect()
    }
}

#[test]
fn exp_is_near_on_every_level() {
    let mut x: Vec<f32> = (-120 * 64..100 * 64).map(|i| i as f32 / 64.0).collect();
    x.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 88.72, 88.73, -103.9, -87.4, f32::MAX, f32::MIN, 1e-40]);
    x.resize(x.len().div_ceil(LANES) * LANES, 1.0);
    for (name, level) in Level::all() {
        for (x, got) in x.iter().zip(level.run(Exp(&x))) {
            let want = f64::from(*x).exp();
            let ulp = 2f64.powi(-23) * want + 2f64.powi(-148);
            let good = (f64::from(got) - want).abs() <= 2.0 * ulp || f64::from(got) == f64::from(want as f32) || got.is_nan() && x.is_nan();
            assert!(good, "{name}: exp({x:e}) is {got:e}, want {want:e}");
        }
    }
}

/// Sums differ from the portable ones by the rounding of products, which a fused multiply-add does not have.
fn near_sum(got: f32, want: f32) -> bool {
    (got - want).abs() <= 1e-4
}

/// One tile of packed product, both orders, all remainders.
#[test]
fn products_are_near_on_every_level() {
    fn check<W: Float>() {
        let all = [(3, 17, 1), (5, 31, 9), (1, 32, 256), (14, 32, 256), (15, 31, 37), (29, 1, 64), (8, 16, 255)];
        let few = if cfg!(miri) { 2 } else { all.len() }; // an interpreter has no hours
        for (rows, cols, steps) in all.into_iter().take(few) {
            let weights: Vec<W> = tame(cols.max(steps) * 256, 5).iter().map(|w| W::from_f32(*w)).collect();
            let mut a = vec![0.0; rows * gemm::A_STRIDE];
            a.copy_from_slice(&tame(rows * gemm::A_STRIDE, 6));
            let stride = gemm::NR;
            let run = |level: Level, way: usize| -> Vec<f32> {
                let (mut panel, mut sums) = (vec![0.0; steps * gemm::NR], tame(rows * stride, 7));
                let nk = |j: usize| &weights[j * 256..j * 256 + steps];
                let kn = |k: usize| &weights[k * cols..(k + 1) * cols];
                match way {
                    0 => level.run(gemm::PackNk { rows: std::array::from_fn(|j| nk(j.min(cols - 1))), panel: &mut panel }),
                    1 => level.run(gemm::PackKn { steps, row: kn, panel: &mut panel }),
                    _ => {}
                }
                let (a, chains) = (a.as_chunks().0, &mut vec![0.0; sums.len()]);
                match way {
                    0 | 1 => {
                        let panel = panel.as_chunks().0;
                        level.run(product::AddProduct { a, panel, sums: &mut sums, sum_stride: stride, ahead: &mut Ahead::default() });
                    }
                    2 => level.run(gemm::AddRows { a, steps, row: |k| [kn(k); 2], chains, sums: &mut sums, sum_stride: stride }),
                    _ => {
                        let x: Vec<f32> = a.iter().flatten().copied().collect();
                        level.run(gemm::Dots {
                            x: &x,
                            x_stride: gemm::A_STRIDE,
                            cols,
                            row: |j| [nk(j); 2],
                            sums: &mut sums,
                            sum_stride: stride,
                        });
                    }
                }
                (0..rows * cols).map(|i| sums[i / cols * stride + i % cols]).collect()
            };
            for way in 0..4 {
                let want = run(PORTABLE, way);
                for (name, level) in others() {
                    let got = run(level, way);
                    let wrong = got.iter().zip(&want).position(|(got, want)| !near_sum(*got, *want));
                    assert_eq!(wrong, None, "{name}, way {way}, {rows} x {cols} x {steps}, {}", W::DTYPE.name());
                    // Fused everywhere, in one order: levels with the instruction agree to the bit.
                    assert_eq!(got, run(others()[0].1, way), "{name} against {}", others()[0].0);
                }
            }
            // Packed in either order and read in place are the same chains.
            for (name, level) in Level::all() {
                assert_eq!(run(level, 1), run(level, 2), "{name}");
            }
        }
    }
    check::<f32>();
    check::<Bf16>();
    check::<F16>();
}

#[test]
fn packing_is_exact_on_every_level() {
    fn check<T: Float>() {
        let x = samples::<T>(NR * 40, 8);
        for len in (0..20).chain([31, 32, 33, 37]) {
            for (name, level) in Level::all() {
                let mut panel = vec![-1.0; len * NR];
                level.run(gemm::PackNk { rows: std::array::from_fn(|j| &x[j * 40 + 3..][..len]), panel: &mut panel });
                for (i, got) in panel.into_iter().enumerate() {
                    let want = x[i % NR * 40 + 3 + i / NR].to_f32();
                    assert!(
                        got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                        "{name}, k {} of {len}: {got:e}, {want:e}",
                        i / NR
                    );
                }
            }
        }
    }
    check::<f32>();
    check::<Bf16>();
    check::<F16>();
}

#[test]
fn a_name_chooses_and_an_unknown_one_chooses_nothing() {
    let kind = |level: &Level| std::mem::discriminant(level);
    let all = Level::all();
    assert_eq!(Level::choose("").as_ref().map(kind), Some(kind(&all[0].1)));
    for (name, level) in &all {
        assert_eq!(Level::choose(name).as_ref().map(kind), Some(kind(level)));
    }
    assert!(["avx1024", "AVX2", " portable"].iter().all(|name| Level::choose(name).is_none()));
}
