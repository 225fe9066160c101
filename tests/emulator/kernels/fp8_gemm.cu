// fp8_gemm: y[r, n] = sum over blocks of 128 k of scale[r, block] * (x * w^T over that block), e4m3 in, f32 out.
//
// Work    a 64 x 64 tile per block: warpgroup 0 multiplies, warp 4 loads; two stages of 128 k.
// Order   each block of k goes to scratch accumulators of its own and is added up in f32 registers after the wait. The scales come
//         by cp.async into the stage, so every thread has read them before the stage is released.
#include "common.cuh"

struct Fp8GemmParams {
    TensorMap x;         // {k, rows}, box {128, 64}, 128-byte swizzle
    TensorMap w;         // {k, n}, box {128, 64}, 128-byte swizzle
    const float* scale;  // [k / 128, rows]
    float* y;            // [rows, n]
    u32 rows;            // a multiple of 64
    u32 n;
    u32 steps;           // k / 128
};

constexpr u32 STAGES = 2;
constexpr u32 TILE_BYTES = 64 * 128;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES + 1024;

extern "C" __global__ void __launch_bounds__(160, 1) fp8_gemm(const __grid_constant__ Fp8GemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared);
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const u32 column0 = blockIdx.x * 64, row0 = blockIdx.y * 64;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1 + 32);  // the TMA thread, and every lane's scales
            mbarrier_init(empty + 8 * s, 128);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x >= 128) {
        const u32 lane = threadIdx.x % 32;
        for (u32 step = 0; step < p.steps; ++step) {
            const u32 s = step % STAGES, phase = step / STAGES % 2;
            const u32 x_tile = stages + s * STAGE_BYTES;
            while (!mbarrier_try_wait(empty + 8 * s, phase ^ 1)) {}
            if (lane == 0) {
                mbarrier_expect_tx(full + 8 * s, 2 * TILE_BYTES);
                tma_load_2d(x_tile, p.x, step * 128, row0, full + 8 * s);
                tma_load_2d(x_tile + TILE_BYTES, p.w, step * 128, column0, full + 8 * s);
            }
            if (lane < 16) cp_async_16(x_tile + 2 * TILE_BYTES + lane * 16, p.scale + step * p.rows + row0 + lane * 4, 16);
            cp_async_arrive(full + 8 * s);
        }
        return;
    }

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = 16 * warp + lane / 4;
    float total[32] = {}, scratch[32] = {};
    for (u32 step = 0; step < p.steps; ++step) {
        const u32 s = step % STAGES, phase = step / STAGES % 2;
        const u32 x_tile = stages + s * STAGE_BYTES;
        const u64 a = descriptor(x_tile), b = descriptor(x_tile + TILE_BYTES);
        while (!mbarrier_try_wait(full + 8 * s, phase)) {}
        const float* scale = reinterpret_cast<const float*>(shared + s * STAGE_BYTES + 2 * TILE_BYTES);
        const float upper = scale[row], lower = scale[row + 8];
        pin(scratch);
        wgmma_fence();
#pragma unroll
        for (u32 j = 0; j < 4; ++j) wgmma_64x64x32_e4m3(scratch, a + 2 * j, b + 2 * j, j > 0);
        wgmma_commit();
        pin(scratch);
        wgmma_wait<0>();
        pin(scratch);
        mbarrier_arrive(empty + 8 * s);
#pragma unroll
        for (u32 i = 0; i < 32; ++i) total[i] += (i & 2 ? lower : upper) * scratch[i];
    }
    float* out = p.y + (row0 + row) * p.n + column0 + 2 * (lane % 4);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(total[4 * j], total[4 * j + 1]);
        *reinterpret_cast<float2*>(out + 8 * p.n + 8 * j) = make_float2(total[4 * j + 2], total[4 * j + 3]);
    }
}
