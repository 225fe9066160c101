//! Where kernels find quantised weights: addresses of a matrix, and distances from one expert's to the next.

use crate::device::params::{self, QuantizedMatrixParams};
use crate::dtype::DType;
use crate::error::{Error, Op};
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::quantized::tiles::PANEL_ROWS;
use crate::quantized::{InTiles, QuantizedRows, ScaleRows, Scales, ZERO_ROWS};
use crate::weights::WeightRows;

impl ScaleRows<'_> {
    /// Where the first scale lies, and the bytes from one row to the next.
    fn bytes(&self) -> (u64, usize) {
        with_scales!(self, rows => (rows.address(), rows.stride() * self.dtype().size_bytes()))
    }
}

/// The number that kernels know a type by.
pub(crate) fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => params::TYPE_BF16,
        DType::F16 => params::TYPE_F16,
        DType::U8 => params::TYPE_E8M0,
        _ => params::TYPE_F32,
    }
}

/// The number that kernels know a format by.
fn format_number(format: Format) -> u32 {
    match format {
        Format::E4m3 => params::FORMAT_E4M3,
        Format::Mxfp4 => params::FORMAT_MXFP4,
        Format::Int4 => params::FORMAT_INT4,
        Format::Q8_0 => params::FORMAT_Q8_0,
        Format::Q4_0 => params::FORMAT_Q4_0,
        Format::Q4_1 => params::FORMAT_Q4_1,
        Format::Q5_0 => params::FORMAT_Q5_0,
        Format::Q5_1 => params::FORMAT_Q5_1,
        Format::Q4K => params::FORMAT_Q4_K,
        Format::Q5K => params::FORMAT_Q5_K,
        Format::Q6K => params::FORMAT_Q6_K,
        Format::GgufMxfp4 => params::FORMAT_GGUF_MXFP4,
    }
}

/// Where a group is all of K, its length is a multiple of this.
const WHOLE_GROUP: usize = 128;

impl QuantizedRows<'_> {
    /// Of k, that share a scale which lies apart.
    pub(crate) fn group(&self) -> usize {
        match (self.in_tiles, self.scales) {
            (Some(in_tiles), _) => in_tiles.tiles.group,
            (None, Some(Scales { block: [_, group], .. })) if group < self.cols => group,
            _ => self.cols.next_multiple_of(WHOLE_GROUP).max(WHOLE_GROUP),
        }
    }

    /// One expert's matrix. In checkpoint order, `first` is the row within the block of scales; of weights
    /// with zero points, whose rows each have scales of their own, the row within the eight of a word.
    pub(crate) fn matrix_params(&self, op: Op, arg: &'static str) -> Result<QuantizedMatrixParams, Error> {
        if let Some(in_tiles) = self.in_tiles {
            return self.tile_params(op, arg, &in_tiles);
        }
        let (scales, row_scales, block_rows) = self.scales.map_or((0, 0, 1), |Scales { values, block }| {
            let (address, row_bytes) = values.bytes();
            let block_rows = block[0].min(u32::MAX as usize); // kernels count rows in 32 bits
            (address + (self.first / block_rows * row_bytes) as u64, row_bytes, block_rows)
        });
        let zeros = self.zeros.map_or(0, |zeros| zeros.address() + (self.first / ZERO_ROWS * zeros.stride()) as u64);
        Ok(QuantizedMatrixParams {
            codes: self.codes.address(),
            scales,
            zeros,
            expert_codes: 0,
            expert_scales: 0,
            expert_zeros: 0,
            row_codes: self.codes.stride() as i64,
            row_scales: row_scales as i64,
            row_zeros: self.zeros.map_or(0, |zeros| zeros.stride()) as i64,
            first: (self.first % if self.zeros.is_some() { ZERO_ROWS } else { block_rows }) as u32,
            step: self.step as u32,
            block_rows: block_rows as u32,
            group: self.group() as i64,
            format: format_number(self.format),
            scale_type: self.scales.map_or(0, |scales| type_number(scales.values.dtype())),
            unused: 0,
        })
    }

    fn tile_params(&self, op: Op, arg: &'static str, in_tiles: &InTiles<'_>) -> Result<QuantizedMatrixParams, Error> {
        let InTiles { tiles, rows, scales, zeros } = in_tiles;
        let (expert, skipped) = (self.first / tiles.n.max(1), self.first % tiles.n.max(1));
        if *rows > 1 && self.step != 1 || !skipped.is_multiple_of(PANEL_ROWS) {
            let got = format!("every {} from {skipped} on", self.step);
            return Err(Error::unsupported(op, format!("`{arg}` in tiles, of its outputs"), got, "all from a multiple of 32 on"));
        }
        let panel = expert * tiles.panels_of_expert() + skipped / PANEL_ROWS;
        let at = |address: u64, stride: usize| address + (panel * stride) as u64;
        Ok(QuantizedMatrixParams {
            codes: at(self.codes.vectors(op, arg)?, self.codes.stride()),
            scales: at(scales.vectors(op, arg)?, scales.stride()),
            zeros: zeros.map_or(Ok(0), |zeros| Ok(at(zeros.vectors(op, arg)?, zeros.stride())))?,
            expert_codes: 0,
            expert_scales: 0,
            expert_zeros: 0,
            row_codes: self.codes.stride() as i64,
            row_scales: scales.stride() as i64,
            row_zeros: zeros.map_or(0, |zeros| zeros.stride()) as i64,
            first: 0,
            step: 1,
            block_rows: 1,
            group: tiles.group as i64,
            format: format_number(self.format),
            scale_type: type_number(tiles.scale_type),
            unused: 0,
        })
    }
}

/// The matrices of all experts, which have scales of one kind. From each expert to the next there must be one
/// distance of codes, one of scales and one of zero points.
pub(crate) fn params_of(op: Op, arg: &'static str, w: &ExpertWeights<'_>) -> Result<QuantizedMatrixParams, Error> {
    let of = |expert: usize| match w.expert(expert) {
        WeightRows::Quantized(rows) => rows.matrix_params(op, arg),
        _ => Err(Error::unsupported(op, format!("`{arg}` of type"), w.dtype().name(), "quantised weights")),
    };
    let refuse = |what: &str, expert: usize, supported| {
        Err(Error::unsupported(op, format!("`{arg}` with {what}"), format!("matrix {expert}"), supported))
    };
    let first = of(0)?;
    let distance = |from: u64, to: u64| to.wrapping_sub(from) as i64;
    let mut before = first;
    let mut all = first;
    for expert in 1..w.experts_to_measure() {
        let here = of(expert)?;
        if !here.is_like(&first) {
            return refuse("other scales, or other rows of blocks of them, at", expert, "scales of one kind, for all experts alike");
        }
        let distances = [(before.codes, here.codes), (before.scales, here.scales), (before.zeros, here.zeros)].map(|(a, b)| distance(a, b));
        if expert == 1 {
            [all.expert_codes, all.expert_scales, all.expert_zeros] = distances;
        }
        if distances != [all.expert_codes, all.expert_scales, all.expert_zeros] {
            return refuse("another distance before", expert, "one distance from each expert's matrix to the next");
        }
        before = here;
    }
    Ok(all)
}

impl QuantizedMatrixParams {
    /// Whether a matrix lies as another does, wherever either begins.
    fn is_like(&self, other: &Self) -> bool {
        self.kind() == other.kind() && self.strides() == other.strides()
    }

    /// What its numbers are: format, group, types, and whether there are zero points.
    pub(crate) fn kind(&self) -> (u32, i64, u32, bool) {
        (self.format, self.group, self.scale_type, self.zeros != 0)
    }

    fn strides(&self) -> ([i64; 3], [u32; 3]) {
        ([self.row_codes, self.row_scales, self.row_zeros], [self.first, self.step, self.block_rows])
    }
}

const _: () = {
    use crate::device::params;
    use crate::quantized::tiles;
    assert!(tiles::PANEL_ROWS == params::WEIGHT_PANEL_ROWS as usize && tiles::PANEL_DEPTH == params::WEIGHT_PANEL_DEPTH as usize);
    assert!(tiles::PANEL_BYTES == params::WEIGHT_PANEL_BYTES as usize);
};
