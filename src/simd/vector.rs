//! A vector of sixteen floats, whatever the machine has to hold it in: what every kernel of this folder is written with.
//!
//! An instruction set is a token, a value of a type that implements [`Simd`]. Tokens exist only where the machine was
//! found to have the instructions, so their methods are safe, and a kernel is written once, without unsafe code:
//!
//! ```text
//! struct Sum<'a>(&'a [[f32; 16]]);
//! impl Kernel for Sum<'_> {
//!     type Output = f32;
//!     #[inline(always)]
//!     fn run<S: Simd>(self, simd: S) -> f32 { .. simd.add(sum, simd.load(chunk)) .. }
//! }
//! ```
//!
//! `super::run(Sum(..))` then picks the token. Since every set computes in sixteen lanes and with fused multiply-adds, they all
//! give the same bits, but for the portable one where the compiler's target lacks a fused multiply-add.
//! Everything on the way from `run` to an instruction must be `#[inline(always)]`, lest it be compiled without the set.

use crate::dtype::Float;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The instructions that kernels are made of.
pub(crate) trait Simd: Copy {
    /// Sixteen floats.
    type V: Copy;
    /// Sixty-four bytes.
    type B: Copy;

    /// Rows of input that `gemm::dots` multiplies by four rows of weights at once, as registers allow: 4, 2 or 1.
    const DOT_ROWS: usize;

    /// Sixteen times the same.
    fn splat(self, value: f32) -> Self::V;
    /// Widens sixteen elements, exactly.
    fn load<T: Float>(self, from: &[T; LANES]) -> Self::V;
    /// Rounds to nearest even and stores.
    fn store<T: Float>(self, values: Self::V, to: &mut [T; LANES]);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, which is `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`, which is `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integers, ties to even; of zeros the sign is unspecified. For `|a| < 2^22`.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^a` for integers in `-126..=127`.
    fn pow2(self, a: Self::V) -> Self::V;

    /// `columns[k * stride + j] = rows[j][k]`, widened, for the k below what is returned, which is at most the rows' length.
    ///
    /// Eight rows, from end to end: rows are often a multiple of 4096 bytes apart, and then a first-level cache holds the same part of no
    /// more.
    #[inline(always)]
    fn transpose<T: Float>(self, _rows: &[&[T]; 8], _columns: &mut [f32], _stride: usize) -> usize {
        0
    }

    /// `sums[i, j] += sum_k a[i, k] * panel[k, j]` for all rows of `a`; see `gemm::add_product`.
    fn add_product(self, product: super::product::AddProduct<'_>);

    /// The bytes of one, then of the other.
    fn bytes(self, from: [&[u8; 32]; 2]) -> Self::B;
    /// The low nibbles, then the high ones.
    fn nibbles(self, from: &[u8; 32]) -> Self::B;
    /// The low nibbles of one and of the other, then the high ones.
    fn nibbles_of_two(self, from: [&[u8; 16]; 2]) -> Self::B;
    /// Nibbles of `low`, the low ones or the `upper`, below pairs of bits of `high`: of each byte the first
    /// two pairs, or the `upper` two, one after the other.
    fn sextets(self, low: &[u8; 64], high: &[u8; 32], upper: bool) -> Self::B;
    /// All bytes as an array.
    fn to_bytes(self, codes: Self::B) -> [u8; 64];
    /// Signed bytes as floats.
    fn widen(self, from: &[u8; LANES]) -> Self::V;
    /// 16 where the bit of a word is set, the lowest first; else 0.
    #[inline(always)]
    fn fifths(self, word: u32) -> [u8; 32] {
        std::array::from_fn(|i| (word >> i & 1) as u8 * 16)
    }
    /// 16 where bit `bit` of a byte is set; else 0.
    #[inline(always)]
    fn fifths_of(self, from: &[u8; 32], bit: u32) -> [u8; 32] {
        from.map(|byte| (byte >> bit & 1) * 16)
    }
    /// `table[code]` for codes below 16.
    fn look_up(self, table: &[u8; 16], codes: Self::B) -> Self::B;
    /// Lane `i` is `offsets[i]` and the sum over `j` in `4i..4i + 4` of `codes[j] * x[j]`, exact, for codes
    /// below 128 and `x` that is not -128.
    fn dot_unsigned(self, codes: Self::B, x: &[i8; 64], offsets: &[i32; LANES]) -> Self::V;
    /// The sum over `j` in `4i..4i + 4` of `codes[j] * x[j]`, for signed codes and `x` that is not -128.
    /// `offsets[i]` is the sum of those `x` times -128, which some instruction sets need.
    fn dot_signed(self, codes: Self::B, x: &[i8; 64], offsets: &[i32; LANES]) -> Self::V;
    /// Lane `2i` is byte `i` of `even`, the lowest first, and lane `2i + 1` that of `odd`.
    fn interleaved(self, even: u64, odd: u64) -> Self::V;
    /// Lane `i` is 2 to the power of byte `i`, the lowest first, less 128; NaN for 255. Lanes from 8 on are
    /// not specified.
    fn half_powers(self, exponents: u64) -> Self::V;
    /// Four lanes each of four: those of quarter `q` are lane `lanes[q]`. The first two are of one half, and
    /// so are the last two.
    fn spread(self, from: Self::V, lanes: [usize; 4]) -> Self::V;

    /// All lanes as an array.
    #[inline(always)]
    fn to_array(self, a: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        lanes
    }

    /// The first elements of a slice shorter than a vector, and zeros.
    #[inline(always)]
    fn load_part<T: Float>(self, from: &[T]) -> Self::V {
        let mut all = [T::default(); LANES];
        all[..from.len()].copy_from_slice(from);
        self.load(&all)
    }

    /// Stores the first lanes in a slice shorter than a vector.
    #[inline(always)]
    fn store_part<T: Float>(self, values: Self::V, to: &mut [T]) {
        let mut all = [T::default(); LANES];
        self.store(values, &mut all);
        to.copy_from_slice(&all[..to.len()]);
    }

    /// The sum of all lanes, halving them until one is left.
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        fold(self.to_array(a), |a, b| a + b)
    }

    /// The [`sum`](Self::sum) of each.
    #[inline(always)]
    fn sums(self, a: [Self::V; 4]) -> [f32; 4] {
        a.map(|a| self.sum(a))
    }

    /// The largest lane; what a NaN gives is unspecified.
    #[inline(always)]
    fn max_lane(self, a: Self::V) -> f32 {
        fold(self.to_array(a), |a, b| if a > b { a } else { b })
    }

    /// `e^a` within 2 units in the last place; 0 and infinity beyond the range, NaN of NaN.
    #[inline(always)]
    fn exp(self, a: Self::V) -> Self::V {
        // e^a = 2^n * e^r with n an integer and |r| <= ln(2) / 2. The order of operands lets a NaN pass.
        let a = self.max(self.splat(-104.0), self.min(self.splat(89.0), a));
        let n = self.round(self.mul(a, self.splat(std::f32::consts::LOG2_E)));
        // ln(2) in two parts, of which the first has enough trailing zeros for an exact product.
        let r = self.mul_add(n, self.splat(-0.693_359_4), a);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        // Taylor, of which the first omitted term is below a tenth of a unit in the last place.
        let mut e = self.splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            e = self.mul_add(e, r, self.splat(coefficient));
        }
        // In two steps, since 2^128 is not a float and neither are the powers below 2^-126.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(e, self.pow2(half)), self.pow2(self.sub(n, half)))
    }
}

/// Folds the upper half onto the lower until one lane is left.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Work that is the same for every instruction set.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;
    /// Does it. `#[inline(always)]` in every implementation.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}
