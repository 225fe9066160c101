// attention, the plain form: out[t, h, :] = softmax(cap(q[t, h, :] . keys * scale)) . values, over the
// token's own position and those before it
//
// Contract  src/ops/attention.rs has checked shapes; the pages come from a KvCache, or from a caller who
//           vouches for them; nothing is re-checked here.
// Work      any head_dim, value_dim, type and layout of the pools: a warp a (token, head). Others go to
//           attention_prefill.cu and attention_decode.cu.
// Cost      len * (d + dv) * sizeof(T) bytes of cache and 2 * len * (d + dv) FLOP per token and head; keys
//           are read row-wise by lanes, so L1 bound.
// Order     as common/attention_row.cuh says: a row's bits depend on its own sequence alone.
#include "common/attention_row.cuh"
#include "common/ptx/launch.cuh"

enum : int { WARPS = ATTENTION_WARPS };

template <typename T> __device__ __forceinline__ void attention(const AttentionParams& p) {
    await_previous_launch();
    extern __shared__ float dynamic[]; // per warp: the query, the weighted sum of values
    __shared__ int64_t      value_at[WARPS][32];
    __shared__ float        weights[WARPS][32];
    float* const            query = dynamic + warp() * (p.head_dim + p.value_dim);
    const RowScratch        scratch = {query, query + p.head_dim, value_at[warp()], weights[warp()]};
    for (int64_t item = int64_t(blockIdx.x) * WARPS + warp(); item < p.num_tokens * p.num_heads;
         item += int64_t(gridDim.x) * WARPS)
        attend_row<T>(p, item / p.num_heads, item % p.num_heads, scratch);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_f32(const __grid_constant__ AttentionParams p) {
    attention<float>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_bf16(const __grid_constant__ AttentionParams p) {
    attention<bf16>(p);
}
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_f16(const __grid_constant__ AttentionParams p) {
    attention<f16>(p);
}
