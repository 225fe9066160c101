// Sums and maxima over a warp or a block, in an order that depends on the number of threads alone.
#pragma once
#include "params.h"

enum : unsigned { FULL_WARP = 0xffffffffu };

__device__ __forceinline__ unsigned lane() { return threadIdx.x % 32; }
__device__ __forceinline__ unsigned warp() { return threadIdx.x / 32; }

// The same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(FULL_WARP, static_cast<unsigned long long>(x), step);
    return x;
}

// The sum over the lanes up to and with this one.
template <typename T> __device__ __forceinline__ T warp_sum_upto(T x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T lower = __shfl_up_sync(FULL_WARP, x, step);
        if (lane() >= step) x += lower;
    }
    return x;
}

__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(FULL_WARP, static_cast<unsigned long long>(x), step);
        x = other > x ? other : x;
    }
    return x;
}

// Two sums over the block, the same bits in every thread. `scratch` holds two floats per warp; a barrier separates calls.
__device__ __forceinline__ void block_sum(float& a, float& b, float (*scratch)[2]) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (lane() == 0) {
        scratch[warp()][0] = a;
        scratch[warp()][1] = b;
    }
    __syncthreads();
    const unsigned warps = blockDim.x / 32;
    a = warp_sum(lane() < warps ? scratch[lane()][0] : 0.0f);
    b = warp_sum(lane() < warps ? scratch[lane()][1] : 0.0f);
    __syncthreads();
}
