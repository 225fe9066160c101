// gating: the `top_k` largest logits of each token, ties to the lower expert, with softmax weights over the chosen.
//
// Work    one warp per token, one lane per expert.
// Bug 1   `>` for `>=`: the warp after the last token reads past the logits.
#include "common.cuh"

struct GatingParams {
    const float* logits;  // [tokens, 32]
    u32* ids;             // [tokens, top_k]
    float* weights;       // [tokens, top_k]
    u32 tokens;
    u32 top_k;
};

constexpr u32 ALL = 0xFFFFFFFF;
constexpr float TAKEN = -3.0e38f;

extern "C" __global__ void gating(const __grid_constant__ GatingParams p) {
    const u32 token = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const u32 lane = threadIdx.x % 32;
#ifdef BUG_1
    if (token > p.tokens) return;
#else
    if (token >= p.tokens) return;
#endif
    float logit = p.logits[token * 32 + lane];  // report 1
    float top = 0.0f, sum = 0.0f, mine = 0.0f;
    for (u32 slot = 0; slot < p.top_k; ++slot) {
        float best = logit;
        u32 id = lane;
        for (u32 offset = 16; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(ALL, best, offset);
            const u32 other_id = __shfl_xor_sync(ALL, id, offset);
            if (other > best || (other == best && other_id < id)) {
                best = other;
                id = other_id;
            }
        }
        if (slot == 0) top = best;
        const float power = exp2f((best - top) * 1.44269504f);
        sum += power;
        if (lane == slot) mine = power;
        if (lane == 0) p.ids[token * p.top_k + slot] = id;
        if (id == lane) logit = TAKEN;
    }
    if (lane < p.top_k) p.weights[token * p.top_k + lane] = mine / sum;
}
