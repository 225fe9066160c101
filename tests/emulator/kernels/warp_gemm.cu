// warp_gemm: y = x * w^T for 64 rows and 32 columns, bf16 in, f32 out, by mma.sync.
//
// Work    four warps of 16 rows; two buffers of 32 k filled by cp.async, read by ldmatrix. Rows of 64 bytes, whose four chunks are
//         exchanged by (row / 2) % 4 so that eight rows touch all banks.
// Order   the next step's copies are in flight while this step's are waited for; the block meets before and after each step.
// Bug 36  the last step waits for all copies but its own, and multiplies what the buffer held two steps before.
#include "common.cuh"

struct WarpGemmParams {
    const u8* x;  // [64, k] bf16
    const u8* w;  // [32, k] bf16
    float* y;     // [64, 32]
    u32 steps;    // k / 32
};

constexpr u32 ROWS = 64 + 32;  // of x, then of w

DEVICE u32 chunk_at(u32 row, u32 chunk) {
    return row * 64 + (chunk ^ row / 2 % 4) * 16;
}

DEVICE void load(const WarpGemmParams& p, u32 buffer, u32 step) {
    for (u32 i = threadIdx.x; i < ROWS * 4; i += 128) {
        const u32 row = i / 4, chunk = i % 4;
        const u8* from = row < 64 ? p.x + row * u64(64 * p.steps) : p.w + (row - 64) * u64(64 * p.steps);
        cp_async_16(buffer + chunk_at(row, chunk), from + step * 64 + chunk * 16, 16);
    }
    cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(128) warp_gemm(const __grid_constant__ WarpGemmParams p) {
    __shared__ __align__(128) u8 buffers[2][ROWS * 64];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[4][4] = {};
    load(p, shared_address(buffers[0]), 0);
    for (u32 step = 0; step < p.steps; ++step) {
        if (step + 1 < p.steps) {
            load(p, shared_address(buffers[(step + 1) % 2]), step + 1);
            cp_async_wait<1>();
        } else {
#ifdef BUG_36
            cp_async_wait<1>();
#else
            cp_async_wait<0>();
#endif
        }
        __syncthreads();
        const u32 buffer = shared_address(buffers[step % 2]);
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            u32 a[4], b[4];
            ldmatrix_x4(a, buffer + chunk_at(16 * warp + lane % 16, 2 * j + lane / 16));  // report 36
#pragma unroll
            for (u32 pair = 0; pair < 2; ++pair) {
                // Columns 16 * pair.. : both halves of k for eight columns, then for the next eight.
                ldmatrix_x4(b, buffer + chunk_at(64 + 16 * pair + lane % 8 + lane / 16 * 8, 2 * j + lane / 8 % 2));  // report 36
                mma_16x8x16(acc[2 * pair], a, b[0], b[1]);
                mma_16x8x16(acc[2 * pair + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        float* out = p.y + (16 * warp + lane / 4) * 32 + 8 * i + 2 * (lane % 4);
        *reinterpret_cast<float2*>(out) = make_float2(acc[i][0], acc[i][1]);
        *reinterpret_cast<float2*>(out + 8 * 32) = make_float2(acc[i][2], acc[i][3]);
    }
}
