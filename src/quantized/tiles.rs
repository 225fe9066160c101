//! 4-bit weights in tiles: the order in which a GPU multiplies them.
//!
//! A panel is 32 outputs of an expert, and one row of bytes. 1024 bytes hold 64 of k, eight bytes for each
//! thread. Scales and zero points are matrices of their own, a row for each panel. `cuda/common/params.h`
//! has the places, `cuda/common/quantized_weights.cuh` the bits.

use crate::dtype::DType;
use crate::error::{Error, Op, check_shape};
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::quantized::{InTiles, QuantizedRows};
use crate::shape::checked_bytes;
use crate::view::Rows;
use crate::weights::WeightRows;

/// Outputs of a panel.
pub(crate) const PANEL_ROWS: usize = 32;
/// Of k, that lie together in a panel.
pub(crate) const PANEL_DEPTH: usize = 64;
/// Bytes of the codes of so many outputs and so much of k.
pub(crate) const PANEL_BYTES: usize = PANEL_ROWS * PANEL_DEPTH / 2;

/// How E matrices `[N, K]` of 4-bit weights lie in tiles, and what memory they take.
///
/// | part | rows | bytes of a row |
/// |---|---|---|
/// | codes | `E * ceil(N / 32)` | `1024 * ceil(K / 64)` |
/// | scales, INT4 | as many | `32 * groups`, times the bytes of a scale, which keeps its type |
/// | scales, MXFP4 | as many | `128 + 64 * ceil(K / 64)`: `f32` factors of outputs, relative exponents |
/// | zero points | as many | `32 * groups` |
///
/// This is what a checkpoint takes, and besides: zeros that fill up the last panel and the last 64 of k, the
/// factors, and half a byte for each zero point, which takes a whole one here. `groups` counts those that
/// begin below K rounded up to a multiple of 64.
///
/// ```
/// use dropless::{Bf16, ExpertWeights, QuantizedRows, Rows, Tiles};
///
/// let (codes, scales) = (vec![0x99; 64 * 48], vec![Bf16(0x3f80); 64 * 3]); // two experts, N = 32, K = 96
/// let (codes, scales) = (Rows::from_slice(&codes, 64, 48)?, Rows::from_slice(&scales, 64, 3)?);
/// let tiles = Tiles::of(&ExpertWeights::nk(QuantizedRows::int4(codes, scales, 96, 32)?, 2)?)?;
/// assert_eq!((tiles.codes(), tiles.scales(), tiles.zeros()), ([2, 2048], [2, 32 * 4 * 2], None));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    pub(crate) format: Format,
    pub(crate) num_experts: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Of k, that share a scale: a multiple of 32; of 128 where one group is all of k.
    pub(crate) group: usize,
    pub(crate) scale_type: DType,
    pub(crate) has_zeros: bool,
}

impl Tiles {
    /// The tiles that weights in checkpoint order become.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for weights that are neither INT4 nor MXFP4, are in tiles already, or have
    /// groups that are no multiple of 32 and less than K; for experts of several kinds of scales.
    pub fn of(w: &ExpertWeights<'_>) -> Result<Tiles, Error> {
        let first = Self::of_expert(w, 0)?;
        for expert in 1..w.num_experts() {
            let other = Self::of_expert(w, expert)?;
            if other != first {
                return Err(Error::unsupported(Op::Repack, format!("`w` whose expert {expert} has"), other.kind(), first.kind()));
            }
        }
        Ok(first)
    }

    fn of_expert(w: &ExpertWeights<'_>, expert: usize) -> Result<Tiles, Error> {
        let op = Op::Repack;
        let rows = match w.expert(expert) {
            WeightRows::Quantized(rows) if matches!(rows.format(), Format::Int4 | Format::Mxfp4) => rows,
            _ => return Err(Error::unsupported(op, "`w` of type", w.dtype().name(), "int4, mxfp4")),
        };
        let Some((scales, [_, group])) = rows.scales() else {
            return Err(Error::unsupported(op, "`w` in", "tiles", "weights in the order of a checkpoint"));
        };
        checked_bytes(op, "bytes of a panel", &[w.k().div_ceil(PANEL_DEPTH)], PANEL_BYTES)?;
        let whole = w.k().next_multiple_of(2 * PANEL_DEPTH).max(2 * PANEL_DEPTH);
        let group = if group >= w.k() { whole } else { group };
        if !group.is_multiple_of(32) {
            return Err(Error::unsupported(op, "groups of", group.to_string(), "multiples of 32, or all of K"));
        }
        let (format, num_experts, has_zeros) = (rows.format(), w.num_experts(), rows.zeros().is_some());
        Ok(Tiles { format, num_experts, n: w.n(), k: w.k(), group, scale_type: scales.dtype(), has_zeros })
    }

    pub(crate) fn kind(&self) -> String {
        let zeros = if self.has_zeros { ", zero points" } else { "" };
        format!("{} with {} scales of groups of {}{zeros}", self.format.name(), self.scale_type.name(), self.group)
    }

    /// The format of the codes.
    pub fn format(&self) -> Format {
        self.format
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Rows and bytes of a row of the codes.
    pub fn codes(&self) -> [usize; 2] {
        [self.panels(), self.steps() * PANEL_BYTES]
    }

    /// Rows and bytes of a row of the scales.
    pub fn scales(&self) -> [usize; 2] {
        let bytes = match self.format {
            Format::Mxfp4 => PANEL_ROWS * (4 + 2 * self.steps()),
            _ => PANEL_ROWS * self.groups() * self.scale_type.size_bytes(),
        };
        [self.panels(), bytes]
    }

    /// Rows and bytes of a row of the zero points, where there are some.
    pub fn zeros(&self) -> Option<[usize; 2]> {
        self.has_zeros.then(|| [self.panels(), PANEL_ROWS * self.groups()])
    }

    /// Panels of an expert.
    pub(crate) fn panels_of_expert(&self) -> usize {
        self.n.div_ceil(PANEL_ROWS)
    }

    fn panels(&self) -> usize {
        self.num_experts * self.panels_of_expert()
    }

    /// Pieces of 64 of k.
    pub(crate) fn steps(&self) -> usize {
        self.k.div_ceil(PANEL_DEPTH)
    }

    /// Groups of an output, those of the zeros after the last of k included.
    pub(crate) fn groups(&self) -> usize {
        (self.steps() * PANEL_DEPTH).div_ceil(self.group)
    }

    /// Refuses parts of other sizes, and zero points where there should be none or the other way round.
    pub(crate) fn check_parts(&self, op: Op, codes: [usize; 2], scales: [usize; 2], zeros: Option<[usize; 2]>) -> Result<(), Error> {
        check_shape(op, "codes", "[panels, bytes]", &self.codes(), &codes)?;
        check_shape(op, "scales", "[panels, bytes]", &self.scales(), &scales)?;
        match (self.zeros(), zeros) {
            (None, None) => Ok(()),
            (Some(want), Some(got)) => check_shape(op, "zeros", "[panels, bytes]", &want, &got),
            (want, got) => {
                let text = |there: bool| if there { "zero points" } else { "none" };
                Err(Error::mismatch(op, "zeros", text(want.is_some()).to_owned(), text(got.is_some())))
            }
        }
    }
}

impl<'a> QuantizedRows<'a> {
    /// Weights in tiles, as [`repack`](crate::repack::repack) writes them: a stack of E matrices `[N, K]` for
    /// [`ExpertWeights::nk`]. On a GPU the tensor cores multiply `bf16` rows by INT4 and MXFP4 weights in tiles
    /// alone; on the CPU products take no tiles.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for a part of another size than `tiles` says; [`Error::Mismatch`] if there are zero
    /// points and should be none, or the other way round; [`Error::Place`] if parts live elsewhere.
    pub fn tiles(tiles: Tiles, codes: Rows<'a, u8>, scales: Rows<'a, u8>, zeros: Option<Rows<'a, u8>>) -> Result<Self, Error> {
        tiles.check_parts(Op::ExpertWeights, codes.dims(), scales.dims(), zeros.map(|zeros| zeros.dims()))?;
        let rows = tiles.num_experts * tiles.n;
        let in_tiles = Some(InTiles { tiles, rows, scales, zeros });
        let all = QuantizedRows { cols: tiles.k, in_tiles, ..Self::bare(tiles.format, codes) };
        all.check_place("scales", scales.place())?;
        zeros.map_or(Ok(()), |zeros| all.check_place("zeros", zeros.place()))?;
        Ok(all)
    }

    /// How the weights lie in tiles, if they do.
    pub fn in_tiles(&self) -> Option<Tiles> {
        self.in_tiles.map(|in_tiles| in_tiles.tiles)
    }

    /// Refuses weights in tiles, for code that reads rows.
    pub(crate) fn check_rows(&self, op: Op, arg: &'static str) -> Result<(), Error> {
        if self.in_tiles.is_none() {
            return Ok(());
        }
        Err(Error::unsupported(op, format!("`{arg}` in"), "tiles", "weights in the order of a checkpoint"))
    }
}
