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

// Orders (value, index) pairs as integers: the larger value wins, the lower index among equals (-0 = +0), NaN is below -inf.
// Never 0, and every index below 2^32 - 1 has a rank of its own.
__device__ __forceinline__ uint64_t rank(float value, uint32_t index) {
    const uint32_t bits = __float_as_uint(value + 0.0f); // -0 becomes +0
    const uint32_t order = value != value ? 0 : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return static_cast<uint64_t>(order) << 32 | ~index;
}
__device__ __forceinline__ uint32_t index_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }
