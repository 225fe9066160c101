//! The tensor-core kernels, fed by TMA, and the table of their tiles: `cuda/grouped_gemm.cu`, and `cuda/grouped_gemm_few.cu` for few rows.
#![allow(unsafe_code)] // the launch

use std::cell::Cell;

use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::driver::{TensorMap, TensorMapDesc};
use crate::device::image::{self, Image};
use crate::device::params::{
    FEW_COLS, FEW_SHARED_BYTES, FEW_THREADS, TILED_CLUSTER, TILED_COLS, TILED_DEPTH, TILED_ROWS, TILED_SHARED_BYTES, TILED_THREADS,
    TiledProductParams,
};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::view::{Rows, RowsMut};

/// A row of the tile table: a form of a kernel that was compiled.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// What its entry points end with.
    pub name: &'static str,
    image: &'static Image,
    /// It serves calls in which no expert can own more rows. The host knows that bound without knowing the routing.
    serves: usize,
    /// Rows of a tile.
    rows: u32,
    /// Columns of a tile, of all products together, or of each.
    cols: Columns,
    /// Blocks that take tiles together.
    cluster: u32,
    threads: u32,
    shared_bytes: u32,
}

#[derive(Clone, Copy, Debug)]
enum Columns {
    OfAll(u32),
    OfEach(u32),
}

/// The tile table: a call takes the first form that serves it.
///
/// Few rows: the weights are the wide operand and each of their bytes is loaded once. Many: a pair of blocks halves the traffic of
/// weights from the L2 cache; where few rows of an expert are left, the blocks take two columns of them, each with weights of its own.
pub static FORMS: [Form; 4] = [few("few8", 8), few("few32", 32), few("few64", 64), TILED];

/// The entry points of a family, in the order of [`FORMS`].
macro_rules! forms {
    ($family:literal) => {
        [concat!($family, "_few8"), concat!($family, "_few32"), concat!($family, "_few64"), concat!($family, "_256x2")]
    };
}

const fn few(name: &'static str, rows: u32) -> Form {
    Form {
        name,
        image: &image::GROUPED_GEMM_FEW,
        serves: rows as usize,
        rows,
        cols: Columns::OfEach(FEW_COLS),
        cluster: 1,
        threads: FEW_THREADS,
        shared_bytes: FEW_SHARED_BYTES,
    }
}

const TILED: Form = Form {
    name: "256x2",
    image: &image::GROUPED_GEMM,
    serves: usize::MAX,
    rows: TILED_ROWS,
    cols: Columns::OfAll(TILED_COLS),
    cluster: TILED_CLUSTER,
    threads: TILED_THREADS,
    shared_bytes: TILED_SHARED_BYTES,
};

thread_local! {
    static FORCED: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Runs `work` with every tiled product of this thread in the form `FORMS[form]`: for tests and benches.
pub fn with_form<R>(form: usize, work: impl FnOnce() -> R) -> R {
    struct Restore(Option<usize>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _until_the_end = Restore(FORCED.replace(Some(form)));
    work()
}

fn choose(rows: &ExpertRows<'_>) -> usize {
    let fits = |form: &Form| rows.max_rows_per_expert() <= form.serves;
    FORCED.get().or_else(|| FORMS.iter().position(fits)).unwrap_or(FORMS.len() - 1)
}

/// What TMA and 16-byte stores ask of types, widths and addresses. Static shape and layout alone decide.
pub(super) fn serves<A: Float, W: Float, O: Float>(
    x: &Rows<'_, A>,
    weights: &[ExpertWeights<'_, W>],
    rows: &ExpertRows<'_>,
    y: &RowsMut<'_, O>,
) -> bool {
    const MAX_STRIDE_BYTES: u64 = 1 << 40;
    let vectors = |address: u64, stride: usize, size: usize| address.is_multiple_of(16) && (stride * size).is_multiple_of(16);
    let weights_fit = weights.iter().all(|w| {
        let expert_bytes = w.stacked().stride() as u64 * (w.stacked().rows() / w.num_experts()) as u64 * 2;
        vectors(w.stacked().address(), w.stacked().stride(), 2) && expert_bytes < MAX_STRIDE_BYTES
    });
    let (k, n, widest) = (x.cols(), y.cols(), i32::MAX as usize - 2 * TILED_COLS as usize); // coordinates are 32 bits
    matches!(A::DTYPE, DType::Bf16 | DType::F16)
        && k > 0
        && k.is_multiple_of(8)
        && n.is_multiple_of(8)
        && k.max(n).max(x.stride()) <= widest
        && rows.rows().max(rows.input_rows()) <= i32::MAX as usize - 2 * TILED_ROWS as usize
        && vectors(x.address(), x.stride(), 2)
        && vectors(y.address(), y.stride(), size_of::<O>())
        && weights_fit
}

pub(super) fn product<A: Float, W: Float, O: Float, const P: usize>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: [ExpertWeights<'_, W>; P],
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let cuda = stream.cuda();
    let which = choose(&rows);
    let form = &FORMS[which];
    let entry = entries::<A, O>(P, weights[0].order())[which];
    let tile_cols = match form.cols {
        Columns::OfAll(cols) => cols / P as u32,
        Columns::OfEach(cols) => cols,
    };
    let [num_rows, n] = y.dims();
    let (offsets, row_to_slot, top_k) = rows.addresses();
    let maps = weights.map(|w| weights_map(&w, tile_cols / form.cluster));
    let map = |desc: &TensorMapDesc| cuda.tensor_map(Op::GroupedGemm, desc);
    let w_map = map(&maps[0])?;
    let params = TiledProductParams {
        x_map: if row_to_slot == 0 { map(&rows_map(&x, form.rows))? } else { TensorMap([0; 16]) },
        w: w_map,
        v: if P == 1 { w_map } else { map(&maps[P - 1])? },
        x: x.address(),
        offsets,
        row_to_slot,
        y: y.address(),
        taken: cuda.scratch(),
        rows: num_rows as i64,
        num_experts: rows.num_experts() as i64,
        n: n as i64,
        k: x.cols() as i64,
        top_k: top_k as i64,
        x_stride: x.stride() as i64,
        y_stride: y.stride() as i64,
        unused: [0; 4],
    };
    // Each expert may end in a tile of its own; clusters that find no tile leave.
    let row_tiles = (num_rows as u64).div_ceil(u64::from(form.rows)) + (rows.num_experts().min(num_rows) as u64) - 1;
    let tiles = row_tiles * (n as u64).div_ceil(u64::from(tile_cols * form.cluster));
    let clusters = tiles.min(u64::from(cuda.attributes().sm_count / form.cluster)) as u32;
    let Form { cluster, threads, shared_bytes, .. } = *form;
    let grid = Grid { blocks: [clusters * cluster, 1, 1], threads, shared_bytes, cluster };
    // SAFETY: `TiledProductParams` is the struct of these entries; `x`, the weights and `y` have these extents, `rows` the invariants
    // of its type; all are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch(Op::GroupedGemm, form.image, entry, grid, &params) }
}

fn entries<A: Float, O: Float>(products: usize, order: WeightOrder) -> [&'static str; FORMS.len()] {
    match (products, order, A::DTYPE, O::DTYPE == DType::F32) {
        (2, _, DType::Bf16, _) => forms!("grouped_gemm_glu_nt_bf16"),
        (2, _, _, _) => forms!("grouped_gemm_glu_nt_f16"),
        (_, WeightOrder::Nk, DType::Bf16, false) => forms!("grouped_gemm_nt_bf16"),
        (_, WeightOrder::Nk, DType::Bf16, true) => forms!("grouped_gemm_nt_bf16_to_f32"),
        (_, WeightOrder::Nk, _, false) => forms!("grouped_gemm_nt_f16"),
        (_, WeightOrder::Nk, _, true) => forms!("grouped_gemm_nt_f16_to_f32"),
        (_, WeightOrder::Kn, DType::Bf16, false) => forms!("grouped_gemm_nn_bf16"),
        (_, WeightOrder::Kn, DType::Bf16, true) => forms!("grouped_gemm_nn_bf16_to_f32"),
        (_, WeightOrder::Kn, _, false) => forms!("grouped_gemm_nn_f16"),
        (_, WeightOrder::Kn, _, true) => forms!("grouped_gemm_nn_f16_to_f32"),
    }
}

/// Input rows: a box is the rows of a tile. The stride of a single row may be anything, but the driver wants one.
fn rows_map<A: Float>(x: &Rows<'_, A>, rows: u32) -> TensorMapDesc {
    TensorMapDesc::swizzled::<A, 2>(x.address(), [x.cols(), x.rows()], [1, x.stride().max(x.cols())], [TILED_DEPTH, rows])
}

/// Weights, with a dimension for the expert, so that what lies outside a matrix reads as zeros and not as the next expert's. A box is
/// `cols` outputs, or, where k is not innermost, as many as the swizzle is wide.
fn weights_map<W: Float>(w: &ExpertWeights<'_, W>, cols: u32) -> TensorMapDesc {
    let stacked = w.stacked();
    let (rows, stride) = (stacked.rows() / w.num_experts(), stacked.stride());
    let tile = if w.order() == WeightOrder::Nk { [TILED_DEPTH, cols, 1] } else { [64, TILED_DEPTH, 1] };
    TensorMapDesc::swizzled::<W, 3>(stacked.address(), [stacked.cols(), rows, w.num_experts()], [1, stride, rows * stride], tile)
}
