// cluster_gemm: y = x * w^T, bf16 in, f32 out, two row tiles per cluster sharing one tile of w by multicast.
//
// Work    CTA `rank` of a cluster of two owns rows 64 * rank.. of a 128 x 64 tile; each CTA loads its own x tile and half
//         of the w tile, which goes to both. Warps 0-3 multiply, warp 4 loads; three stages of 64 k.
// Order   a stage is empty when the consumers of both CTAs have released it: either CTA's copy overwrites both.
// Bug 12  only the own consumer is asked. Bug 13: no cluster barrier at the end, so a CTA may leave before its peer's last arrive.
#include "common.cuh"

struct ClusterGemmParams {
    TensorMap x;  // {k, rows}, box {64, 64}, 128-byte swizzle
    TensorMap w;  // {k, n}, box {64, 32}, 128-byte swizzle
    float* y;     // [rows, n]
    u32 rows;
    u32 n;
    u32 steps;    // k / 64
};

constexpr u32 STAGES = 3;
constexpr u32 TILE_BYTES = 64 * 64 * 2;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;

extern "C" __global__ void __launch_bounds__(160, 1) __cluster_dims__(2, 1, 1)
    cluster_gemm(const __grid_constant__ ClusterGemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared);
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const u32 rank = cluster_rank();
    const u32 row0 = blockIdx.x * 64, column0 = blockIdx.y * 64;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1);
#ifdef BUG_12
            mbarrier_init(empty + 8 * s, 1);
#else
            mbarrier_init(empty + 8 * s, 2);
#endif
        }
        fence_mbarrier_init();
    }
    cluster_sync();

    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128) {
            for (u32 step = 0; step < p.steps; ++step) {
                const u32 s = step % STAGES, phase = step / STAGES % 2;
                const u32 x_tile = stages + s * STAGE_BYTES, w_half = x_tile + TILE_BYTES + rank * (TILE_BYTES / 2);
                while (!mbarrier_try_wait_cluster(empty + 8 * s, phase ^ 1)) {}
                mbarrier_expect_tx(full + 8 * s, STAGE_BYTES);
                tma_load_2d(x_tile, p.x, step * 64, row0, full + 8 * s);
                tma_load_2d_multicast(w_half, p.w, step * 64, column0 + 32 * rank, full + 8 * s, 3);  // report 12
            }
        }
    } else {
        float acc[32] = {};
        for (u32 step = 0; step < p.steps; ++step) {
            const u32 s = step % STAGES, phase = step / STAGES % 2;
            const u32 x_tile = stages + s * STAGE_BYTES, w_tile = x_tile + TILE_BYTES;
            const u64 a = descriptor(x_tile), b = descriptor(w_tile);
            while (!mbarrier_try_wait(full + 8 * s, phase)) {}
            pin(acc);
            wgmma_fence();
#pragma unroll
            for (u32 j = 0; j < 4; ++j) wgmma_64x64x16(acc, a + 2 * j, b + 2 * j, step + j > 0);
            wgmma_commit();
            pin(acc);
            wgmma_wait<0>();
            pin(acc);
#ifdef BUG_12
            if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
#else
            if (threadIdx.x < 2) mbarrier_arrive_remote(empty + 8 * s, threadIdx.x);  // report 13
#endif
        }
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = row0 + 16 * warp + lane / 4 + 8 * half;
            if (row < p.rows) {
                float* out = p.y + row * p.n + column0 + 2 * (lane % 4);
#pragma unroll
                for (u32 j = 0; j < 8; ++j)
                    *reinterpret_cast<float2*>(out + 8 * j) = half ? make_float2(acc[4 * j + 2], acc[4 * j + 3]) : make_float2(acc[4 * j], acc[4 * j + 1]);
            }
        }
    }
#ifndef BUG_13
    cluster_sync();
#endif
}
