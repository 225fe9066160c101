//! CPU backend of `glu`. Callers have checked the shapes.
//!
//! The activation is the one that `grouped_gemm::glu_nt` applies to its sums, so that both give the same bits.

use crate::activation::Glu;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::ExpertRows;
use crate::simd::{glu_mul, narrow, widen};
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

/// Elements that are in `f32`, on the stack, at a time.
const BLOCK: usize = 512;

pub(super) fn gated<T: Float>(stream: &Stream, glu: Glu, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let (gate, up, cols) = (gate.host(), up.host(), gate.cols());
    for_each_row(stream, y.host(), rows_per_task(cols), |row, y| {
        let (mut sums, mut factor) = ([0f32; BLOCK], [0f32; BLOCK]);
        for ((gate, up), y) in gate.row(row).chunks(BLOCK).zip(up.row(row).chunks(BLOCK)).zip(y.chunks_mut(BLOCK)) {
            let (sums, factor) = (&mut sums[..y.len()], &mut factor[..y.len()]);
            widen(sums, gate);
            widen(factor, up);
            glu_mul(sums, factor, glu);
            narrow(y, sums);
        }
    });
    Ok(())
}

pub(super) fn gated_interleaved<T: Float>(
    stream: &Stream,
    glu: Glu,
    gate_up: Rows<'_, T>,
    owned: Option<ExpertRows<'_>>,
    y: &mut RowsMut<'_, T>,
) -> Result<(), Error> {
    let (gate_up, cols) = (gate_up.host(), gate_up.cols());
    let rows = owned.map_or(usize::MAX, |owned| owned.with_offsets(|offsets| offsets[owned.num_experts()] as usize));
    for_each_row(stream, y.host(), rows_per_task(cols), |row, y| {
        if row >= rows {
            return;
        }
        let mut both = [0f32; 2 * BLOCK];
        let (mut sums, mut factor) = ([0f32; BLOCK], [0f32; BLOCK]);
        for (gate_up, y) in gate_up.row(row).chunks(2 * BLOCK).zip(y.chunks_mut(BLOCK)) {
            let (sums, factor, both) = (&mut sums[..y.len()], &mut factor[..y.len()], &mut both[..gate_up.len()]);
            widen(both, gate_up);
            for (([gate, up], sum), factor) in both.as_chunks().0.iter().zip(&mut *sums).zip(&mut *factor) {
                (*sum, *factor) = (*gate, *up);
            }
            glu_mul(sums, factor, glu);
            narrow(y, sums);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::with_scratch;

    /// A row is computed block by block: the bits of the whole, and no scratch of its length.
    #[test]
    fn long_rows_take_no_scratch() {
        let cols = if cfg!(miri) { 1030 } else { 70_001 };
        let gate: Vec<f32> = (0..cols).map(|i| (i % 97) as f32 / 7.0 - 6.0).collect();
        let up: Vec<f32> = (0..cols).map(|i| (i % 89) as f32 / 9.0 - 4.0).collect();
        let mut want = gate.clone();
        glu_mul(&mut want, &up, Glu::Silu);
        // On a thread of its own, whose scratch nobody has used.
        let (got, held) = std::thread::scope(|scope| {
            let compute = || {
                let stream = crate::Device::cpu_with_threads(1).unwrap().stream().unwrap();
                let row = |x| Rows::from_slice(x, 1, cols).unwrap();
                let mut y = vec![0f32; cols];
                super::super::glu(&stream, row(&gate), row(&up), &mut RowsMut::from_slice(&mut y, 1, cols).unwrap()).unwrap();
                (y, crate::simd::scratch_floats())
            };
            scope.spawn(compute).join().unwrap()
        });
        assert!(got.iter().zip(&want).all(|(got, want)| got.to_bits() == want.to_bits()));
        assert_eq!(held, 0);
        with_scratch(cols, |_| ());
        assert!(crate::simd::scratch_floats() >= cols);
    }
}
