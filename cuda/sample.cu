// sample: ids[t] = the v with the largest logits[t, v]
//
// Contract  src/ops/sample.rs has checked shapes and that every row begins on 16 bytes.
// Work      one block a row, grid-stride over rows; a thread reads every 16-byte vector of its own, the last cut to its elements.
// Cost      memory bound: 4 * T * V bytes.
// Order     a maximum over (value, index) ranks, which no order of work can change: the lowest index among equals.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

extern "C" __global__ void __launch_bounds__(1024) sample_argmax(const __grid_constant__ ArgmaxParams p) {
    await_previous_launch();
    __shared__ uint64_t best_of_warp[32];
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const float* logits = p.logits + token * p.logits_stride;
        uint64_t     best = 0;
        for (int64_t col = int64_t(threadIdx.x) * 4; col < p.vocab; col += blockDim.x * 4) {
            const Vec<float> v = load_first(logits + col, p.vocab - col);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (col + j < p.vocab) best = max(best, rank(v.at[j], uint32_t(col + j)));
        }
        best = warp_max(best);
        if (lane() == 0) best_of_warp[warp()] = best;
        __syncthreads();
        best = warp_max(lane() < blockDim.x / 32 ? best_of_warp[lane()] : uint64_t(0));
        if (threadIdx.x == 0) p.ids[token] = index_of(best);
        __syncthreads();
    }
}
