//! How the tensors of a safetensors checkpoint hold a matrix: as floats, or quantised as the configuration
//! says.
//!
//! A quantised matrix has its outputs as rows, also where its floats would have inputs as rows. Each of
//! stacked experts is one matrix, with scales of its own. Names, shapes and types are checked here.

use std::path::Path;

use dropless::quantized::{Awq, Gptq};
use dropless::{Bf16, DType, Error, F16, QuantizedRows, Rows, ScaleRows, WeightRows};

use super::checkpoint::Shards;
use super::failure::{Failure, refuse_file};
use super::families::{Quantization, Scheme, stem};
use super::spec::{Kind, Spec};
use super::target::{MX_GROUP, Stack};

/// A tensor of a file.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    pub file: &'a Path,
    pub name: &'a str,
    pub dtype: &'a str,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// What one tensor of a description is in a checkpoint.
pub enum Stored<'a> {
    /// Used where it lies: one matrix, or one for each stacked expert that has scales of its own.
    InPlace(Vec<WeightRows<'a>>),
    /// Made anew when it is loaded.
    Packed(Packed<'a>),
}

/// INT4 that lies input after input.
#[derive(Clone, Copy)]
pub enum Packed<'a> {
    Gptq(Gptq<'a>),
    Awq(Awq<'a>),
}

impl Packed<'_> {
    /// The type that it has once it is loaded: GPTQ's order by activations is none of the library's.
    pub fn loaded(&self) -> DType {
        match self {
            Packed::Gptq(gptq) if !gptq.is_in_order() => DType::F32,
            Packed::Gptq(_) | Packed::Awq(_) => DType::Quantized(dropless::Format::Int4),
        }
    }

    /// N, K and groups of K.
    fn sizes(&self) -> [u64; 3] {
        let ([n, k], groups) = match self {
            Packed::Gptq(gptq) => (gptq.dims(), gptq.num_groups()),
            Packed::Awq(awq) => (awq.dims(), awq.num_groups()),
        };
        [n, k, groups].map(|size| size as u64)
    }

    /// Bytes of it as the library's INT4.
    pub fn bytes(&self) -> u64 {
        let [n, k, groups] = self.sizes();
        n * k / 2 + n * groups * 2 + n / 2 * groups
    }

    /// Bytes of that in tiles: of 32 outputs and 64 inputs, with a byte for each zero point.
    pub fn tile_bytes(&self) -> u64 {
        let [n, k, groups] = self.sizes();
        let rows = n.next_multiple_of(32);
        rows * k.next_multiple_of(64) / 2 + rows * groups * 3
    }

    pub fn check_scales(&self) -> Result<(), Error> {
        match self {
            Packed::Gptq(gptq) => gptq.check_scales(),
            Packed::Awq(awq) => awq.check_scales(),
        }
    }
}

impl<'a> Piece<'a> {
    /// A refusal that names file and tensor.
    pub fn refuse<T>(&self, text: impl std::fmt::Display) -> Result<T, Failure> {
        refuse_file(self.file, format_args!("tensor `{}` {text}", self.name))
    }

    /// Refuses another shape than the one that follows from the configuration.
    fn shaped(self, want: &[usize]) -> Result<Piece<'a>, Failure> {
        if self.shape == want { Ok(self) } else { self.refuse(format_args!("must be {want:?} by config.json, got {:?}", self.shape)) }
    }

    fn typed(self, want: &str) -> Result<Piece<'a>, Failure> {
        if self.dtype == want { Ok(self) } else { self.refuse(format_args!("must be {want}, got {}", self.dtype)) }
    }

    /// The type of floats.
    fn float(&self) -> Option<DType> {
        match self.dtype {
            "F32" => Some(DType::F32),
            "BF16" => Some(DType::Bf16),
            "F16" => Some(DType::F16),
            _ => None,
        }
    }

    /// Its floats as a matrix.
    fn floats(&self, [rows, cols]: [usize; 2]) -> Result<WeightRows<'a>, Failure> {
        let Some(dtype) = self.float() else { return self.refuse(format_args!("must be F32, BF16 or F16, got {}", self.dtype)) };
        let view = match dtype {
            DType::F32 => Rows::<f32>::from_bytes(self.bytes, rows, cols).map(WeightRows::from),
            DType::Bf16 => Rows::<Bf16>::from_bytes(self.bytes, rows, cols).map(WeightRows::from),
            _ => Rows::<F16>::from_bytes(self.bytes, rows, cols).map(WeightRows::from),
        };
        self.viewed(view, dtype.size_bytes())
    }

    /// Those of rows `first..first + rows` as scales.
    fn scales(&self, first: usize, [rows, cols]: [usize; 2]) -> Result<ScaleRows<'a>, Failure> {
        let Some(dtype) = self.float() else { return self.refuse(format_args!("must be F32, BF16 or F16, got {}", self.dtype)) };
        let bytes = self.rows_of(first, rows, cols * dtype.size_bytes())?;
        let view = match dtype {
            DType::F32 => Rows::<f32>::from_bytes(bytes, rows, cols).map(ScaleRows::from),
            DType::Bf16 => Rows::<Bf16>::from_bytes(bytes, rows, cols).map(ScaleRows::from),
            _ => Rows::<F16>::from_bytes(bytes, rows, cols).map(ScaleRows::from),
        };
        self.viewed(view, dtype.size_bytes())
    }

    /// Some rows as bytes.
    fn codes(&self, first: usize, [rows, bytes]: [usize; 2]) -> Result<Rows<'a, u8>, Failure> {
        let of_rows = self.rows_of(first, rows, bytes)?;
        self.viewed(Rows::from_slice(of_rows, rows, bytes), 1)
    }

    /// All of it as words of 4 bytes.
    fn words(&self, [rows, cols]: [usize; 2]) -> Result<Rows<'a, u32>, Failure> {
        self.viewed(Rows::from_bytes(self.bytes, rows, cols), 4)
    }

    fn rows_of(&self, first: usize, rows: usize, row_bytes: usize) -> Result<&'a [u8], Failure> {
        let ends = [first, first + rows].map(|row| row.checked_mul(row_bytes));
        match ends {
            [Some(begin), Some(end)] if end <= self.bytes.len() => Ok(&self.bytes[begin..end]),
            _ => self.refuse(format_args!("has {} bytes, too few for row {}", self.bytes.len(), first + rows)),
        }
    }

    /// A view, or what is wrong with it: elements begin at multiples of their size.
    fn viewed<T>(&self, view: Result<T, Error>, alignment: usize) -> Result<T, Failure> {
        if !self.bytes.as_ptr().addr().is_multiple_of(alignment) {
            return self.refuse(format_args!("must begin at a multiple of {alignment} bytes"));
        }
        view.or_else(|error| self.refuse(format_args!("cannot be used: {error}")))
    }

    /// Whole numbers of 64 bits.
    fn numbers(&self) -> Vec<i64> {
        self.bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    }
}

/// One tensor of a description.
pub fn stored<'a>(shards: &'a Shards, quantization: Option<&Quantization>, spec: &Spec, name: &str) -> Result<Stored<'a>, Failure> {
    let plain = || Ok(Stored::InPlace(vec![shards.get(name)?.shaped(&spec.shape)?.floats(spec.dims())?]));
    let Some(quantization) = quantization.filter(|_| spec.kind != Kind::Vector) else { return plain() };
    let scheme = quantization.scheme;
    let (codes_name, scales_name) = (scheme.codes(name), scheme.scales(name));
    let (codes, scales) = (shards.find(&codes_name)?, shards.find(&scales_name)?);
    let is_fp8 = matches!(scheme, Scheme::Blocks(_) | Scheme::Float { .. });
    let codes = match (codes, scales) {
        (Some(codes), None) if is_fp8 && codes.float().is_some() => return plain(),
        (Some(codes), _) if is_fp8 && codes.float().is_some() && quantization.keeps(name).is_some() => return plain(),
        (None, None) if !is_fp8 || shards.find(name)?.is_none() => return plain(),
        (Some(codes), _) => codes,
        (None, _) => shards.get(&codes_name)?,
    };
    if let Some(entry) = quantization.keeps(name) {
        return codes.refuse(format_args!("must be F32, BF16 or F16, got {}: config.json has `{entry}` as not quantised", codes.dtype));
    }
    if !is_fp8 && shards.find(name)?.is_some() {
        return codes.refuse(format_args!("is there, and so is `{name}`, which it stands for"));
    }
    let found = Found { shards, codes, scales_name, stack: Stack::of(spec), name };
    Ok(Stored::InPlace(match scheme {
        Scheme::Blocks(block) => found.blocks(block)?,
        Scheme::Float { by_output } => found.float(by_output)?,
        Scheme::Mxfp4 => found.mxfp4()?,
        Scheme::Packed { group, symmetric } => found.packed(group, symmetric)?,
        Scheme::Gptq { group } => return Ok(Stored::Packed(Packed::Gptq(found.gptq(group)?))),
        Scheme::Awq { group } => return Ok(Stored::Packed(Packed::Awq(found.awq(group)?))),
    }))
}

/// A tensor of codes.
struct Found<'a, 'n> {
    shards: &'a Shards,
    codes: Piece<'a>,
    scales_name: String,
    stack: Stack,
    name: &'n str,
}

impl<'a> Found<'a, '_> {
    fn scales(&self, shape: &[usize]) -> Result<Piece<'a>, Failure> {
        self.shards.get(&self.scales_name)?.shaped(shape)
    }

    /// A matrix for each expert, by its number.
    fn each(&self, of: impl Fn(usize) -> Result<Result<QuantizedRows<'a>, Error>, Failure>) -> Result<Vec<WeightRows<'a>>, Failure> {
        let one = |expert| match of(expert)? {
            Ok(rows) => Ok(WeightRows::Quantized(rows)),
            Err(error) => self.codes.refuse(format_args!("cannot be used: {error}")),
        };
        (0..self.stack.count()).map(one).collect()
    }

    fn fp8(&self) -> Result<Piece<'a>, Failure> {
        self.codes.typed("F8_E4M3")?.shaped(&self.stack.dims())
    }

    fn blocks(&self, block: [usize; 2]) -> Result<Vec<WeightRows<'a>>, Failure> {
        let Stack { n, k, .. } = self.stack;
        let (codes, grid) = (self.fp8()?, [n.div_ceil(block[0]), k.div_ceil(block[1])]);
        let scales = self.scales(&self.stack.shape(&grid))?;
        self.each(|e| Ok(QuantizedRows::e4m3(codes.codes(e * n, [n, k])?, scales.scales(e * grid[0], grid)?, block)))
    }

    fn float(&self, by_output: bool) -> Result<Vec<WeightRows<'a>>, Failure> {
        let Stack { n, k, experts, .. } = self.stack;
        let codes = self.fp8()?;
        let (block, rows) = if by_output { ([1, k.max(1)], n) } else { ([n.max(1), k.max(1)], 1) };
        let scales = self.shards.get(&self.scales_name)?;
        // One for a tensor may have any number of dimensions of one element.
        let is_one = !by_output && experts.is_none() && scales.shape.iter().all(|size| *size == 1);
        if !is_one {
            scales.shaped(&if by_output { self.stack.shape(&[n, 1]) } else { vec![self.stack.count()] })?;
        }
        self.each(|e| Ok(QuantizedRows::e4m3(codes.codes(e * n, [n, k])?, scales.scales(e * rows, [rows, 1])?, block)))
    }

    fn mxfp4(&self) -> Result<Vec<WeightRows<'a>>, Failure> {
        let Stack { n, k, .. } = self.stack;
        if !k.is_multiple_of(MX_GROUP) {
            return self.codes.refuse(format_args!("must have inputs in whole blocks of {MX_GROUP}, got {k}"));
        }
        let blocks = k / MX_GROUP;
        let codes = self.codes.typed("U8")?.shaped(&self.stack.shape(&[n, blocks, MX_GROUP / 2]))?;
        let scales = self.scales(&self.stack.shape(&[n, blocks]))?.typed("U8")?;
        self.each(|e| Ok(QuantizedRows::mxfp4(codes.codes(e * n, [n, k / 2])?, scales.codes(e * n, [n, blocks])?)))
    }

    fn packed(&self, group: Option<usize>, symmetric: bool) -> Result<Vec<WeightRows<'a>>, Failure> {
        let Stack { n, k, .. } = self.stack;
        let group = group.unwrap_or(k).max(1);
        let (words, groups, zero_rows) = (k.div_ceil(8), k.div_ceil(group), n.div_ceil(8));
        let shape = self.shards.get(&format!("{}_shape", self.name))?.typed("I64")?;
        let want = self.stack.dims();
        let says = shape.numbers();
        if !says.iter().map(|size| usize::try_from(*size).ok()).eq(want.iter().map(|size| Some(*size))) {
            return shape.refuse(format_args!("must hold {want:?} by config.json, got {}", super::input::brief(format!("{says:?}"))));
        }
        let codes = self.codes.typed("I32")?.shaped(&self.stack.shape(&[n, words]))?;
        let scales = self.scales(&self.stack.shape(&[n, groups]))?;
        let zeros_name = format!("{}_zero_point", self.name);
        let zeros = match (self.shards.find(&zeros_name)?, symmetric) {
            (Some(zeros), true) => return zeros.refuse("is there, and config.json says that zero points are symmetric"),
            (None, true) => None,
            (_, false) => Some(self.shards.get(&zeros_name)?.typed("I32")?.shaped(&self.stack.shape(&[zero_rows, groups]))?),
        };
        self.each(|e| {
            let weights = QuantizedRows::int4(codes.codes(e * n, [n, 4 * words])?, scales.scales(e * n, [n, groups])?, k, group);
            let zeros = zeros.map(|zeros| zeros.codes(e * zero_rows, [zero_rows, 4 * groups])).transpose()?;
            Ok(match zeros {
                Some(zeros) => weights.and_then(|weights| weights.with_zeros(zeros)),
                None => weights,
            })
        })
    }

    /// Zero points and scales, of groups of so many inputs.
    fn of_groups(&self, group: Option<usize>) -> Result<(usize, Piece<'a>, Piece<'a>), Failure> {
        let Stack { n, k, experts, .. } = self.stack;
        let whole = n.is_multiple_of(8) && k.is_multiple_of(8);
        if experts.is_some() || !whole {
            return self.codes.refuse(format_args!("must be one matrix of whole words of 8, got {:?}", self.stack.dims()));
        }
        let group = group.unwrap_or(k);
        let groups = k.div_ceil(group);
        let zeros = self.shards.get(&format!("{}.qzeros", stem(self.name)))?.typed("I32")?.shaped(&[groups, n / 8])?;
        Ok((group, zeros, self.scales(&[groups, n])?))
    }

    fn gptq(&self, group: Option<usize>) -> Result<Gptq<'a>, Failure> {
        let Stack { n, k, .. } = self.stack;
        let (group, zeros, scales) = self.of_groups(group)?;
        let groups = k.div_ceil(group);
        let codes = self.codes.typed("I32")?.shaped(&[k / 8, n])?.words([k / 8, n])?;
        let gptq = Gptq::new(codes, zeros.words([groups, n / 8])?, scales.scales(0, [groups, n])?, group);
        let gptq = gptq.or_else(|error| self.codes.refuse(format_args!("cannot be used: {error}")))?;
        let Some(of_inputs) = self.shards.find(&format!("{}.g_idx", stem(self.name)))? else { return Ok(gptq) };
        let of_inputs = of_inputs.typed("I32")?.shaped(&[k])?;
        let Some(list) = of_inputs.words([1, k])?.as_slice() else { return of_inputs.refuse("is not on the host") };
        gptq.with_groups(list).or_else(|error| of_inputs.refuse(format_args!("cannot be used: {error}")))
    }

    fn awq(&self, group: Option<usize>) -> Result<Awq<'a>, Failure> {
        let Stack { n, k, .. } = self.stack;
        let (group, zeros, scales) = self.of_groups(group)?;
        let groups = k.div_ceil(group);
        let codes = self.codes.typed("I32")?.shaped(&[k, n / 8])?.words([k, n / 8])?;
        let awq = Awq::new(codes, zeros.words([groups, n / 8])?, scales.scales(0, [groups, n])?, group);
        awq.or_else(|error| self.codes.refuse(format_args!("cannot be used: {error}")))
    }
}
