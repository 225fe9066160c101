//! INT4 weights as GPTQ and AWQ store them, input after input, and their copy in the order that products
//! take.
//!
//! ```text
//! Gptq   codes [K / 8, N]   word r of column n: inputs 8r..8r + 8 of output n, from the low bits on
//!        zeros [G, N / 8]   outputs from the low bits on, each stored less one
//! Awq    codes [K, N / 8]   word w of row k: outputs 8w + 0, 2, 4, 6, 1, 3, 5, 7 from the low bits on
//!        zeros [G, N / 8]   the same order
//! both   scales [G, N]      w[n, k] = (code - zero) * scale, of group k / g, or of the one in GPTQ's list
//! Int4   codes [N, K / 2], scales [N, G], zeros [N / 8, 4 G]: what [`QuantizedRows::int4`] takes
//! ```
//!
//! Sources: AutoGPTQ's `qlinear_cuda.QuantLinear` (`checkpoint_format` `gptq`), AutoAWQ's `packing_utils`.

use super::{QuantizedRows, ScaleRows};
use crate::dtype::{Bf16, F16, Float};
use crate::error::{Error, Op, Place, check_shape};
use crate::shape::{checked_bytes, filled};
use crate::simd::decode::RowScales;
use crate::view::Rows;

const OP: Op = Op::ExpertWeights;
/// Codes of a word, and outputs whose zero points share one.
const WORD: usize = 8;
/// The nibble of a word of AWQ that holds output `j` of eight.
const AWQ_NIBBLES: [u32; WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// INT4 weights of GPTQ, borrowed where they lie in host memory.
#[derive(Clone, Copy)]
pub struct Gptq<'a> {
    codes: Rows<'a, u32>,
    of: Groups<'a>,
    /// The group of each input, where they are not in order.
    groups: Option<&'a [u32]>,
}

/// INT4 weights of AWQ (`version` `gemm`), borrowed where they lie in host memory.
#[derive(Clone, Copy)]
pub struct Awq<'a> {
    codes: Rows<'a, u32>,
    of: Groups<'a>,
}

/// Zero points and scales, and the sizes of the matrix that they belong to.
#[derive(Clone, Copy)]
struct Groups<'a> {
    zeros: Rows<'a, u32>,
    scales: ScaleRows<'a>,
    n: usize,
    k: usize,
    group: usize,
}

impl<'a> Groups<'a> {
    /// Refuses shapes that do not belong together, and what is not on the host.
    fn new(
        codes: &Rows<'a, u32>,
        zeros: Rows<'a, u32>,
        scales: ScaleRows<'a>,
        [n, k]: [usize; 2],
        group: usize,
    ) -> Result<Groups<'a>, Error> {
        if group == 0 || (!group.is_multiple_of(WORD) && group < k) {
            return Err(Error::Value { op: OP, arg: "group", need: "a multiple of 8, or all of K", got: group as f64 });
        }
        let whole = [n, k].map(|size| size.next_multiple_of(WORD));
        check_shape(OP, "codes", "[N, K] in whole words of 8", &whole, &[n, k])?;
        let count = k.div_ceil(group);
        check_shape(OP, "zeros", "[groups, N / 8]", &[count, n / WORD], &zeros.dims())?;
        check_shape(OP, "scales", "[groups, N]", &[count, n], &scales.dims())?;
        for (arg, got) in [("codes", codes.place()), ("zeros", zeros.place()), ("scales", scales.place())] {
            if got != Place::Host {
                return Err(Error::Place { op: OP, arg, want: Place::Host, got });
            }
        }
        if let ScaleRows::E8m0(_) = scales {
            return Err(Error::unsupported(OP, "INT4 scales of type", "e8m0", "f32, bf16, f16"));
        }
        Ok(Groups { zeros, scales, n, k, group })
    }

    fn count(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    fn scale(&self, group: usize) -> RowScales<'a> {
        self.scales.host_row(group)
    }

    fn check_scales(&self) -> Result<(), Error> {
        for group in 0..self.count() {
            let scales = self.scale(group);
            if let Some(row) = (0..self.n).find(|&n| !scales.get(n).is_finite()) {
                return Err(Error::NotFinite { op: OP, arg: "scales", row, block: group });
            }
        }
        Ok(())
    }
}

impl<'a> Gptq<'a> {
    /// Weights of N outputs and K inputs: `codes [K / 8, N]` (`qweight`), `zeros [ceil(K / group), N / 8]`
    /// (`qzeros`) and `scales [ceil(K / group), N]` of `f32`, `bf16` or `f16`, for groups of inputs in order.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for a group that is neither a multiple of 8 nor all of K; [`Error::Shape`];
    /// [`Error::Place`] for what is not on the host.
    pub fn new(codes: Rows<'a, u32>, zeros: Rows<'a, u32>, scales: impl Into<ScaleRows<'a>>, group: usize) -> Result<Gptq<'a>, Error> {
        let k = checked_bytes(OP, "inputs", &[codes.rows()], WORD)?;
        let of = Groups::new(&codes, zeros, scales.into(), [codes.cols(), k], group)?;
        Ok(Gptq { codes, of, groups: None })
    }

    /// With the group of each input (`g_idx`), K of them. A list in the order of the inputs changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for another number; [`Error::Index`] for a group beyond the last.
    pub fn with_groups(self, groups: &'a [u32]) -> Result<Gptq<'a>, Error> {
        check_shape(OP, "groups", "[K]", &[self.of.k], &[groups.len()])?;
        let count = self.of.count();
        if let Some((at, &group)) = groups.iter().enumerate().find(|(_, group)| **group as usize >= count) {
            return Err(Error::Index { op: OP, arg: "groups", at, got: group.into(), bound: count as u64 });
        }
        let in_order = groups.iter().enumerate().all(|(k, &group)| group as usize == k / self.of.group);
        Ok(Gptq { groups: (!in_order).then_some(groups), ..self })
    }

    /// Whether neighbouring inputs share a group, as the library's order needs. Where GPTQ ordered them by
    /// activations (`desc_act`) they do not.
    pub fn is_in_order(&self) -> bool {
        self.groups.is_none()
    }

    /// `[N, K]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.of.n, self.of.k]
    }

    /// Groups of inputs that share a zero point and a scale.
    pub fn num_groups(&self) -> usize {
        self.of.count()
    }

    /// The same weights in the library's order, exactly.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for weights that are not in order, which [`to_f32`](Self::to_f32) takes;
    /// [`Error::OutOfMemory`].
    pub fn to_int4(&self) -> Result<Int4, Error> {
        if !self.is_in_order() {
            return Err(Error::unsupported(OP, "GPTQ's", "order by activations", "groups of neighbouring inputs"));
        }
        Int4::of(self)
    }

    /// All elements as [`QuantizedRows::to_f32`] gives them, `[N, K]`, for groups in any order.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        to_f32(self)
    }

    /// Refuses scales that are no finite numbers.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] with the output and the group of the first such scale.
    pub fn check_scales(&self) -> Result<(), Error> {
        self.of.check_scales()
    }
}

impl<'a> Awq<'a> {
    /// Weights of N outputs and K inputs: `codes [K, N / 8]` (`qweight`), `zeros [ceil(K / group), N / 8]`
    /// (`qzeros`) and `scales [ceil(K / group), N]` of `f32`, `bf16` or `f16`. K is a multiple of 8.
    ///
    /// # Errors
    ///
    /// As [`Gptq::new`].
    pub fn new(codes: Rows<'a, u32>, zeros: Rows<'a, u32>, scales: impl Into<ScaleRows<'a>>, group: usize) -> Result<Awq<'a>, Error> {
        let n = checked_bytes(OP, "outputs", &[codes.cols()], WORD)?;
        let of = Groups::new(&codes, zeros, scales.into(), [n, codes.rows()], group)?;
        Ok(Awq { codes, of })
    }

    /// `[N, K]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.of.n, self.of.k]
    }

    /// Groups of inputs that share a zero point and a scale.
    pub fn num_groups(&self) -> usize {
        self.of.count()
    }

    /// The same weights in the library's order, exactly.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn to_int4(&self) -> Result<Int4, Error> {
        Int4::of(self)
    }

    /// All elements as [`QuantizedRows::to_f32`] gives them, `[N, K]`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        to_f32(self)
    }

    /// Refuses scales that are no finite numbers.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] with the output and the group of the first such scale.
    pub fn check_scales(&self) -> Result<(), Error> {
        self.of.check_scales()
    }
}

/// Weights that lie input after input: eight outputs are read at a time.
trait InputMajor {
    fn groups(&self) -> &Groups<'_>;

    /// The codes of inputs `8 word..8 word + 8` of outputs `8 eight..8 eight + 8`, a word of each output,
    /// from its low bits on.
    fn words(&self, eight: usize, word: usize) -> [u32; WORD];

    /// The zero points of those outputs in a group.
    fn zeros(&self, eight: usize, group: usize) -> [u8; WORD];

    /// The group of an input.
    fn group(&self, k: usize) -> usize {
        k / self.groups().group
    }
}

impl InputMajor for Gptq<'_> {
    fn groups(&self) -> &Groups<'_> {
        &self.of
    }

    fn words(&self, eight: usize, word: usize) -> [u32; WORD] {
        let row = self.codes.host().row(word);
        std::array::from_fn(|n| row[WORD * eight + n])
    }

    fn zeros(&self, eight: usize, group: usize) -> [u8; WORD] {
        let word = self.of.zeros.host().row(group)[eight];
        std::array::from_fn(|n| (nibble(word, n as u32) + 1) & 15)
    }

    fn group(&self, k: usize) -> usize {
        self.groups.map_or(k / self.of.group, |groups| groups[k] as usize)
    }
}

impl InputMajor for Awq<'_> {
    fn groups(&self) -> &Groups<'_> {
        &self.of
    }

    fn words(&self, eight: usize, word: usize) -> [u32; WORD] {
        let codes = self.codes.host();
        let inputs: [u32; WORD] = std::array::from_fn(|i| codes.row(WORD * word + i)[eight]);
        AWQ_NIBBLES.map(|at| packed(inputs.map(|word| nibble(word, at))))
    }

    fn zeros(&self, eight: usize, group: usize) -> [u8; WORD] {
        let word = self.of.zeros.host().row(group)[eight];
        AWQ_NIBBLES.map(|at| nibble(word, at))
    }
}

#[inline(always)]
fn nibble(word: u32, at: u32) -> u8 {
    (word >> (4 * at) & 15) as u8
}

/// A word of eight nibbles, from the low bits on.
#[inline(always)]
fn packed(nibbles: [u8; WORD]) -> u32 {
    nibbles.into_iter().enumerate().fold(0, |word, (i, nibble)| word | u32::from(nibble) << (4 * i))
}

fn to_f32(from: &impl InputMajor) -> Result<Vec<f32>, Error> {
    let of = from.groups();
    checked_bytes(OP, "elements", &[of.n, of.k], size_of::<f32>())?;
    let mut all = filled(OP, of.n * of.k, 0.0f32)?;
    for (eight, rows) in all.chunks_exact_mut((WORD * of.k).max(1)).enumerate() {
        for word in 0..of.k / WORD {
            let codes = from.words(eight, word);
            for (i, k) in (WORD * word..WORD * word + WORD).enumerate() {
                let group = from.group(k);
                let (scales, zeros) = (of.scale(group), from.zeros(eight, group));
                for n in 0..WORD {
                    let code = nibble(codes[n], i as u32) as i8 - zeros[n] as i8;
                    rows[n * of.k + k] = f32::from(code) * scales.get(WORD * eight + n);
                }
            }
        }
    }
    Ok(all)
}

/// A copy of GPTQ's or AWQ's weights in the library's order.
///
/// ```
/// use dropless::{F16, Rows, quantized::Gptq};
///
/// // Eight inputs of eight outputs: every code 9, every zero point 8 (stored as 7), every scale 0.5.
/// let (codes, zeros, scales) = ([0x9999_9999u32; 8], [0x7777_7777u32], [F16(0x3800); 8]);
/// let (codes, zeros) = (Rows::from_slice(&codes, 1, 8)?, Rows::from_slice(&zeros, 1, 1)?);
/// let gptq = Gptq::new(codes, zeros, Rows::from_slice(&scales, 1, 8)?, 8)?;
/// let int4 = gptq.to_int4()?;
/// assert_eq!(int4.rows()?.to_f32()?, [0.5; 64]);
/// assert!(int4.zeros().is_none(), "without zero points the format subtracts 8");
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Int4 {
    dims: [usize; 2],
    group: usize,
    codes: Vec<u8>,
    scales: Numbers,
    zeros: Option<Vec<u8>>,
}

/// Scales in their stored type.
#[derive(Clone, Debug)]
enum Numbers {
    F32(Vec<f32>),
    Bf16(Vec<Bf16>),
    F16(Vec<F16>),
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed<T: Float>(rows: Rows<'_, T>) -> Result<Vec<T>, Error> {
    let (from, [count, len]) = (rows.host(), rows.dims());
    let mut to = filled(OP, count * len, T::default())?;
    for row in 0..count {
        for (col, value) in from.row(row).iter().enumerate() {
            to[col * count + row] = *value;
        }
    }
    Ok(to)
}

impl Int4 {
    fn of(from: &impl InputMajor) -> Result<Int4, Error> {
        let of = from.groups();
        let (words, groups) = (of.k / WORD, of.count());
        checked_bytes(OP, "codes", &[of.n, words], size_of::<u32>())?;
        let mut codes = filled(OP, of.n * words * size_of::<u32>(), 0u8)?;
        let mut zeros = filled(OP, of.n / WORD * groups * size_of::<u32>(), 0u8)?;
        let mut all_are_8 = true;
        for eight in 0..of.n / WORD {
            for word in 0..words {
                for (n, codes_of) in from.words(eight, word).into_iter().enumerate() {
                    codes.as_chunks_mut::<4>().0[(WORD * eight + n) * words + word] = codes_of.to_le_bytes();
                }
            }
            for group in 0..groups {
                let of_group = from.zeros(eight, group);
                all_are_8 &= of_group == [8; WORD];
                zeros.as_chunks_mut::<4>().0[eight * groups + group] = packed(of_group).to_le_bytes();
            }
        }
        let scales = match of.scales {
            ScaleRows::F32(rows) => Numbers::F32(transposed(rows)?),
            ScaleRows::Bf16(rows) => Numbers::Bf16(transposed(rows)?),
            ScaleRows::F16(rows) => Numbers::F16(transposed(rows)?),
            ScaleRows::E8m0(_) => unreachable!("`Groups::new` refuses them"),
        };
        Ok(Int4 { dims: [of.n, of.k], group: of.group, codes, scales, zeros: (!all_are_8).then_some(zeros) })
    }

    /// The weights.
    ///
    /// # Errors
    ///
    /// None: the parts fit each other. [`QuantizedRows::int4`], which is called, returns a `Result`.
    pub fn rows(&self) -> Result<QuantizedRows<'_>, Error> {
        let [n, k] = self.dims;
        let weights = QuantizedRows::int4(Rows::from_slice(&self.codes, n, k / 2)?, self.scales()?, k, self.group)?;
        match &self.zeros {
            Some(zeros) => weights.with_zeros(Rows::from_slice(zeros, n / WORD, 4 * k.div_ceil(self.group))?),
            None => Ok(weights),
        }
    }

    /// The scales, `[N, groups]`, in their stored type.
    ///
    /// # Errors
    ///
    /// As [`rows`](Self::rows).
    pub fn scales(&self) -> Result<ScaleRows<'_>, Error> {
        let (n, groups) = (self.dims[0], self.dims[1].div_ceil(self.group));
        Ok(match &self.scales {
            Numbers::F32(scales) => Rows::from_slice(scales, n, groups)?.into(),
            Numbers::Bf16(scales) => Rows::from_slice(scales, n, groups)?.into(),
            Numbers::F16(scales) => Rows::from_slice(scales, n, groups)?.into(),
        })
    }

    /// The codes, `[N, K / 2]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The zero points, `[N / 8, 4 * groups]`; none where all of them are 8.
    pub fn zeros(&self) -> Option<&[u8]> {
        self.zeros.as_deref()
    }

    /// `[N, K]`.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }
}
