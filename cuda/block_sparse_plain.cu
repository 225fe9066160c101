// block_sparse: sdd y[block n] = (a * b) where block n lies; dsd y = s * d, dds being dsd of the transposed matrices; arrange: the blocks of rows sorted by expert
//
// Contract  src/ops/block_sparse.rs has checked shapes and dtypes; the index comes from a Topology, offsets from an ExpertRows.
// Work      the plain form, for every type, shape, stride and transpose: a block of 64 threads takes tiles of 32 x 32, 4 x 4 a thread. arrange: a block a block row or column.
// Cost      sdd 2 * blocks * block^2 * K FLOP, dsd 2 * blocks * block^2 * N, on the f32 pipes; operands are read once per tile, through the caches.
// Order     one chain of f32 additions over ascending k per element, rounded once. arrange is integers, without atomics: same offsets, same index.
#include "common/dtype.cuh"
#include "common/tile.cuh"
#include "common/ptx/launch.cuh"

template <typename T, typename O> __device__ void sdd(const SddParams& p) {
    await_previous_launch();
    __shared__ TileInputs inputs;
    const int64_t         across = p.block / TILE, tiles = p.rows.offsets[p.rows.places] * across * across;

    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const int64_t  n = index / (across * across), first_row = index / across % across * TILE, first_col = index % across * TILE;
        const uint32_t block_row = p.row_ids[n], block_col = p.rows.other_ids[n];
        const int64_t  row = p.rows.starts[block_row] + first_row, num_rows = p.rows.starts[block_row + 1] - row; // 0 or less beyond the last
        const int64_t  col = p.rows.other_starts[block_col] + first_col, num_cols = p.rows.other_starts[block_col + 1] - col;

        float sum[4][4] = {};
        if (num_rows > 0 && num_cols > 0) {
            const TileOperand<T> a = {static_cast<const T*>(p.a) + row * p.a_row, p.a_row, p.a_k, num_rows};
            const TileOperand<T> b = {static_cast<const T*>(p.b) + col * p.b_col, p.b_col, p.b_k, num_cols};
            add_product(sum, a, b, p.k, inputs);
        }
        O* y = static_cast<O*>(p.y) + (n * p.block + first_row) * p.y_stride + first_col;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool inside = tile_row() + i < num_rows && tile_col() + j < num_cols; // else zero, whatever it was multiplied with
                y[(tile_row() + i) * p.y_stride + tile_col() + j] = from_f32<O>(inside ? sum[i][j] : 0.0f);
            }
    }
}

template <typename T, typename O> __device__ void dsd(const DsdParams& p) {
    await_previous_launch();
    __shared__ TileInputs inputs;
    const int64_t         across = p.block / TILE, col_tiles = (p.n + TILE - 1) / TILE, tiles = p.axis.places * across * col_tiles;

    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const int64_t place = index / col_tiles / across, first_row = index / col_tiles % across * TILE, col = index % col_tiles * TILE;
        const int64_t row = p.axis.starts[place] + first_row, num_rows = p.axis.starts[place + 1] - row, num_cols = p.n - col;
        if (num_rows <= 0) continue;

        float sum[4][4] = {};
        for (uint32_t at = p.axis.offsets[place]; at < p.axis.offsets[place + 1]; at++) {
            const uint32_t n = p.axis.order ? p.axis.order[at] : at, other = p.axis.other_ids[n];
            const int64_t  first_k = p.axis.other_starts[other], num_k = p.axis.other_starts[other + 1] - first_k;

            const TileOperand<T> s = {static_cast<const T*>(p.s) + n * p.s_block + first_row * p.s_row, p.s_row, p.s_k, num_rows};
            const TileOperand<T> d = {static_cast<const T*>(p.d) + first_k * p.d_k + col * p.d_col, p.d_col, p.d_k, num_cols};
            add_product(sum, s, d, num_k, inputs);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (tile_row() + i < num_rows && tile_col() + j < num_cols)
                    static_cast<O*>(p.y)[(row + tile_row() + i) * p.y_row + (col + tile_col() + j) * p.y_col] = from_f32<O>(sum[i][j]);
    }
}

// The blocks of one expert: block rows and columns from these on, numbered from `block` on.
struct Expert {
    uint32_t first_row, row, rows; // its first row; its first block row and their number
    uint32_t col, cols;            // its first block column and their number
    uint32_t block;
};

// The first expert that `mine` says yes to; behind the last one, what is left: no rows and no columns.
template <typename Mine> __device__ __forceinline__ Expert find_expert(const ArrangeParams& p, Mine mine) {
    Expert e = {};
    for (int64_t expert = 0; expert < p.num_experts; expert++) {
        const uint32_t end = p.offsets ? p.offsets[expert + 1] : uint32_t(p.rows);
        e.rows = uint32_t((end - e.first_row + p.block - 1) / p.block);
        e.col = p.expert_cols[expert];
        e.cols = p.expert_cols[expert + 1] - e.col;
        if (mine(e)) return e;
        e.first_row = end;
        e.row += e.rows;
        e.block += e.rows * e.cols;
    }
    e.col += e.cols;
    e.rows = e.cols = 0;
    return e;
}

extern "C" __global__ void __launch_bounds__(128) block_sparse_arrange(const __grid_constant__ ArrangeParams p) {
    await_previous_launch();
    // One item for each block row, one for each block column, and the ends of both.
    for (int64_t item = blockIdx.x; item < p.block_rows + p.block_cols + 2; item += gridDim.x) {
        if (item <= p.block_rows) {
            const uint32_t row = uint32_t(item);
            const Expert   e = find_expert(p, [=](const Expert& e) { return row < e.row + e.rows; });
            const uint32_t begin = e.block + (row - e.row) * e.cols; // e.cols is 0 for rows beyond the last
            for (uint32_t i = threadIdx.x; i < e.cols; i += blockDim.x) {
                p.row_ids[begin + i] = row;
                p.col_ids[begin + i] = e.col + i;
            }
            if (threadIdx.x == 0) {
                p.row_starts[row] = e.rows ? e.first_row + (row - e.row) * uint32_t(p.block) : e.first_row; // behind the last expert: its end
                p.row_offsets[row] = begin;
            }
        } else {
            const uint32_t col = uint32_t(item - p.block_rows - 1);
            const Expert   e = find_expert(p, [=](const Expert& e) { return col < e.col + e.cols; });
            const uint32_t begin = e.block + (col - e.col) * e.rows;
            for (uint32_t i = threadIdx.x; i < e.rows; i += blockDim.x) p.by_col[begin + i] = e.block + i * e.cols + (col - e.col);
            if (threadIdx.x == 0) p.col_offsets[col] = begin;
        }
    }
}

#define ENTRIES(NAME, T, O)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) block_sparse_sdd_##NAME(const __grid_constant__ SddParams p) { sdd<T, O>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS) block_sparse_dsd_##NAME(const __grid_constant__ DsdParams p) { dsd<T, O>(p); }
ENTRIES(f32, float, float)
ENTRIES(bf16, bf16, bf16)
ENTRIES(f16, f16, f16)
ENTRIES(bf16_to_f32, bf16, float)
ENTRIES(f16_to_f32, f16, float)
