// gemm: y[r, n] = sum over k of x[r, k] * w[e, n, k] for the rows r of expert e; bf16 in, f32 out.
//
// Work    one 64 x 64 tile per block: blockIdx.x chooses the columns, blockIdx.y the expert (at most 64 rows each).
//         Warpgroup 0 multiplies, one thread of warpgroup 1 feeds it by TMA through two stages of 64 k each.
// Order   a stage is full when its bytes have landed, and empty when the warpgroup has waited for the wgmma that reads it.
// Bugs    3-11, 28, 29, 37, 38, 40: each at the line that names it.
#include "common.cuh"

struct GemmParams {
    TensorMap x;         // {k, rows}, box {64, 64}, 128-byte swizzle
    TensorMap w;         // {k, n, experts}, box {64, 64, 1}, 128-byte swizzle
    const u32* offsets;  // [experts + 1]
    float* y;            // [rows, n]
    u32 n;
    u32 steps;           // k / 64
};

constexpr u32 STAGES = 2;
constexpr u32 TILE_BYTES = 64 * 64 * 2;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;

extern "C" __global__ void __launch_bounds__(256, 1) gemm(const __grid_constant__ GemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared);
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const u32 row0 = p.offsets[blockIdx.y], row1 = p.offsets[blockIdx.y + 1];
    const u32 column0 = blockIdx.x * 64;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1);  // report 4 37 40
            mbarrier_init(empty + 8 * s, 1);  // report 4
        }
#if !defined(BUG_37) && !defined(BUG_40)
        fence_mbarrier_init();
#endif
    }
#ifdef BUG_40
    __syncthreads();
    if (threadIdx.x == 1) fence_mbarrier_init();
#endif
#ifndef BUG_4
    __syncthreads();
#endif

    if (threadIdx.x >= 128) {
        registers_dec<40>();
        if (threadIdx.x != 128) return;
        for (u32 step = 0; step < p.steps; ++step) {
            const u32 s = step % STAGES, phase = step / STAGES % 2;
            const u32 x_tile = stages + s * STAGE_BYTES, w_tile = x_tile + TILE_BYTES;
#ifndef BUG_5
            while (!mbarrier_try_wait(empty + 8 * s, phase ^ 1)) {}  // report 4
#endif
#ifdef BUG_6
            mbarrier_expect_tx(full + 8 * s, TILE_BYTES);
#else
            mbarrier_expect_tx(full + 8 * s, STAGE_BYTES);  // report 5
#endif
#ifdef BUG_28
            tma_load_2d(x_tile, p.x, row0, step * 64, full + 8 * s);
#else
            tma_load_2d(x_tile, p.x, step * 64, row0, full + 8 * s);
#endif
            tma_load_3d(w_tile, p.w, step * 64, column0, blockIdx.y, full + 8 * s);
        }
        return;
    }

    registers_inc<232>();
    float acc[32] = {};
    for (u32 step = 0; step < p.steps; ++step) {
        const u32 s = step % STAGES;
#ifdef BUG_7
        const u32 phase = 0;
#else
        const u32 phase = step / STAGES % 2;
#endif
        const u32 x_tile = stages + s * STAGE_BYTES, w_tile = x_tile + TILE_BYTES;
#if defined(BUG_8)
        const u64 a = descriptor(x_tile), b = descriptor(w_tile, 512);
#elif defined(BUG_9)
        const u64 a = descriptor(x_tile), b = descriptor(w_tile, 1024, 2);
#elif defined(BUG_29)
        const u64 a = descriptor(w_tile), b = descriptor(x_tile);
#else
        const u64 a = descriptor(x_tile), b = descriptor(w_tile);
#endif
#ifdef BUG_38
        if (threadIdx.x < 32)
#endif
        while (!mbarrier_try_wait(full + 8 * s, phase)) {}  // report 4 7
        pin(acc);
#ifndef BUG_10
        wgmma_fence();
#endif
#pragma unroll
        for (u32 j = 0; j < 4; ++j) wgmma_64x64x16(acc, a + 2 * j, b + 2 * j, step + j > 0);  // report 6 9 10 11 38
        wgmma_commit();
        pin(acc);
#ifdef BUG_11
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
        wgmma_wait<0>();
#else
        wgmma_wait<0>();  // report 7
        pin(acc);
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
#endif
    }

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 half = 0; half < 2; ++half) {
        const u32 row = row0 + 16 * warp + lane / 4 + 8 * half;
#ifdef BUG_3
        if (row <= row1) {
#else
        if (row < row1) {
#endif
            float* out = p.y + row * p.n + column0 + 2 * (lane % 4);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                const float2 pair = half ? make_float2(acc[4 * j + 2], acc[4 * j + 3]) : make_float2(acc[4 * j], acc[4 * j + 1]);
                *reinterpret_cast<float2*>(out + 8 * j) = pair;  // report 3
            }
        }
    }
}
