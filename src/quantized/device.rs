//! Where kernels find quantised weights: addresses of a matrix, and distances from one expert's to the next.

use crate::device::params::{QuantizedMatrixParams, SCALE_BF16, SCALE_F16, SCALE_F32};
use crate::dtype::DType;
use crate::error::{Error, Op};
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

/// The number that kernels know a type of scales by.
pub(crate) fn scale_type(dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => SCALE_BF16,
        DType::F16 => SCALE_F16,
        _ => SCALE_F32,
    }
}

impl QuantizedRows<'_> {
    /// One expert's matrix. In checkpoint order, `first` is the row within the block of scales; of weights
    /// with zero points, whose rows each have scales of their own, the row within the eight of a word.
    fn matrix_params(&self, op: Op, arg: &'static str) -> Result<QuantizedMatrixParams, Error> {
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
            unused: 0,
        })
    }
}

/// The matrices of all experts. From each expert to the next there must be one distance of codes, one of
/// scales and one of zero points.
pub(crate) fn params_of(op: Op, arg: &'static str, w: &ExpertWeights<'_>) -> Result<QuantizedMatrixParams, Error> {
    let of = |expert: usize| match w.expert(expert) {
        WeightRows::Quantized(rows) => rows.matrix_params(op, arg),
        _ => Err(Error::unsupported(op, format!("`{arg}` of type"), w.dtype().name(), "quantised weights")),
    };
    let first = of(0)?;
    let distance = |from: u64, to: u64| to.wrapping_sub(from) as i64;
    let mut before = first;
    let mut all = first;
    for expert in 1..w.experts_to_measure() {
        let here = of(expert)?;
        let distances = [(before.codes, here.codes), (before.scales, here.scales), (before.zeros, here.zeros)].map(|(a, b)| distance(a, b));
        if expert == 1 {
            [all.expert_codes, all.expert_scales, all.expert_zeros] = distances;
        }
        let rows = |params: &QuantizedMatrixParams| {
            [params.row_codes, params.row_scales, params.row_zeros, params.first.into(), params.step.into()]
        };
        if distances != [all.expert_codes, all.expert_scales, all.expert_zeros] || rows(&here) != rows(&first) {
            let what = format!("`{arg}` with another distance before");
            return Err(Error::unsupported(op, what, format!("matrix {expert}"), "one distance from each expert's matrix to the next"));
        }
        before = here;
    }
    Ok(all)
}

const _: () = {
    use crate::device::params;
    use crate::quantized::tiles;
    assert!(tiles::PANEL_ROWS == params::WEIGHT_PANEL_ROWS as usize && tiles::PANEL_DEPTH == params::WEIGHT_PANEL_DEPTH as usize);
    assert!(tiles::PANEL_BYTES == params::WEIGHT_PANEL_BYTES as usize);
};
