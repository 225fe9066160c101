// grouped_gemm: y[r, :] = x[input(r), :] * w[expert of r], w as [N, K] (nt) or [K, N] (nn); glu: silu(x w^T) * (x v^T), or another epilogue
//
// Contract  src/ops/grouped_gemm.rs has checked shapes, dtypes and order; offsets and maps come from a Routing, or from a caller who vouches for them.
// Work      the plain form, for every shape and alignment: a block of 64 threads takes tiles of 32 rows of one expert x 32 columns, 4 x 4 a thread.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the f32 pipes; x is read N / 32 times, w R / 32 times, through the caches.
// Order     one chain of f32 additions over ascending k per element, rounded once: a row's bits depend on that row and the weights alone.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"

enum : int { TILE = PLAIN_TILE, THREADS = PLAIN_THREADS, PITCH = TILE + 4 }; // rows of shared tiles stay on 16 bytes

// A tile of rows: those of expert `expert` from `begin` to `end`, at most TILE. `expert` is num_experts behind the last tile.
struct RowTile {
    int64_t expert, begin, end;
};

__device__ __forceinline__ RowTile row_tile(const ProductParams& p, int64_t index) {
    int64_t begin = 0;
    for (int64_t expert = 0; expert < p.num_experts; expert++) {
        const int64_t end = p.offsets ? int64_t(p.offsets[expert + 1]) : p.rows, tiles = (end - begin + TILE - 1) / TILE;
        if (index < tiles) return {expert, begin + index * TILE, min(end, begin + (index + 1) * TILE)};
        index -= tiles;
        begin = end;
    }
    return {p.num_experts, 0, 0};
}

// The weights of TILE columns at TILE steps of k, zeros outside the matrix.
template <typename T, bool NN>
__device__ __forceinline__ void load_weights(float (*tile)[PITCH], const T* w, int64_t stride, int64_t first_k, int64_t k, int64_t first_col, int64_t n) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int  col = NN ? i % TILE : i / TILE, step = NN ? i / TILE : i % TILE; // neighbours in memory to neighbouring threads
        const bool inside = first_k + step < k && first_col + col < n;
        const int64_t at = NN ? (first_k + step) * stride + first_col + col : (first_col + col) * stride + first_k + step;
        tile[step][col] = inside ? to_f32(w[at]) : 0.0f;
    }
}

// Biases, and another activation: sum[0] becomes what is stored. Rows of sums move in a circle, so that the code for one of them stands here once.
template <typename T, bool GLU>
__device__ __forceinline__ void finish(const ProductParams& p, int64_t expert, int64_t first_col, float (&sum)[GLU ? 2 : 1][4][4]) {
#pragma unroll 1
    for (int row = 0; row < 4; row++) {
        float done[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t col = min(first_col + j, p.n - 1); // those beyond the last are not stored
            const float   first = sum[0][0][j] + bias_of<T>(p.epilogue.first_bias, expert, col);
            const float   second = GLU ? sum[GLU][0][j] + bias_of<T>(p.epilogue.second_bias, expert, col) : 0.0f;
            done[j] = finished<Precise, GLU>(p.epilogue, first, second);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 3; i++) {
                sum[0][i][j] = sum[0][i + 1][j];
                if (GLU) sum[GLU][i][j] = sum[GLU][i + 1][j];
            }
            sum[0][3][j] = done[j];
        }
    }
}

template <typename T, typename O, bool NN, bool GLU> __device__ void product(const ProductParams& p) {
    await_previous_launch();
    __shared__ __align__(16) float xs[TILE][PITCH];          // [k][row]
    __shared__ __align__(16) float ws[GLU ? 2 : 1][TILE][PITCH]; // [k][column]
    __shared__ int64_t             input_row[TILE];
    const int     first_row = threadIdx.x / 8 * 4, first_col = threadIdx.x % 8 * 4; // of this thread, in the tile
    const int64_t col_tiles = (p.n + TILE - 1) / TILE;

    for (int64_t index = blockIdx.x;; index += gridDim.x) {
        const RowTile rows = row_tile(p, index / col_tiles);
        const int64_t col = index % col_tiles * TILE;
        if (rows.expert == p.num_experts) return;
        const T* w = static_cast<const T*>(p.w) + rows.expert * p.w_expert;
        const T* v = static_cast<const T*>(p.v) + rows.expert * p.v_expert;
        if (threadIdx.x < TILE) {
            const int64_t row = min(rows.begin + threadIdx.x, rows.end - 1); // rows beyond the last are computed and not stored
            input_row[threadIdx.x] = p.row_to_slot ? p.row_to_slot[row] / uint32_t(p.top_k) : row;
        }

        float sum[GLU ? 2 : 1][4][4] = {};
        for (int64_t k = 0; k < p.k; k += TILE) {
            __syncthreads(); // input_row is written; the tiles of the last step are no longer read
#pragma unroll 4
            for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
                const int row = i / TILE, step = i % TILE;
                xs[step][row] = k + step < p.k ? to_f32(static_cast<const T*>(p.x)[input_row[row] * p.x_stride + k + step]) : 0.0f;
            }
            load_weights<T, NN>(ws[0], w, p.w_stride, k, p.k, col, p.n);
            if (GLU) load_weights<T, NN>(ws[GLU], v, p.v_stride, k, p.k, col, p.n);
            __syncthreads();
#pragma unroll 4
            for (int step = 0; step < TILE; step++) {
                const Vec<float> x = load_n<4>(&xs[step][first_row]);
#pragma unroll
                for (int which = 0; which < (GLU ? 2 : 1); which++) {
                    const Vec<float> weight = load_n<4>(&ws[which][step][first_col]);
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[which][i][j] += x.at[i] * weight.at[j];
                }
            }
        }

        if (p.epilogue.is_general) finish<T, GLU>(p, rows.expert, col + first_col, sum);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t row = rows.begin + first_row + i;
                if (row >= rows.end || col + first_col + j >= p.n) continue;
                const float value = GLU && !p.epilogue.is_general ? silu<Precise>(sum[0][i][j]) * sum[GLU][i][j] : sum[0][i][j];
                static_cast<O*>(p.y)[row * p.y_stride + col + first_col + j] = from_f32<O>(value);
            }
        __syncthreads(); // before the next tile overwrites input_row
    }
}

#define ENTRY(NAME, T, O, NN, GLU) \
    extern "C" __global__ void __launch_bounds__(THREADS, 8) grouped_gemm_##NAME(const __grid_constant__ ProductParams p) { product<T, O, NN, GLU>(p); }
ENTRY(nt_f32, float, float, false, false)
ENTRY(nt_bf16, bf16, bf16, false, false)
ENTRY(nt_f16, f16, f16, false, false)
ENTRY(nt_bf16_to_f32, bf16, float, false, false)
ENTRY(nt_f16_to_f32, f16, float, false, false)
ENTRY(nn_f32, float, float, true, false)
ENTRY(nn_bf16, bf16, bf16, true, false)
ENTRY(nn_f16, f16, f16, true, false)
ENTRY(nn_bf16_to_f32, bf16, float, true, false)
ENTRY(nn_f16_to_f32, f16, float, true, false)
ENTRY(glu_nt_f32, float, float, false, true)
ENTRY(glu_nt_bf16, bf16, bf16, false, true)
ENTRY(glu_nt_f16, f16, f16, false, true)
ENTRY(glu_nn_f32, float, float, true, true)
ENTRY(glu_nn_bf16, bf16, bf16, true, true)
ENTRY(glu_nn_f16, f16, f16, true, true)
