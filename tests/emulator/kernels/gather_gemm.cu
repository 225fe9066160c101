// gather_gemm: y[r] = w * x[token[r]] for 64 gathered rows, bf16 in, f32 out; rows with token -1 are zero.
//
// Work    warps 4-7 gather x with cp.async, one row per pair of threads, and one of their threads loads w by TMA; warps 0-3 multiply.
// Order   a stage is full after 128 cp.async arrivals, one arrival for the TMA and its bytes; the consumers then fence for the
//         async proxy, because cp.async writes through the generic one.
#include "common.cuh"

struct GatherGemmParams {
    TensorMap w;       // {k, n}, box {64, 64}, 128-byte swizzle
    const u8* x;       // [tokens, k] bf16
    const int* token;  // [64]
    float* y;          // [64, n]
    u32 n;
    u32 steps;         // k / 64
};

constexpr u32 STAGES = 2;
constexpr u32 TILE_BYTES = 64 * 64 * 2;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;

extern "C" __global__ void __launch_bounds__(256, 1) gather_gemm(const __grid_constant__ GatherGemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared);
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const u32 column0 = blockIdx.x * 64;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 128 + 1);
            mbarrier_init(empty + 8 * s, 1);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x >= 128) {
        const u32 thread = threadIdx.x - 128, row = thread / 2;
        const int token = p.token[row];
        const u8* from = p.x + (token < 0 ? 0 : token) * u64(128 * p.steps);
        for (u32 step = 0; step < p.steps; ++step) {
            const u32 s = step % STAGES, phase = step / STAGES % 2;
            const u32 x_tile = stages + s * STAGE_BYTES;
            while (!mbarrier_try_wait(empty + 8 * s, phase ^ 1)) {}
            if (thread == 0) {
                mbarrier_expect_tx(full + 8 * s, TILE_BYTES);
                tma_load_2d(x_tile + TILE_BYTES, p.w, step * 64, column0, full + 8 * s);
            }
            for (u32 i = 0; i < 4; ++i) {
                const u32 chunk = thread % 2 * 4 + i;
                cp_async_16(x_tile + row * 128 + (chunk ^ row % 8) * 16, from + step * 128 + chunk * 16, token < 0 ? 0 : 16);
            }
            cp_async_arrive(full + 8 * s);
        }
        return;
    }

    float acc[32] = {};
    for (u32 step = 0; step < p.steps; ++step) {
        const u32 s = step % STAGES, phase = step / STAGES % 2;
        const u32 x_tile = stages + s * STAGE_BYTES;
        while (!mbarrier_try_wait(full + 8 * s, phase)) {}
        fence_proxy_async();
        pin(acc);
        wgmma_fence();
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
            wgmma_64x64x16(acc, descriptor(x_tile) + 2 * j, descriptor(x_tile + TILE_BYTES) + 2 * j, step + j > 0);
        wgmma_commit();
        pin(acc);
        wgmma_wait<0>();
        pin(acc);
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
    }
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* out = p.y + (16 * warp + lane / 4) * p.n + column0 + 2 * (lane % 4);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(acc[4 * j], acc[4 * j + 1]);
        *reinterpret_cast<float2*>(out + 8 * p.n + 8 * j) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
}
