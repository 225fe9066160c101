// attention_tile: o = softmax(q * k^T) * v for 64 queries and blocks of 64 keys, head dimension 64, bf16 in, f32 out.
//
// Work    one warpgroup. Scores stay in registers: as accumulators of the first product they are, packed to bf16 in pairs, the
//         first operand of the second.
// Order   per block of keys: load k and v, multiply, rescale what was summed so far, multiply. One thread loads; the block meets
//         before it overwrites k and v.
#include "common.cuh"

struct AttentionTileParams {
    TensorMap q;  // {64, 64}, box {64, 64}, 128-byte swizzle
    TensorMap k;  // {64, keys}, box {64, 64}, 128-byte swizzle
    TensorMap v;  // {64, keys}, box {64, 64}, 128-byte swizzle
    float* o;     // [64, 64]
    u32 blocks;   // keys / 64
};

constexpr u32 TILE_BYTES = 64 * 64 * 2;

// The largest and the sum of a value over the four lanes that share a row.
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

extern "C" __global__ void __launch_bounds__(128, 1) attention_tile(const __grid_constant__ AttentionTileParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 q_tile = shared_address(shared), k_tile = q_tile + TILE_BYTES, v_tile = k_tile + TILE_BYTES, full = v_tile + TILE_BYTES;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    __syncthreads();

    float out[32] = {}, score[32] = {};
    float top[2] = {-1.0e30f, -1.0e30f}, sum[2] = {0.0f, 0.0f};
    for (u32 block = 0; block < p.blocks; ++block) {
        if (threadIdx.x == 0) {
            mbarrier_expect_tx(full, (block == 0 ? 3 : 2) * TILE_BYTES);
            if (block == 0) tma_load_2d(q_tile, p.q, 0, 0, full);
            tma_load_2d(k_tile, p.k, 0, block * 64, full);
            tma_load_2d(v_tile, p.v, 0, block * 64, full);
        }
        while (!mbarrier_try_wait(full, block % 2)) {}

        pin(score);
        wgmma_fence();
#pragma unroll
        for (u32 j = 0; j < 4; ++j) wgmma_64x64x16(score, descriptor(q_tile) + 2 * j, descriptor(k_tile) + 2 * j, j > 0);
        wgmma_commit();
        pin(score);
        wgmma_wait<0>();
        pin(score);

#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float best = top[half];
#pragma unroll
            for (u32 i = 0; i < 32; ++i)
                if ((i / 2) % 2 == half) best = fmaxf(best, score[i]);
            best = row_max(best);
            const float shrink = exp2f(top[half] - best);
            top[half] = best;
            float part = 0.0f;
#pragma unroll
            for (u32 i = 0; i < 32; ++i) {
                if ((i / 2) % 2 != half) continue;
                score[i] = exp2f(score[i] - best);
                part += score[i];
                out[i] *= shrink;
            }
            sum[half] = sum[half] * shrink + row_sum(part);
        }
        u32 weight[4][4];
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
#pragma unroll
            for (u32 r = 0; r < 4; ++r) weight[j][r] = pack_bf16(score[8 * j + 2 * r], score[8 * j + 2 * r + 1]);

        pin(out);
        wgmma_fence();
#pragma unroll
        for (u32 j = 0; j < 4; ++j) wgmma_64x64x16_nn(out, weight[j], descriptor(v_tile) + 128 * j, true);
        wgmma_commit();
        pin(out);
        wgmma_wait<0>();
        pin(out);
        __syncthreads();
    }
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < 32; ++i) {
        const u32 half = i / 2 % 2, row = 16 * warp + lane / 4 + 8 * half, column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        p.o[row * 64 + column] = out[i] / sum[half];
    }
}
