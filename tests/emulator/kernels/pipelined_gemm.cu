// pipelined_gemm: y = x * w, bf16 in and out, w lying [k, n]; each stage is released one step after its wgmma was issued.
//
// Work    a 128 x 64 tile per block: warpgroups 0 and 1 own 64 rows each, warp 8 loads; three stages of 64 k.
// Order   batch `step` is in flight while batch `step - 1` is waited for and its stage released. Each warpgroup then writes its
//         half of y to swizzled shared memory, fences, meets at a barrier of its own and stores it with one TMA copy.
#include "common.cuh"

struct PipelinedGemmParams {
    TensorMap x;  // {k, rows}, box {64, 128}, 128-byte swizzle
    TensorMap w;  // {n, k}, box {64, 64}, 128-byte swizzle
    TensorMap y;  // {n, rows}, box {64, 64}, 128-byte swizzle
    u32 steps;    // k / 64
};

constexpr u32 STAGES = 3;
constexpr u32 X_BYTES = 128 * 64 * 2;
constexpr u32 W_BYTES = 64 * 64 * 2;
constexpr u32 STAGE_BYTES = X_BYTES + W_BYTES;
constexpr u32 Y_BYTES = 64 * 64 * 2;

extern "C" __global__ void __launch_bounds__(288, 1) pipelined_gemm(const __grid_constant__ PipelinedGemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared), staging = stages + STAGES * STAGE_BYTES;
    const u32 full = staging + 2 * Y_BYTES, empty = full + 8 * STAGES;
    const u32 column0 = blockIdx.x * 64, row0 = blockIdx.y * 128;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, 2);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x >= 256) {
        if (threadIdx.x > 256) return;
        for (u32 step = 0; step < p.steps; ++step) {
            const u32 s = step % STAGES, phase = step / STAGES % 2;
            while (!mbarrier_try_wait(empty + 8 * s, phase ^ 1)) {}
            mbarrier_expect_tx(full + 8 * s, STAGE_BYTES);
            tma_load_2d(stages + s * STAGE_BYTES, p.x, step * 64, row0, full + 8 * s);
            tma_load_2d(stages + s * STAGE_BYTES + X_BYTES, p.w, column0, step * 64, full + 8 * s);
        }
        return;
    }

    const u32 group = threadIdx.x / 128, thread = threadIdx.x % 128;
    float acc[32] = {};
    pin(acc);
    for (u32 step = 0; step < p.steps; ++step) {
        const u32 s = step % STAGES, phase = step / STAGES % 2;
        const u64 a = descriptor(stages + s * STAGE_BYTES + group * (X_BYTES / 2)), b = descriptor(stages + s * STAGE_BYTES + X_BYTES);
        while (!mbarrier_try_wait(full + 8 * s, phase)) {}
        wgmma_fence();
#pragma unroll
        for (u32 j = 0; j < 4; ++j) wgmma_64x64x16_nn(acc, a + 2 * j, b + 128 * j, step + j > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            if (thread == 0) mbarrier_arrive(empty + 8 * ((step - 1) % STAGES));
        }
    }
    wgmma_wait<0>();
    pin(acc);

    const u32 warp = thread / 32, lane = thread % 32;
    const u32 row = 16 * warp + lane % 16, half = staging + group * Y_BYTES;
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const u32 chunk = 2 * j + lane / 16;
        stmatrix_x4(half + row * 128 + (chunk ^ row % 8) * 16, pack_bf16(acc[8 * j], acc[8 * j + 1]), pack_bf16(acc[8 * j + 2], acc[8 * j + 3]),
                    pack_bf16(acc[8 * j + 4], acc[8 * j + 5]), pack_bf16(acc[8 * j + 6], acc[8 * j + 7]));
    }
    fence_proxy_async();
    if (group == 0) barrier_sync<1, 128>();
    else barrier_sync<2, 128>();
    if (thread == 0) {
        tma_store_2d(p.y, half, column0, row0 + 64 * group);
        bulk_commit();
        bulk_wait();
    }
}
