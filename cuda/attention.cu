// attention: out[t, h, :] = softmax(cap(q[t, h, :] . keys * scale)) . values, over the token's own position and those before it in its window
//
// Contract  src/ops/attention.rs has checked shapes; the pages come from a KvCache, or from a caller who vouches for them; nothing is re-checked here.
// Work      the plain form, for every head_dim: a warp a (token, head), 32 keys at a time, a key a lane for the scores, an element a lane for the values.
// Cost      2 * len * d * sizeof(T) bytes of cache and 4 * len * d FLOP per token and head; keys are read row-wise by lanes, so L1 bound.
// Order     f32, keys ascending in blocks of 32 from position 0 with a running maximum: a row's bits depend on its own sequence alone.
#include "common/dtype.cuh"
#include "common/pages.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

enum : int { WARPS = ATTENTION_WARPS };

template <typename T> __device__ void attention(const AttentionParams& p) {
    await_previous_launch();
    extern __shared__ float dynamic[]; // per warp: the query, the weighted sum of values
    __shared__ int64_t      value_of_key[WARPS][32];
    __shared__ float        weight_of_key[WARPS][32];
    float*                  query = dynamic + warp() * 2 * p.head_dim;
    float*                  sum_of_values = query + p.head_dim;
    int64_t*                value_at = value_of_key[warp()];
    float*                  weights = weight_of_key[warp()];

    for (int64_t item = int64_t(blockIdx.x) * WARPS + warp(); item < p.num_tokens * p.num_heads; item += int64_t(gridDim.x) * WARPS) {
        const int64_t token = item / p.num_heads, head = item % p.num_heads, kv_head = head / p.group;
        const Place   place = locate(p.pages, token);
        const T*      q = static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
        T*            out = static_cast<T*>(p.out) + token * p.out_stride + head * p.head_dim;
        for (int64_t j = lane(); j < p.head_dim; j += 32) {
            query[j] = to_f32(q[j]);
            sum_of_values[j] = 0.0f;
        }

        // A sink is a score without a value.
        float         largest = p.sinks ? p.sinks[head] : -infinity(), sum = p.sinks ? 1.0f : 0.0f;
        const int64_t oldest = max(int64_t(0), place.position + 1 - p.window);
        for (int64_t first = oldest / 32 * 32; first <= place.position; first += 32) {
            const int64_t position = first + lane();
            const bool    seen = oldest <= position && position <= place.position;
            __syncwarp(); // the query is there; places and weights of the last block are no longer read
            float score = -infinity();
            if (seen) {
                const Slot slot = slot_of(p.pages, place.sequence, position);
                const T*   key = static_cast<const T*>(p.keys) + head_at(p.key_pool, slot, kv_head);
                float      dot = 0.0f;
                for (int64_t begin = 0; begin < p.head_dim; begin += p.key_pool.chunk, key += p.key_pool.chunk_stride)
                    for (int64_t j = 0; j < p.key_pool.chunk; j++) dot += query[begin + j] * to_f32(key[j]);
                score = dot * p.scale;
                if (p.softcap < infinity()) score = p.softcap * tanhf(score / p.softcap);
                value_at[lane()] = head_at(p.value_pool, slot, kv_head);
            }
            const float now_largest = fmaxf(largest, warp_max(score));
            const float shift = now_largest == -infinity() ? 0.0f : now_largest; // so far no score above -inf: no weight, not NaN
            const float weight = seen ? expf(score - shift) : 0.0f, rescale = expf(largest - shift);
            largest = now_largest;
            sum = sum * rescale + warp_sum(weight);
            weights[lane()] = weight;
            __syncwarp();

            const int begin = int(max(int64_t(0), oldest - first)), end = int(min(int64_t(32), place.position + 1 - first));
            for (int64_t j = lane(); j < p.head_dim; j += 32) {
                const T* value = static_cast<const T*>(p.values) + element_at(p.value_pool, j);
                float    total = sum_of_values[j] * rescale;
                for (int key = begin; key < end; key++) total += weights[key] * to_f32(value[value_at[key]]);
                sum_of_values[j] = total;
            }
        }
        for (int64_t j = lane(); j < p.head_dim; j += 32) out[j] = from_f32<T>(sum_of_values[j] / sum);
        __syncwarp(); // before the next item overwrites the query
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_f32(const __grid_constant__ AttentionParams p) { attention<float>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_bf16(const __grid_constant__ AttentionParams p) { attention<bf16>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_f16(const __grid_constant__ AttentionParams p) { attention<f16>(p); }
