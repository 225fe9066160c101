//! CUDA launches of `repack`: codes, then scales. Callers have checked shapes and order.
#![allow(unsafe_code)] // the launches

use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{REPACK_THREADS, RepackParams};
use crate::device::{Stream, image};
use crate::dtype::DType;
use crate::error::{Error, Op};
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::quantized::Tiles;
use crate::quantized::device::params_of;
use crate::quantized::tiles::PANEL_ROWS;
use crate::view::RowsMut;

/// What a kernel writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The codes.
    Codes,
    /// The scales, and the zero points.
    Scales,
}

pub static KERNELS: &[Kernel<Key>] = &[
    kernel("repack_int4", Key::Codes, Format::Int4),
    kernel("repack_int4_scales", Key::Scales, Format::Int4),
    kernel("repack_mxfp4", Key::Codes, Format::Mxfp4),
    kernel("repack_mxfp4_scales", Key::Scales, Format::Mxfp4),
];

const fn kernel(entry: &'static str, key: Key, format: Format) -> Kernel<Key> {
    Kernel { threads: REPACK_THREADS, ..Kernel::new(&image::REPACK, entry, key, types(format)) }
}

const fn types(format: Format) -> Types {
    Types { x: DType::Quantized(format), w: DType::Quantized(format), y: DType::U8 }
}

/// What the kernels need beyond the contract: matrices at one distance.
pub(super) fn check(w: &ExpertWeights<'_>) -> Result<(), Error> {
    params_of(Op::Repack, "w", w).map(|_| ())
}

pub(super) fn repack(
    stream: &Stream,
    tiles: &Tiles,
    w: ExpertWeights<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, u8>,
    zeros: Option<&mut RowsMut<'_, u8>>,
) -> Result<(), Error> {
    let [panels, bytes] = tiles.codes();
    if panels == 0 || bytes == 0 {
        return Ok(());
    }
    let (zeros_at, zeros_row) = zeros.map_or((0, 0), |zeros| (zeros.address(), zeros.stride()));
    let params = RepackParams {
        from: params_of(Op::Repack, "w", &w)?,
        codes: codes.address(),
        scales: scales.address(),
        zeros: zeros_at,
        row_codes: codes.stride() as i64,
        row_scales: scales.stride() as i64,
        row_zeros: zeros_row as i64,
        num_experts: tiles.num_experts() as i64,
        n: w.n() as i64,
        k: w.k() as i64,
        groups: w.k().div_ceil(tiles.group) as i64,
        all_groups: tiles.groups() as i64,
    };
    let threads_of_panel = |key: Key| match (key, tiles.format()) {
        (Key::Codes, _) => tiles.steps() * REPACK_THREADS as usize,
        (Key::Scales, Format::Mxfp4) => PANEL_ROWS,
        (Key::Scales, _) => tiles.groups() * PANEL_ROWS,
    };
    let cuda = stream.cuda();
    for key in [Key::Codes, Key::Scales] {
        let kernel = find(Op::Repack, KERNELS, key, types(tiles.format()), |_| true)?;
        let all = (panels as u64).saturating_mul(threads_of_panel(key) as u64);
        let grid = cuda.grid(all, REPACK_THREADS.into(), REPACK_THREADS);
        // SAFETY: `RepackParams` is the struct of these entries; the weights and the outputs have these
        // extents, which the contract compared with those of the tiles; all are on this stream's device and
        // stay valid until the work completes: buffers are freed in stream order, raw views promise it.
        unsafe { cuda.launch_kernel(Op::Repack, kernel, grid, &params)? };
    }
    Ok(())
}
