//! Quantised matrices in a GPU's memory: codes, scales and zero points as they lie in a checkpoint, without
//! gaps, or 4-bit weights in tiles, which the device makes of them.

use dropless::{Bf16, Buffer, DType, Element, Error, ExpertWeights, F16, Format, QuantizedRows, Rows, RowsMut, ScaleRows};
use dropless::{Stream, Tiles, WeightRows, repack};

use super::super::spec::Part;
use super::buffers::zeros;
use super::pieces::{Filling, Piece};
use super::{Failure, Spec, refuse};

/// Rows of zero points are for so many outputs.
const ZERO_ROWS: usize = 8;
/// Outputs of a panel of tiles.
const PANEL_ROWS: usize = 32;

/// A matrix `[rows, cols]` without gaps.
struct Held<T> {
    values: Buffer<T>,
    dims: [usize; 2],
}

impl<T: Element> Held<T> {
    fn zeros(stream: &Stream, dims: [usize; 2], spec: &Spec) -> Result<Held<T>, Failure> {
        Ok(Held { values: zeros(stream, dims[0] * dims[1], spec)?, dims })
    }

    /// Copies of matrices of one shape, one below the other.
    fn copied(stream: &Stream, parts: &[Rows<'_, T>], spec: &Spec) -> Result<Held<T>, Failure> {
        let [rows, cols] = parts.first().map_or([0, 0], Rows::dims);
        let mut all = Held::zeros(stream, [parts.len() * rows, cols], spec)?;
        for (number, part) in parts.iter().enumerate() {
            let Some(values) = part.as_slice() else { return not_packed(spec) };
            all.all_mut()?.row_range(number * rows..(number + 1) * rows)?.copy_from_slice(stream, values)?;
        }
        Ok(all)
    }

    /// Part `at` of as many as share the rows.
    fn part(&self, at: usize, of: usize) -> Result<Rows<'_, T>, Error> {
        let [rows, cols] = self.dims;
        self.values.rows(rows, cols)?.row_range(at * (rows / of)..(at + 1) * (rows / of))
    }

    fn all(&self) -> Result<Rows<'_, T>, Error> {
        self.part(0, 1)
    }

    fn all_mut(&mut self) -> Result<RowsMut<'_, T>, Error> {
        self.values.rows_mut(self.dims[0], self.dims[1])
    }
}

/// Scales of one type.
enum Scales {
    F32(Held<f32>),
    Bf16(Held<Bf16>),
    F16(Held<F16>),
    E8m0(Held<u8>),
}

impl Scales {
    fn copied<'a>(stream: &Stream, parts: &[ScaleRows<'a>], spec: &Spec) -> Result<Scales, Failure> {
        macro_rules! of {
            ($variant:ident) => {{
                let rows = |part: ScaleRows<'a>| if let ScaleRows::$variant(rows) = part { Some(rows) } else { None };
                let Some(parts) = parts.iter().copied().map(rows).collect::<Option<Vec<_>>>() else { return of_several_kinds(spec) };
                Scales::$variant(Held::copied(stream, &parts, spec)?)
            }};
        }
        Ok(match parts.first() {
            Some(ScaleRows::F32(_)) => of!(F32),
            Some(ScaleRows::Bf16(_)) => of!(Bf16),
            Some(ScaleRows::F16(_)) => of!(F16),
            _ => of!(E8m0),
        })
    }

    fn part(&self, at: usize, of: usize) -> Result<ScaleRows<'_>, Error> {
        Ok(match self {
            Scales::F32(scales) => scales.part(at, of)?.into(),
            Scales::Bf16(scales) => scales.part(at, of)?.into(),
            Scales::F16(scales) => scales.part(at, of)?.into(),
            Scales::E8m0(scales) => ScaleRows::E8m0(scales.part(at, of)?),
        })
    }
}

/// Matrices of one shape, each with scales of its own, in the order of a checkpoint.
pub struct Quantized {
    format: Format,
    /// N and K.
    dims: [usize; 2],
    /// Rows and columns that share a scale, where scales lie apart.
    block: [usize; 2],
    count: usize,
    codes: Held<u8>,
    scales: Option<Scales>,
    zeros: Option<Held<u8>>,
}

impl Quantized {
    /// Room for the codes of matrices on the host, and copies of the rest.
    pub fn new(stream: &Stream, host: &[QuantizedRows<'_>], spec: &Spec) -> Result<Quantized, Failure> {
        let Some(first) = host.first() else { return not_packed(spec) };
        let kind = |rows: &QuantizedRows<'_>| (rows.format(), rows.dims(), rows.scales().map(|(_, block)| block), rows.zeros().is_some());
        if host.iter().any(|rows| kind(rows) != kind(first)) {
            return of_several_kinds(spec);
        }
        let [rows, row_bytes] = first.codes().dims();
        let scales: Vec<ScaleRows<'_>> = host.iter().filter_map(|rows| Some(rows.scales()?.0)).collect();
        let zeros: Vec<Rows<'_, u8>> = host.iter().filter_map(QuantizedRows::zeros).collect();
        Ok(Quantized {
            format: first.format(),
            dims: first.dims(),
            block: first.scales().map_or([1, 1], |(_, block)| block),
            count: host.len(),
            codes: Held::zeros(stream, [host.len() * rows, row_bytes], spec)?,
            scales: if scales.is_empty() { None } else { Some(Scales::copied(stream, &scales, spec)?) },
            zeros: if zeros.is_empty() { None } else { Some(Held::copied(stream, &zeros, spec)?) },
        })
    }

    /// The copies of the codes.
    pub fn pieces<'a>(&'a mut self, host: &[QuantizedRows<'a>], spec: &'a Spec) -> Result<Vec<Piece<'a>>, Failure> {
        let cols = self.codes.dims[1];
        let mut filling = Filling::new(&mut self.codes.values, spec, [cols, cols])?;
        for rows in host {
            let Some(codes) = rows.codes().as_slice() else { return not_packed(spec) };
            filling.same(codes)?;
        }
        Ok(filling.pieces())
    }

    /// One view of all matrices, or one of each where scales do not end where a matrix ends.
    pub fn views(&self) -> Result<Vec<WeightRows<'_>>, Error> {
        let n = self.dims[0];
        let is_stack = n.is_multiple_of(self.block[0]) && (self.zeros.is_none() || n.is_multiple_of(ZERO_ROWS));
        let count = if is_stack { 1 } else { self.count };
        (0..count).map(|at| Ok(self.view(at, count)?.into())).collect()
    }

    fn view(&self, at: usize, of: usize) -> Result<QuantizedRows<'_>, Error> {
        let (codes, cols, [_, group]) = (self.codes.part(at, of)?, self.dims[1], self.block);
        let rows = match (self.scales.as_ref().map(|scales| scales.part(at, of)).transpose()?, self.format) {
            (None, format) => QuantizedRows::gguf(format, codes, cols)?,
            (Some(ScaleRows::E8m0(exponents)), _) => QuantizedRows::mxfp4(codes, exponents)?,
            (Some(scales), Format::E4m3) => QuantizedRows::e4m3(codes, scales, self.block)?,
            (Some(scales), _) => QuantizedRows::int4(codes, scales, cols, group)?,
        };
        match &self.zeros {
            Some(zeros) => rows.with_zeros(zeros.part(at, of)?),
            None => Ok(rows),
        }
    }
}

fn not_packed<T>(spec: &Spec) -> Result<T, Failure> {
    refuse(format!("tensor `{}` must lie on the host without gaps", spec.name()))
}

fn of_several_kinds<T>(spec: &Spec) -> Result<T, Failure> {
    refuse(format!("tensor `{}` and those of the other experts must have scales of one type", spec.name()))
}

/// Weights in tiles.
pub struct Tiled {
    tiles: Tiles,
    codes: Held<u8>,
    scales: Held<u8>,
    zeros: Option<Held<u8>>,
}

impl Tiled {
    /// Has the device write weights in tiles.
    pub fn repacked(stream: &Stream, w: ExpertWeights<'_>, tiles: Tiles, spec: &Spec) -> Result<Tiled, Failure> {
        let room = |dims| Held::zeros(stream, dims, spec);
        let zeros = tiles.zeros().map(room).transpose()?;
        let mut all = Tiled { tiles, codes: room(tiles.codes())?, scales: room(tiles.scales())?, zeros };
        let Tiled { codes, scales, zeros, .. } = &mut all;
        let mut zeros = zeros.as_mut().map(Held::all_mut).transpose()?;
        repack::repack(stream, w, &mut codes.all_mut()?, &mut scales.all_mut()?, zeros.as_mut())?;
        Ok(all)
    }

    /// All matrices.
    pub fn view(&self) -> Result<QuantizedRows<'_>, Error> {
        let zeros = self.zeros.as_ref().map(Held::all).transpose()?;
        QuantizedRows::tiles(self.tiles, self.codes.all()?, self.scales.all()?, zeros)
    }
}

/// The tiles that a matrix is repacked in for activations of that type: whatever can be, but tables that are
/// looked up, and outputs whose second half begins within a panel.
pub fn tiles_for(activations: DType, spec: &Spec, w: &ExpertWeights<'_>) -> Option<Tiles> {
    let stays = activations != DType::Bf16 || spec.part == Part::Embedding;
    let is_cut = spec.in_halves && !w.n().is_multiple_of(2 * PANEL_ROWS);
    if stays || is_cut { None } else { Tiles::of(w).ok() }
}

/// Bytes of weights in tiles.
pub fn tile_bytes(tiles: &Tiles) -> u64 {
    let parts = [Some(tiles.codes()), Some(tiles.scales()), tiles.zeros()];
    parts.into_iter().flatten().map(|[rows, bytes]| rows as u64 * bytes as u64).sum()
}
