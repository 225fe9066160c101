//! CPU backend of `quantize`. Callers have checked the shapes; a routing's maps are permutations by
//! construction.

use super::{BLOCK, Source, scale_of};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::ExpertRows;
use crate::simd::widen;
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

/// Writes the scales, of which a row belongs to a block of columns, and then the codes.
pub(super) fn quantized<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    source: Source<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let x = x.host();
    let count = |owned: ExpertRows<'_>| owned.with_offsets(|offsets| offsets[offsets.len() - 1] as usize);
    let (rows, map) = match source {
        Source::All => (codes.rows(), None),
        Source::Owned(owned) => (count(owned), None),
        Source::Gathered(routing) => (count(routing.expert_rows()), Some((routing.row_to_slot().host().row(0), routing.top_k()))),
    };
    let input = |row: usize| x.row(map.map_or(row, |(slots, top_k)| slots[row] as usize / top_k));
    for_each_row(stream, scales.host(), 1, |block, scales| {
        for (row, scale) in scales[..rows].iter_mut().enumerate() {
            let wide = &mut [0f32; BLOCK];
            let of_block = input(row).chunks(BLOCK).nth(block).unwrap_or_default();
            widen(&mut wide[..of_block.len()], of_block);
            *scale = scale_of(wide.iter().fold(0.0, |most, x| most.max(x.abs()))); // `max` passes over a NaN
        }
    });
    let scales = scales.as_rows().host();
    for_each_row(stream, codes.host(), rows_per_task(x.cols()), |row, codes| {
        if row >= rows {
            return;
        }
        for (block, (codes, x)) in codes.chunks_mut(BLOCK).zip(input(row).chunks(BLOCK)).enumerate() {
            let (wide, scale) = (&mut [0f32; BLOCK][..x.len()], scales.row(block)[row]);
            widen(wide, x);
            codes.iter_mut().zip(wide).for_each(|(code, x)| *code = e4m3(*x / scale));
        }
    });
    Ok(())
}

/// The nearest number of e4m3, ties to even, and at most 448 in magnitude; 0x7f for a NaN.
#[inline(always)]
fn e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    // Below 2^-6 the codes are 2^-9 apart, as floats from 2^14 on are: the addition rounds.
    let small = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(16384f32.to_bits());
    let rebiased = magnitude.wrapping_sub((127 - 7) << 23);
    // Adding 0x7ffff plus the last kept bit carries exactly when nearest-even rounds up.
    let large = (rebiased.wrapping_add(0x7ffff + (rebiased >> 20 & 1)) >> 20).min(0x7e);
    let code = if magnitude < (127 - 6) << 23 { small } else { large };
    if value.is_nan() { 0x7f } else { sign | code as u8 }
}

#[cfg(test)]
mod tests {
    use super::e4m3;
    use crate::simd::decode;

    /// Every code, and every number halfway between two, which goes to the even one; just below and above it.
    #[test]
    fn rounds_to_the_nearest_and_ties_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (decode::e4m3(code), decode::e4m3(code + 1));
            let half = (low + high) / 2.0;
            let even = code + (code & 1);
            let below = f32::from_bits(half.to_bits() - 1);
            let above = f32::from_bits(half.to_bits() + 1);
            for (value, want) in [(low, code), (high, code + 1), (half, even), (below, code), (above, code + 1)] {
                assert_eq!((e4m3(value), e4m3(-value)), (want, want | 0x80), "{value:e}");
            }
        }
    }

    #[test]
    fn saturates_and_keeps_nan() {
        for value in [448.0, 463.9, 464.0, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!((e4m3(value), e4m3(-value)), (0x7e, 0xfe), "{value:e}");
        }
        for value in [0.0, f32::from_bits(1), 1e-30, 2f32.powi(-10)] {
            assert_eq!((e4m3(value), e4m3(-value)), (0, 0x80), "{value:e}");
        }
        assert_eq!((e4m3(f32::NAN), e4m3(-f32::NAN)), (0x7f, 0x7f));
    }
}
