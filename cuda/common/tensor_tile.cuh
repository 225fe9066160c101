// What the tensor-core kernels of 384 threads share: warpgroup 0 loads stages of 64 of k, warpgroups 1 and 2 multiply 64 rows each and store.
#pragma once
#include "dtype.cuh"
#include "ptx/warp.cuh"
#include "ptx/wgmma.cuh"
#include "warpgroup.cuh"

enum : int { CONSUMERS = 2, THREADS = TILED_THREADS };
enum : int { PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224 }; // of 168 each at launch
enum : int { HALF = 64, ROWS = TILED_ROWS, DEPTH = TILED_DEPTH }; // of a tile: rows of a consumer and of all; k of a stage
enum : int { SLAB_BYTES = 16 * PITCH, SLABS = 4 * CONSUMERS };    // a warp's rows on their way out, 64 columns at a time
static_assert(THREADS == (1 + CONSUMERS) * WARPGROUP && ROWS == CONSUMERS * HALF && PITCH == 2 * DEPTH, "params.h");

__device__ __forceinline__ bool is_producer() { return __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) == 0; }
// Among those of all consumers. Uniform, and the compiler knows it.
__device__ __forceinline__ uint32_t consumer_warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0) - WARPGROUP / 32; }

// The product of a stage, as one batch that is left in flight, of operands as `k_major` and `mn_major` give them. MN says of an operand that
// it lies MN-major, in panels of DEPTH.
template <typename T, bool A_MN, bool B_MN, int N>
__device__ __forceinline__ void multiply_stage(float (&sum)[N], uint32_t a, uint32_t b, bool accumulate) {
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (uint32_t step = 0; step < DEPTH / 16; step++)
        wgmma<T, A_MN, B_MN>(sum, a + step * (A_MN ? MN_MAJOR_STEP : K_MAJOR_STEP), b + step * (B_MN ? MN_MAJOR_STEP : K_MAJOR_STEP),
                             accumulate || step > 0);
    wgmma_commit();
    pin(sum);
}

// Stores 64 columns of a warp's 16 rows, as far as there are that many: 16-bit elements go through shared memory, so that eight threads
// write 128 bytes of a row. `to` and all rows lie on 16 bytes, columns come by eights.
template <typename T> __device__ __forceinline__ void store_rows(T* to, int64_t stride, int rows, int cols, uint32_t slab, const float* sum) {
    const uint32_t lane = threadIdx.x % 32, into = slab + lane % 16 * PITCH, chunk = lane / 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* s = sum + 8 * i; // 16 columns
        stmatrix_x4(into + ((2 * i + chunk) ^ lane % 8) * 16, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7]));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int   r = 4 * i + lane / 8, c = lane % 8;
        const uint4 values = load_shared_16(slab + r * PITCH + (c ^ r % 8) * 16);
        if (r < rows && 8 * c < cols) store_global_16(to + r * stride + 8 * c, values);
    }
    __syncwarp(); // before the next columns overwrite these
}

// f32 elements leave as they are: four threads write 32 bytes of a row.
__device__ __forceinline__ void store_floats(float* to, int64_t stride, int rows, int cols, const float* sum) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane / 4 + 8 * half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int c = 8 * i + 2 * (lane % 4);
            if (r < rows && c < cols) *reinterpret_cast<float2*>(to + r * stride + c) = make_float2(sum[4 * i + 2 * half], sum[4 * i + 2 * half + 1]);
        }
    }
    __syncwarp(); // whole again: descriptors in uniform registers want that
}

// The same transposed: a warp's 16 rows become 16 columns of 64 rows, two threads to a row.
template <typename T> __device__ __forceinline__ void store_rows_turned(T* to, int64_t stride, int rows, int cols, uint32_t slab, const float* sum) {
    const uint32_t lane = threadIdx.x % 32, col = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float*   s = sum + 8 * i; // 16 columns
        const uint32_t r = 16 * i + col;
        stmatrix_x4_turned(slab + r * 32 + (half ^ r / 4 % 2) * 16, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7]));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int   r = 16 * i + lane / 2, c = lane % 2;
        const uint4 values = load_shared_16(slab + r * 32 + (c ^ r / 4 % 2) * 16);
        if (r < cols && 8 * c < rows) store_global_16(to + r * stride + 8 * c, values);
    }
    __syncwarp();
}
