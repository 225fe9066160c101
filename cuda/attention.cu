// attention: out[t, h, :] = softmax(q[t, h, :] . keys * scale) . values, over the token's own position and all before it
//
// Contract  src/ops/attention.rs has checked shapes; the pages come from a KvCache, or from a caller who vouches for them; nothing is re-checked here.
// Work      the plain form, for every head_dim: a warp a (token, head), 32 keys at a time, a key a lane for the scores, an element a lane for the values.
// Cost      2 * len * d * sizeof(T) bytes of cache and 4 * len * d FLOP per token and head; keys are read row-wise by lanes, so L1 bound.
// Order     f32, keys ascending in blocks of 32 with a running maximum: a row's bits depend on its own sequence alone.
#include "common/dtype.cuh"
#include "common/pages.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

enum : int { WARPS = 4 };

template <typename T> __device__ void attention(const AttentionParams& p) {
    await_previous_launch();
    extern __shared__ float dynamic[]; // per warp: the query, the weighted sum of values
    __shared__ int64_t      row_of_key[WARPS][32];
    __shared__ float        weight_of_key[WARPS][32];
    float*                  query = dynamic + warp() * 2 * p.head_dim;
    float*                  sum_of_values = query + p.head_dim;
    int64_t*                rows = row_of_key[warp()];
    float*                  weights = weight_of_key[warp()];

    for (int64_t item = int64_t(blockIdx.x) * WARPS + warp(); item < p.num_tokens * p.num_heads; item += int64_t(gridDim.x) * WARPS) {
        const int64_t token = item / p.num_heads, head = item % p.num_heads, kv_col = head / p.group * p.head_dim;
        const Place   place = locate(p.pages, token);
        const T*      q = static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
        T*            out = static_cast<T*>(p.out) + token * p.out_stride + head * p.head_dim;
        for (int64_t j = lane(); j < p.head_dim; j += 32) {
            query[j] = to_f32(q[j]);
            sum_of_values[j] = 0.0f;
        }

        float largest = -infinity(), sum = 0.0f;
        for (int64_t first = 0; first <= place.position; first += 32) {
            const int64_t position = first + lane();
            const bool    seen = position <= place.position;
            const int64_t row = seen ? pool_row(p.pages, place.sequence, position) : 0;
            __syncwarp(); // the query is there; rows and weights of the last block are no longer read
            float score = -infinity();
            if (seen) {
                const T* key = static_cast<const T*>(p.keys) + row * p.keys_stride + kv_col;
                float    dot = 0.0f;
                for (int64_t j = 0; j < p.head_dim; j++) dot += query[j] * to_f32(key[j]);
                score = dot * p.scale;
            }
            const float now_largest = fmaxf(largest, warp_max(score));
            const float shift = now_largest == -infinity() ? 0.0f : now_largest; // so far no score above -inf: no weight, not NaN
            const float weight = seen ? expf(score - shift) : 0.0f, rescale = expf(largest - shift);
            largest = now_largest;
            sum = sum * rescale + warp_sum(weight);
            rows[lane()] = row;
            weights[lane()] = weight;
            __syncwarp();

            const int keys = int(min(int64_t(32), place.position + 1 - first));
            for (int64_t j = lane(); j < p.head_dim; j += 32) {
                float total = sum_of_values[j] * rescale;
                for (int key = 0; key < keys; key++)
                    total += weights[key] * to_f32(static_cast<const T*>(p.values)[rows[key] * p.values_stride + kv_col + j]);
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
