// A tile of a matrix product in f32, the plain form: any shape, stride and alignment; TILE x TILE sums by THREADS threads, 4 x 4 each.
#pragma once
#include "dtype.cuh"

enum : int { TILE = 32, THREADS = 64, PITCH = TILE + 4 }; // rows of shared tiles stay on 16 bytes

// What is multiplied by what at TILE steps of k.
struct TileInputs {
    __align__(16) float x[TILE][PITCH]; // [k][row]
    __align__(16) float w[TILE][PITCH]; // [k][column]
};

// Rows of an operand along its outer axis: `outers` of them are its own, the tile's others count as zeros.
template <typename T> struct TileOperand {
    const T* first;
    int64_t  outer_stride, k_stride, outers;
};

// The first row and column of the 4 x 4 sums of this thread.
__device__ __forceinline__ int tile_row() { return threadIdx.x / 8 * 4; }
__device__ __forceinline__ int tile_col() { return threadIdx.x % 8 * 4; }

template <typename T> __device__ __forceinline__ void load_tile(float (*tile)[PITCH], const TileOperand<T>& from, int64_t first_k, int64_t num_k) {
    const bool along_k = from.k_stride == 1; // neighbours in memory to neighbouring threads
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int     outer = along_k ? i / TILE : i % TILE, step = along_k ? i % TILE : i / TILE;
        const int64_t k = first_k + step;
        tile[step][outer] = outer < from.outers && k < num_k ? to_f32(from.first[outer * from.outer_stride + k * from.k_stride]) : 0.0f;
    }
}

// sum[i][j] += x[row i, k] * w[column j, k] over ascending k, in one chain of f32 additions. All threads of the block take part.
template <typename T>
__device__ __forceinline__ void add_product(float (&sum)[4][4], const TileOperand<T>& x, const TileOperand<T>& w, int64_t num_k, TileInputs& in) {
    for (int64_t k = 0; k < num_k; k += TILE) {
        __syncthreads(); // the inputs of the last step are no longer read
        load_tile(in.x, x, k, num_k);
        load_tile(in.w, w, k, num_k);
        __syncthreads();
#pragma unroll 4
        for (int step = 0; step < TILE; step++) {
            const Vec<float> xs = load_n<4>(&in.x[step][tile_row()]), ws = load_n<4>(&in.w[step][tile_col()]);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += xs.at[i] * ws.at[j];
        }
    }
}
