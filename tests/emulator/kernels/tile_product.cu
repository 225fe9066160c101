// tile_product: y = a * b^T for one 64 x 64 tile of each, bf16 in, f32 out, the tiles written to shared memory by ordinary stores.
//
// Order   every writer fences for the async proxy, then the block meets, then wgmma reads.
// Bug 30  an accumulator is read before the wait. Bug 31: an aligned instruction under a branch that half a warp takes.
// Bug 32  no fence for the async proxy. Bug 39: no barrier among the writers.
// Bug 41  accumulators that nobody cleared, and a first product that adds to them.
#include "common.cuh"

struct TileProductParams {
    const uint4* a;  // [64, 64] bf16
    const uint4* b;  // [64, 64] bf16
    float* y;        // [64, 64]
};

extern "C" __global__ void tile_product(const __grid_constant__ TileProductParams p) {
    __shared__ __align__(1024) u8 a_tile[64 * 128];
    __shared__ __align__(1024) u8 b_tile[64 * 128];
    for (u32 chunk = threadIdx.x; chunk < 64 * 8; chunk += 128) {
        const u32 row = chunk / 8, swizzled = row * 128 + (chunk % 8 ^ row % 8) * 16;
        *reinterpret_cast<uint4*>(a_tile + swizzled) = p.a[chunk];
        *reinterpret_cast<uint4*>(b_tile + swizzled) = p.b[chunk];
    }
#ifndef BUG_32
    fence_proxy_async();
#endif
#ifndef BUG_39
    __syncthreads();
#endif

    const u64 a = descriptor(shared_address(a_tile)), b = descriptor(shared_address(b_tile));
#ifdef BUG_41
    float acc[32];
    constexpr bool fresh = false;
#else
    float acc[32] = {};
    constexpr bool fresh = true;
#endif
    pin(acc);
#ifdef BUG_31
    if (threadIdx.x % 32 < 16) wgmma_fence();  // report 31
#else
    wgmma_fence();
#endif
#pragma unroll
    for (u32 j = 0; j < 4; ++j) wgmma_64x64x16(acc, a + 2 * j, b + 2 * j, !fresh || j > 0);  // report 32 39 41
    wgmma_commit();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* out = p.y + (16 * warp + lane / 4) * 64 + 2 * (lane % 4);
#ifdef BUG_30
    out[0] = acc[0];  // report 30
#endif
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(acc[4 * j], acc[4 * j + 1]);
        *reinterpret_cast<float2*>(out + 8 * 64 + 8 * j) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
}
