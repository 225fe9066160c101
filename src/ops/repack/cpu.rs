//! CPU backend of `repack`. Callers have checked the shapes.

use crate::device::Stream;
use crate::error::Error;
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::quantized::Tiles;
use crate::quantized::tiles::{PANEL_BYTES, PANEL_DEPTH, PANEL_ROWS};
use crate::simd::decode::{QuantizedRow, RowScales, e8m0, zero_point};
use crate::view::{RowsMut, for_each_row, rows_per_task};
use crate::weights::WeightRows;

/// Threads of a warpgroup, four to an output.
const THREADS: usize = 128;

pub(super) fn repack(
    stream: &Stream,
    tiles: &Tiles,
    w: ExpertWeights<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, u8>,
    zeros: Option<&mut RowsMut<'_, u8>>,
) -> Result<(), Error> {
    let rows = |panel: usize| rows_of(tiles, &w, panel);
    let per_task = rows_per_task(codes.cols());
    for_each_row(stream, codes.host(), per_task, |panel, to| codes_of(tiles.format, &rows(panel), to));
    for_each_row(stream, scales.host(), per_task, |panel, to| match tiles.format {
        Format::Mxfp4 => exponents_of(&rows(panel), to),
        _ => scales_of(tiles, &rows(panel), to),
    });
    if let Some(zeros) = zeros {
        for_each_row(stream, zeros.host(), per_task, |panel, to| zeros_of(&rows(panel), to));
    }
    Ok(())
}

/// The outputs of a panel: fewer than 32 at an expert's end.
fn rows_of<'a>(tiles: &Tiles, w: &ExpertWeights<'a>, panel: usize) -> Vec<QuantizedRow<'a>> {
    let (expert, first) = (panel / tiles.panels_of_expert(), panel % tiles.panels_of_expert() * PANEL_ROWS);
    let WeightRows::Quantized(matrix) = w.expert(expert) else { unreachable!("`Tiles::of` takes quantised weights alone") };
    (first..tiles.n.min(first + PANEL_ROWS)).map(|n| matrix.host_row(n)).collect()
}

fn codes_of(format: Format, rows: &[QuantizedRow<'_>], to: &mut [u8]) {
    let words = if format == Format::Mxfp4 { mxfp4_words } else { int4_words };
    for (step, to) in to.chunks_exact_mut(PANEL_BYTES).enumerate() {
        for (thread, to) in to.chunks_exact_mut(PANEL_BYTES / THREADS).enumerate() {
            let byte = |at: usize| rows.get(thread / 4).and_then(|row| row.codes.get(at)).copied().unwrap_or(0);
            let bytes: [u32; 8] = std::array::from_fn(|i| byte(step * PANEL_DEPTH / 2 + 4 * i + thread % 4).into());
            let [low, high] = words(bytes);
            to[..4].copy_from_slice(&low.to_le_bytes());
            to[4..].copy_from_slice(&high.to_le_bytes());
        }
    }
}

/// Pair `i` of a word in its nibbles `i` and `i + 4`.
fn int4_words(bytes: [u32; 8]) -> [u32; 2] {
    let word = |bytes: &[u32]| bytes.iter().enumerate().fold(0, |word, (i, byte)| word | (byte & 15 | byte >> 4 << 16) << (4 * i));
    [word(&bytes[..4]), word(&bytes[4..])]
}

/// Pairs 0, 1 and 2 of each half in a word of their own, turned right by 0, 4 and 10. The bits that they
/// leave free in both words hold the two pairs that remain.
fn mxfp4_words(bytes: [u32; 8]) -> [u32; 2] {
    const OF_FIRST: u32 = 0x80c1_80c1;
    let pair = |byte: u32| {
        let both = byte & 15 | byte >> 4 << 16;
        (both & 0x0007_0007) << 6 | (both & 0x0008_0008) << 12
    };
    let [a, b, c, d, e, f, g, h] = bytes.map(pair);
    let last = d | h.rotate_right(6);
    let first = a | b.rotate_right(4) | c.rotate_right(10) | (last & OF_FIRST).rotate_right(6);
    [first, e | f.rotate_right(4) | g.rotate_right(10) | (last & !OF_FIRST).rotate_right(8)]
}

fn scales_of(tiles: &Tiles, rows: &[QuantizedRow<'_>], to: &mut [u8]) {
    let size = tiles.scale_type.size_bytes();
    for (group, to) in to.chunks_exact_mut(PANEL_ROWS * size).enumerate() {
        for (i, to) in to.chunks_exact_mut(size).enumerate() {
            match rows.get(i).map(|row| row.scales) {
                Some(RowScales::F32(scales)) => copy(to, scales.get(group).map(|scale| scale.to_le_bytes())),
                Some(RowScales::Bf16(scales)) => copy(to, scales.get(group).map(|scale| scale.0.to_le_bytes())),
                Some(RowScales::F16(scales)) => copy(to, scales.get(group).map(|scale| scale.0.to_le_bytes())),
                _ => to.fill(0),
            }
        }
    }
}

/// Writes zeros for `None`.
fn copy<const N: usize>(to: &mut [u8], from: Option<[u8; N]>) {
    to.copy_from_slice(&from.unwrap_or([0; N]));
}

/// Factors of the outputs, then relative exponents, two groups of each output at a time.
fn exponents_of(rows: &[QuantizedRow<'_>], to: &mut [u8]) {
    let (factors, steps) = to.split_at_mut(PANEL_ROWS * 4);
    steps.fill(0);
    for (i, factor) in factors.chunks_exact_mut(4).enumerate() {
        let exponents = rows.get(i).map_or(&[][..], |row| row.scales.exponents());
        let largest = exponents.iter().copied().max().unwrap_or(0);
        factor.copy_from_slice(&e8m0(largest).to_le_bytes());
        for (group, exponent) in exponents.iter().enumerate() {
            steps[group / 2 * 2 * PANEL_ROWS + 2 * i + group % 2] = (253 + u32::from(*exponent)).saturating_sub(largest.into()) as u8;
        }
    }
}

fn zeros_of(rows: &[QuantizedRow<'_>], to: &mut [u8]) {
    for (group, to) in to.chunks_exact_mut(PANEL_ROWS).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            let row = rows.get(i).filter(|row| group < row.scales.len());
            *to = row.map_or(0, |row| zero_point(row, group) as u8);
        }
    }
}
