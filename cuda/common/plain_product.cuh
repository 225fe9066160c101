// The plain form of grouped_gemm, for every shape and alignment: what products of floats and of quantised
// weights share.
//
// A block of 64 threads takes tiles of 32 rows of one expert x 32 columns, 4 x 4 a thread. `Weights` puts the
// weights of a tile's columns, at TILE steps of k, into shared memory as f32.
#pragma once
#include "activation.cuh"
#include "dtype.cuh"
#include "ptx/launch.cuh"

// Rows of shared tiles stay on 16 bytes.
enum : int { TILE = PLAIN_TILE, THREADS = PLAIN_THREADS, PITCH = TILE + 4 };

// Of one product or two: [k][column], zeros outside the matrix.
typedef float WeightTile[TILE][PITCH];

// Elements of x, of biases and of y, whose types an entry is compiled for.
template <typename T, typename O> struct Typed {
    __device__ __forceinline__ float x(In at, int64_t i) const {
        return to_f32(static_cast<const T*>(at)[i]);
    }
    __device__ __forceinline__ float bias(const BiasParams& p, int64_t expert, int64_t col) const {
        return bias_of<T>(p, expert, col);
    }
    __device__ __forceinline__ void store(Out at, int64_t i, float value) const {
        static_cast<O*>(at)[i] = from_f32<O>(value);
    }
};

// A tile of rows: those of expert `expert` from `begin` to `end`, at most TILE. After the last tile `expert` is
// num_experts.
struct RowTile {
    int64_t expert, begin, end;
};

__device__ __forceinline__ RowTile row_tile(const ProductParams& p, int64_t index) {
    int64_t begin = 0;
    for (int64_t expert = 0; expert < p.num_experts; expert++) {
        const int64_t end = p.offsets ? int64_t(p.offsets[expert + 1]) : p.rows;
        const int64_t tiles = (end - begin + TILE - 1) / TILE;
        if (index < tiles) return {expert, begin + index * TILE, min(end, begin + (index + 1) * TILE)};
        index -= tiles;
        begin = end;
    }
    return {p.num_experts, 0, 0};
}

// Biases, and another activation: sum[0] becomes what is stored. Rows of sums move in a circle, so that the
// code for one of them stands here once.
template <bool GLU, typename Elements>
__device__ __forceinline__ void finish(const ProductParams& p, const Elements& elements, int64_t expert,
                                       int64_t first_col, float (&sum)[GLU ? 2 : 1][4][4]) {
    const BiasParams &first_bias = p.epilogue.first_bias, &second_bias = p.epilogue.second_bias;
#pragma unroll 1
    for (int row = 0; row < 4; row++) {
        float done[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t col = min(first_col + j, p.n - 1); // those beyond the last are not stored
            const float   first = sum[0][0][j] + elements.bias(first_bias, expert, col);
            const float   second = GLU ? sum[GLU][0][j] + elements.bias(second_bias, expert, col) : 0.0f;
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

template <bool GLU, typename Elements, typename Weights>
__device__ void product(const ProductParams& p, const Elements& elements, const Weights& weights) {
    await_previous_launch();
    __shared__ __align__(16) float      xs[TILE][PITCH]; // [k][row]
    __shared__ __align__(16) WeightTile ws[GLU ? 2 : 1];
    __shared__ int64_t                  input_row[TILE];
    // Of this thread, in the tile.
    const int     first_row = threadIdx.x / 8 * 4, first_col = threadIdx.x % 8 * 4;
    const int64_t col_tiles = (p.n + TILE - 1) / TILE;

    for (int64_t index = blockIdx.x;; index += gridDim.x) {
        const RowTile rows = row_tile(p, index / col_tiles);
        const int64_t col = index % col_tiles * TILE;
        if (rows.expert == p.num_experts) return;
        if (threadIdx.x < TILE) {
            // Rows beyond the last are computed and not stored.
            const int64_t row = min(rows.begin + threadIdx.x, rows.end - 1);
            input_row[threadIdx.x] = p.row_to_slot ? p.row_to_slot[row] / uint32_t(p.top_k) : row;
        }

        float sum[GLU ? 2 : 1][4][4] = {};
        for (int64_t k = 0; k < p.k; k += TILE) {
            __syncthreads(); // input_row is written; the tiles of the last step are no longer read
#pragma unroll 4
            for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
                const int row = i / TILE, step = i % TILE;
                const int64_t at = input_row[row] * p.x_stride + k + step;
                xs[step][row] = k + step < p.k ? elements.x(p.x, at) : 0.0f;
            }
            weights.load(ws, rows.expert, k, col);
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

        if (p.epilogue.is_general) finish<GLU>(p, elements, rows.expert, col + first_col, sum);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t row = rows.begin + first_row + i;
                if (row >= rows.end || col + first_col + j >= p.n) continue;
                const float value = GLU && !p.epilogue.is_general
                                        ? silu<Precise>(sum[0][i][j]) * sum[GLU][i][j]
                                        : sum[0][i][j];
                elements.store(p.y, row * p.y_stride + col + first_col + j, value);
            }
        __syncthreads(); // before the next tile overwrites input_row
    }
}
